"""Delimited text: cells along one side, genes or peaks along the other; the names decide which."""

import csv
import gzip
import re
from itertools import islice
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from utils.errors import UserError
from utils.features.gene_ids import share_known
from utils.features.gene_symbols import symbol_candidates
from utils.features.peaks import looks_like_peaks

ANNOTATION = re.compile(
    r"n_?(counts?|features?|genes?|umis?)(_\w+)?|total_counts\w*|(percent|pct)[._]?\w*|orig\.ident|\w*clusters?|leiden\w*"
    r"|louvain\w*|\w+_snn_res\.[\d.]+|(s|g2m)[._]score|phase|doublet\w*|batch|donor|sample|cell_?type\w*|labels?|annotation",
    re.IGNORECASE,
)
"""What Seurat and scanpy call the columns that they put beside the genes."""
HDF5 = b"\x89HDF"
GZIP = b"\x1f\x8b"


def read_text(path: Path, rows_at_once: int = 1000) -> ad.AnnData:
    """Read a table of counts; columns that annotate cells go to obs.

    Parameters
    ----------
    path : text, gzipped or not, separated by tabs, commas, semicolons or spaces; the corner may be left out, as R does

    Raises
    ------
    UserError
        If it is no such table.
    """
    with path.open("rb") as file:
        is_zipped = file.read(2) == GZIP
    opener = gzip.open if is_zipped else open
    with opener(path, "rb") as file:
        start = file.read(4)
    if start == HDF5:
        raise UserError(f"{path}: is a zipped HDF5 file; unpack it with gunzip first")
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
            filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
            numbered = list(islice(filled, 2))
            head = [line for _, line in numbered]
    except UnicodeDecodeError:
        raise UserError(f"{path}: is neither HDF5 nor text in UTF-8; save it as .h5ad or as text in UTF-8") from None
    if len(head) < 2:
        raise UserError(f"{path}: a text of {len(head)} line(s); a table has a line of names and a line for each cell")
    separator = max("\t,; ", key=head[0].count)
    if not head[0].count(separator):
        raise UserError(f"{path}: no table: its first line holds no tab, comma, semicolon or space between names")
    across, first = csv.reader(head, delimiter=separator)
    if len(first) == len(across):
        across = across[1:]  # without the corner
    elif len(first) != len(across) + 1:
        raise UserError(f"{path}: no table: {len(across)} names in its first line, but {len(first)} values in the next")
    table = pd.read_csv(
        path,
        sep=separator,
        header=None,
        skiprows=numbered[0][0],
        index_col=0,
        dtype={0: str},
        chunksize=rows_at_once,
        low_memory=False,
        compression="gzip" if is_zipped else None,
        encoding="utf-8-sig",
    )
    annotates = np.array([bool(ANNOTATION.fullmatch(name)) and not symbol_candidates(name) for name in across])
    blocks, annotation, down = [], [], []
    for chunk in table:
        values = chunk.loc[:, ~annotates]
        for column in values.columns[[not pd.api.types.is_numeric_dtype(dtype) for dtype in values.dtypes]]:
            word = next(v for v in values[column] if isinstance(v, str))
            raise UserError(
                f"{path}: column {across[column - 1]!r} holds {word!r}, which is no number; leave names and values only"
            )
        blocks.append(csr_matrix(values.to_numpy(dtype=np.float32)))
        annotation.append(chunk.loc[:, annotates])
        down.extend(chunk.index.astype(str))
    matrix, obs = vstack(blocks, format="csr"), pd.concat(annotation)
    obs.columns = [name for name, is_one in zip(across, annotates, strict=True) if is_one]
    across = pd.Index([name for name, is_one in zip(across, annotates, strict=True) if not is_one])
    if _feature_likeness(down) > _feature_likeness(across):
        return ad.AnnData(csr_matrix(matrix.T), pd.DataFrame(index=across), pd.DataFrame(index=pd.Index(down)))
    return ad.AnnData(matrix, obs.set_axis(pd.Index(down), axis=0), pd.DataFrame(index=across))


def _feature_likeness(names: list[str] | pd.Index) -> float:
    """How much names look like genes or peaks rather than cells, 0 … 1."""
    if looks_like_peaks(names):
        return 1.0
    is_numbered = len(names) > 2 and len({re.sub(r"\d+", "", name) for name in names}) == 1  # Cell1, Cell2 …
    is_barcode = [re.search("[ACGT]{12}", name) is not None for name in names]
    return 0.0 if is_numbered or np.mean(is_barcode) > 0.5 else share_known(names)
