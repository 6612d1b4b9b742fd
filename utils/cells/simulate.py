"""Simulates paired RNA and ATAC of cells, and returns all parameters that were used (the truth).

The generative model, for cell c of type t and donor d, gene g, peak p:

    activity   a_c  = [lineage of t | type of t, blurred with its siblings | continuous cell states]    programmes
    RNA        m_cg = softmax_g(base_g + Σ_k W_gk a_ck + donor_dg)                                 share of a cell's RNA
               x_cg ~ NB(mean depth_c · m_cg, dispersion φ_g), variance mean + φ mean²
    ATAC       l_cp = baseline_p + link · Σ_g L_pg z_cg + Σ_k D_pk a_ck + donor_dp             logit of accessibility
               o_cp ~ Bernoulli(depth_c · σ(l_cp) / Σ_p σ(l_cp)), counts 1 or 2 where open

z_cg is the gene's log rate W_g·a_c, z-scored over cells. L are weights of peak-gene links, which decay with distance. D
are effects of distal peaks, which belong to a lineage or a type and follow no gene.

The same activity drives both modalities, so accessibility can be predicted from RNA; within a type, the cell states
make this possible. A cell's RNA counts are noisy, so the distal peaks and the links, which are scaled alike for all
genes, add information about its sub-type. Gene symbols are real; all positions are invented.
"""

from dataclasses import dataclass, field

import mudata
import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy.sparse import csr_matrix, vstack

from utils.cells.preprocessed import SIMULATED
from utils.errors import UserError
from utils.features.gene_symbols import load_gene_table
from utils.features.peaks import chrom_sizes, format_peaks

CELL_TYPES = (
    ("CD4 naive", "T"),
    ("CD14 monocyte", "myeloid"),
    ("CD4 memory", "T"),
    ("B naive", "B"),
    ("CD8 effector", "T"),
    ("B memory", "B"),
    ("CD8 naive", "T"),
    ("CD16 monocyte", "myeloid"),
    ("NK CD56dim", "NK"),
    ("Treg", "T"),
    ("cDC2", "myeloid"),
    ("NK CD56bright", "NK"),
    ("Plasma", "B"),
    ("MAIT", "T"),
    ("pDC", "pDC"),
    ("cDC1", "myeloid"),
)
"""(type, lineage) in the order in which types are added, the most common first."""
BIN = 1_000  # base pairs; a bin of this size holds one peak at most, so peaks never overlap
LINK_REACH = 100_000  # largest distance in base pairs between a gene's start and the peaks linked to it
LINK_DECAY = 30_000  # distance in base pairs over which a link's weight falls by a factor e
NEAR_GENES = 0.75  # share of peaks that are placed within reach of a gene
GENE_SHARES = (0.20, 0.06, 0.15)  # shares of the genes that a programme of a lineage, a type or a state affects
PEAK_SHARES = (0.30, 0.06, 0.0)  # shares of the distal peaks that such a programme affects
BLOCK = 8_000_000  # number of values in the largest dense array


@dataclass(frozen=True)
class SimulationConfig:
    """Size and difficulty of the simulated data."""

    n_cells: int = field(default=3000, metadata={"help": "number of cells"})
    n_genes: int = field(default=1000, metadata={"help": "number of genes"})
    n_peaks: int = field(default=5000, metadata={"help": "number of peaks"})
    n_types: int = field(default=8, metadata={"help": "number of cell types"})
    n_donors: int = field(default=5, metadata={"help": "number of donors, each a batch; the last one is shifted"})
    rna_depth: float = field(default=1500.0, metadata={"help": "median RNA counts per cell"})
    atac_depth: float = field(
        default=400.0, metadata={"help": "median open peaks per cell, at most a fifth of the peaks"}
    )
    imbalance: float = field(default=12.0, metadata={"help": "how many times as common the first type is as the last"})
    lineage_effect: float = field(default=1.0, metadata={"help": "sd of the log fold changes between lineages"})
    type_effect: float = field(default=0.8, metadata={"help": "sd of the log fold changes between a lineage's types"})
    state_effect: float = field(default=0.5, metadata={"help": "sd of the log fold changes per sd of a cell state"})
    blur: float = field(
        default=0.2, metadata={"help": "mean share of a cell's type activity that goes to another type of its lineage"}
    )
    dispersion: float = field(default=0.3, metadata={"help": "median negative-binomial dispersion of a gene"})
    link_effect: float = field(default=2.0, metadata={"help": "change of a peak's logit per sd of its gene's log rate"})
    distal_effect: float = field(default=1.0, metadata={"help": "sd of the logits of distal peaks"})
    donor_effect: float = field(default=0.15, metadata={"help": "sd of a donor's log rates and logits"})
    last_donor_shift: float = field(default=2.0, metadata={"help": "factor on the effects of the last donor"})
    n_states: int = field(default=3, metadata={"help": "number of continuous cell states"})
    seed: int = field(default=0, metadata={"help": "random seed; the same seed gives the same data"})


