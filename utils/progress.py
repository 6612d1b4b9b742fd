"""How far something is: a bar on a terminal, a line now and then in a log."""

import math
import sys
import time

SECONDS = 30.0
"""Between two lines in a log; what takes less leaves none."""


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use, to two digits."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            count = seconds / size
            return f"{count:.0f} {unit}" if count >= 9.5 else f"{count:.1f} {unit}".replace(".0 ", " ")
    return f"{max(seconds, 1):.0f} seconds" if seconds >= 1.5 else "1 second"


def epoch_name(epoch: float) -> str:
    """`epoch 4`, and `a part of epoch 5` where a run was stopped within it."""
    return ("" if epoch == math.ceil(epoch) else "a part of ") + f"epoch {math.ceil(epoch)}"


class Lines:
    """The part of tqdm's interface that is used here, as whole lines on stderr.

    Parameters
    ----------
    total, initial : how much there is, and how much of it is done already
    title, unit : what is done, and what is counted
    """

    def __init__(self, total: int, title: str, unit: str, initial: int = 0):
        self.total, self.title, self.unit = total, title, unit
        self.initial = self.done = initial
        self.notes: dict[str, str] = {}
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def set_postfix(self, refresh: bool = False, **notes: str) -> None:
        """What the next line ends with."""
        self.notes = notes

    def update(self, n: int = 1) -> None:
        """Count n more; write a line if the last one is old enough."""
        self.done += n
        now = time.monotonic()
        if now - self.shown < SECONDS:
            return
        self.shown = now
        rate = (self.done - self.initial) / (now - self.started)
        left = f", {duration((self.total - self.done) / rate)} left" if rate > 0 and self.done < self.total else ""
        notes = "".join(f", {name} {value}" for name, value in self.notes.items())
        print(
            f"{self.title}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.3g} {self.unit}/s{left}{notes}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Nothing is left to do: a log keeps its lines."""


def progress_bar(total: int, title: str, unit: str = "cells", initial: int = 0, shown: bool = True, leave: bool = True):
    """A bar to `update`, `set_postfix` and `close`, also for a with block.

    Parameters
    ----------
    total, initial : how much there is, and how much of it is done already
    title, unit : what is done, and what is counted
    shown : False on all processes but the first
    leave : whether a terminal keeps the full bar

    Returns
    -------
    A tqdm on a terminal, else a `Lines`
    """
    if shown and not sys.stderr.isatty():
        return Lines(total, title, unit, initial)
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=f" {unit}",
        disable=not shown,
        leave=leave,
        dynamic_ncols=True,
        mininterval=0.5,
    )
