"""The predictions of a file as a table, one line per cell."""

import csv
from pathlib import Path

from utils import __version__
from utils.files.write import whole_file
from utils.predict.label import Labelled
from utils.predict.query import BLOCK_CELLS

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


def write_table(labelled: Labelled, path: str | Path) -> None:
    """Write the predicted columns of all cells to .csv, below comments with versions, model and warnings.

        pandas.read_csv("cells.predicted.csv", comment="#", index_col="barcode")

    All text is quoted, so that a # in a barcode or in the name of a type does not start a comment.

    Parameters
    ----------
    labelled : from `label_file`
    path : the file

    Raises
    ------
    UserError
        If the folder cannot be written to.
    """
    lines = comments_of(labelled.entry)
    with whole_file(path) as partial, open(partial, "w", newline="") as file:
        file.writelines(f"{COMMENT} {' '.join(line.split())}\n" for line in lines)
        labelled.columns.to_csv(
            file, index_label="barcode", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n", chunksize=BLOCK_CELLS
        )