@dataclass
class Simulation:
    """Simulated cells and the parameters that generated them.

    Attributes
    ----------
    mdata
        Modalities ``rna`` and ``atac``: raw integer counts as float32 CSR, peaks in genome order. The file and both
        modalities have ``cell_type`` and ``donor`` in ``obs``, and the mark ``uns["scmomer_simulated"]``.
    truth
        T types, D donors, K programmes, S states, N cells, G genes, P peaks, E links; in the order of ``mdata``.

        - ``types`` [T] names; ``lineages`` [T] lineage of each type; ``type_proportions`` [T]
        - ``programmes`` [K] names; ``gene_programmes`` [G, K] log fold changes W; ``type_programmes`` [T, K] mean
          activity of each type
        - ``genes`` [G] symbols; ``gene_chrom`` [G], ``gene_tss`` [G] base pairs, invented; ``gene_base`` [G] log rate;
          ``gene_dispersion`` [G]
        - ``link_peak``, ``link_gene`` [E] indices; ``link_weight`` [E] L; ``link_distance`` [E] base pairs
        - ``peak_distal`` [P, K] distal effects D; ``peak_base`` [P] and ``peak_programmes`` [P, K] intercept and slopes
          of the logit as a function of activity (links and distal effects together)
        - ``donor_rna`` [D, G], ``donor_atac`` [D, P] shifts of log rate and logit
        - ``type_expression`` [T, G] mean counts and ``type_accessibility`` [T, P] P(open) of a cell with median depth,
          mean activity and no donor effect
        - ``programme_activity`` [N, K]; ``cell_state`` [N, S], a copy of its last S columns
        - ``rna_depth``, ``atac_depth`` [N] expected counts and open peaks
    config
        Sizes, difficulty and seed.
    """

    mdata: MuData
    truth: dict[str, np.ndarray]
    config: SimulationConfig


def simulate(config: SimulationConfig | None = None) -> Simulation:
    """Draw paired cells from the model above.

    Parameters
    ----------
    config
        Sizes, difficulty and seed; the defaults if None.

    Returns
    -------
    The cells and the truth.

    Raises
    ------
    UserError
        If a size is out of range.
    """
    config = config or SimulationConfig()
    _check(config)
    rng = np.random.default_rng(config.seed)
    truth = _type_truth(config)
    truth |= _gene_truth(config, truth, rng)
    intervals = _place_peaks(config, truth, rng)
    truth |= _link_peaks(intervals, truth)
    obs, cells = _draw_cells(config, truth, rng)
    truth |= cells
    truth |= _effects(config, truth, rng)
    typical, each = truth["type_programmes"], np.ones(config.n_types)
    truth["type_expression"] = _expression(truth, typical, 0.0, config.rna_depth * each).astype(np.float32)
    truth["type_accessibility"] = _accessibility(truth, typical, 0.0, _open_peaks(config) * each).astype(np.float32)
    donor = obs["donor"].cat.codes.to_numpy()
    rna, atac = _draw_counts(config, truth, donor, rng)
    return Simulation(_to_mudata(rna, atac, obs, truth["genes"], format_peaks(intervals)), truth, config)


def _check(config: SimulationConfig) -> None:
    """Raise an error for the first size that is out of range."""
    least = {"n_cells": 1, "n_genes": 10, "n_peaks": 10, "n_types": 1, "n_donors": 1, "n_states": 0}
    most = {"n_genes": len(load_gene_table()), "n_peaks": 2_000_000}
    for name, low in least.items():
        if not low <= (value := getattr(config, name)) <= most.get(name, value):
            upper = f" and at most {most[name]}" if name in most else ""
            raise UserError(f"{name} is {value}; make it at least {low}{upper}")
    for name in ("rna_depth", "atac_depth", "imbalance"):
        if getattr(config, name) <= 0:
            raise UserError(f"{name} is {getattr(config, name)}; make it positive")
    if not 0 <= config.blur < 0.5:
        raise UserError(f"blur is {config.blur}; make it at least 0 and below 0.5, where two types become one")


