"""Choose the settings of a baseline on validation cells, with the same number of tries for each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

BUDGET = 16
"""Settings that each baseline may try."""


@dataclass
class Tuned:
    """A fit, and how it was chosen.

    Parameters
    ----------
    fit : the best fit
    setting : name → value
    tried : number of settings that were tried; 0 where nothing could choose
    at_end : settings whose best value is the first or last of those offered, so that a still better one may lie beyond
    score : of the best fit on validation cells; None where nothing could choose
    """

    fit: Any
    setting: dict[str, Any]
    tried: int
    at_end: list[str] = field(default_factory=list)
    score: float | None = None

    def __str__(self) -> str:
        say = lambda value: ("no", "yes")[value] if isinstance(value, bool) else f"{value:g}"
        return ", ".join(f"{name} {say(value)}" for name, value in self.setting.items())


def tune(
    fit: Callable[[dict], Any],
    score: Callable[[Any], float] | None,
    axes: dict[str, tuple],
    start: dict[str, Any],
    open_ended: tuple[str, ...] = (),
) -> Tuned:
    """Try settings around the best one so far until the budget is used, and return the best.

    The next one to try is always the nearest to the best: one step along one axis, the axes in their order, upwards
    first. So the search follows whatever direction helps, and no axis needs all its values tried.

    Parameters
    ----------
    fit : makes a fit of a setting
    score : of a fit, higher is better; None where there is nothing to score it on: the start is then taken as it is
    axes : name → values in order
    start : the setting that is tried first
    open_ended : axes that could be longer, which are noted where the best value is at an end
    """
    if score is None:
        return Tuned(fit(start), start, 0)
    names = list(axes)
    grid = list(product(*(range(len(axes[name])) for name in names)))
    setting_at = lambda place: {name: axes[name][i] for name, i in zip(names, place, strict=True)}
    best = tuple(axes[name].index(start[name]) for name in names)
    best_fit = fit(start)
    best_score = score(best_fit)
    tried = {best}
    while len(tried) < min(BUDGET, len(grid)):
        place = min((place for place in grid if place not in tried), key=partial(_order, best))
        tried.add(place)
        found = fit(setting_at(place))
        value = score(found)
        if value > best_score:  # on a tie, keep what came first
            best, best_fit, best_score = place, found, value
    ends = {name: i in (0, len(axes[name]) - 1) for name, i in zip(names, best, strict=True)}
    at_end = [name for name in open_ended if ends[name]]
    return Tuned(best_fit, setting_at(best), len(tried), at_end, best_score)


def _order(best: tuple[int, ...], place: tuple[int, ...]) -> tuple:
    """Few steps away before many; then a step on an early axis before one on a later, upwards before downwards."""
    steps = [a - b for a, b in zip(place, best, strict=True)]
    return sum(map(abs, steps)), [(-abs(step), -step) for step in steps]
