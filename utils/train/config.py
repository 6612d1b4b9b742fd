"""Settings of training and of inference that all scripts share.

This module does not import torch, so that --help and mistaken flags are answered at once.
"""

from dataclasses import dataclass, field
from typing import Literal

from utils.cli import check_numbers
from utils.errors import UserError


def number_or_auto(text: str) -> int | None:
    """Return the value of `--batch_size` as a number, or None for `auto`.

    It stands as a field's type below, because `transformers.HfArgumentParser` calls a field's type on the flag's text;
    an ordinary `int | None` would not accept the word `auto`.
    """
    return None if text == "auto" else int(text)


Device = Literal["auto", "cpu", "cuda", "mps"]
DEVICE_HELP = "where to compute: cuda is an NVIDIA GPU, mps an Apple GPU (untested); auto uses a GPU if there is one"


@dataclass
class TrainConfig:
    """Training settings of all stages. Defaults are the published values where the paper gives one."""

    epochs: int = field(default=100, metadata={"help": "passes over the training cells"})
    batch_size: number_or_auto = field(
        default=3,
        metadata={
            "help": "cells per forward pass and process; auto measures which size fits into memory and is fastest"
        },
    )
    grad_acc: int = field(default=1, metadata={"help": "forward passes per optimiser step"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate of AdamW"})
    weight_decay: float = field(
        default=0.0,
        metadata={"help": "decoupled weight decay of weight matrices; 0, as published, makes AdamW plain Adam"},
    )
    adam_epsilon: float = field(
        default=1e-8,
        metadata={
            "help": "epsilon of Adam; 1e-6 slows down weights with rare gradients, such as those of rarely open peaks"
        },
    )
    warmup_epochs: float = field(default=5, metadata={"help": "epochs of linear warm-up"})
    cycle_epochs: float = field(
        default=15, metadata={"help": "epochs of the first cosine cycle; each cycle is twice as long as the one before"}
    )
    clip_norm: float = field(
        default=1.0, metadata={"help": "gradients with a larger norm are scaled down to it; 0 turns clipping off"}
    )
    patience: int = field(
        default=10,
        metadata={"help": "stop after this many epochs without a lower validation loss; 0 turns early stopping off"},
    )
    keep: Literal["best", "last"] = field(
        default="best",
        metadata={"help": "which epoch's model to save: best is the one with the lowest validation loss"},
    )
    val_every: int = field(
        default=1, metadata={"help": "epochs between validations; a model is saved only at a validation"}
    )
    max_steps: int = field(default=0, metadata={"help": "stop after this many optimiser steps; 0 turns this limit off"})
    seed: int = field(default=0, metadata={"help": "random seed of initial weights, order of cells, masks and dropout"})
    precision: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"help": "floating-point precision; bf16 uses autocast to bfloat16"}
    )
    device: Device = field(default="auto", metadata={"help": DEVICE_HELP})
    deterministic: bool = field(
        default=True,
        metadata={"help": "on a GPU, the same run gives the same bits again; off, it may be a little faster"},
    )
    save_steps: int = field(default=500, metadata={"help": "optimiser steps between saves of the training state"})
    resume: bool = field(default=False, metadata={"help": "continue an interrupted run from its saved training state"})
    overwrite: bool = field(
        default=False, metadata={"help": "replace a model of the same name, and its training state"}
    )

    def __post_init__(self):
        check_numbers(self, "epochs", "grad_acc", "save_steps", "val_every", least=1)
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size} must be at least 1, or auto")
        check_numbers(self, "patience", "max_steps", "seed", "learning_rate", "weight_decay")
        check_numbers(self, "warmup_epochs")
        check_numbers(self, "adam_epsilon", least=1e-12)
        check_numbers(self, "cycle_epochs", least=1e-3)


@dataclass
class InferConfig:
    """Settings of inference."""

    batch_size: int = field(
        default=64,
        metadata={
            "help": "cells per forward pass and process; use 2 or more, since with 1 each cell is computed twice"
        },
    )
    device: Device = field(default="auto", metadata={"help": DEVICE_HELP})
    precision: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"help": "floating-point precision; bf16 uses autocast to bfloat16"}
    )

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size} must be at least 1")


@dataclass
class LabelConfig:
    """What the labels of new cells promise."""

    coverage: float = field(
        default=0.9, metadata={"help": "share of prediction sets that hold the true type, from 0.5 to 0.99"}
    )
    coverage_per_type: bool = field(
        default=False,
        metadata={"help": "the coverage holds for each type with enough validation cells, not only over all cells"},
    )
    novel_below: float = field(
        default=0.05, metadata={"help": "a cell is novel if its conformal p-value, 1 - novelty, is below this"}
    )
    reject: bool = field(default=False, metadata={"help": "leave novel cells unassigned"})

    def __post_init__(self):
        if not 0.5 <= self.coverage <= 0.99:
            raise UserError(f"--coverage {self.coverage} must be at least 0.5 and at most 0.99")
        if not 0 <= self.novel_below <= 1:
            raise UserError(f"--novel_below {self.novel_below} must be at least 0 and at most 1")
