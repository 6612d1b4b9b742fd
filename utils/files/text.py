"""Read delimited text with cells as rows and features as columns, or the other way round; the names decide which."""

import csv
import gzip
import re
from functools import partial
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
"""Names that Seurat and scanpy give to columns that annotate cells and stand among the gene columns."""
HDF5_SIGNATURE = b"\x89HDF"
GZIP_SIGNATURE = b"\x1f\x8b"


def read_text(path: Path, rows_at_once: int = 1000) -> ad.AnnData:
    """Read a table of counts.

    Parameters
    ----------
    path : text, gzipped or not, separated by tabs, commas, semicolons or spaces; the header may lack a name for the
        first column, as R writes it
    rows_at_once : lines that are parsed at a time, which bounds memory

    Returns
    -------
    AnnData with cells as rows; columns that annotate cells are in obs

    Raises
    ------
    UserError
        If the file is not such a table.
    """
    with path.open("rb") as file:
        is_zipped = file.read(2) == GZIP_SIGNATURE
    opener = gzip.open if is_zipped else open
    with opener(path, "rb") as file:
        start = file.read(4)
    if start == HDF5_SIGNATURE:
        raise UserError(f"{path}: is a zipped HDF5 file; unpack it with gunzip first")
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
            filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
            numbered = list(islice(filled, 2))
            head = [line for _, line in numbered]
    except UnicodeDecodeError:
        raise UserError(f"{path}: is neither HDF5 nor text in UTF-8; save it as .h5ad or as text in UTF-8") from None
    if len(head) < 2:
        raise UserError(f"{path}: has {len(head)} line(s) of text; a table needs a line of names and one for each cell")
    separator = max("\t,; ", key=head[0].count)
    if not head[0].count(separator):
        raise UserError(f"{path}: not a table: its first line has no tab, comma, semicolon or space between names")
    column_names, first = csv.reader(head, delimiter=separator)
    if len(first) == len(column_names):
        column_names = column_names[1:]  # the first column holds the row names
    elif len(first) != len(column_names) + 1:
        n_names, n_values = len(column_names), len(first)
        raise UserError(f"{path}: not a table: {n_names} names in its first line, but {n_values} values in the next")
    read = partial(
        pd.read_csv,
        path,
        sep=separator,
        header=None,
        skiprows=numbered[0][0],  # the header, and blank lines above it
        index_col=0,
        low_memory=False,
        compression="gzip" if is_zipped else None,
        encoding="utf-8-sig",
    )
    # Some genes have such names (PCTP); they stay among the values.
    annotates = np.array([bool(ANNOTATION.fullmatch(name)) and not symbol_candidates(name) for name in column_names])
    if annotates.any():  # in a table of genes × cells, columns are cells, whatever their names
        features = [name for name, is_one in zip(column_names, annotates, strict=True) if not is_one]
        names = read(usecols=[0], dtype={0: str}).index.astype(str)
        annotates &= _feature_likeness(names) <= _feature_likeness(features)
    as_text = {int(column): str for column in np.flatnonzero(annotates) + 1}
    table = read(dtype={0: str} | as_text, chunksize=rows_at_once)
    blocks, annotation, row_names = [], [], []
    for chunk in table:
        values = chunk.loc[:, ~annotates]
        for column in values.columns[[not pd.api.types.is_numeric_dtype(dtype) for dtype in values.dtypes]]:
            word = next(v for v in values[column] if isinstance(v, str))
            raise UserError(
                f"{path}: column {column_names[column - 1]!r} holds {word!r}, which is not a number; keep only names "
                "and numbers"
            )
        blocks.append(csr_matrix(values.to_numpy(dtype=np.float32)))
        annotation.append(chunk.loc[:, annotates])
        row_names.extend(chunk.index.astype(str))
    matrix, obs = vstack(blocks, format="csr"), pd.concat(annotation)
    obs.columns = [name for name, is_one in zip(column_names, annotates, strict=True) if is_one]
    obs = obs.apply(_as_numbers)
    columns = pd.Index([name for name, is_one in zip(column_names, annotates, strict=True) if not is_one])
    rows = pd.Index(row_names)
    if _feature_likeness(row_names) > _feature_likeness(columns):  # features are the rows: transpose
        return ad.AnnData(csr_matrix(matrix.T), pd.DataFrame(index=columns), pd.DataFrame(index=rows))
    return ad.AnnData(matrix, obs.set_axis(rows, axis=0), pd.DataFrame(index=columns))


def _as_numbers(column: pd.Series) -> pd.Series:
    """Return a column of text as numbers, if all of it is."""
    try:
        return pd.to_numeric(column)
    except ValueError:
        return column


def _feature_likeness(names: list[str] | pd.Index) -> float:
    """Return how much names look like genes or peaks rather than cells, from 0 to 1."""
    if looks_like_peaks(names):
        return 1.0
    is_numbered = len(names) > 2 and len({re.sub(r"\d+", "", name) for name in names}) == 1  # Cell1, Cell2 …
    is_barcode = [re.search("[ACGT]{12}", name) is not None for name in names]
    return 0.0 if is_numbered or np.mean(is_barcode) > 0.5 else share_known(names)
