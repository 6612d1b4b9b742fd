"""Gene embeddings on disk: one vector per gene, as .h5ad or as text in word2vec's format, such as gene2vec's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from utils.errors import UserError, reading
from utils.features.gene_ids import translate
from utils.features.gene_symbols import detect_species

REMEDY = "give the path of a gene embedding, .h5ad or word2vec text"


@dataclass(frozen=True, eq=False)
class GeneVectors:
    """Vectors of genes.

    Attributes
    ----------
    genes : [n] names, symbols or Ensembl ids, each of them once
    vectors : [n, width] float32, finite
    n_cells : [n] number of cells behind each vector, or None if the file does not give it
    static : [n, width] the model's gene embedding, which is the same in every cell, or None if the file lacks it
    """

    genes: np.ndarray
    vectors: np.ndarray
    n_cells: np.ndarray | None = None
    static: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.genes)

    @property
    def width(self) -> int:
        """Length of a vector."""
        return self.vectors.shape[1]

    @cached_property
    def _species(self) -> str:
        return detect_species(self.genes)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        """Current symbol → row. A gene named by its current symbol goes before one named by a former symbol."""
        rows = {str(gene): row for row, gene in enumerate(self.genes)}
        for row, symbol in enumerate(translate(self.genes, self._species).symbols):
            rows.setdefault(str(symbol), row)
        return rows

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """Return the row of each gene, -1 for a gene without a vector.

        Parameters
        ----------
        names : symbols of any year or Ensembl ids, also mixed

        Returns
        -------
        [len(names)] int64
        """
        names = [str(name) for name in names]
        if not names:
            return np.empty(0, dtype=np.int64)
        row_of = self._row_of
        symbols = translate(names, self._species if self._species != "unknown" else "auto").symbols
        found = (row_of.get(name, row_of.get(str(symbol), -1)) for name, symbol in zip(names, symbols, strict=True))
        return np.fromiter(found, dtype=np.int64, count=len(names))

    def of(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors of genes, by symbols of any year or Ensembl ids.

        Parameters
        ----------
        names : [n_names] genes, also several times

        Returns
        -------
        vectors : [n_names, width] float32; zeros for a gene without a vector
        found : [n_names] bool, whether the gene has a vector
        """
        rows = self.rows(names)
        found = rows >= 0
        vectors = np.zeros((len(rows), self.width), dtype=np.float32)
        vectors[found] = self.vectors[rows[found]]
        return vectors, found


def read_gene_vectors(path: str | Path, width: int | None = None) -> GeneVectors:
    """Read a gene embedding.

    Parameters
    ----------
    path : .h5ad with genes as rows (X holds the vectors, obs_names the genes, obs["n_cells"] the number of cells,
        obsm["static"] the model's gene embedding), or text with a gene and its numbers on each line, separated by white
        space; a first line `n_genes width` is skipped
    width : length that the vectors must have, or None to accept any

    Returns
    -------
    GeneVectors; of a gene that a text repeats, the last vector

    Raises
    ------
    UserError
        If the file cannot be read, vectors differ in length or have another than `width`, a number is not finite, or
        there is no gene in it.
    """
    path = Path(path)
    found = _read_h5ad(path) if path.suffix == ".h5ad" else _read_text(path, width)
    if not len(found):
        raise UserError(f"{path} holds no gene vectors; {REMEDY}")
    if width is not None and found.width != width:
        raise UserError(
            f"{path} holds vectors of width {found.width}, not {width}; give a gene embedding of width {width} or "
            "change the model's width"
        )
    bad = ~np.isfinite(found.vectors).all(1)
    if bad.any():
        raise UserError(
            f"{path} holds numbers that are not finite for {bad.sum():,} genes ({', '.join(found.genes[bad][:3])}); "
            "remove these genes or make the embedding again"
        )
    return found


