"""Gene ids of any type are translated to approved symbols."""

import anndata
import numpy as np
import pandas as pd
import pytest

from utils.features.gene_ids import name_genes, share_known, translate
from utils.features.gene_symbols import load_gene_table


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("FAM214A", "ATOSA"),
        ("MARCH1", "MARCHF1"),
        ("SEPT1", "SEPTIN1"),
        ("H2AFX", "H2AX"),
        ("HIST1H1B", "H1-5"),
        ("C1ORF21", "C1orf21"),
        ("C12ORF49", "SPRING1"),  # case restored, then renamed
        ("C12orf49", "SPRING1"),
        ("CHE1", "BCHE"),  # BCHE's previous symbol goes before AATF's alias
        ("CD20", "MS4A1"),  # an alias of one gene
    ],
)
def test_outdated_symbols_are_updated(old, new):
    update = translate(["CD3D", old], "human")
    assert update.symbols.tolist() == ["CD3D", new]
    assert update.updated == {old: new}
    assert not update.ambiguous
    assert not update.unknown


def test_ids_of_several_kinds_in_one_list():
    ids = ["CD3D", "AMY1", "no gene", "A20", "MARCH1", "Gad1", "no gene", "PD1"]
    update = translate(ids, "human")
    assert update.symbols.tolist() == ["CD3D", "AMY1", "no gene", "A20", "MARCHF1", "Gad1", "no gene", "PD1"]
    assert update.symbols.dtype.kind == "U"
    assert update.updated == {"MARCH1": "MARCHF1"}
    # AMY1 is a previous symbol of three genes; A20 and PD1 are only aliases.
    assert update.ambiguous["AMY1"] == ["AMY1A", "AMY1B", "AMY1C"]
    assert update.ambiguous["A20"] == ["IGKV1-27", "TNFAIP3"]
    assert update.ambiguous["PD1"] == ["PDCD1", "SNCA", "SPATA2"]
    assert update.unknown == ["no gene", "Gad1"]


def test_approved_symbols_never_change():
    symbols = load_gene_table()["symbol"]
    update = translate(symbols, "human")
    assert (update.symbols == symbols.to_numpy(dtype=str)).all()
    assert not update.updated


def test_updating_twice_changes_nothing(shared_data):
    ids = anndata.read_h5ad(shared_data / "immune_rna.h5ad", backed="r").var_names
    first = translate(ids, "human")
    assert len(first.symbols) == len(ids) == 6397
    assert len(first.updated) == 99
    assert first.updated["FAM214A"] == "ATOSA"
    assert len(first.unknown) == 217
    second = translate(first.symbols, "human")
    assert (second.symbols == first.symbols).all()
    assert not second.updated


@pytest.fixture(scope="module")
def genes() -> pd.DataFrame:
    """Return genes that have both an Ensembl and an Entrez id."""
    table = load_gene_table()
    return table[(table["ensembl"] != "") & (table["entrez"] != "")].iloc[::40]


IDS = {
    "symbols": lambda gene: gene.symbol,
    "Ensembl ids": lambda gene: gene.ensembl,
    "Ensembl ids with versions": lambda gene: f"{gene.ensembl}.7",
    "Entrez ids": lambda gene: gene.entrez,
    "symbol_Ensembl": lambda gene: f"{gene.symbol}_{gene.ensembl}",
    "Ensembl|symbol": lambda gene: f"{gene.ensembl}.3|{gene.symbol}",
    "outdated symbol_Ensembl": lambda gene: f"OLD-{gene.symbol}_{gene.ensembl}",
    "symbols with genome": lambda gene: f"GRCh38_{gene.symbol}",
}
TYPES = ["symbols", "Ensembl ids", "Ensembl ids", "Entrez ids", *["symbols with Ensembl ids"] * 3, "symbols"]


@pytest.mark.parametrize(("kind", "id_type"), list(zip(IDS, TYPES, strict=True)))
def test_every_type_of_id_gives_the_same_symbols(genes, kind, id_type):
    ids = [IDS[kind](gene) for gene in genes.itertuples()]
    names = translate(ids)
    assert (names.species, names.id_type) == ("human", id_type)
    assert names.symbols.tolist() == genes["symbol"].tolist()
    assert names.known.all()
    assert share_known(ids) == 1.0


@pytest.mark.parametrize(
    ("date", "symbol"),
    [
        ("3-Mar", "MARCHF3"),
        ("Mar-03", "MARCHF3"),
        ("2022-03-03", "MARCHF3"),
        ("2022-09-01", "SEPTIN1"),
        ("2001-09-01 00:00:00", "SEPTIN1"),
        ("1-Sep", "SEPTIN1"),
        ("01-Sep", "SEPTIN1"),
        ("1-Dec", "DELEC1"),
    ],
)
def test_spreadsheet_dates_are_repaired(date, symbol):
    names = translate(["CD3D", date, "GAD1"], "human")
    assert names.symbols.tolist() == ["CD3D", symbol, "GAD1"]
    assert names.repaired == {date: symbol}
    assert not names.unknown


