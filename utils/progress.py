"""Show progress: as a bar on a terminal, and as an occasional line in a log file."""

import math
import sys
import time

SECONDS = 30.0
"""Seconds between two lines in a log; shorter work writes none."""


def duration(seconds: float) -> str:
    """Return a duration in words, with two digits and in the unit that fits best."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            count = seconds / size
            return f"{count:.0f} {unit}" if count >= 9.5 else f"{count:.1f} {unit}".replace(".0 ", " ")
    return f"{max(seconds, 1):.0f} seconds" if seconds >= 1.5 else "1 second"


def epoch_name(epoch: float) -> str:
    """Return `epoch 4`, or `a part of epoch 5` for 4.3 epochs."""
    return ("" if epoch == math.ceil(epoch) else "a part of ") + f"epoch {math.ceil(epoch)}"


class Lines:
    """Writes progress as whole lines to stderr; it has the methods of tqdm that our code calls.

    Parameters
    ----------
    total : number of units in all
    title : name of the work
    unit : name of the units, in the plural
    initial : number of units that are already done
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
        """Set the values that stand at the end of the next line."""
        self.notes = notes

    def update(self, n: int = 1) -> None:
        """Count n more units; write a line if the last one is `SECONDS` old."""
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
        """Do nothing; tqdm's bars need closing, lines do not."""


def progress_bar(total: int, title: str, unit: str = "cells", initial: int = 0, shown: bool = True, leave: bool = True):
    """Return a progress bar with the methods `update`, `set_postfix` and `close`; it is also a context manager.

    Parameters
    ----------
    total : number of units in all
    title : name of the work
    unit : name of the units, in the plural
    initial : number of units that are already done
    shown : False on all processes but the first
    leave : whether the finished bar stays on the terminal

    Returns
    -------
    tqdm on a terminal, otherwise `Lines`
    """
    if shown and not sys.stderr.isatty():
        return Lines(total, title, unit, initial)
    from tqdm import tqdm  # here, because runs without a terminal do not need it

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
