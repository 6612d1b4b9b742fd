"""Reading peaks from names in every spelling, and putting them in genome order."""

import time

import numpy as np
import pandas as pd
import pytest

from utils.errors import UserError
from utils.features.peaks import CHROM_SIZES, chrom_sizes, format_peaks, genome_order, looks_like_peaks, parse_peaks


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chr1:10-20", ("chr1", 10, 20)),
        ("chr1-10-20", ("chr1", 10, 20)),
        ("chr1_10_20", ("chr1", 10, 20)),
        ("chr1:10_20", ("chr1", 10, 20)),
        ("1:10-20", ("chr1", 10, 20)),
        ("X-0-5", ("chrX", 0, 5)),
        (" Chr2:3-4 ", ("chr2", 3, 4)),
        ("chrUn_KI270742v1:1-200", ("chrUn_KI270742v1", 1, 200)),
        ("GL000194.1-55758-56597", ("chrGL000194.1", 55758, 56597)),
        ("chr1_KI270706v1_random_5_10", ("chr1_KI270706v1_random", 5, 10)),
        ("HLA-A*01:01-1-9", ("chrHLA-A*01:01", 1, 9)),
        ("chr1.3717746.3718593", ("chr1", 3717746, 3718593)),
        ("X1.10.20", ("chr1", 10, 20)),
        ("X.10.20", ("chrX", 10, 20)),
        ("chr1_KI270706v1_random.5.10", ("chr1_KI270706v1_random", 5, 10)),
        ("GL000194.1.55758.56597", ("chrGL000194.1", 55758, 56597)),
    ],
)
def test_every_spelling_is_read(name, expected):
    intervals = parse_peaks([name])
    assert intervals.dtypes.tolist() == [np.dtype(object), np.dtype("int64"), np.dtype("int64")]
    assert tuple(intervals.iloc[0]) == expected
    assert looks_like_peaks([name])


@pytest.mark.parametrize(
    "columns",
    [("chrom", "start", "end"), ("chr", "Start", "End"), ("seqnames", "start", "end"), ("Chromosome", "Start", "Stop")],
)
def test_var_columns_override_names(columns):
    var = pd.DataFrame([["2", 5, 9], ["chrX", 1, 3]], columns=columns, index=["a", "b"])
    assert parse_peaks(var.index, var).to_numpy().tolist() == [["chr2", 5, 9], ["chrX", 1, 3]]
    as_text = var.astype({columns[1]: str}).astype({columns[0]: "category"})
    assert parse_peaks(var.index, as_text).to_numpy().tolist() == [["chr2", 5, 9], ["chrX", 1, 3]]


def test_names_are_used_if_var_lacks_a_column():
    var = pd.DataFrame({"chrom": ["chr9"], "n_cells": [3]})
    assert tuple(parse_peaks(["chr1:10-20"], var).iloc[0]) == ("chr1", 10, 20)


@pytest.mark.parametrize("bad", ["CD3D", "chr1:10", "chr1:20-10", "chr1:10-10", "chr1:a-b", "chr1:-5-10x", "", "10-20"])
def test_unreadable_names_are_reported(bad):
    with pytest.raises(UserError, match="1 of 2 peaks") as error:
        parse_peaks(["chr1:10-20", bad])
    assert repr(bad) in str(error.value)
    assert "chr1_10_20" in str(error.value)


def test_only_the_first_three_unreadable_names_are_reported():
    with pytest.raises(UserError, match=r"4 of 5 peaks .*\('a', 'b', 'c'\)"):
        parse_peaks(["a", "b", "chr1:1-2", "c", "d"])


@pytest.mark.parametrize("row", [["chr1", None, 5], [None, 1, 5], ["chr1", 1.5, 5], ["chr1", -1, 5], ["chr1", 5, 5]])
def test_unreadable_rows_of_var_are_reported(row):
    var = pd.DataFrame([["chr1", 1, 5], row], columns=["chrom", "start", "end"], index=["good", "bad"])
    with pytest.raises(UserError, match="'bad'"):
        parse_peaks(var.index, var)


def test_genes_do_not_look_like_peaks():
    assert not looks_like_peaks(["CD3D", "HLA-A", "AC020916.1", "RP11-34P13.7", "chr1:10-20"])
    assert not looks_like_peaks(
        ["HLA.DRA", "RP11.34P13.7", "AC020916.1.2", "RP11.206L10.2.1", "AL627309.5.1", "X5S.1.2"]
    )
    assert not looks_like_peaks([])
    many = np.array([f"chr1:{i}-{i + 1}" for i in range(5000)])
    assert looks_like_peaks(many)
    assert not looks_like_peaks(np.concatenate([many, [f"gene{i}" for i in range(20_000)]]))


def test_genome_order_is_natural_and_stable():
    names = "chr10:1-9 chrUn_a:1-2 chr2:5-9 chrM:1-2 chr2:5-7 chrY:1-2 chrX:1-2 chr1:900-901 chr2:5-9 chr1:20-30"
    intervals = parse_peaks(names.split())
    order = genome_order(intervals)
    assert order.dtype == np.int64
    assert order.tolist() == [9, 7, 4, 2, 8, 0, 6, 5, 3, 1]  # the equal rows 2 and 8 keep their order
    again = intervals.iloc[order].reset_index(drop=True)
    assert genome_order(again).tolist() == list(range(len(again)))


def test_formatted_names_are_read_back():
    names = ["chr1:10-20", "chrUn_KI270742v1:1-200", "chrX:5-6"]
    assert format_peaks(parse_peaks(names)).tolist() == names
    assert parse_peaks([]).shape == (0, 3)
    assert genome_order(parse_peaks([])).shape == (0,)


@pytest.mark.alone
def test_a_hundred_thousand_names_are_read_quickly():
    start = np.random.default_rng(0).integers(0, 10**8, 100_000)
    names = [f"chr{i % 22 + 1}:{s}-{s + 500}" for i, s in enumerate(start.tolist())]
    begin = time.perf_counter()
    intervals = parse_peaks(names)
    genome_order(intervals)
    assert time.perf_counter() - begin < 4  # about 0.4 s on a laptop core
    np.testing.assert_array_equal(intervals["start"], start)


def test_sizes_of_hg38():
    sizes = chrom_sizes("hg38")
    assert list(sizes)[:2] == ["chr1", "chr2"]
    assert list(sizes)[-3:] == ["chrX", "chrY", "chrM"]
    assert (sizes["chr1"], sizes["chrM"], sum(sizes.values())) == (248_956_422, 16_569, 3_088_286_401)
    sizes["chr1"] = 0  # a copy: the table itself does not change
    assert CHROM_SIZES["hg38"]["chr1"] == 248_956_422
    with pytest.raises(UserError, match=r"'mm9'.* hg19, hg38, mm10, mm39"):
        chrom_sizes("mm9")
