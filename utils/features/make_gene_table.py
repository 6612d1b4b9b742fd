"""Rebuild the table of gene symbols that ``utils.features.gene_symbols`` reads from HGNC's complete set (CC0).

    python -m utils.features.make_gene_table hgnc_complete_set.txt

The source is a tab-separated file, plain or gzipped, at https://www.genenames.org/download/archive/.
"""

import argparse
import gzip
from pathlib import Path

import pandas as pd

from utils.errors import UserError
from utils.features.gene_symbols import GENE_TABLE

# HGNC's column → ours. Lists of symbols stay separated by ``|``, as HGNC writes them.
COLUMNS = {
    "symbol": "symbol",
    "locus_group": "protein_coding",
    "prev_symbol": "previous",
    "alias_symbol": "alias",
    "ensembl_gene_id": "ensembl",
    "entrez_id": "entrez",
}


def make_gene_table(source: str | Path, target: str | Path = GENE_TABLE) -> int:
    """Write the compact table of approved genes. The same source always gives the same bytes.

    Parameters
    ----------
    source
        HGNC's complete set (tab-separated, ``.gz`` or plain).
    target
        Path of the gzipped table.

    Returns
    -------
    Number of genes written.

    Raises
    ------
    UserError
        If the source is missing or lacks one of HGNC's columns.
    """
    try:
        table = pd.read_csv(source, sep="\t", dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise UserError(f"{source} does not exist; give the path of HGNC's complete set") from error
    missing = sorted({*COLUMNS, "status"} - set(table.columns))
    if missing:
        raise UserError(f"{source} lacks the columns {', '.join(missing)}; give HGNC's complete set")
    table = table.loc[table["status"] == "Approved", list(COLUMNS)].rename(columns=COLUMNS)
    table["protein_coding"] = (table["protein_coding"] == "protein-coding gene").astype(int)
    table = table.sort_values("symbol")
    # mtime=0: gzip stores no time, so the file only changes when HGNC's table does.
    text = table.to_csv(sep="\t", index=False, lineterminator="\n")
    Path(target).write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    return len(table)


def main() -> None:
    """Rebuild the table in this repository."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="HGNC's complete set (tab-separated, .gz or plain)")
    source = parser.parse_args().source
    try:
        n_genes = make_gene_table(source)
    except UserError as error:
        parser.error(str(error))
    print(f"{GENE_TABLE.name}: {n_genes} genes, {GENE_TABLE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
