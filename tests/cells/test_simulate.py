"""Simulated cells have the sizes and statistics that were asked for, and follow the truth that is returned."""

import re
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score, roc_auc_score

from utils.cells import simulate as module
from utils.cells.simulate import Simulation, SimulationConfig, simulate
from utils.errors import UserError
from utils.features.gene_symbols import load_gene_table
from utils.features.peaks import chrom_sizes, genome_order, parse_peaks

TINY = SimulationConfig(n_cells=80, n_genes=60, n_peaks=150, n_types=3, n_donors=2)


@pytest.fixture(scope="module")
def default() -> Simulation:
    return simulate()


def log_normalised(rna: csr_matrix) -> np.ndarray:
    counts = rna.toarray()
    return np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1))


def type_means(values: np.ndarray, simulation: Simulation) -> np.ndarray:
    codes = simulation.mdata.obs["cell_type"].cat.codes.to_numpy()
    return np.stack([values[codes == t].mean(0) for t in range(simulation.config.n_types)])


@pytest.mark.parametrize("config", [TINY, SimulationConfig()], ids=["tiny", "default"])
def test_shapes_and_formats(config):
    simulation = simulate(config)
    mdata, n = simulation.mdata, config.n_cells
    assert (mdata["rna"].shape, mdata["atac"].shape) == ((n, config.n_genes), (n, config.n_peaks))
    for modality in mdata.mod.values():
        x = modality.X
        assert isinstance(x, csr_matrix)
        assert x.dtype == np.float32
        assert (x.data == np.round(x.data)).all()
        assert x.data.min() >= 1
        assert list(modality.obs) == ["cell_type", "donor"]
        assert (modality.obs_names == mdata.obs_names).all()
    assert list(mdata.obs) == ["cell_type", "donor"]
    assert set(mdata["atac"].X.data) == {1, 2}
    barcodes = mdata.obs_names
    assert barcodes.is_unique
    assert all(re.fullmatch(r"D\d+_[ACGT]{16}", b) for b in barcodes)
    assert (barcodes.str.split("_").str[0] == mdata.obs["donor"].astype(str)).all()
    table = load_gene_table()
    assert set(mdata["rna"].var_names) <= set(table.loc[table["protein_coding"], "symbol"])
    assert (mdata["rna"].var_names == simulation.truth["genes"]).all()


def test_every_donor_has_every_type(default):
    for simulation, least in ((default, 2), (simulate(TINY), 2)):
        obs = simulation.mdata.obs
        assert obs.groupby(["donor", "cell_type"], observed=False).size().min() >= least


@pytest.mark.parametrize(
    "change",
    [
        {"n_cells": 1, "n_types": 1, "n_donors": 1, "n_states": 0, "n_genes": 10, "n_peaks": 10},
        {"n_cells": 60, "n_types": 8, "n_donors": 5},
        {"n_types": 20, "blur": 0.0},
        {"n_types": 2},
        {"n_peaks": 20_000, "n_genes": 10},  # more peaks than bins near genes
    ],
)
def test_unusual_sizes_work(change):
    config = SimulationConfig(**{**{f.name: getattr(TINY, f.name) for f in fields(TINY)}, **change})
    simulation = simulate(config)
    assert simulation.mdata["atac"].shape == (config.n_cells, config.n_peaks)
    assert len(set(simulation.truth["types"])) == config.n_types
    assert all(np.isfinite(v).all() for v in simulation.truth.values() if v.dtype.kind == "f")


def test_the_seed_determines_everything():
    first, second = simulate(TINY), simulate(TINY)
    other = simulate(SimulationConfig(**{**vars(TINY), "seed": 1}))
    for name in ("rna", "atac"):
        assert (first.mdata[name].X != second.mdata[name].X).nnz == 0
        assert (first.mdata[name].X != other.mdata[name].X).nnz > 0
        assert (first.mdata[name].var_names == second.mdata[name].var_names).all()
    assert (first.mdata.obs_names == second.mdata.obs_names).all()
    for key, value in first.truth.items():
        np.testing.assert_array_equal(value, second.truth[key])


def test_dense_arrays_are_limited_to_a_block(monkeypatch):
    shapes = []
    plain = module._accessibility

    def spy(truth, activity, donor, depth):
        p = plain(truth, activity, donor, depth)
        shapes.append(p.shape)
        return p

    monkeypatch.setattr(module, "_accessibility", spy)
    monkeypatch.setattr(module, "BLOCK", 7 * TINY.n_peaks)
    assert simulate(TINY).mdata["atac"].shape == (80, 150)
    assert max(rows for rows, _ in shapes) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_cells": 0}, "n_cells is 0; .* 1"),
        ({"n_genes": 10**6}, "n_genes is 1000000; .* 10 .* 44997"),
        ({"blur": 0.5}, "blur is 0.5"),
        ({"rna_depth": 0}, "rna_depth is 0"),
    ],
)
def test_impossible_sizes_are_named(change, message):
    with pytest.raises(UserError, match=message):
        simulate(SimulationConfig(**change))


