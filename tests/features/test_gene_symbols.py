"""The table of gene symbols, and detection of the species."""

import gzip

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from utils.errors import UserError
from utils.features.gene_symbols import (
    GENE_TABLE,
    detect_species,
    is_clone_name,
    load_gene_table,
    share_gene_like,
)
from utils.features.make_gene_table import make_gene_table

MOUSE = ["Gad1", "Slc17a7", "1700017B05Rik", "A230006K03Rik", "mt-Nd1", "H2-K1", "Gm12345", "Pvalb", "Sst", "Vip"]
HUMAN = ["GAD1", "SLC17A7", "CD3D", "MT-ND1", "HLA-DRA", "C1orf21", "MARCH1", "PVALB", "SST", "VIP"]


def test_the_table_holds_hgncs_complete_set():
    table = load_gene_table()
    assert list(table.columns) == ["symbol", "protein_coding", "previous", "alias", "ensembl", "entrez"]
    assert len(table) == 44_997
    assert table["protein_coding"].sum() == 19_295
    assert table["symbol"].is_unique
    assert table["symbol"].is_monotonic_increasing
    cd3d = table.set_index("symbol").loc["CD3D"]
    assert (cd3d["ensembl"], cd3d["entrez"]) == ("ENSG00000167286", "915")
    assert GENE_TABLE.stat().st_size < 1.2e6
    assert load_gene_table() is table  # read once


def test_rebuilding_the_table_gives_the_same_bytes_without_withdrawn_genes(tmp_path):
    source = tmp_path / "hgnc.tsv"
    columns = ["symbol", "locus_group", "status", "alias_symbol", "prev_symbol", "entrez_id", "ensembl_gene_id"]
    rows = [
        ["ZYX", "protein-coding gene", "Approved", "", "", "7791", "ENSG00000159840"],
        ["GONE", "other", "Entry Withdrawn", "", "", "", ""],
        ["NA", "non-coding RNA", "Approved", "A|B", "C", "1", "ENSG1"],
    ]
    pd.DataFrame(rows, columns=columns).to_csv(source, sep="\t", index=False)
    targets = tmp_path / "a.gz", tmp_path / "b.gz"
    assert [make_gene_table(source, t) for t in targets] == [2, 2]
    assert targets[0].read_bytes() == targets[1].read_bytes()
    lines = gzip.decompress(targets[0].read_bytes()).decode().splitlines()
    assert lines[1:] == ["NA\t0\tC\tA|B\tENSG1\t1", "ZYX\t1\t\t\tENSG00000159840\t7791"]
    with pytest.raises(UserError, match=r"absent\.tsv"):
        make_gene_table(tmp_path / "absent.tsv", targets[0])
    source.write_text("symbol\tstatus\nA\tApproved\n")
    with pytest.raises(UserError, match=r"hgnc\.tsv .*alias_symbol"):
        make_gene_table(source, targets[0])


def test_the_committed_table_equals_a_rebuilt_one(shared_data, tmp_path):
    make_gene_table(shared_data / "hgnc_symbols.tsv.gz", tmp_path / "table.gz")
    assert gzip.decompress((tmp_path / "table.gz").read_bytes()) == gzip.decompress(GENE_TABLE.read_bytes())


def test_the_species_of_small_panels_is_detected():
    assert detect_species(HUMAN * 5) == "human"
    assert detect_species(MOUSE * 5) == "mouse"
    assert detect_species(["ENSG00000167286", "ENSG00000159840.12"]) == "human"
    assert detect_species(["ENSMUSG00000070880"]) == "mouse"
    assert detect_species([f"feature_{i}" for i in range(50)]) == "unknown"
    assert detect_species(["chr1:10-20", "CD3D", "x_1"]) == "unknown"
    assert detect_species([]) == "unknown"


@pytest.mark.parametrize(
    "genes",
    [
        HUMAN,
        MOUSE,
        ["Aplp1", "LOC498555", "RGD1311739", "Tp53"],  # rat
        ["sox10", "gad1b", "si:ch211-285f17.1", "pvalb6", "tp53", "zgc:101569"],  # zebrafish
        ["ENSDARG00000069301", "ENSRNOG00000010756"],
        ["FBgn0000018", "FBgn0000022"],
    ],
)
def test_genes_of_any_species_look_like_genes(genes):
    assert share_gene_like(genes) >= 0.3


@pytest.mark.parametrize("form", ["peak_{}", "gene_{}", "f{}", "G{}", "V{}", "chr1.{0}00.{0}50"])
def test_made_up_names_do_not_look_like_genes(form):
    assert share_gene_like([form.format(i) for i in range(1, 2000)]) < 0.01


def test_names_of_clones_are_recognised():
    assert all(
        map(is_clone_name, ["RP11-34P13.7", "RP11.34P13.7", "AC020916.1", "CTD-2006K23.1", "AL627309.5", "Z83844.1"])
    )
    assert not any(map(is_clone_name, ["CD3D", "HLA-A", "NKX2.1", "ENST00000367770.8", "TBP.1", "chr1.10.20"]))


def test_the_species_of_real_genes_is_detected(shared_data):
    human = np.asarray(anndata.read_h5ad(shared_data / "immune_rna.h5ad", backed="r").var_names, dtype=str)
    with h5py.File(shared_data / "snareseq2_mop.h5mu") as file:
        mouse = file["mod/rna/var/_index"].asstr()[:]
    rng = np.random.default_rng(0)
    assert (detect_species(human), detect_species(mouse)) == ("human", "mouse")
    panels = [(detect_species(rng.choice(human, 50)), detect_species(rng.choice(mouse, 50))) for _ in range(50)]
    assert set(panels) == {("human", "mouse")}
