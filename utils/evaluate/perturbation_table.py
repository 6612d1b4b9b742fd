"""The scores of all rows on all folds of perturbations, as tables and sentences."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from utils.evaluate.comparison import in_words
from utils.evaluate.perturbation import (
    MEAN,
    MEASURES,
    SUM,
    Conditions,
    Fold,
    change_scores,
    compare,
    interval,
    n_seen,
    summary,
)

CEILING = "measured again (halves of the cells)"
SEEN = ("none of the singles seen", "one of the singles seen", "both of the singles seen")


@dataclass
class Scores:
    """Scores of each test condition.

    Attributes
    ----------
    names : [n] lines and genes of the test conditions
    kind : [n] how many of a double's singles are among the training conditions; "all" for other splits
    of : method → score → [n]; the ceiling is a method
    best_pearson : [n] correlation that a prediction without any noise would have with the measured change
    """

    names: list[str]
    kind: np.ndarray
    of: dict[str, dict[str, np.ndarray]]
    best_pearson: np.ndarray

    @classmethod
    def collect(
        cls,
        conditions: Conditions,
        change: np.ndarray,
        halves: list[tuple[np.ndarray, np.ndarray]],
        folds: list[Fold],
        predicted: list[dict[str, np.ndarray]],
        by_seen: bool,
    ) -> "Scores":
        """Score all folds.

        Parameters
        ----------
        conditions, change : all conditions and their measured changes [conditions, genes]
        halves : pairs of changes, each measured in one random half of every condition's cells
        folds : with their test conditions
        predicted : for each fold, method → [test conditions, genes]
        by_seen : whether to count the singles of each test condition
        """
        test = np.concatenate([fold.test for fold in folds])
        centre = np.concatenate([np.repeat(change[fold.train].mean(0)[None], len(fold.test), 0) for fold in folds])
        number = np.repeat(np.arange(len(folds)), [len(fold.test) for fold in folds])
        _, groups = np.unique(
            [f"{n}/{conditions[i][0]}" for n, i in zip(number, test, strict=True)], return_inverse=True
        )
        of = {
            name: change_scores(np.concatenate([rows[name] for rows in predicted]), change[test], centre, groups)
            for name in predicted[0]
        }
        again = [change_scores(one[test], other[test], centre, groups) for one, other in halves]
        of[CEILING] = {name: np.mean([scores[name] for scores in again], axis=0) for name in MEASURES}
        # Spearman and Brown: twice the cells are as reliable as 2r / (1 + r), and noise-free values correlate with
        # values of reliability q by its root.
        r = np.clip(of[CEILING]["pearson"], 0, 1)
        kind = np.full(len(test), "all", dtype=object)
        if by_seen:
            seen = [
                n_seen(conditions[i][1], conditions, folds[n].train, conditions[i][0])
                for n, i in zip(number, test, strict=True)
            ]
            kind = np.array([SEEN[min(n, 2)] for n in seen], dtype=object)
        names = [f"{conditions[i][0]}: {'+'.join(conditions[i][1])}" for i in test]
        return cls(names, kind, of, np.sqrt(2 * r / (1 + r)))

    def table(self) -> pd.DataFrame:
        """Mean and interval of each score, by kind of condition and method."""
        kinds = sorted(set(self.kind), reverse=True)
        kinds = ["all", *kinds] if kinds != ["all"] else kinds
        rows = {}
        for kind in kinds:
            some = np.ones(len(self.kind), dtype=bool) if kind == "all" else self.kind == kind
            for name, scores in self.of.items():
                rows[kind, name] = {"conditions": int(some.sum())} | summary({m: v[some] for m, v in scores.items()})
        return pd.DataFrame(rows).T.rename_axis(["test conditions", "method"])

    def per_condition(self) -> pd.DataFrame:
        """Each score of each condition."""
        parts = [
            pd.DataFrame({"condition": self.names, "kind": self.kind, "method": name} | scores)
            for name, scores in self.of.items()
        ]
        return pd.concat(parts, ignore_index=True)

    def verdict(self, ours: str) -> tuple[list[str], list[dict]]:
        """Who wins, one sentence a comparison, and the comparisons (see `compare`).

        Our row is compared with the best of the others in each score, and in the correlation also with the mean of the
        training conditions; for doubles with the sum of the singles, too, by how many of the singles were seen.
        """
        others, all_of = [name for name in self.of if name not in (ours, CEILING)], np.ones(len(self.kind), dtype=bool)
        named = {text: (measure, others, all_of) for measure, text in MEASURES.items()}
        named["Pearson of the change, against the mean"] = "pearson", [MEAN], all_of
        for kind in sorted(set(self.kind), reverse=True) if SUM in self.of else ():
            some = self.kind == kind
            named[f"Pearson of the change, {kind} ({some.sum()})"] = "pearson", [SUM], some
        rows, sentences = [], []
        for text, (measure, baselines, some) in named.items():
            row = compare(ours, self.of, baselines, measure, some)
            kind = f", {self.kind[some][0]}" if baselines == [SUM] else ""
            rows.append(row | {"score": measure + kind})
            sentences.append(in_words(ours, row, text, is_best=len(baselines) > 1))
        low, high = interval(self.best_pearson)
        sentences.append(
            f"a half of the cells predicts the other with Pearson {self.of[CEILING]['pearson'].mean():.3f}; a "
            f"prediction without error would reach {self.best_pearson.mean():.3f} ({low:.3f} to {high:.3f}) on all"
        )
        return sentences, rows