def test_every_field_has_help():
    assert all(f.metadata["help"] for f in fields(SimulationConfig))


def test_marginal_statistics_match_the_config(default):
    config, truth, mdata = default.config, default.truth, default.mdata
    rna, atac = mdata["rna"].X, mdata["atac"].X
    assert np.median(np.asarray(rna.sum(1))) == pytest.approx(config.rna_depth, rel=0.05)
    assert np.median(atac.getnnz(1)) == pytest.approx(config.atac_depth, rel=0.05)
    np.testing.assert_allclose(np.mean(rna.sum(1)), truth["rna_depth"].mean(), rtol=0.02)
    np.testing.assert_allclose(np.mean(atac.getnnz(1)), truth["atac_depth"].mean(), rtol=0.02)
    share = mdata.obs["cell_type"].value_counts(normalize=True).reindex(truth["types"]).to_numpy()
    np.testing.assert_allclose(share, truth["type_proportions"], atol=0.03)
    assert 0.015 < share.min() < 0.04
    # Among cells of one type, counts vary more than Poisson counts, as much as the true dispersion implies.
    cells = mdata.obs["cell_type"].to_numpy() == "CD4 naive"
    counts, mean = rna[cells].toarray(), truth["type_expression"][0]
    high = mean > 3
    assert np.median(np.abs(np.log(counts.mean(0)[high]) - np.log(mean[high]))) < 0.1
    dispersion = ((counts.var(0) - counts.mean(0)) / counts.mean(0) ** 2)[high]
    assert spearmanr(dispersion, truth["gene_dispersion"][high]).statistic > 0.4
    assert np.median(dispersion) > config.dispersion


def test_peaks_are_valid_intervals_in_genome_order(default):
    names = default.mdata["atac"].var_names
    intervals = parse_peaks(names)
    assert names.is_unique
    assert (genome_order(intervals) == np.arange(len(names))).all()
    width = intervals["end"] - intervals["start"]
    assert (width.min(), width.max()) == (200, 900)
    assert (intervals["end"] <= intervals["chrom"].map(chrom_sizes())).all()
    same = intervals["chrom"].to_numpy()[1:] == intervals["chrom"].to_numpy()[:-1]
    assert (intervals["start"].to_numpy()[1:] >= intervals["end"].to_numpy()[:-1])[same].all()


def test_links_join_peaks_to_near_genes(default):
    truth = default.truth
    intervals = parse_peaks(default.mdata["atac"].var_names)
    peak, gene = truth["link_peak"], truth["link_gene"]
    centre = (intervals["start"] + intervals["end"]).to_numpy() // 2
    assert (intervals["chrom"].to_numpy()[peak] == truth["gene_chrom"][gene]).all()
    np.testing.assert_array_equal(np.abs(centre[peak] - truth["gene_tss"][gene]), truth["link_distance"])
    assert truth["link_distance"].max() <= module.LINK_REACH
    assert len(set(zip(peak.tolist(), gene.tolist(), strict=True))) == len(peak)
    decay, weight = np.exp(-truth["link_distance"] / module.LINK_DECAY), truth["link_weight"]
    only = np.bincount(peak)[peak] == 1
    np.testing.assert_allclose(weight[only], decay[only])
    assert (weight <= decay).all()
    assert np.bincount(peak, weight**2).max() <= 1 + 1e-9
    # A search over all peaks finds the same links for a few genes.
    for g in range(0, default.config.n_genes, 100):
        near = (intervals["chrom"] == truth["gene_chrom"][g]).to_numpy()
        near &= np.abs(centre - truth["gene_tss"][g]) <= module.LINK_REACH
        assert set(np.flatnonzero(near)) == set(peak[gene == g])
    linked = len(set(peak)) / default.config.n_peaks
    assert 0.7 < linked < 0.9
    assert not truth["peak_distal"][np.unique(peak)].any()


def test_linked_peaks_follow_their_genes_across_types(default):
    truth = default.truth
    rna = type_means(log_normalised(default.mdata["rna"].X), default)
    atac = type_means((default.mdata["atac"].X.toarray() > 0).astype(float), default)
    informative = (np.ptp(np.log(truth["type_expression"]), axis=0) > 1)[truth["link_gene"]]
    only = np.bincount(truth["link_peak"])[truth["link_peak"]] == 1
    peak, gene = (truth[k][informative & only] for k in ("link_peak", "link_gene"))

    def correlation(p, g):
        a, b = atac[:, p] - atac[:, p].mean(0), rna[:, g] - rna[:, g].mean(0)
        return (a * b).sum(0) / np.maximum(np.sqrt((a**2).sum(0) * (b**2).sum(0)), 1e-9)

    assert np.median(correlation(peak, gene)) > 0.6
    shuffled = np.random.default_rng(0).permutation(gene)
    assert abs(np.median(correlation(peak, shuffled))) < 0.15


