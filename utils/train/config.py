"""How to train and how to run a trained model: settings that all stages share, known before torch is imported."""

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


@dataclass
class TrainConfig:
    """How to train; common to all stages. Defaults are the published values where there are any."""

    epochs: int = field(default=100, metadata={"help": "passes over the training cells"})
    batch_size: number_or_auto = field(
        default=3,
        metadata={"help": "cells per forward pass and process; auto cuts a step into as many as fit and are fastest"},
    )
    grad_acc: int = field(default=1, metadata={"help": "forward passes per optimiser step"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate of AdamW"})
    weight_decay: float = field(
        default=0.0, metadata={"help": "decoupled weight decay of matrices; 0 makes it Adam, as published"}
    )
    adam_epsilon: float = field(
        default=1e-8,
        metadata={
            "help": "added to the root of Adam's second moment; 1e-6 damps weights with rare gradients, of peaks"
        },
    )
    warmup_epochs: float = field(default=5, metadata={"help": "epochs of linear warm-up"})
    cycle_epochs: float = field(
        default=15, metadata={"help": "epochs of the first cosine cycle; each next one doubles"}
    )
    clip_norm: float = field(default=1.0, metadata={"help": "largest norm of the gradient; 0 for no clipping"})
    patience: int = field(
        default=10, metadata={"help": "epochs without a better validation loss before it stops; 0: never"}
    )
    keep: Literal["best", "last"] = field(
        default="best",
        metadata={"help": "which epoch's model is kept: the one of the lowest validation loss, or the last"},
    )
    val_every: int = field(
        default=1, metadata={"help": "epochs between validations, at which the model is kept; more for tiny epochs"}
    )
    max_steps: int = field(default=0, metadata={"help": "stop after this many optimiser steps; 0 for no such limit"})
    seed: int = field(default=0, metadata={"help": "of weights, order, masks and dropout"})
    precision: Literal["fp32", "bf16"] = field(default="fp32", metadata={"help": "bf16 computes under autocast"})
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "auto takes a GPU when there is one"}
    )
    save_steps: int = field(default=500, metadata={"help": "optimiser steps between saves of the training state"})
    resume: bool = field(default=False, metadata={"help": "go on from the training state left by an earlier run"})
    overwrite: bool = field(default=False, metadata={"help": "replace a model of the same name"})

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
    """How to run a trained model."""

    batch_size: int = field(default=64, metadata={"help": "cells per forward pass and process; 1 computes each twice"})
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "auto takes a GPU when there is one"}
    )
    precision: Literal["fp32", "bf16"] = field(default="fp32", metadata={"help": "bf16 computes under autocast"})

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size} must be at least 1")