@pytest.mark.parametrize(("beside", "symbol"), [("MARC1", "MARCHF1"), ("MTARC1", "MARCHF1"), ("MARCH1", "MTARC1")])
def test_a_date_of_two_genes_becomes_the_one_without_a_column(beside, symbol):
    names = translate(["CD3D", "1-Mar", beside], "human")
    assert names.symbols[1] == symbol
    assert names.repaired == {"1-Mar": symbol}


def test_a_date_that_may_be_either_gene_is_reported_as_ambiguous():
    names = translate(["CD3D", "1-Mar"], "human")
    assert names.symbols.tolist() == ["CD3D", "1-Mar"]
    assert names.ambiguous == {"1-Mar": ["MARCHF1", "MTARC1"]}
    assert not names.repaired


@pytest.mark.parametrize("second", ["CD3D-1", "CD3D.1"])
def test_duplicate_columns_that_were_made_unique_are_one_gene(second):
    assert translate(["CD3D", second, "GAD1"], "human").symbols.tolist() == ["CD3D", "CD3D", "GAD1"]
    alone = translate([second, "GAD1"], "human")  # without the gene that it could be a duplicate of
    assert alone.symbols.tolist() == [second, "GAD1"]


def test_dots_that_r_made_of_hyphens_are_hyphens_again():
    assert translate(["HLA.A", "NKX2.1", "CD3D"], "human").symbols.tolist() == ["HLA-A", "NKX2-1", "CD3D"]
    former = translate(["CAPN10.AS1", "CTD.2171N6.1"], "human")  # CAPN10-AS1 and CTD-2171N6.1 are not approved symbols
    assert former.symbols.tolist() == ["CAPN10-DT", *translate(["CTD-2171N6.1"], "human").symbols]
    assert former.known.all()


def test_a_duplicate_column_is_not_taken_for_a_hyphen():
    """TBP-1 is an alias of another gene, but R makes TBP.1 of a second column TBP."""
    assert translate(["TBP", "TBP.1", "CD3D"], "human").symbols.tolist() == ["TBP", "TBP", "CD3D"]
    assert translate(["TBP.1", "CD3D"], "human").symbols[0] not in ("TBP", "TBP.1")


def test_mouse_genes_keep_their_names():
    names = translate(["Gad1", "1-Mar", "mt-Nd1", "Cd8a_ENSMUSG00000053977.3", "ENSMUSG00000070880.12"])
    assert names.species == "mouse"
    assert names.symbols.tolist() == ["Gad1", "1-Mar", "mt-Nd1", "Cd8a", "ENSMUSG00000070880"]


def test_row_numbers_are_not_taken_for_entrez_ids():
    numbers = [str(i) for i in range(1, 500)]
    assert translate(numbers).id_type == "row numbers"
    assert share_known(numbers) == 0.0


COLUMNS = ["gene_symbols", "feature_name", "gene_ids"]


@pytest.mark.parametrize("column", COLUMNS)
def test_ids_in_a_column_are_found(genes, column):
    ids = genes["ensembl"] if column == "gene_ids" else genes["symbol"].astype("category")
    var = pd.DataFrame(
        {"mean": 1.0, "kind": "gene", column: ids.to_numpy()}, index=[f"f{i}" for i in range(len(genes))]
    )
    names = name_genes(var)
    assert (names.column, names.symbols.tolist()) == (column, genes["symbol"].tolist())


def test_the_index_is_preferred_to_an_equally_good_column(genes):
    var = pd.DataFrame({"gene_ids": genes["ensembl"].to_numpy()}, index=genes["symbol"].to_numpy())
    assert name_genes(var).column == "index"


def test_mouse_symbols_are_preferred_to_mouse_ensembl_ids():
    var = pd.DataFrame({"symbol": ["Gad1", "Sst", "Vip"]}, index=[f"ENSMUSG0000007088{i}" for i in range(3)])
    assert name_genes(var).symbols.tolist() == ["Gad1", "Sst", "Vip"]


def test_a_reference_decides_between_index_and_column(genes):
    var = pd.DataFrame({"other": [f"x{i}" for i in range(len(genes))]}, index=genes["symbol"].to_numpy())
    wanted = [f"x{i}" for i in range(10)]
    var["other"] = var["other"].mask(np.arange(len(var)) >= len(var) - 3, genes["symbol"].to_numpy())
    assert name_genes(var, reference=wanted).column == "other"
    assert name_genes(var, reference=genes["symbol"].to_numpy()).column == "index"
