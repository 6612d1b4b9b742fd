"""Matching the features of a file to those of a model: what is summed, what is found, and what is refused."""

import anndata as ad
import bioframe
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from utils.cells.reference import read_reference
from utils.errors import UserError
from utils.features.gene_symbols import load_gene_table
from utils.features.match import align_genes, align_peaks, check_coverage

HUMAN = ["CD3D", "CD8A", "GAD1", "HLA-A", "MARCHF1", "MS4A1", "PVALB", "SST"]


def var(*names: str) -> pd.DataFrame:
    return pd.DataFrame(index=list(names))


def columns(alignment) -> dict[str, list[str]]:
    """Return feature of the output → the file's columns that are summed into it."""
    dense = alignment.projection.toarray()
    return {f: list(alignment.ids[dense[:, i] > 0]) for i, f in enumerate(alignment.features) if dense[:, i].any()}


def test_old_and_new_symbols_are_one_gene_in_alphabetical_order():
    alignment = align_genes(var("MS4A1", "MARCH1", "CD8A", "MARCHF1", "no-gene"), "human", None, "f")
    assert columns(alignment) == {
        "CD8A": ["CD8A"],
        "MARCHF1": ["MARCH1", "MARCHF1"],
        "MS4A1": ["MS4A1"],
        "no-gene": ["no-gene"],
    }
    assert list(alignment.features) == ["CD8A", "MARCHF1", "MS4A1", "no-gene"]


def test_a_reference_gives_order_and_names():
    alignment = align_genes(var("GAD1", "MARCH1", "VIP", "CD20"), "auto", ["MS4A1", "CD3D", "MARCHF1"], "f")
    assert columns(alignment) == {"MS4A1": ["CD20"], "MARCHF1": ["MARCH1"]}
    assert list(alignment.features) == ["MS4A1", "CD3D", "MARCHF1"]
    assert (alignment.n_found, alignment.coverage) == (2, 2 / 3)
    assert alignment.used.tolist() == [False, True, False, True]


def covered(alignment, least: float = 0.3, sums=None) -> None:
    check_coverage(alignment, np.arange(len(alignment.ids), 0, -1) if sums is None else sums, least, "cells.h5ad")


def ensembl(symbols: list[str]) -> list[str]:
    return load_gene_table().set_index("symbol")["ensembl"][symbols].tolist()


@pytest.mark.parametrize(
    ("names", "reference", "words"),
    [
        (["Cd3d", "Gad1", "Sst", "Pvalb"], HUMAN, ["mouse", "human"]),
        (["CD3D", "CD8A"], [*HUMAN, "VIP"], ["panel", "2 genes", "--min_gene_coverage"]),
        (["a", "b", "c", "d"], HUMAN, ["not recognised", "CD3D, CD8A, GAD1", "var_names"]),
        (
            [f"ENSMUSG0000007088{i}" for i in range(5)],
            ["Gad1", "Sst", "Pvalb", "Vip"],
            ["Ensembl ids", "Gad1, Sst, Pvalb", "var_names"],
        ),
    ],
)
def test_too_few_genes_are_refused_with_a_reason(names, reference, words):
    with pytest.raises(UserError) as error:
        covered(align_genes(var(*names), "auto", reference, "cells.h5ad"))
    for word in ("cells.h5ad: ", *words):
        assert word in str(error.value)


def test_the_most_expressed_unmatched_genes_are_named():
    names = ["CD3D", *(f"x{i}" for i in range(15))]
    sums = np.array([9, *np.random.default_rng(0).permutation(15)])
    with pytest.raises(UserError) as error:
        covered(align_genes(var(*names), "human", HUMAN, "f"), sums=sums)
    top = [names[i] for i in np.argsort(-sums) if i][:10]
    assert str(error.value).endswith(": " + ", ".join(top))


def test_the_least_coverage_is_enough_but_no_gene_never_is():
    covered(align_genes(var(*HUMAN[:4], "x"), "human", HUMAN, "f"), least=0.5)
    with pytest.raises(UserError, match=r"cells\.h5ad: .* 4 of the 8 genes .*50\.0%.*--min_gene_coverage .*0\.51"):
        covered(align_genes(var(*HUMAN[:4], "x"), "human", HUMAN, "f"), least=0.51)
    with pytest.raises(UserError, match=r"cells\.h5ad: .* 0 of the 8 genes"):
        covered(align_genes(var("x", "y"), "human", HUMAN, "f"), least=0.0)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["0", "1", "2", "3"], "0, 1, 2 …"),
        (["CD3D", "GAD1", "CD3D", "GAD1"], "every one of its 4 genes"),
    ],
)
def test_names_that_do_not_identify_genes_are_refused(names, words):
    with pytest.raises(UserError) as error:
        align_genes(var(*names), "auto", None, "cells.h5ad")
    assert str(error.value).startswith("cells.h5ad: ")
    assert words in str(error.value)


