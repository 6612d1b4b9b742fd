"""Detecting what a matrix holds (counts, logarithms to three bases, shares, or neither), and recovering its counts."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from utils.features.count_detection import BASES, Values, detect_values, recover_counts, to_counts


def counts_of(n_cells: int = 40, n_genes: int = 60, deep: float = 3.0, seed: int = 0) -> csr_matrix:
    """Make cells with at least one count of 1 each, as nearly all real cells have."""
    rng = np.random.default_rng(seed)
    counts = rng.negative_binomial(1, 1 / (1 + deep), (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.4)
    counts[:, 0], counts[:, 1] = 1, 7
    return csr_matrix(counts.astype(np.float64))


def scaled(counts: csr_matrix, target: float) -> np.ndarray:
    dense = counts.toarray()
    return dense * target / dense.sum(1, keepdims=True)


def log1p(values: np.ndarray, base: str) -> np.ndarray:
    return np.log1p(values) / np.log(BASES[base])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("target", [1e4, 1e6, 137.0])
@pytest.mark.parametrize("base", BASES)
def test_counts_are_recovered_from_logarithms(base, target, dtype):
    counts = counts_of()
    matrix = csr_matrix(log1p(scaled(counts, target), base).astype(dtype))
    values = detect_values(matrix)
    assert values == Values("log1p", base)
    found, whole = to_counts(matrix, values)
    assert whole.all()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.toarray(), counts.toarray())


def test_among_several_bases_the_one_with_equal_sums_is_chosen():
    """Bases e and 10 both give whole numbers here, but only with base 10 do both cells have the same sum."""
    counts = csr_matrix(np.array([[1.0, 5, 0], [1, 4, 1]]))
    matrix = csr_matrix(log1p(scaled(counts, 1e4), "10"))
    for base in ("e", "10"):
        assert to_counts(matrix, Values("log1p", base))[1].all()
    assert detect_values(matrix) == Values("log1p", "10")
    np.testing.assert_array_equal(to_counts(matrix, detect_values(matrix))[0].toarray(), counts.toarray())


@pytest.mark.parametrize("base", BASES)
def test_counts_are_recovered_from_unscaled_logarithms(base):
    counts = counts_of()
    found, _ = to_counts(csr_matrix(log1p(counts.toarray(), base)), Values("log1p", base))
    np.testing.assert_array_equal(found.toarray(), counts.toarray())
    assert detect_values(csr_matrix(log1p(counts.toarray(), base))) == Values("log1p", base)


@pytest.mark.parametrize("decimals", [3, 4, 5])
def test_counts_are_recovered_from_rounded_logarithms(decimals):
    """Text files round values; all small counts of a cell together still give its factor."""
    counts = counts_of(200, 300)
    matrix = csr_matrix(np.round(log1p(scaled(counts, 1e3), "e"), decimals))
    values = detect_values(matrix)
    assert values == Values("log1p", "e")
    np.testing.assert_array_equal(to_counts(matrix, values)[0].toarray(), counts.toarray())


def test_counts_are_recovered_from_counts_per_million():
    counts = counts_of()
    matrix = csr_matrix(scaled(counts, 1e6).astype(np.float32))
    values = detect_values(matrix)
    assert values == Values("cpm")
    np.testing.assert_array_equal(to_counts(matrix, values)[0].toarray(), counts.toarray())


def test_counts_are_recovered_where_the_smallest_is_two():
    x = np.array([2.0, 3.0, 8.0, 7.0, 1.0, 4.0, 2.0, 3.0]) * np.array([0.37] * 4 + [11.0] * 2 + [0.2] * 2)
    counts, exact = recover_counts(x, np.array([0, 4, 4, 6, 8]))
    assert counts[:6].tolist() == [2, 3, 8, 7, 1, 4]
    assert exact.tolist() == [True, True, True, False]  # the last cell has too few values to be sure
    assert counts[6:].tolist() == x[6:].tolist()


@pytest.mark.parametrize("base", BASES)
def test_other_logarithms_are_shares_and_equal_sums_give_the_base(base):
    rng = np.random.default_rng(1)
    weights = np.exp(rng.normal(size=(30, 50)))
    shares = 1e4 * weights / weights.sum(1, keepdims=True)
    matrix = csr_matrix(log1p(shares, base))
    values = detect_values(matrix)
    assert values == Values("log1p", base, exact=False)
    found, whole = to_counts(matrix, values)
    assert not whole.all()
    np.testing.assert_allclose(found.toarray(), shares, rtol=1e-5)
    part = detect_values(csr_matrix(log1p(shares, base)[:, :20]))  # with some of the genes only, the sums differ
    assert part == Values("log1p", "e", exact=False, guessed=True)
    assert "(assumed)" in str(part)


def changed(value: float) -> csr_matrix:
    counts = counts_of()
    counts[3, 4] = value
    return counts


@pytest.mark.parametrize(
    ("matrix", "kind"),
    [
        (counts_of(), "counts"),
        (csr_matrix(counts_of().astype(np.int64)), "counts"),
        (csr_matrix(scaled(counts_of(), 1e6)), "cpm"),
        (changed(0.5), "fractional"),
        (changed(-1.0), "negative"),
        (changed(np.nan), "missing"),
        (changed(np.inf), "infinite"),
        (csr_matrix((3, 4)), "empty"),
        (csr_matrix(np.random.default_rng(0).normal(size=(9, 9))), "negative"),
        (csr_matrix(np.random.default_rng(0).gamma(1, 300, (9, 9))), "fractional"),
    ],
)
def test_kinds_of_values(matrix, kind):
    values = detect_values(matrix)
    assert values.kind == kind
    assert values.usable == (kind in ("counts", "cpm"))


def test_the_user_overrides_the_detected_kind():
    fractional = csr_matrix(np.random.default_rng(0).gamma(1, 300, (9, 9)))
    assert detect_values(fractional, "cpm") == Values("cpm", exact=False)
    assert detect_values(fractional, "counts") == Values("counts", exact=False)
    assert detect_values(fractional, "log1p").kind == "fractional"  # logarithms are never that large
    whole = counts_of()
    assert detect_values(whole, "log1p").kind == "log1p"
    assert detect_values(changed(-1.0), "counts").kind == "negative"


def wide(seed: int = 0) -> np.ndarray:
    """Make [200, 2000] counts, 3,000 per cell on average, as uneven as real ones: few genes make up most of a cell."""
    rng = np.random.default_rng(seed)
    rate = np.exp(rng.normal(0, 2, 2000))
    depth = 3000 * np.exp(rng.normal(0, 0.4, (200, 1)))
    return rng.poisson(depth * rate / rate.sum()).astype(np.float64)


def rsem() -> np.ndarray:
    """Make counts as RSEM does: pairs of similar genes share reads, which are divided between them."""
    counts, rng = wide(), np.random.default_rng(1)
    for one in range(0, 600, 2):
        share = rng.uniform(0, 1, 200) * np.minimum(counts[:, one], 5)
        counts[:, one] -= share
        counts[:, one + 1] += share
    return np.round(counts, 2)


def alevin() -> np.ndarray:
    """Make counts as alevin does: some molecules belong to several genes, which each get a fraction."""
    counts, rng = wide(), np.random.default_rng(2)
    shared = rng.random(counts.shape) < 0.06
    return np.maximum(counts + shared * rng.uniform(-0.5, 0.5, counts.shape), 0)


def soupx() -> np.ndarray:
    """Make counts as SoupX does: a tenth of each cell is background, which is subtracted gene by gene."""
    counts = wide()
    soup = counts.sum(0) / counts.sum()
    return np.maximum(counts - 0.1 * counts.sum(1, keepdims=True) * soup, 0)


@pytest.mark.parametrize("estimate", [rsem, alevin, soupx])
def test_estimated_counts_are_used_as_is(estimate):
    matrix = csr_matrix(estimate().astype(np.float32))
    values = detect_values(matrix)
    assert values == Values("counts", exact=False)
    np.testing.assert_array_equal(to_counts(matrix, values)[0].toarray(), matrix.toarray())


def few(target: float) -> np.ndarray:
    """Make shallow cells, scaled by the total of all genes but with only some of them: few values, unequal sums."""
    counts = np.minimum(wide(), 4)
    return (counts * target / (counts.sum(1, keepdims=True) + 500))[:, :400]


NOT_COUNTS = {
    "logarithms": lambda: np.round(np.log1p(few(1e4)), 1),
    "logarithms to base 2": lambda: np.log2(1 + few(1e6) * np.random.default_rng(0).uniform(0.9, 1.1, (200, 400))),
    "scaled": lambda: few(1e4),
    "scaled a little": lambda: few(700),
    "per million": lambda: few(1e6),
    "divided by size factors": lambda: wide() / np.random.default_rng(0).lognormal(0, 0.3, (200, 1)),
    "rounded to one decimal": lambda: np.round(few(700), 1),
    "means of neighbours": lambda: (np.cumsum(wide(), axis=0)[30:] - np.cumsum(wide(), axis=0)[:-30]) / 30,
    "not of molecules": lambda: np.random.default_rng(0).gamma(0.4, 30, (200, 60)),
    "from 0 to 1": lambda: wide() / np.maximum(wide().max(0), 1),
}


@pytest.mark.parametrize("name", NOT_COUNTS)
def test_other_values_are_not_detected_as_counts(name):
    assert detect_values(csr_matrix(NOT_COUNTS[name]())).kind != "counts"
    centred = wide() - wide().mean(0)
    assert detect_values(csr_matrix(centred)).kind == "negative"


def test_a_single_fraction_among_whole_counts_is_refused():
    matrix = wide()
    matrix[3, 4] = 0.5
    assert detect_values(csr_matrix(matrix)).kind == "fractional"


def test_peaks_above_zero_are_open():
    values = detect_values(csr_matrix(np.array([[0.3, 0.0], [0.0, 2.7]])), is_open=True)
    assert values.usable
    assert to_counts(csr_matrix(np.array([[0.3, 0.0], [0.0, 2.7]])), values)[0].toarray().tolist() == [[1, 0], [0, 1]]


def test_log2_is_read_to_base_2():
    """Bulk log2(TPM + 1): no counts can be recovered, and by default the base would be assumed to be e."""
    tpm = np.random.default_rng(0).lognormal(2, 1.5, (50, 80))
    matrix = csr_matrix(np.log2(1 + tpm))
    assert detect_values(matrix) == Values("log1p", "e", exact=False, guessed=True)
    values = detect_values(matrix, "log2")
    assert values == Values("log1p", "2", exact=False)
    np.testing.assert_allclose(to_counts(matrix, values)[0].toarray(), tpm, rtol=1e-5)


def test_counts_are_recovered_from_log2():
    counts = wide()
    matrix = csr_matrix(np.log2(1 + 1e4 * counts / counts.sum(1, keepdims=True)))
    values = detect_values(matrix, "log2")
    assert values == Values("log1p", "2")
    found = to_counts(matrix, values)[0].toarray()
    np.testing.assert_allclose(found / found.sum(1, keepdims=True), counts / counts.sum(1, keepdims=True), rtol=1e-5)
    assert detect_values(csr_matrix(60.0 + counts), "log2").kind == "fractional"  # no logarithm is this large
