"""The doctor (preprocess.py --check) reports what a file holds, what preprocessing would do, what must be fixed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
import pandas as pd

from models.rna_encoder import N_BINS
from models.shapes import FEATURES
from utils.cells.config import IngestConfig
from utils.cells.ingest import Ingested, count, ingest, listed, not_copied
from utils.cells.join import file_names, join_genes, open_files
from utils.cells.labels import check_labels, label_candidates
from utils.cells.preprocessed import RawFile
from utils.cells.split import types_that_lack_cells
from utils.errors import UserError
from utils.features.gene_symbols import is_clone_name
from utils.features.normalise import choose_target_sum
from utils.features.peaks import CHROM_SIZES
from utils.files.source import Source

QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}
"""Quantiles that describe counts per cell, by their names in JSON."""
SHOWN = {"least": "min", "most": "max"}
"""Shorter names in the table. JSON keeps the names above, because programs rely on them."""
WIDTH = 110
"""Columns of text in a line of the table."""
NAME = 22
"""Columns of text for the name of a finding."""
ITEMS = 8
"""A longer list is cut after this many items."""
HIGH_BIN = 3
"""If a single count of the median cell falls into this expression bin or a higher one, few bins are left for higher
counts, and the user is advised to choose a smaller --target_sum."""
FEW_KNOWN = 0.7
"""If a smaller share of the ids are known genes of the species, the doctor adds a note with a likely reason."""


@dataclass
class Examination:
    """The doctor's findings.

    Attributes
    ----------
    sections : title → name → finding (text, number, list, or dict of numbers)
    actions : what preprocess.py would do
    notes : warnings and advice
    problems : what must be fixed first; while there is a problem, preprocess.py does nothing
    """

    sections: dict[str, dict]
    actions: list[str]
    notes: list[str]
    problems: list[str]

    def text(self, as_json: bool = False) -> str:
        """Format the findings as a table for people, or as JSON for programs."""
        if as_json:
            lists = {"what_will_happen": self.actions, "notes": self.notes, "problems": self.problems}
            return json.dumps({"usable": not self.problems} | self.sections | lists, indent=1)
        lists = {"what will happen": self.actions, "notes": self.notes, "problems": self.problems}
        lines = []
        for title, findings in self.sections.items():
            lines.append(title)
            for name, finding in findings.items():
                rows = wrap(_in_words(finding), WIDTH - NAME - 2) or [""]
                lines += [f"  {name if i == 0 else '':<{NAME}}{row}" for i, row in enumerate(rows)]
        for title, items in lists.items():
            if items:
                lines.append(title)
                for item in items:
                    lines += wrap(item, WIDTH, initial_indent="  - ", subsequent_indent="    ")
        return "\n".join(lines)


def _in_words(finding) -> str:
    """Format a finding for the table; long lists are cut."""
    if isinstance(finding, dict):
        return ", ".join(f"{SHOWN.get(name, name)} {_in_words(value)}" for name, value in finding.items()) or "none"
    if isinstance(finding, list):
        shown = ", ".join(map(_in_words, finding[:ITEMS])) or "none"
        return shown + (f", … ({len(finding):,} in all)" if len(finding) > ITEMS else "")
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
    batch_column: str = "batch",
) -> Examination:
    """Report what a file holds and what preprocessing would do; read all of it, and write nothing.

    Parameters
    ----------
    inputs : values of the flags --data_path, --rna_path and --atac_path
    config : user overrides for what is otherwise inferred from the file
    reference : modality → names of the genes or peaks of the reference; empty for all the file's
    split : assigns cells to train, val or test, given their annotation; raises UserError if the flags do not fit it
    label_column, any_labels, target_sum, batch_column : the flags of preprocess.py

    Returns
    -------
    The findings; an error that the user can fix is one of their problems, and does not hide the other findings
    """
    try:
        with open_files(*inputs, batch_column) as file:
            return _examine(file, config, reference, split, label_column, any_labels, target_sum)
    except UserError as error:
        return Examination({}, [], [], [str(error)])


def _examine(
    file: RawFile, config: IngestConfig, reference: dict, split, label_column: str, any_labels: bool, target_sum: str
) -> Examination:
    """Examine an opened file, or several that are joined; parameters as of `examine`."""
    paths = ", ".join(map(str, file.inputs))
    found = Examination({"file": {"path": paths, "format": file.format}}, [], list(file.notes), [])
    for modality, sources in file.sources.items():
        _add_modality(found, sources, config, reference.get(modality), target_sum)
    _add_labels(found, file, label_column, any_labels)
    try:
        parts = split(file.obs)
        if label_column in file.obs and not found.problems:
            found.notes += types_that_lack_cells(file.obs[label_column], parts)
    except UserError as error:
        found.problems.append(str(error))
    if file.simulated:
        found.notes.append("the cells are marked as simulated, and so will be every model that is trained on them")
    found.actions.append(f"an {file.suffix} file is written, with cells split into training, validation and test")
    if file.stamp is not None:
        found.actions = ["nothing: the file is preprocessed already; give it to the training scripts"]
    if found.problems:
        found.actions = []
    return found


def _add_modality(
    found: Examination, sources: list[Source], config: IngestConfig, reference: np.ndarray | None, target_sum: str
) -> None:
    """Add what the files hold of a modality, and what would be done to it; parameters as of `examine`."""
    modality, parts = sources[0].modality, {}
    names = file_names([source.path for source in sources]) if len(sources) > 1 else []
    for title, source in zip([f"{modality} of {name}" for name in names] or [modality], sources, strict=True):
        try:
            parts[title] = ingest(source, config, reference, progress=True)
        except UserError as error:
            found.sections[title] = {"cells": len(source.obs)}
            found.problems.append(str(error))
    try:
        if len(parts) == len(sources):
            joined, lines = join_genes(list(parts.values()))
            parts = dict(zip(parts, joined, strict=True))
            found.notes += [line.strip() for line in lines]
    except UserError as error:
        found.problems.append(str(error))
    for title, part in parts.items():
        findings = _gene_findings(part) if modality == "rna" else _peak_findings(part)
        found.sections[title] = findings | _value_findings(part)
        found.actions += _actions(part, title)
        found.notes += [f"{title}: {note}" if names else note for note in _notes(part)]
        found.actions += [f"{title}: {line.strip()}" for line in not_copied(part.source)]
    if modality == "rna" and parts:
        try:
            totals = np.concatenate([part.totals for part in parts.values()])
            found.notes += coarse_bins(list(parts.values()), choose_target_sum(target_sum, totals))
        except UserError as error:
            found.problems.append(str(error))


def _gene_findings(ingested: Ingested) -> dict:
    """Name → finding: which genes the file has, and what becomes of their names."""
    genes = ingested.alignment.genes
    findings = {
        "cells": len(ingested.barcodes),
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
    if genes.repaired:
        findings["spreadsheet dates"] = [f"{date} → {symbol}" for date, symbol in genes.repaired.items()]
    return findings


def _peak_findings(ingested: Ingested) -> dict:
    """Name → finding: how many peaks the file has, and of which genome build."""
    return {
        "cells": len(ingested.barcodes),
        "peaks": len(ingested.alignment.ids),
        "genome build": ingested.alignment.genomes or f"none of {', '.join(CHROM_SIZES)} fits",
    }


def _value_findings(ingested: Ingested) -> dict:
    """Name → finding: what the values are, and how many each cell has."""
    alignment = ingested.alignment
    quantiles = lambda values: {
        name: int(q) if float(q).is_integer() else round(float(q), 2)
        for name, q in zip(QUANTILES, np.quantile(values, list(QUANTILES.values())), strict=True)
    }
    features = FEATURES[ingested.modality]
    findings = {
        "values": f"{ingested.values} in {ingested.place}",
        "counts per cell" if ingested.values.exact else "sum per cell": quantiles(ingested.all_totals),
        f"{features} per cell": quantiles(ingested.n_expressed),
        "empty cells": int((~ingested.measured).sum()),
    }
    if alignment.by_reference:
        how = f" {alignment.how}" if alignment.how else ""
        findings["in the reference"] = (
            f"{alignment.n_found:,} of {len(alignment.features):,} {features} found{how} "
            f"({alignment.coverage:.1%}), with {ingested.count_coverage:.1%} of the counts"
        )
    return findings


def _actions(ingested: Ingested, title: str) -> list[str]:
    """List what preprocessing would do to a modality; each line begins with the title."""
    alignment, genes = ingested.alignment, ingested.alignment.genes
    values, features = ingested.values, FEATURES[ingested.modality]
    n_features = f"{title}: {len(alignment.features):,} {features}"
    if genes:
        order = "the order asked for" if alignment.by_reference else "alphabetical order"
        n_updated = len(genes.updated) + len(genes.repaired)
        changes = [f"{count(n_updated, 'symbol')} updated"] if n_updated else []
        changes += [f"{count(genes.n_duplicates, 'duplicate')} summed"] if genes.n_duplicates else []
        actions = ["; ".join([f"{n_features} are written in {order}", *changes])]
    else:
        actions = [f"{n_features} are written in genome order; a peak is open in a cell if its count is above 0"]
    # Whole counts stay as they are, and any peak value above zero counts as open: nothing to report.
    if values.kind in ("log1p", "cpm") or (values.kind == "counts" and not values.exact):
        kind = "estimated counts" if values.kind == "counts" else f"{values.kind} values"
        becomes = "turned back into counts" if values.exact else "scaled to one sum per cell; no counts are written"
        actions.append(f"{title}: the {kind} in {ingested.place} are {becomes}")
    if not ingested.measured.all():
        n_empty = (~ingested.measured).sum()
        are = "is" if n_empty == 1 else "are"
        actions.append(f"{title}: {count(n_empty, 'cell')} without a count in these {features} {are} left out")
    return actions


def _notes(ingested: Ingested) -> list[str]:
    """List warnings and advice about a modality."""
    genes, notes = ingested.alignment.genes, []
    if genes and genes.ambiguous:
        notes.append(f"{count(len(genes.ambiguous), 'ambiguous id')} may mean several genes and will not be changed")
    if genes and genes.species == "unknown":
        notes.append("no symbol will be updated, because the species is unclear; name it with --species")
    elif genes and genes.species != "other" and genes.known.mean() < FEW_KNOWN:
        share = f"{1 - genes.known.mean():.0%}"
        notes.append(f"{share} of the ids are not known {genes.species} genes{_hint(genes.unknown)}")
    notes += ingested.alignment.notes
    if not genes and ingested.config.genome is None:
        notes.append("give --genome to check the peaks against their genome build")
    if ingested.values.guessed:
        notes.append("the base of the logarithm cannot be inferred from the values and is assumed to be e")
    return notes + ingested.warnings


def coarse_bins(parts: list[Ingested], target_sum: float) -> list[str]:
    """Advise a smaller --target_sum if low counts already fall into high expression bins: one line, or none.

    Parameters
    ----------
    parts : the RNA of each file
    target_sum : counts per cell after scaling
    """
    median = float(np.median(np.concatenate([part.totals[part.measured] for part in parts])))
    bin_of_one = int(np.log2(1 + target_sum / median))
    if bin_of_one < HIGH_BIN or not all(part.values.exact or part.values.kind == "counts" for part in parts):
        return []
    # At three times the median total, one count becomes log2(1 + 3) = 2, the bin below HIGH_BIN.
    better = max(100, round(3 * median, -2))
    return [
        f"at --target_sum {target_sum:g}, a single count of the median cell ({median:,.0f} counts) already falls into "
        f"expression bin {min(bin_of_one, N_BINS - 1)} of 0 to {N_BINS - 1}; consider --target_sum {better:.0f}"
    ]


def _hint(unknown: list[str]) -> str:
    """Say what most ids that match no known gene look like, if that is clear, and name the first of them."""
    looks = {
        "; most look like clone names, which older annotations use for lncRNAs": is_clone_name,
        "; most are transcripts, not genes": lambda gene: gene.startswith(("ENST", "ENSMUST", "NM_", "NR_")),
    }
    hints = (hint for hint, fits in looks.items() if 2 * sum(map(fits, unknown)) > len(unknown))
    return f"{next(hints, '')}{listed(unknown, 3)}; they are kept unchanged"


def _add_labels(found: Examination, file: RawFile, column: str, any_labels: bool) -> None:
    """Add the columns that may hold cell types, and what is in the one that is used."""
    candidates = label_candidates(file.obs)
    found.sections["labels"] = candidates or {"candidates": "none"}
    try:
        words = check_labels(file.obs, column, file.path, any_labels)
    except UserError as error:
        found.problems.append(str(error))
        return
    if column not in file.obs and candidates:
        words += f" in {column}; name their column with --label_column, perhaps {next(iter(candidates))}"
    found.notes.append(words)