def _open_peaks(config: SimulationConfig) -> float:
    """Return the median number of open peaks per cell; the cap keeps cells different if there are few peaks."""
    return min(float(config.atac_depth), config.n_peaks / 5)


def _chromosomes() -> dict[str, int]:
    """Return the lengths of the chromosomes that hold genes and peaks. Y is left out: not every donor has one."""
    return {chrom: size for chrom, size in chrom_sizes().items() if chrom not in ("chrY", "chrM")}


def _type_truth(config: SimulationConfig) -> dict[str, np.ndarray]:
    """Choose the types and lineages, their proportions, and each type's mean activity in each programme."""
    listed = list(CELL_TYPES[: config.n_types])
    listed += [(f"type {i + 1}", f"lineage {i // 4}") for i in range(len(listed), config.n_types)]
    types, lineages = (np.array(column) for column in zip(*listed, strict=True))
    names, lineage = np.unique(lineages, return_inverse=True)
    n = config.n_types
    proportions = config.imbalance ** -(np.arange(n) / max(n - 1, 1))
    own_and_shared = (1 - config.blur) * np.eye(n) + config.blur * _siblings(lineages)
    activity = np.hstack([np.eye(len(names))[lineage], own_and_shared, np.zeros((n, config.n_states))])
    states = [f"state {i + 1}" for i in range(config.n_states)]
    return {
        "types": types,
        "lineages": lineages,
        "type_proportions": proportions / proportions.sum(),
        "programmes": np.array([*(f"lineage {x}" for x in names), *types, *states]),
        "type_programmes": activity,
    }


def _siblings(lineages: np.ndarray) -> np.ndarray:
    """Return even weights over the other types of each type's lineage, or over itself if it has none: [T, T]."""
    same = (lineages[:, None] == lineages) & ~np.eye(len(lineages), dtype=bool)
    count = same.sum(1, keepdims=True)
    return np.where(count > 0, same / np.maximum(count, 1), np.eye(len(lineages)))


def _per_programme(config: SimulationConfig, truth: dict, lineage: float, of_type: float, state: float) -> np.ndarray:
    """Return one value per programme, by its kind: [K]."""
    n_lineages = len(truth["programmes"]) - config.n_types - config.n_states
    return np.repeat([lineage, of_type, state], [n_lineages, config.n_types, config.n_states])


