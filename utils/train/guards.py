"""Checks during a training run: non-finite losses, collapsed embeddings, and requests to stop."""

import os
import signal
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.train.distributed import Runtime

STOPPED = 75
"""Exit code of a run that was asked to stop and saved its state (EX_TEMPFAIL: try again)."""
REPEAT_SECONDS = 2.0
"""Seconds within which a second Ctrl-C is ignored under a launcher. There, a process may get one Ctrl-C twice: from the
terminal, which sends it to all processes, and from the launcher, which passes it on within a second. A user who wants
to end the run at once presses again later than that."""
BAD_STEPS = 3
"""This many steps in a row without a finite loss or gradient end a run."""
LEAST_SPREAD = 1e-3
"""If the standard deviation of the embedding over cells is below this, the embedding has collapsed."""

COLLAPSED = (
    "  warning: embeddings of different cells are nearly the same (standard deviation {:.1e}): they have collapsed; "
    "lower --learning_rate, or start from other weights"
)


class Stopped(SystemExit):
    """Ends a run that was asked to stop, after its state has been saved."""


class StopSignal:
    """Records requests to stop while the block runs; the training loop then saves its state and stops.

    Requests are Ctrl-C (SIGINT), and SIGTERM and SIGUSR1, which schedulers send before they reclaim a machine. A second
    Ctrl-C ends the run at once, by KeyboardInterrupt.

    Python allows signal handlers in the main thread only; in other threads this class changes nothing.

    Attributes
    ----------
    name : name of the last signal, such as "SIGTERM"; empty if there was none
    """

    def __enter__(self) -> "StopSignal":
        self.name, self.interrupted = "", -1.0  # `interrupted`: time of the first Ctrl-C, -1 before it
        self.owner = os.getpid()
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGUSR1]
            if (
                signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
            ):  # a shell ignores it for scripts it runs in the background
                numbers.append(signal.SIGINT)
            self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, _frame) -> None:
        if os.getpid() != self.owner:  # a forked child that has inherited the handler just ends
            os._exit(128 + number)
        if number == signal.SIGINT:
            now = time.monotonic()
            is_launched = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1
            if self.interrupted < 0:
                self.interrupted = now
            elif now - self.interrupted > (REPEAT_SECONDS if is_launched else 0):
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one acts at once, too
                raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@dataclass
class FiniteGuard:
    """Skips optimiser steps without a finite loss or gradient, and ends the run after several in a row.

    Attributes
    ----------
    barcodes : [cells] barcodes of the training cells
    in_a_row : number of bad steps since the last good one
    cells : barcodes of the cells without a finite loss in those steps, in this process
    """

    barcodes: np.ndarray
    in_a_row: int = 0
    cells: dict[str, None] = field(default_factory=dict)

    def note(self, rows: Tensor, loss: Tensor) -> None:
        """Remember which cells of a minibatch have no finite loss [B], both on the CPU."""
        bad = ~torch.isfinite(loss)
        if bad.any():
            self.cells |= dict.fromkeys(self.barcodes[rows[bad].numpy()])

    def passes(self, is_finite: bool, step: int, runtime: Runtime) -> bool:
        """Return whether the optimiser step may be taken.

        All processes must call this together and with the same `is_finite`, since they exchange barcodes.

        Parameters
        ----------
        is_finite : whether loss and gradient are finite on every process
        step : number of the optimiser step, for messages
        runtime : this process

        Raises
        ------
        UserError
            If this is the last of `BAD_STEPS` bad steps in a row.
        """
        if is_finite:
            self.in_a_row, self.cells = 0, {}
            return True
        self.in_a_row += 1
        if self.in_a_row < BAD_STEPS:
            runtime.say(f"  step {step} has no finite loss or gradient and is left out")
            return False
        cells = list(dict.fromkeys(barcode for part in runtime.gather(list(self.cells)) for barcode in part))
        named = f" in cells {', '.join(cells[:5])}{', …' if len(cells) > 5 else ''}" if cells else ""
        raise UserError(
            f"no finite loss or gradient{named} in {BAD_STEPS} steps in a row, up to step {step}; lower "
            "--learning_rate, use --precision fp32, or look at these cells"
        )


@dataclass
class Spread:
    """Measures how much embeddings differ between cells, over all minibatches and processes."""

    moments: Tensor | None = None  # [3, D] count, sum and sum of squares of each dimension

    def add(self, embedding: Tensor | None, weight: Tensor) -> None:
        """Add the embeddings [B, D] of a minibatch, on the CPU; cells of weight 0 do not count."""
        if embedding is None:
            return
        x, w = embedding.double(), weight.double()[:, None]
        moments = torch.stack([w.sum(0).expand(x.shape[1]), (w * x).sum(0), (w * x * x).sum(0)])
        self.moments = moments if self.moments is None else self.moments + moments

    def deviation(self, runtime: Runtime) -> float | None:
        """Return the standard deviation over cells (root mean square over dimensions); None without embeddings."""
        if self.moments is None:
            return None
        count, first, second = runtime.sum_tensor(self.moments)
        variance = second / count.clamp(min=1) - (first / count.clamp(min=1)).square()
        return float(variance.clamp(min=0).mean().sqrt())
