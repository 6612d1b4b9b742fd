"""What watches over a run: non-finite losses, embeddings that collapse, people and schedulers that want to stop it."""

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
"""Under a launcher, one Ctrl-C may come twice: from the terminal, to all processes at once, and from the launcher,
which passes it on within a second. A person who means to end the run at once presses again later than that."""
BAD_STEPS = 3
"""Steps in a row without a finite loss that end a run."""
LEAST_SPREAD = 1e-3
"""Standard deviation over cells below which embeddings say nothing of a cell."""

COLLAPSED = (
    "  warning: embeddings of different cells are nearly the same (standard deviation {:.1e}): they have collapsed; "
    "lower --learning_rate, or start from other weights"
)


class Stopped(SystemExit):
    """The run was asked to stop; its state is saved."""


class StopSignal:
    """Notes requests to stop while the block runs: Ctrl-C (SIGINT), and SIGTERM and SIGUSR1, which schedulers send
    before they take the machine away. A second Ctrl-C ends the run at once, by KeyboardInterrupt.

    Outside the main thread, where Python allows no handlers, signals do what they did before.
    """

    def __enter__(self) -> "StopSignal":
        self.name, self.interrupted = "", -1.0
        self.owner = os.getpid()
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGUSR1]
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for a script in a shell's background
                numbers.append(signal.SIGINT)
            self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, _frame) -> None:
        if os.getpid() != self.owner:  # a loader's process that inherited the handler
            os._exit(128 + number)
        if number == signal.SIGINT:
            now = time.monotonic()
            is_launched = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1
            if self.interrupted < 0:
                self.interrupted = now
            elif now - self.interrupted > (REPEAT_SECONDS if is_launched else 0):
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one need not wait for anything
                raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@dataclass
class FiniteGuard:
    """Steps whose loss or gradient is not finite are left out and counted; several in a row end the run.

    Attributes
    ----------
    barcodes : [cells] of the training cells
    in_a_row : bad steps since the last good one
    cells : barcodes of the cells that had no finite loss in them, in this process
    """

    barcodes: np.ndarray
    in_a_row: int = 0
    cells: dict[str, None] = field(default_factory=dict)

    def note(self, rows: Tensor, loss: Tensor) -> None:
        """Remember which cells of a minibatch have no finite loss [B]."""
        bad = ~torch.isfinite(loss.detach()).cpu()
        if bad.any():
            self.cells |= dict.fromkeys(self.barcodes[rows[bad].numpy()])

    def passes(self, is_finite: bool, step: int, runtime: Runtime) -> bool:
        """Whether the step may be taken; every process must ask, with the same answer.

        Raises
        ------
        UserError
            If it is one of several bad steps in a row.
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
    """How much embeddings differ between cells: the moments of each dimension, over minibatches and processes."""

    moments: Tensor | None = None  # [3, D]: count, sum, sum of squares

    def add(self, embedding: Tensor | None, weight: Tensor) -> None:
        """Add the embeddings [B, D] of a minibatch."""
        if embedding is None:
            return
        x, w = embedding.detach().double().cpu(), weight.double().cpu()[:, None]
        moments = torch.stack([w.sum(0).expand(x.shape[1]), (w * x).sum(0), (w * x * x).sum(0)])
        self.moments = moments if self.moments is None else self.moments + moments

    def deviation(self, runtime: Runtime) -> float | None:
        """Standard deviation over cells, root mean square over dimensions; None where there is no embedding."""
        if self.moments is None:
            return None
        count, first, second = runtime.sum_tensor(self.moments)
        variance = second / count.clamp(min=1) - (first / count.clamp(min=1)).square()
        return float(variance.clamp(min=0).mean().sqrt())