def _sparse_normal(rng: np.random.Generator, n: int, share: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Draw [n, K] normal values; `share` [K] of each column is not zero and has standard deviation `sd` [K]."""
    return np.where(rng.random((n, len(sd))) < share, rng.normal(0, 1, (n, len(sd))) * sd, 0.0)


def _gene_truth(config: SimulationConfig, truth: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Choose the genes' symbols, and draw their positions, base rates, dispersions and programmes."""
    table = load_gene_table()
    coding = table["protein_coding"].to_numpy()
    # Random order, but protein-coding genes come first: others are taken only if there are not enough of these.
    order = np.argsort(rng.random(len(table)) + ~coding)[: config.n_genes]
    sizes = _chromosomes()
    lengths = np.array(list(sizes.values()))
    chrom = rng.choice(len(sizes), config.n_genes, p=lengths / lengths.sum())
    tss = rng.integers(LINK_REACH, lengths[chrom] - LINK_REACH)
    effect = _per_programme(config, truth, config.lineage_effect, config.type_effect, config.state_effect)
    return {
        "genes": table["symbol"].to_numpy(dtype=str)[order],
        "gene_chrom": np.array(list(sizes))[chrom],
        "gene_tss": tss,
        "gene_base": rng.normal(0, 1.2, config.n_genes),
        "gene_dispersion": config.dispersion * rng.lognormal(0, 0.4, config.n_genes),
        "gene_programmes": _sparse_normal(rng, config.n_genes, _per_programme(config, truth, *GENE_SHARES), effect),
    }


def _place_peaks(config: SimulationConfig, truth: dict, rng: np.random.Generator) -> pd.DataFrame:
    """Place peaks of 200 to 900 bp, at most one per bin: most near a gene, the others anywhere; in genome order."""
    sizes = _chromosomes()
    n_bins = np.array(list(sizes.values())) // BIN
    first_bin = np.concatenate([[0], np.cumsum(n_bins)])
    chrom = pd.Index(sizes).get_indexer(truth["gene_chrom"])
    near = int(NEAR_GENES * config.n_peaks)
    gene = rng.integers(config.n_genes, size=near)
    offset = np.clip(rng.laplace(0, LINK_DECAY, near), -0.95 * LINK_REACH, 0.95 * LINK_REACH)
    bins = np.unique(first_bin[chrom[gene]] + (truth["gene_tss"][gene] + offset).astype(int) // BIN)
    while (missing := config.n_peaks - len(bins)) > 0:  # duplicates are replaced by bins from anywhere
        bins = np.unique(np.concatenate([bins, rng.integers(first_bin[-1], size=missing)]))
    chrom = np.searchsorted(first_bin, bins, side="right") - 1
    width = rng.integers(200, 901, config.n_peaks)
    start = (bins - first_bin[chrom]) * BIN + rng.integers(0, BIN - width)
    return pd.DataFrame({"chrom": np.array(list(sizes))[chrom], "start": start, "end": start + width})


def _link_peaks(intervals: pd.DataFrame, truth: dict) -> dict[str, np.ndarray]:
    """Link each peak to all genes within reach; a peak's weights are scaled to a Euclidean norm of 1 at most."""
    centre = (intervals["start"] + intervals["end"]).to_numpy() // 2
    chrom, pairs = intervals["chrom"].to_numpy(dtype=str), []
    for name in np.unique(chrom):
        peaks = np.flatnonzero(chrom == name)  # sorted by position
        genes = np.flatnonzero(truth["gene_chrom"] == name)
        low = np.searchsorted(centre[peaks], truth["gene_tss"][genes] - LINK_REACH)
        high = np.searchsorted(centre[peaks], truth["gene_tss"][genes] + LINK_REACH, side="right")
        pairs += [(peaks[i:j], np.full(j - i, g)) for g, i, j in zip(genes, low, high, strict=True)]
    peak, gene = (np.concatenate([np.empty(0, int), *column]) for column in zip(*pairs, strict=True))
    distance = np.abs(centre[peak] - truth["gene_tss"][gene])
    weight = np.exp(-distance / LINK_DECAY)
    length = np.sqrt(np.bincount(peak, weight**2, minlength=len(centre)))
    weight /= np.maximum(length, 1)[peak]
    return {"link_peak": peak, "link_gene": gene, "link_weight": weight, "link_distance": distance}


def _draw_cells(
    config: SimulationConfig, truth: dict, rng: np.random.Generator
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Draw donor, type, barcode, activity and depth of each cell; the cells are in random order."""
    n, n_types = config.n_cells, config.n_types
    share = np.stack([rng.dirichlet(200 * truth["type_proportions"]) for _ in range(config.n_donors)])
    # If there are enough cells, each donor has at least two of each type, so every split holds every type.
    least = 2 if n >= 2 * share.size else 0
    extra = rng.multinomial(n - least * share.size, share.ravel() / share.sum())
    group = rng.permutation(np.repeat(np.arange(share.size), least + extra))
    donor, cell_type = np.divmod(group, n_types)

    # A share of each cell's type activity goes to one other type of its lineage, so some cells lie between two types.
    shared = rng.beta(4 * config.blur, 4 * (1 - config.blur), (n, 1)) if config.blur else np.zeros((n, 1))
    activity = truth["type_programmes"][cell_type]
    siblings = _siblings(truth["lineages"])[cell_type]
    sibling = (siblings * rng.random(siblings.shape)).argmax(1)
    one_hot = np.eye(n_types)
    is_type, is_state = (_per_programme(config, truth, *values) == 1 for values in ((0, 1, 0), (0, 0, 1)))
    activity[:, is_type] = (1 - shared) * one_hot[cell_type] + shared * one_hot[sibling]
    state = rng.normal(size=(n, config.n_states))
    activity[:, is_state] = state

    codes = rng.choice(4**16, n, replace=False)  # 16 bases, two bits each
    bases = np.array(list("ACGT"))[(codes[:, None] >> (2 * np.arange(16))) & 3]
    donors = [f"D{i + 1}" for i in range(config.n_donors)]
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(cell_type, truth["types"]),
            "donor": pd.Categorical.from_codes(donor, donors),
        },
        index=[f"{donors[d]}_{''.join(b)}" for d, b in zip(donor, bases, strict=True)],
    )
    quality = rng.normal(size=n)  # shared, so a cell with many RNA counts also has many open peaks
    depth = {
        f"{name}_depth": median * np.exp(0.35 * (0.6 * quality + 0.8 * rng.normal(size=n)))
        for name, median in (("rna", config.rna_depth), ("atac", _open_peaks(config)))
    }
    return obs, {"programme_activity": activity, "cell_state": state, **depth}


def _effects(config: SimulationConfig, truth: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw the donors' and the distal peaks' effects, and compute how accessibility depends on activity."""
    scale = np.full((config.n_donors, 1), config.donor_effect)
    if config.n_donors > 1:
        scale[-1] *= config.last_donor_shift
    loadings, activity = truth["gene_programmes"], truth["programme_activity"]
    linked = csr_matrix(
        (truth["link_weight"], (truth["link_peak"], truth["link_gene"])), shape=(config.n_peaks, config.n_genes)
    )
    sd = (activity @ loadings.T).std(0)[:, None]
    z = loadings / np.where(sd > 1e-6, sd, np.inf)  # a gene that never varies has no effect
    effect = _per_programme(config, truth, config.distal_effect, config.distal_effect, 0)
    distal = _sparse_normal(rng, config.n_peaks, _per_programme(config, truth, *PEAK_SHARES), effect)
    distal[np.unique(truth["link_peak"])] = 0
    slopes = config.link_effect * (linked @ z) + distal
    return {
        "donor_rna": rng.normal(0, scale, (config.n_donors, config.n_genes)),
        "donor_atac": rng.normal(0, scale, (config.n_donors, config.n_peaks)),
        "peak_distal": distal,
        "peak_programmes": slopes,
        "peak_base": rng.normal(-3, 1, config.n_peaks) - slopes @ activity.mean(0),
    }


def _expression(truth: dict, activity: np.ndarray, donor: np.ndarray | float, depth: np.ndarray) -> np.ndarray:
    """Return expected counts [cells, G], given activity [cells, K], donor shift [cells, G] and depth [cells]."""
    log_rate = truth["gene_base"] + activity @ truth["gene_programmes"].T + donor
    rate = np.exp(log_rate - log_rate.max(1, keepdims=True))
    return depth[:, None] * rate / rate.sum(1, keepdims=True)


def _accessibility(truth: dict, activity: np.ndarray, donor: np.ndarray | float, depth: np.ndarray) -> np.ndarray:
    """Return P(open) [cells, P], given activity [cells, K], donor shift [cells, P] and expected open peaks [cells]."""
    logit = truth["peak_base"] + activity @ truth["peak_programmes"].T + donor
    accessibility = 1 / (1 + np.exp(-logit))
    return np.minimum(depth[:, None] * accessibility / accessibility.sum(1, keepdims=True), 0.95)


def _draw_counts(
    config: SimulationConfig, truth: dict, donor: np.ndarray, rng: np.random.Generator
) -> tuple[csr_matrix, csr_matrix]:
    """Draw counts [N, G] and [N, P], a block of cells at a time, because a block is dense in memory."""
    rna, atac = [], []
    size = max(1, BLOCK // max(config.n_genes, config.n_peaks))
    for first in range(0, config.n_cells, size):
        cells = slice(first, first + size)
        activity, d = truth["programme_activity"][cells], donor[cells]
        mean = _expression(truth, activity, truth["donor_rna"][d], truth["rna_depth"][cells])
        shape = 1 / truth["gene_dispersion"]
        rna.append(csr_matrix(rng.poisson(rng.gamma(shape, mean / shape)).astype(np.float32)))
        p = _accessibility(truth, activity, truth["donor_atac"][d], truth["atac_depth"][cells])
        draw = rng.random(p.shape)
        # A peak is open if draw < p. An open one has a second fragment with probability p: P(draw < p² | draw < p) = p.
        atac.append(csr_matrix((draw < p).astype(np.float32) + (draw < p * p)))
    return vstack(rna, format="csr", dtype=np.float32), vstack(atac, format="csr", dtype=np.float32)


def _to_mudata(rna: csr_matrix, atac: csr_matrix, obs: pd.DataFrame, genes: np.ndarray, peaks: np.ndarray) -> MuData:
    """Put counts and annotation together, and mark them as simulated."""
    kinds = {"rna": (rna, genes, "Gene Expression"), "atac": (atac, peaks, "Peaks")}
    modalities = {
        name: AnnData(counts, obs=obs.copy(), var=pd.DataFrame({"feature_types": kind}, index=pd.Index(features)))
        for name, (counts, features, kind) in kinds.items()
    }
    with mudata.set_options(pull_on_update=False):  # obs belongs to the cells, and is set below
        mdata = MuData(modalities)
    mdata.obs[list(obs)] = obs
    for part in (mdata, *modalities.values()):
        part.uns[SIMULATED] = True
    return mdata
