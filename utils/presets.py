"""`--preset`: recommended sizes and settings by name.

published  the sizes and training of the paper, for GPUs and a hundred thousand cells; our values where it gives none
small      the settings of the study on real cells (benchmarks/paired.py, benchmarks/RESULTS.md): thousands of cells,
           two CPU cores, about twenty minutes for all stages; chosen on validation cells of mouse cortex
tiny       the settings of the demo (docs/demo.md): a first try in minutes, on hundreds of cells; chosen for speed

A preset lists what differs from `published`, and `published` lists what differs from the dataclasses' defaults.
"""

from typing import Literal

Preset = Literal["published", "small", "tiny"]

_SMALL_TOWER = {"dim": 64, "depth": 2}
_TINY_TOWER = {"dim": 64, "depth": 2, "heads": 2, "dim_head": 32}
_TINY_PACE = {"learning_rate": 1e-3, "warmup_epochs": 1}

PRESETS: dict[str, dict[Preset, dict]] = {
    "pretrain_rna": {
        "published": {"grad_acc": 20},
        "small": {
            **_SMALL_TOWER,
            "heads": 2,
            "dim_head": 32,
            "tokens": "expressed",
            "mask_ratio": 0.3,  # with few cells, predict more in each
            "epochs": 4,
            "warmup_epochs": 1,
            "cycle_epochs": 3,
            "batch_size": 16,
            "grad_acc": 1,
            "learning_rate": 1e-3,
        },
        "tiny": {
            **_TINY_TOWER,
            **_TINY_PACE,
            "tokens": "expressed",
            "epochs": 3,
            "cycle_epochs": 2,
            "batch_size": 8,
            "grad_acc": 2,
        },
    },
    "pretrain_atac": {
        "published": {"batch_size": 32},
        "small": {
            **_SMALL_TOWER,
            "heads": 4,
            "dim_head": 16,
            "n_patches": 32,
            "patch_maps": "own",  # on few cells attention does not learn to distinguish patches
            "mask_ratio": 0.5,
            "epochs": 4,
            "warmup_epochs": 1,
            "cycle_epochs": 3,
            "batch_size": 16,
            "learning_rate": 2e-3,
        },
        "tiny": {**_TINY_TOWER, **_TINY_PACE, "n_patches": 64, "epochs": 10, "cycle_epochs": 9},
    },
    "pretrain_multimodal": {
        "published": {"batch_size": 8},
        "small": {
            "trainable_blocks": -1,
            "feature_dropout": 0.3,
            "alone_weight": 1.0,  # with few cells, each modality alone should also reconstruct the cell
            "pair_weight": 0.03,
            "epochs": 5,
            "warmup_epochs": 1,
            "cycle_epochs": 4,
            "batch_size": 16,
            "learning_rate": 1e-3,
        },
        "tiny": {
            **_TINY_PACE,
            "feature_dropout": 0.3,
            "alone_weight": 1.0,
            "pair_weight": 0.03,
            "epochs": 4,
            "cycle_epochs": 3,
            "grad_acc": 2,
        },
    },
    "pretrain_missing_mod": {
        "published": {"batch_size": 32},
        "small": {
            "feature_dropout": 0.5,
            "alone_weight": 20.0,
            "blank_decoders": True,
            "epochs": 12,
            "warmup_epochs": 1,
            "cycle_epochs": 11,
            "learning_rate": 1e-3,
            "weight_decay": 0.3,
            "adam_epsilon": 1e-6,
            "patience": 0,
            "keep": "last",  # its validation loss is noisy, so the best epoch is partly luck
        },
        "tiny": {
            "learning_rate": 3e-3,  # the student is small, and few cells make few steps
            "warmup_epochs": 1,
            "feature_dropout": 0.5,
            "alone_weight": 20.0,
            "blank_decoders": True,
            "epochs": 40,
            "cycle_epochs": 39,
            "weight_decay": 0.3,
            "adam_epsilon": 1e-6,
            "keep": "last",
        },
    },
    # --train_student stays on the command line: not every model that is fine-tuned has a student.
    "train_missing_celltype_func": {
        "published": {"batch_size": 8, "patience": 5},
        "small": {
            "trainable_blocks": 0,
            "feature_dropout": 0.5,
            "class_balance": 0.3,
            "mix_baselines": "auto",
            "epochs": 12,
            "warmup_epochs": 1,
            "cycle_epochs": 11,
            "batch_size": 16,
            "grad_acc": 2,
            "learning_rate": 1e-3,
            "patience": 0,
            "keep": "last",
        },
        "tiny": {
            **_TINY_PACE,
            "trainable_blocks": 0,
            "feature_dropout": 0.5,
            "class_balance": 0.3,
            "epochs": 8,
            "cycle_epochs": 7,
            "batch_size": 16,
            "keep": "last",
        },
    },
}