# References ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_reference_is_read(tmp_path):
    (tmp_path / "genes.tsv").write_text('"MARCH1"\tx\nCD20,y\n\nSST\n')
    ad.AnnData(csr_matrix((1, 3)), var=var("MARCH1", "CD20", "SST")).write(tmp_path / "genes.h5ad")
    for name in ("genes.tsv", "genes.h5ad"):
        assert list(read_reference(tmp_path / name)["rna"]) == ["MARCHF1", "MS4A1", "SST"]
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(ensembl(HUMAN)))
    assert list(read_reference(ids)["rna"]) == HUMAN
    model = tmp_path / "model"
    model.mkdir()
    (model / "genes.txt").write_text("MARCH1\nCD3D\n")  # a model's own names are not translated
    (model / "peaks.txt").write_text("chr1:1-5\n")
    assert {name: list(names) for name, names in read_reference(model).items()} == {
        "rna": ["MARCH1", "CD3D"],
        "atac": ["chr1:1-5"],
    }


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe\x00"])
def test_an_unusable_reference_is_refused(content, tmp_path):
    path = tmp_path / "genes.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"--gene_reference {path}: .*(no such file|cannot be read|no gene)"):
        read_reference(path)


# Peaks ---------------------------------------------------------------------------------------------------------------


def test_peaks_are_in_genome_order_and_duplicates_are_summed():
    alignment = align_peaks(var("chr10:5-9", "chr2:50-60", "chr2_7_9", "2:50-60", "chrX-1-2"), None, None, "f")
    assert list(alignment.features) == ["chr2:7-9", "chr2:50-60", "chr10:5-9", "chrX:1-2"]
    assert columns(alignment)["chr2:50-60"] == ["chr2:50-60", "2:50-60"]


def test_a_subset_of_the_same_peaks_is_matched_by_name():
    """Overlap would match more, because the model's peaks overlap each other."""
    model = ["chr1:10-30", "chr1:20-40", "chr2:5-9"]
    for names in (["chr1:20-40", "chr2:5-9"], [*reversed(model)], [*model, "chr3:1-9"]):
        alignment = align_peaks(var(*names), None, model, "f")
        assert columns(alignment) == {name: [name] for name in model if name in names}
        assert alignment.how == "by name"


def test_another_set_of_peaks_is_matched_by_overlap():
    model = ["chr1:10-30", "chr1:30-40", "chr2:5-9", "chr3:1-2"]
    alignment = align_peaks(var("chr1:29-31", "chr1:1-10", "chr2:8-20", "chr2:1-6", "chr9:1-5"), None, model, "f")
    assert columns(alignment) == {
        "chr1:10-30": ["chr1:29-31"],
        "chr1:30-40": ["chr1:29-31"],
        "chr2:5-9": ["chr2:8-20", "chr2:1-6"],
    }
    assert (alignment.n_found, alignment.coverage, alignment.how) == (3, 0.75, "by overlap")


intervals = st.lists(st.tuples(st.sampled_from(["chr1", "chr2"]), st.integers(0, 40), st.integers(1, 9)), min_size=1)


@settings(max_examples=60, deadline=None)
@given(intervals, intervals)
def test_overlapping_peaks_share_a_base(ours, theirs):
    names = [f"{c}:{s}-{s + n}" for c, s, n in dict.fromkeys(ours)]
    model = [f"{c}:{s}-{s + n}" for c, s, n in dict.fromkeys(theirs)]
    alignment = align_peaks(var(*names), None, model, "f")
    if alignment.how == "by name":
        return
    split = lambda name: (name.split(":")[0], *map(int, name.split(":")[1].split("-")))
    for i, (chrom, start, end) in enumerate(map(split, names)):
        for j, (other, first, last) in enumerate(map(split, model)):
            assert alignment.projection[i, j] == (chrom == other and start < last and first < end)