def write_gene_vectors(vectors: GeneVectors, path: str | Path) -> None:
    """Write a gene embedding, as .h5ad or (with any other ending) as text in word2vec's format.

    The text begins with a line `n_genes width`; it holds the vectors alone. Scripts write through
    `utils.files.write.whole_file`, so that an interrupted run leaves no half file.
    """
    path = Path(path)
    if path.suffix == ".h5ad":
        obs = pd.DataFrame(index=pd.Index(vectors.genes.astype(object), name="gene"))
        if vectors.n_cells is not None:
            obs["n_cells"] = np.asarray(vectors.n_cells, dtype=np.int64)
        obsm = {} if vectors.static is None else {"static": vectors.static}
        ad.AnnData(vectors.vectors.astype(np.float32, copy=False), obs, obsm=obsm).write_h5ad(path)
        return
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{len(vectors)} {vectors.width}\n")
        for gene, vector in zip(vectors.genes, vectors.vectors, strict=True):
            file.write(f"{gene} {' '.join(f'{x:.9g}' for x in vector)}\n")  # 9 digits hold a float32 exactly


def read_gene_embedding(path: str | Path, genes: Sequence[str], dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Read pretrained vectors for the genes of a model, matched by the very same symbols.

    Parameters
    ----------
    path : as in `read_gene_vectors`
    genes : [n_genes] symbols of the model's genes
    dim : length that the vectors must have

    Returns
    -------
    vectors : [n_genes, dim] float32; zeros for a gene that is not in the file
    found : [n_genes] bool, whether the gene is in the file

    Raises
    ------
    UserError
        As in `read_gene_vectors`, or if none of the genes is in the file.
    """
    file = read_gene_vectors(path, dim)
    rows = pd.Index(file.genes).get_indexer(pd.Index([str(gene) for gene in genes]))
    found = rows >= 0
    if not found.any():
        raise UserError(f"{path} holds none of the {len(genes)} genes; check that both use the same gene symbols")
    vectors = np.zeros((len(rows), dim), dtype=np.float32)
    vectors[found] = file.vectors[rows[found]]
    return vectors, found


def _read_text(path: Path, width: int | None) -> GeneVectors:
    """Read word2vec text; `width` is that of the first line if it is None."""
    rows: dict[str, np.ndarray] = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                name, *values = line.split() or [""]
                if not name or (number == 1 and len(values) == 1 and name.isdigit() and values[0].isdigit()):
                    continue
                if width is None:
                    width = len(values)
                if len(values) != width or not width:
                    raise UserError(
                        f"{path} line {number} ({name[:40]}) holds {len(values)} numbers, not {width or 'a vector'}; "
                        "give a gene embedding in which all vectors have the width that is wanted"
                    )
                rows[name] = np.array(values, dtype=np.float32)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
    except ValueError as error:  # not a number, or not UTF-8
        raise UserError(
            f"{path} is not a text of one gene and {width or 'its'} numbers per line ({error}); {REMEDY}"
        ) from error
    vectors = np.array(list(rows.values()), dtype=np.float32).reshape(len(rows), width or 0)
    return GeneVectors(np.array(list(rows), dtype=str), vectors)


def _read_h5ad(path: Path) -> GeneVectors:
    """Read genes × width from X."""
    if not path.is_file():
        raise UserError(f"{path} cannot be read (no such file); {REMEDY}")
    with reading(path, "is not a readable .h5ad file", REMEDY):
        file = ad.read_h5ad(path)
        if file.X is None:
            raise UserError(f"{path}: has no X, which holds the vectors; {REMEDY}")
        values = file.X.toarray() if hasattr(file.X, "toarray") else np.asarray(file.X)
        vectors, genes = values.astype(np.float32), np.asarray(file.obs_names, dtype=str)
        n_cells = file.obs["n_cells"].to_numpy().astype(np.int64) if "n_cells" in file.obs else None
        static = np.asarray(file.obsm["static"], dtype=np.float32) if "static" in file.obsm else None
    if len(set(genes)) < len(genes):
        raise UserError(f"{path}: names a gene twice in obs_names; keep one row per gene")
    return GeneVectors(genes, vectors, n_cells, static)
