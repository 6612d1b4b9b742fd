"""The doctor: what is in a file of cells, what preprocessing would do with it, and what must be fixed first."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
import pandas as pd

from models.rna_encoder import N_BINS
from models.shapes import FEATURES
from utils.cells.config import IngestConfig
from utils.cells.ingest import Ingested, count, ingest, not_carried
from utils.cells.labels import check_labels, label_candidates
from utils.cells.preprocessed import RawFile, open_cells
from utils.cells.split import types_that_lack_cells
from utils.errors import UserError
from utils.features import normalise as prepare
from utils.features.gene_symbols import is_clone_name

QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}
SHOWN = {"least": "min", "most": "max"}
"""Names in the table of what has another one in JSON, which programs rely on."""
WIDTH = 110
NAME = 22
HIGH_BIN = 3
"""If one count of the median cell falls into this bin of expression or a higher one, few are left for more counts."""


@dataclass
class Examination:
    """What was found.

    Attributes
    ----------
    sections : title → name → finding (text, number, list, or dict of numbers)
    happens : what preprocess.py would do
    notes : warnings, and what else a user should look at
    problems : what must be fixed first; until then nothing else will happen
    """

    sections: dict[str, dict]
    happens: list[str]
    notes: list[str]
    problems: list[str]

    def text(self, as_json: bool = False) -> str:
        """A table for people, or JSON for programs."""
        if as_json:
            endings = {"what_will_happen": self.happens, "worth_a_look": self.notes, "to_mend_first": self.problems}
            return json.dumps({"usable": not self.problems} | self.sections | endings, indent=1)
        endings = {"what will happen": self.happens, "warnings": self.notes, "must fix": self.problems}
        lines = []
        for title, findings in self.sections.items():
            lines.append(title)
            for name, finding in findings.items():
                rows = wrap(_in_words(finding), WIDTH - NAME - 2) or [""]
                lines += [f"  {name if i == 0 else '':<{NAME}}{row}" for i, row in enumerate(rows)]
        for title, items in endings.items():
            if items:
                lines.append(title)
                lines += [
                    line
                    for item in items
                    for line in wrap(item, WIDTH, initial_indent="  - ", subsequent_indent="    ")
                ]
        return "\n".join(lines)


def _in_words(finding) -> str:
    if isinstance(finding, dict):
        return ", ".join(f"{SHOWN.get(name, name)} {_in_words(value)}" for name, value in finding.items()) or "none"
    if isinstance(finding, list):
        return (
            ", ".join(map(_in_words, finding[:8])) + (f", … ({len(finding):,} in all)" if len(finding) > 8 else "")
            or "none"
        )
    if isinstance(finding, float):
        return f"{finding:,.0f}" if abs(finding) >= 1000 else f"{finding:.4g}"
    return f"{finding:,}" if isinstance(finding, int) else str(finding)


def examine(
    inputs: tuple[str | None, str | None, str | None],
    config: IngestConfig,
    reference: dict[str, np.ndarray],
    split: Callable[[pd.DataFrame], np.ndarray],
    label_column: str,
    any_labels: bool,
    target_sum: str,
) -> Examination:
    """Read all of a file, and write nothing.

    Parameters
    ----------
    inputs : what the flags --data_path, --rna_path and --atac_path name
    config : the user's word, where the file is not to be believed
    reference : modality → names to align to, or empty
    split : what will divide the cells, given their annotation; raises UserError if the flags for it do not fit
    label_column, any_labels, target_sum : the flags of preprocess.py
    """
    try:
        with open_cells(*inputs) as file:
            return _examine(file, config, reference, split, label_column, any_labels, target_sum)
    except UserError as error:
        return Examination({}, [], [], [str(error)])


def _examine(
    file: RawFile, config: IngestConfig, reference: dict, split, label_column: str, any_labels: bool, target_sum: str
) -> Examination:
    paths = ", ".join(dict.fromkeys(str(source.path) for source in file.modalities.values()))
    found = Examination({"file": {"path": paths, "format": file.format}}, [], list(file.notes), [])
    for name, source in file.modalities.items():
        try:
            intake = ingest(source, config, reference.get(name), progress=True)
            scale = prepare.choose_target_sum(target_sum, intake.totals) if name == "rna" else 0.0
        except UserError as error:
            found.sections[name] = {"cells": len(source.obs)}
            found.problems.append(str(error))
            continue
        found.sections[name] = _genes(intake) if name == "rna" else _peaks(intake)
        found.sections[name] |= _values(intake)
        _report(intake, found, scale)
        found.happens += [f"{name}: {line.strip()}" for line in not_carried(source)]
    _labels(file, label_column, any_labels, found)
    try:
        parts = split(file.obs)
        if label_column in file.obs and not found.problems:
            found.notes += types_that_lack_cells(file.obs[label_column], parts)
    except UserError as error:
        found.problems.append(str(error))
    if file.simulated:
        found.notes.append("the cells are marked as simulated; so will be all models that are trained on them")
    found.happens.append(f"an {file.suffix} file is written, with cells split into training, validation and test")
    if file.stamp is not None:
        found.happens = ["nothing: the file is preprocessed already; give it to the training scripts"]
    if found.problems:
        found.happens = []
    return found


def _genes(intake: Ingested) -> dict:
    genes = intake.alignment.genes
    findings = {
        "cells": len(intake.barcodes),
        "genes": len(genes.symbols),
        "ids": genes.id_type + (" in the index" if genes.column == "index" else f" in var['{genes.column}']"),
        "species": genes.species,
        "known genes": f"{genes.known.mean():.1%}",
        "updated": [f"{old} → {new}" for old, new in genes.updated.items()],
        "ambiguous": [f"{gene} ({' or '.join(symbols)})" for gene, symbols in genes.ambiguous.items()],
        "unknown": genes.unknown,
        "duplicates": genes.n_duplicates,
        "summed": [f"{symbol} from {' and '.join(ids)}" for symbol, ids in genes.merged.items()],
    }
    return findings | (
        {"spreadsheet dates": [f"{a} → {b}" for a, b in genes.repaired.items()]} if genes.repaired else {}
    )


def _peaks(intake: Ingested) -> dict:
    return {
        "cells": len(intake.barcodes),
        "peaks": len(intake.alignment.ids),
        "genome build": intake.alignment.genomes or "none of those known fits",
    }


def _values(intake: Ingested) -> dict:
    alignment = intake.alignment
    quantiles = lambda values: {
        name: int(q) if float(q).is_integer() else round(float(q), 2)
        for name, q in zip(QUANTILES, np.quantile(values, list(QUANTILES.values())), strict=True)
    }
    what = FEATURES[intake.modality]
    findings = {
        "values": f"{intake.values} in {intake.place}",
        "counts per cell" if intake.values.exact else "sum per cell": quantiles(intake.all_totals),
        f"{what} per cell": quantiles(intake.n_expressed),
        "empty cells": int((~intake.measured).sum()),
    }
    if alignment.by_reference:
        findings["asked for"] = (
            f"{alignment.n_found:,} of {len(alignment.features):,} {what} found {alignment.how} "
            f"({alignment.coverage:.1%}), with {intake.count_coverage:.1%} of the counts"
        )
    return findings


def _report(intake: Ingested, found: Examination, target_sum: float) -> None:
    """Add what will happen to a modality, and what a user should look at; `target_sum` is of RNA."""
    name, alignment, genes = intake.modality, intake.alignment, intake.alignment.genes
    what = FEATURES[name]
    if genes:
        changed = len(genes.updated) + len(genes.repaired)
        found.happens.append(
            f"{name}: {count(changed, 'symbol')} updated, {count(genes.n_duplicates, 'duplicate')} summed as counts, "
            f"{len(alignment.features):,} genes written in "
            + ("the order asked for" if alignment.by_reference else "alphabetical order")
        )
        if genes.ambiguous:
            found.notes.append(
                f"{len(genes.ambiguous):,} ids may mean several genes and stay as they are; rename those that matter"
            )
        if genes.species == "unknown":
            found.notes.append("the species is not clear and no symbol is updated; state it by --species")
        elif genes.species != "other" and genes.known.mean() < 0.7:
            found.notes.append(
                f"{1 - genes.known.mean():.0%} of the ids are no known {genes.species} gene" + _guess(genes.unknown)
            )
    else:
        found.notes += alignment.notes
        found.happens.append(
            f"{name}: {len(alignment.features):,} peaks are written in genome order, open where above 0"
        )
        if intake.config.genome is None:
            found.notes.append("peaks are checked against the genome build when it is stated by --genome")
    if intake.values.kind == "log1p" or not intake.values.exact:
        kind = "estimated counts" if intake.values.kind == "counts" else intake.values.kind
        state = (
            "turned back into counts" if intake.values.exact else "scaled to one sum per cell; no counts are written"
        )
        if intake.values.kind != "open":
            found.happens.append(f"{name}: values in {intake.place} are {kind} and are {state}")
    if intake.values.guessed:
        found.notes.append("the base of the logarithm does not follow from the values and is taken to be e")
    found.notes += intake.warnings
    if not intake.measured.all():
        found.happens.append(f"{name}: {(~intake.measured).sum():,} cells without a count in these {what} are left out")
    if name == "rna":
        found.notes += coarse_bins(intake, target_sum)


def coarse_bins(intake: Ingested, target_sum: float) -> list[str]:
    """A line of advice where few bins of expression are left above a single count of the median cell, or none.

    Parameters
    ----------
    intake : of RNA
    target_sum : counts per cell after scaling
    """
    median = float(np.median(intake.totals[intake.measured]))
    bin_of_one = int(np.log2(1 + target_sum / median))
    if not (intake.values.exact or intake.values.kind == "counts") or bin_of_one < HIGH_BIN:
        return []
    return [
        f"one count of the median cell, which has {median:,.0f}, falls into bin {min(bin_of_one, N_BINS - 1)} "
        f"(0 … {N_BINS - 1}) at --target_sum {target_sum:g}; consider --target_sum "
        f"{max(100, round(3 * median, -2)):.0f}"
    ]


def _guess(unknown: list[str]) -> str:
    """What ids that mean no known gene may be."""
    shares = {
        "; most of these are names of clones, as older annotations have them for lncRNAs": is_clone_name,
        "; most of these are transcripts, not genes": lambda gene: gene.startswith(("ENST", "ENSMUST", "NM_", "NR_")),
    }
    words = (word for word, fits in shares.items() if 2 * sum(map(fits, unknown)) > len(unknown))
    return f"{next(words, '')} ({', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''}); they stay as they are"


def _labels(file: RawFile, column: str, any_labels: bool, found: Examination) -> None:
    candidates = label_candidates(file.obs)
    found.sections["labels"] = {name: sizes for name, sizes in candidates.items()} or {"candidates": "none"}
    try:
        words = check_labels(file.obs, column, file.path, any_labels)
    except UserError as error:
        found.problems.append(str(error))
        return
    if words == "no cell types" and candidates:
        words += f" in {column}; name the column by --label_column, perhaps {next(iter(candidates))}"
    found.notes.append(words)