def test_expected_values_match_the_cells(default):
    """The means of a type's cells are near the true ones; donors, states and chance make a difference."""
    truth = default.truth
    rna = type_means(default.mdata["rna"].X.toarray(), default)
    atac = type_means((default.mdata["atac"].X.toarray() > 0).astype(float), default)
    for t in range(default.config.n_types):
        assert np.corrcoef(np.log1p(rna[t]), np.log1p(truth["type_expression"][t]))[0, 1] > 0.95
        assert np.corrcoef(atac[t], truth["type_accessibility"][t])[0, 1] > 0.9
    np.testing.assert_allclose(truth["type_expression"].sum(1), default.config.rna_depth, rtol=1e-4)
    np.testing.assert_allclose(truth["type_accessibility"].sum(1), default.config.atac_depth, rtol=0.02)


def test_programmes_can_be_recovered(default):
    """A regression of expression on the true activity finds each programme's log fold changes."""
    truth = default.truth
    x = log_normalised(default.mdata["rna"].X)
    high = truth["type_expression"].min(0) > 1
    slopes = Ridge(1.0).fit(truth["programme_activity"], x[:, high]).coef_  # [genes, programmes]
    planted = truth["gene_programmes"][high]
    for k, name in enumerate(truth["programmes"]):
        if name.startswith("state"):
            assert np.corrcoef(slopes[:, k], planted[:, k])[0, 1] > 0.9
    # Lineage and type programmes are confounded, so only their sum can be estimated for each type.
    fitted, true = slopes @ truth["type_programmes"].T, planted @ truth["type_programmes"].T
    fitted, true = fitted - fitted.mean(1, keepdims=True), true - true.mean(1, keepdims=True)
    assert min(np.corrcoef(fitted[:, t], true[:, t])[0, 1] for t in range(default.config.n_types)) > 0.8


def test_siblings_are_closer_than_lineages(default):
    truth = default.truth
    x = type_means(log_normalised(default.mdata["rna"].X), default)
    distance = np.linalg.norm(x[:, None] - x, axis=2)
    same = truth["lineages"][:, None] == truth["lineages"]
    siblings = distance[same & ~np.eye(len(x), dtype=bool)]
    assert siblings.max() < distance[~same].min()
    assert Counter(truth["lineages"].tolist()) == {"T": 4, "B": 2, "myeloid": 2}


def test_the_last_donor_is_shifted_most(default):
    for name in ("donor_rna", "donor_atac"):
        sd = default.truth[name].std(1)
        np.testing.assert_allclose(sd[:-1], default.config.donor_effect, rtol=0.1)
        assert sd[-1] == pytest.approx(2 * default.config.donor_effect, rel=0.1)


def test_cells_are_as_difficult_as_real_ones(default):
    """RNA separates lineages but not all sub-types. ATAC adds information, and RNA predicts a part of it."""
    obs = default.mdata.obs
    y, test = obs["cell_type"].astype(str).to_numpy(), (obs["donor"] == "D5").to_numpy()
    lineage = dict(zip(default.truth["types"], default.truth["lineages"], strict=True))
    x = log_normalised(default.mdata["rna"].X)
    opened = (default.mdata["atac"].X.toarray() > 0).astype(np.float32)

    def components(values, n):
        pca = PCA(n, svd_solver="randomized", iterated_power=3, random_state=0).fit(values[~test])
        scores = pca.transform(values)
        return scores / scores[~test].std(0)

    rna, atac = components(x, 30), components(opened[:, opened.mean(0) > 0.08], 30)
    predicted = {}
    for name, z in {"rna": rna, "both": np.hstack([rna, atac])}.items():
        predicted[name] = LogisticRegression(C=0.1, max_iter=500).fit(z[~test], y[~test]).predict(z[test])
    accuracy = {name: np.mean(p == y[test]) for name, p in predicted.items()}
    assert 0.75 < accuracy["rna"] < 0.92
    assert 0.6 < f1_score(y[test], predicted["rna"], average="macro") < 0.88
    assert accuracy["both"] > accuracy["rna"] + 0.03
    assert accuracy["both"] < 0.98
    assert np.mean([lineage[p] == lineage[t] for p, t in zip(predicted["rna"], y[test], strict=True)]) > 0.98

    peaks = np.flatnonzero(opened[test].sum(0) >= 10)[::15]
    ridge = Ridge(100).fit(rna[~test], opened[~test][:, peaks])
    scores = ridge.predict(rna[test])
    auroc = np.mean([roc_auc_score(opened[test][:, p], scores[:, i]) for i, p in enumerate(peaks)])
    assert 0.58 < auroc < 0.75
