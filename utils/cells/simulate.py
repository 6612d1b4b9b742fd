"""Simulated paired RNA + ATAC cells whose whole truth is known.

The generative model, for cell c of type t and donor d, gene g, peak p:

    activity   a_c  = [lineage of t | type of t, blurred with its siblings | continuous cell states]    programmes
    RNA        m_cg = softmax_g(base_g + Σ_k W_gk a_ck + donor_dg)                                 share of a cell's RNA
               x_cg ~ NB(mean depth_c · m_cg, dispersion φ_g), variance mean + φ mean²
    ATAC       l_cp = baseline_p + link · Σ_g L_pg z_cg + Σ_k D_pk a_ck + donor_dp             logit of accessibility
               o_cp ~ Bernoulli(depth_c · σ(l_cp) / Σ_p σ(l_cp)), counts 1 or 2 where open

z_cg is the gene's log rate W_g·a_c, z-scored over cells, and L the peak-gene links, which decay with distance; D are
distal peaks that belong to a lineage or a type and follow no gene. Both modalities are thus driven by the same
activity: accessibility can be predicted from RNA, within a type through the cell states, yet the distal peaks and the
evenly scaled links add to what a cell's noisy RNA says about its sub-type. Gene symbols are real; all positions are
invented.
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

# (type, lineage) in the order in which types are added, the most common first.
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
BIN = 1_000  # one peak at most per bin of this many base pairs, so peaks never overlap
LINK_REACH = 100_000  # base pairs between a gene's start and the peaks linked to it
LINK_DECAY = 30_000  # base pairs over which a link's weight falls by e
NEAR_GENES = 0.75  # share of peaks placed within reach of a gene
GENE_SHARES = (0.20, 0.06, 0.15)  # of the genes in a programme of a lineage, a type, a state
PEAK_SHARES = (0.30, 0.06, 0.0)  # of the distal peaks in such a programme
BLOCK = 8_000_000  # values in the largest dense array


@dataclass(frozen=True)
class SimulationConfig:
    """Size and hardness of the simulated data."""

    n_cells: int = field(default=3000, metadata={"help": "number of cells"})
    n_genes: int = field(default=1000, metadata={"help": "number of genes"})
    n_peaks: int = field(default=5000, metadata={"help": "number of peaks"})
    n_types: int = field(default=8, metadata={"help": "number of cell types"})
    n_donors: int = field(default=5, metadata={"help": "number of donors, each a batch; the last one is shifted"})
    rna_depth: float = field(default=1500.0, metadata={"help": "median RNA counts per cell"})
    atac_depth: float = field(
        default=400.0, metadata={"help": "median open peaks per cell, at most a fifth of the peaks"}
    )
    imbalance: float = field(default=12.0, metadata={"help": "how many times commoner the first type is than the last"})
    lineage_effect: float = field(default=1.0, metadata={"help": "sd of the log fold changes between lineages"})
    type_effect: float = field(default=0.8, metadata={"help": "sd of the log fold changes between a lineage's types"})
    state_effect: float = field(default=0.5, metadata={"help": "sd of the log fold changes per sd of a cell state"})
    blur: float = field(default=0.2, metadata={"help": "mean share of a cell's type programme lent to a sibling type"})
    dispersion: float = field(default=0.3, metadata={"help": "median negative-binomial dispersion of a gene"})
    link_effect: float = field(default=2.0, metadata={"help": "logit per sd of the log rate of a gene at the peak"})
    distal_effect: float = field(default=1.0, metadata={"help": "sd of the logits of distal peaks"})
    donor_effect: float = field(default=0.15, metadata={"help": "sd of a donor's log rates and logits"})
    last_donor_shift: float = field(default=2.0, metadata={"help": "how many times larger the last donor's effect is"})
    n_states: int = field(default=3, metadata={"help": "number of continuous cell states"})
    seed: int = field(default=0, metadata={"help": "the same seed gives the same data"})


@dataclass
class Simulation:
    """Simulated cells and what was planted in them.

    Attributes
    ----------
    mdata
        Modalities ``rna`` and ``atac``, raw integer counts in CSR float32; peaks stand in genome order. ``obs`` holds
        ``cell_type`` and ``donor``, in the whole and in each modality; ``uns["scmomer_simulated"]`` marks all three.
    truth
        T types, D donors, K programmes, S states, N cells, G genes, P peaks, E links. Rows follow the data's order.

        - ``types`` [T], ``lineages`` [T] (each type's), ``type_proportions`` [T]
        - ``programmes`` [K] names; ``gene_programmes`` [G, K] log fold changes W; ``type_programmes`` [T, K] a type's
          mean activity
        - ``genes`` [G] symbols; ``gene_chrom`` [G], ``gene_tss`` [G] base pairs, invented; ``gene_base`` [G] log rate;
          ``gene_dispersion`` [G]
        - ``link_peak``, ``link_gene`` [E] positions; ``link_weight`` [E] L; ``link_distance`` [E] base pairs
        - ``peak_distal`` [P, K] distal logits D; ``peak_base`` [P] and ``peak_programmes`` [P, K] the logit's intercept
          and slopes in activity, links and distal logits together
        - ``donor_rna`` [D, G], ``donor_atac`` [D, P] shifts of log rate and logit
        - ``type_expression`` [T, G] mean counts and ``type_accessibility`` [T, P] P(open) of a cell of median depth,
          mean activity and no donor effect
        - ``programme_activity`` [N, K]; ``cell_state`` [N, S], its last S columns
        - ``rna_depth``, ``atac_depth`` [N] expected counts and open peaks
    config
        The configuration.
    """

    mdata: MuData
    truth: dict[str, np.ndarray]
    config: SimulationConfig


def simulate(config: SimulationConfig | None = None) -> Simulation:
    """Draw paired cells from the model above.

    Parameters
    ----------
    config
        Sizes, hardness and seed; the defaults if None.

    Returns
    -------
    The cells and the truth.

    Raises
    ------
    UserError
        If a size cannot be made.
    """
    config = config or SimulationConfig()
    _check(config)
    rng = np.random.default_rng(config.seed)
    truth = _types(config)
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
        raise UserError(f"blur is {config.blur}; at 0.5 types are alike, so choose a share from 0 to less than 0.5")


def _open_peaks(config: SimulationConfig) -> float:
    """Median open peaks per cell; capped so that a small peak set still differs between cells."""
    return min(float(config.atac_depth), config.n_peaks / 5)


def _chromosomes() -> dict[str, int]:
    """The chromosomes that hold genes and peaks, with their lengths: those that every donor has."""
    return {chrom: size for chrom, size in chrom_sizes().items() if chrom not in ("chrY", "chrM")}


def _types(config: SimulationConfig) -> dict[str, np.ndarray]:
    """Names and lineages, proportions, and each type's mean activity of lineage, type and state programmes."""
    listed = list(CELL_TYPES[: config.n_types])
    listed += [(f"type {i + 1}", f"lineage {i // 4}") for i in range(len(listed), config.n_types)]
    types, lineages = (np.array(column) for column in zip(*listed, strict=True))
    names, lineage = np.unique(lineages, return_inverse=True)
    n = config.n_types
    proportions = config.imbalance ** -(np.arange(n) / max(n - 1, 1))
    own_and_lent = (1 - config.blur) * np.eye(n) + config.blur * _siblings(lineages)
    activity = np.hstack([np.eye(len(names))[lineage], own_and_lent, np.zeros((n, config.n_states))])
    states = [f"state {i + 1}" for i in range(config.n_states)]
    return {
        "types": types,
        "lineages": lineages,
        "type_proportions": proportions / proportions.sum(),
        "programmes": np.array([*(f"lineage {x}" for x in names), *types, *states]),
        "type_programmes": activity,
    }


def _siblings(lineages: np.ndarray) -> np.ndarray:
    """[T, T] a type's even shares of its lineage's other types; itself where it has none."""
    same = (lineages[:, None] == lineages) & ~np.eye(len(lineages), dtype=bool)
    count = same.sum(1, keepdims=True)
    return np.where(count > 0, same / np.maximum(count, 1), np.eye(len(lineages)))


def _kinds(config: SimulationConfig, truth: dict, lineage: float, of_type: float, state: float) -> np.ndarray:
    """One value per programme, by its kind: [K]."""
    n_lineages = len(truth["programmes"]) - config.n_types - config.n_states
    return np.repeat([lineage, of_type, state], [n_lineages, config.n_types, config.n_states])


def _sparse_normal(rng: np.random.Generator, n: int, share: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """[n, K] normal values, of which only a share is not zero; share and standard deviation [K] per column."""
    return np.where(rng.random((n, len(sd))) < share, rng.normal(0, 1, (n, len(sd))) * sd, 0.0)


def _gene_truth(config: SimulationConfig, truth: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Symbols, invented positions, base rates and programmes of the genes."""
    table = load_gene_table()
    coding = table["protein_coding"].to_numpy()
    # Protein-coding genes first, the others only when there are more genes than those.
    order = np.argsort(rng.random(len(table)) + ~coding)[: config.n_genes]
    sizes = _chromosomes()
    lengths = np.array(list(sizes.values()))
    chrom = rng.choice(len(sizes), config.n_genes, p=lengths / lengths.sum())
    tss = rng.integers(LINK_REACH, lengths[chrom] - LINK_REACH)
    effect = _kinds(config, truth, config.lineage_effect, config.type_effect, config.state_effect)
    return {
        "genes": table["symbol"].to_numpy(dtype=str)[order],
        "gene_chrom": np.array(list(sizes))[chrom],
        "gene_tss": tss,
        "gene_base": rng.normal(0, 1.2, config.n_genes),
        "gene_dispersion": config.dispersion * rng.lognormal(0, 0.4, config.n_genes),
        "gene_programmes": _sparse_normal(rng, config.n_genes, _kinds(config, truth, *GENE_SHARES), effect),
    }


def _place_peaks(config: SimulationConfig, truth: dict, rng: np.random.Generator) -> pd.DataFrame:
    """Peaks of 200-900 bp in genome order, one per bin: most within reach of a gene, the others anywhere."""
    sizes = _chromosomes()
    n_bins = np.array(list(sizes.values())) // BIN
    first_bin = np.concatenate([[0], np.cumsum(n_bins)])
    chrom = pd.Index(sizes).get_indexer(truth["gene_chrom"])
    near = int(NEAR_GENES * config.n_peaks)
    gene = rng.integers(config.n_genes, size=near)
    offset = np.clip(rng.laplace(0, LINK_DECAY, near), -0.95 * LINK_REACH, 0.95 * LINK_REACH)
    bins = np.unique(first_bin[chrom[gene]] + (truth["gene_tss"][gene] + offset).astype(int) // BIN)
    while (missing := config.n_peaks - len(bins)) > 0:  # bins drawn twice are filled up from the whole genome
        bins = np.unique(np.concatenate([bins, rng.integers(first_bin[-1], size=missing)]))
    chrom = np.searchsorted(first_bin, bins, side="right") - 1
    width = rng.integers(200, 901, config.n_peaks)
    start = (bins - first_bin[chrom]) * BIN + rng.integers(0, BIN - width)
    return pd.DataFrame({"chrom": np.array(list(sizes))[chrom], "start": start, "end": start + width})


def _link_peaks(intervals: pd.DataFrame, truth: dict) -> dict[str, np.ndarray]:
    """All pairs of a peak and a gene within reach; a peak's weights have length 1 at most, however many its genes."""
    centre = (intervals["start"] + intervals["end"]).to_numpy() // 2
    chrom, pairs = intervals["chrom"].to_numpy(dtype=str), []
    for name in np.unique(chrom):
        peaks = np.flatnonzero(chrom == name)  # in order of position
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
    """Donor, type, barcode, activity and depth of each cell, in random order."""
    n, n_types = config.n_cells, config.n_types
    share = np.stack([rng.dirichlet(200 * truth["type_proportions"]) for _ in range(config.n_donors)])
    # Two cells of each type per donor where there are enough cells, so that every split holds every type.
    least = 2 if n >= 2 * share.size else 0
    extra = rng.multinomial(n - least * share.size, share.ravel() / share.sum())
    group = rng.permutation(np.repeat(np.arange(share.size), least + extra))
    donor, cell_type = np.divmod(group, n_types)

    # A cell lends a share of its type programme to one sibling's, so that some cells lie between two types.
    lent = rng.beta(4 * config.blur, 4 * (1 - config.blur), (n, 1)) if config.blur else np.zeros((n, 1))
    activity = truth["type_programmes"][cell_type]
    siblings = _siblings(truth["lineages"])[cell_type]
    sibling = (siblings * rng.random(siblings.shape)).argmax(1)
    one_hot = np.eye(n_types)
    activity[:, _kinds(config, truth, 0, 1, 0) == 1] = (1 - lent) * one_hot[cell_type] + lent * one_hot[sibling]
    state = rng.normal(size=(n, config.n_states))
    activity[:, _kinds(config, truth, 0, 0, 1) == 1] = state

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
    quality = rng.normal(size=n)  # a good cell is deep in both modalities
    depth = {
        f"{name}_depth": median * np.exp(0.35 * (0.6 * quality + 0.8 * rng.normal(size=n)))
        for name, median in (("rna", config.rna_depth), ("atac", _open_peaks(config)))
    }
    return obs, {"programme_activity": activity, "cell_state": state, **depth}


def _effects(config: SimulationConfig, truth: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Donor effects, distal peaks, and the loadings that turn activity into accessibility."""
    scale = np.full((config.n_donors, 1), config.donor_effect)
    if config.n_donors > 1:
        scale[-1] *= config.last_donor_shift
    loadings, activity = truth["gene_programmes"], truth["programme_activity"]
    linked = csr_matrix(
        (truth["link_weight"], (truth["link_peak"], truth["link_gene"])), shape=(config.n_peaks, config.n_genes)
    )
    sd = (activity @ loadings.T).std(0)[:, None]
    z = loadings / np.where(sd > 1e-6, sd, np.inf)  # genes that never vary have no say
    effect = _kinds(config, truth, config.distal_effect, config.distal_effect, 0)
    distal = _sparse_normal(rng, config.n_peaks, _kinds(config, truth, *PEAK_SHARES), effect)
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
    """Expected counts [cells, G] of cells with an activity [cells, K], donor shift [cells, G] and depth [cells]."""
    log_rate = truth["gene_base"] + activity @ truth["gene_programmes"].T + donor
    rate = np.exp(log_rate - log_rate.max(1, keepdims=True))
    return depth[:, None] * rate / rate.sum(1, keepdims=True)


def _accessibility(truth: dict, activity: np.ndarray, donor: np.ndarray | float, depth: np.ndarray) -> np.ndarray:
    """P(open) [cells, P] of cells with an activity [cells, K], donor shift [cells, P] and expected open peaks."""
    logit = truth["peak_base"] + activity @ truth["peak_programmes"].T + donor
    accessibility = 1 / (1 + np.exp(-logit))
    return np.minimum(depth[:, None] * accessibility / accessibility.sum(1, keepdims=True), 0.95)


def _draw_counts(
    config: SimulationConfig, truth: dict, donor: np.ndarray, rng: np.random.Generator
) -> tuple[csr_matrix, csr_matrix]:
    """Counts [N, G] and [N, P]; only a block of cells is ever dense."""
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
        # A second fragment with probability p: draw < p² given draw < p.
        atac.append(csr_matrix((draw < p).astype(np.float32) + (draw < p * p)))
    return vstack(rna, format="csr", dtype=np.float32), vstack(atac, format="csr", dtype=np.float32)


def _to_mudata(rna: csr_matrix, atac: csr_matrix, obs: pd.DataFrame, genes: np.ndarray, peaks: np.ndarray) -> MuData:
    kinds = {"rna": (rna, genes, "Gene Expression"), "atac": (atac, peaks, "Peaks")}
    modalities = {
        name: AnnData(counts, obs=obs.copy(), var=pd.DataFrame({"feature_types": kind}, index=pd.Index(features)))
        for name, (counts, features, kind) in kinds.items()
    }
    with mudata.set_options(pull_on_update=False):  # the annotations are the cells', not a modality's
        mdata = MuData(modalities)
    mdata.obs[list(obs)] = obs
    for part in (mdata, *modalities.values()):
        part.uns[SIMULATED] = True
    return mdata
