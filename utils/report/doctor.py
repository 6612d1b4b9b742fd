"""The doctor: what is in a file of cells, what preprocessing would do with it, and what to mend first."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
import pandas as pd

from utils.data.intake import FEATURES, Intake, IntakeConfig, not_carried, take_in
from utils.data.labels import check_labels, label_candidates
from utils.data.read import RawFile, open_cells
from utils.errors import UserError

QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}
WIDTH = 110
NAME = 22
FEW_COUNTS, SHALLOW_GENES = 200, 0.9


@dataclass
class Examination:
    """What was found.

    Attributes
    ----------
    sections : title → name → finding (text, number, list, or dict of numbers)
    happens : what preprocess.py would do
    notes : what deserves a look
    problems : what must be mended first; then nothing else will happen
    """

    sections: dict[str, dict]
    happens: list[str]
    notes: list[str]
    problems: list[str]

    def text(self, as_json: bool = False) -> str:
        """A table for people, or JSON for programs."""
        endings = {"what will happen": self.happens, "worth a look": self.notes, "to mend first": self.problems}
        if as_json:
            usable = {"usable": not self.problems}
            return json.dumps(usable | self.sections | {k.replace(" ", "_"): v for k, v in endings.items()}, indent=1)
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
        return ", ".join(f"{name} {_in_words(value)}" for name, value in finding.items()) or "none"
    if isinstance(finding, list):
        return (
            ", ".join(map(_in_words, finding[:8])) + (f", … ({len(finding):,} in all)" if len(finding) > 8 else "")
            or "none"
        )
    if isinstance(finding, float):
        return f"{finding:,.4g}"
    return f"{finding:,}" if isinstance(finding, int) else str(finding)


def examine(
    inputs: tuple[str | None, str | None, str | None],
    label_column: str,
    config: IntakeConfig,
    reference: dict[str, np.ndarray],
    split: Callable[[pd.DataFrame], object],
) -> Examination:
    """Read all of a file, and write nothing.

    Parameters
    ----------
    inputs : what the flags --data_path, --rna_path and --atac_path name
    label_column : column of obs with cell types
    config : the user's word, where the file is not to be believed
    reference : modality → names to align to, or empty
    split : what will divide the cells; raises UserError if the flags for it do not fit
    """
    try:
        with open_cells(*inputs) as file:
            return _examine(file, label_column, config, reference, split)
    except UserError as error:
        return Examination({}, [], [], [str(error)])


def _examine(file: RawFile, label_column: str, config: IntakeConfig, reference: dict, split) -> Examination:
    paths = ", ".join(dict.fromkeys(str(source.path) for source in file.modalities.values()))
    found = Examination({"file": {"path": paths, "format": file.format}}, [], list(file.notes), [])
    for name, source in file.modalities.items():
        try:
            intake = take_in(source, config, reference.get(name), progress=True)
        except UserError as error:
            found.sections[name] = {"cells": len(source.obs)}
            found.problems.append(str(error))
            continue
        found.sections[name] = _genes(intake) if name == "rna" else _peaks(intake)
        found.sections[name] |= _values(intake)
        _tell(intake, found)
        found.happens += [f"{name}: {line.strip()}" for line in not_carried(source)]
    _labels(file, label_column, found)
    try:
        split(file.obs)
    except UserError as error:
        found.problems.append(str(error))
    found.happens.append(f"an {file.suffix} file is written, with cells split into training, validation and test")
    if file.stamp is not None:
        found.happens = ["nothing: the file is preprocessed already; give it to the training scripts"]
    if found.problems:
        found.happens = []
    return found


def _genes(intake: Intake) -> dict:
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


def _peaks(intake: Intake) -> dict:
    return {
        "cells": len(intake.barcodes),
        "peaks": len(intake.alignment.ids),
        "genome build": intake.alignment.genomes or "none of those known fits",
    }


def _values(intake: Intake) -> dict:
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


def _tell(intake: Intake, found: Examination) -> None:
    """What will happen to a modality, and what deserves a look."""
    name, alignment, genes = intake.modality, intake.alignment, intake.alignment.genes
    what = FEATURES[name]
    if genes:
        changed = len(genes.updated) + len(genes.repaired)
        found.happens.append(
            f"{name}: {changed:,} symbols are updated, {genes.n_duplicates:,} duplicates summed as counts, "
            f"{len(alignment.features):,} genes written in "
            + ("the order asked for" if alignment.by_reference else "alphabetical order")
        )
        if genes.ambiguous:
            found.notes.append(
                f"{len(genes.ambiguous):,} ids may mean several genes and stay as they are; rename those that matter"
            )
        if genes.species == "unknown":
            found.notes.append("the species could not be told and no symbol is updated; state it by --species")
        elif genes.known.mean() < 0.7:
            found.notes.append(
                f"{1 - genes.known.mean():.0%} of the ids are no known {genes.species} gene; are they transcripts?"
            )
    else:
        found.notes += alignment.notes
        found.happens.append(
            f"{name}: {len(alignment.features):,} peaks are written in genome order, open where above 0"
        )
        if intake.config.genome is None:
            found.notes.append("peaks are checked against the genome build when it is stated by --genome")
    if intake.values.kind == "log1p" or not intake.values.exact:
        state = (
            "turned back into counts" if intake.values.exact else "scaled to one sum per cell; there will be no counts"
        )
        if intake.values.kind != "open":
            found.happens.append(f"{name}: values in {intake.place} are {intake.values.kind} and are {state}")
    if intake.values.guessed:
        found.notes.append("the base of the logarithm could not be told from the values and is taken to be e")
    if not intake.measured.all():
        found.happens.append(f"{name}: {(~intake.measured).sum():,} cells without a count in these {what} are left out")
    median = float(np.median(intake.totals[intake.measured]))
    if name == "rna" and intake.values.exact and median < FEW_COUNTS:
        found.notes.append(
            f"the median cell has {median:,.0f} counts: at --target_sum 1e4 even a single one is a high value; "
            f"consider --target_sum {max(100, round(10 * median, -2)):.0f}"
        )


def _labels(file: RawFile, column: str, found: Examination) -> None:
    candidates = label_candidates(file.obs)
    found.sections["labels"] = {name: sizes for name, sizes in candidates.items()} or {"candidates": "none"}
    try:
        words = check_labels(file.obs, column, file.path)
    except UserError as error:
        found.problems.append(str(error))
        return
    if words == "no cell types" and candidates:
        words += f" in {column}; name the column by --label_column, perhaps {next(iter(candidates))}"
    found.notes.append(words)