def test_a_peak_is_open_if_any_overlapping_peak_is():
    alignment = align_peaks(var("chr1:1-5", "chr1:6-9", "chr1:20-25"), None, ["chr1:1-10", "chr1:21-22"], "f")
    cells = csr_matrix(np.array([[0, 2, 0], [1, 1, 0], [0, 0, 3], [0, 0, 0]], dtype=np.float32))
    assert ((cells @ alignment.projection).toarray() > 0).tolist() == [[1, 0], [1, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize("genome", ["hg19", "hg38", "mm10", "mm39"])
def test_the_genome_is_detected_from_the_ends_of_chromosomes(genome):
    """The last base of each chromosome is inside, the next outside; bioframe has the same sizes."""
    sizes = bioframe.assembly_info(genome).chromsizes
    inside = [f"{chrom}:{size - 10}-{size}" for chrom, size in sizes.items()]
    alignment = align_peaks(var(*inside), genome, None, "f")
    assert genome in alignment.genomes
    with pytest.raises(UserError) as error:
        align_peaks(var(*inside, f"chr1:5-{sizes['chr1'] + 1}"), genome, None, "cells.h5ad")
    for word in ("cells.h5ad: ", f"1 of {len(inside) + 1} peaks", genome, f"chr1:5-{sizes['chr1'] + 1}"):
        assert word in str(error.value)


def many_peaks(genome: str, *more: str) -> pd.DataFrame:
    """Return 2,000 peaks that fit this build alone, and some more."""
    sizes = bioframe.assembly_info(genome).chromsizes
    ends = [f"{chrom}:{size - 10}-{size}" for chrom, size in sizes.items()]
    return var(*ends, *(f"chr{1 + i % 19}:{1000 * i}-{1000 * i + 500}" for i in range(1, 2001 - len(ends))), *more)


@pytest.mark.parametrize("genome", [None, "hg19"])
def test_a_peak_is_cut_at_the_end_of_its_chromosome(genome):
    """One of 2,001 peaks passes the end in hg19. In hg38 more do, because many of its chromosomes are shorter."""
    alignment = align_peaks(many_peaks("hg19", "chr17:81194897-81195261"), genome, None, "f")
    assert alignment.genomes == ["hg19"]
    assert columns(alignment)["chr17:81194897-81195210"] == ["chr17:81194897-81195261"]
    (note,) = alignment.notes
    for word in ("1 of 2,001 peaks", "hg19", "chr17:81194897-81195261", "1 are cut"):
        assert word in note
    model = list(alignment.features)
    again = align_peaks(many_peaks("hg19", "chr17:81194897-81195261"), genome, model, "f")
    assert (again.coverage, again.how) == (1.0, "by name")


def test_a_peak_completely_outside_is_left_out():
    alignment = align_peaks(many_peaks("hg19", "chr21:48129999-48130499"), None, None, "f")
    assert (len(alignment.features), alignment.used.tolist().index(False)) == (2000, 2000)
    assert "0 are cut" in alignment.notes[0]
    assert "1 left out" in alignment.notes[0]
    projected = align_peaks(
        many_peaks("hg19", "chr21:48129999-48130499"), "hg19", ["chr1:18900-19600", "chr2:1-5"], "f"
    )
    assert projected.projection.nnz == 1


def test_many_peaks_outside_or_peaks_of_another_build_are_refused():
    beyond = [f"chr17:{81195000 + i}-{81195300 + i}" for i in range(3)]
    with pytest.raises(UserError, match=r"f: 3 of 2,003 peaks .* hg19 .* no known build"):
        align_peaks(many_peaks("hg19", *beyond), "hg19", None, "f")
    assert align_peaks(many_peaks("hg19", *beyond), None, None, "f").genomes == []
    low = var(*(f"chr1:{1000 * i}-{1000 * i + 500}" for i in range(1, 2000)), "chr17:83000000-83000500")
    with pytest.raises(UserError, match=r"1 of 2,000 peaks .* hg19 .* hg38, .* --genome"):
        align_peaks(low, "hg19", None, "f")


def test_unplaced_contigs_are_counted():
    alignment = align_peaks(
        many_peaks("hg19", "hs37d5:5-9", "GL000220.1:1-5", "hs37d5:20-29", "MT:1-9"), None, None, "f"
    )
    assert alignment.genomes == ["hg19"]
    (note,) = alignment.notes
    for word in ("3 peaks", "2 unplaced contigs", "chrhs37d5, chrGL000220.1"):
        assert word in note
    assert alignment.used.all()


def test_the_error_names_the_build_that_fits():
    human = var("chr1:248000000-248000500", "chr22:5-10")
    with pytest.raises(UserError, match=r"2 of 2 peaks .* mm10 .* hg19, hg38.* --genome"):
        align_peaks(human, "mm10", None, "f")
    assert align_peaks(human, None, None, "f").genomes == ["hg19", "hg38"]
    with pytest.raises(UserError, match=r"'hg37'.* hg19, hg38, mm10, mm39"):
        align_peaks(human, "hg37", None, "f")
    with pytest.raises(UserError, match=r"f: 1 of 1 peaks .*'peak_1'"):
        align_peaks(var("peak_1"), None, None, "f")
