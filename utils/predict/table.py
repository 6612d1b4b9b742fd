"""The predictions of a file as a table, one line per cell."""

import csv
from pathlib import Path

import anndata as ad
import mudata

from utils import __version__
from utils.files.write import whole_file
from utils.predict.annotate import Names

COMMENT = "#"
"""Starts the lines above the table."""


def table_path(path: str | Path) -> Path:
    """The table beside a labelled file: x.predicted.h5ad and x.h5ad both have x.predicted.csv."""
    path = Path(path)
    return path.with_name(f"{path.stem.removesuffix('.predicted')}.predicted.csv")


def comments_of(entry: dict) -> list[str]:
    """What stands above a table: versions, model, command and warnings, from the entry of uns."""
    return [
        f"scMomer {__version__}, {entry['date']}",
        f"model {entry['model']}, {entry['model_hash']}",
        f"command {entry['command']}",
        *map(str, entry["warnings"]),
        *map(str, entry.get("left_out", ())),
    ]


def write_table(cells: ad.AnnData | mudata.MuData, names: Names, path: str | Path) -> None:
    """Write the predicted columns of all cells to .csv, below comments with versions, model and warnings.

        pandas.read_csv("cells.predicted.csv", comment="#", index_col="barcode")

    All text is quoted, so that a # in a barcode or in the name of a type does not start a comment.

    Parameters
    ----------
    cells : from `label_cells`
    names : the names that it has written

    Raises
    ------
    UserError
        If the folder cannot be written to.
    """
    lines = comments_of(cells.uns[names.provenance])
    columns = cells.obs[[names.prefix + column for column in names.columns]]
    with whole_file(path) as partial, open(partial, "w", newline="") as file:
        file.writelines(f"{COMMENT} {' '.join(line.split())}\n" for line in lines)
        columns.to_csv(file, index_label="barcode", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
