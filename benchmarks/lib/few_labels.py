"""How the study fine-tunes with few labels: twice, first on the labelled cells alone."""


def alone(n: int) -> str:
    """Return the flags of training on n labelled cells of each type alone: the fewer they are, the more epochs."""
    epochs = max(12, 1800 // n)
    return (
        f"--labels_per_type {n} --epochs {epochs} --cycle_epochs {epochs - 1} --val_every {epochs} "
        "--pretrained_lr_scale 0.1"
    )


def on_all_cells(n: int, first: str) -> str:
    """Return the flags of training on all cells, whose labels, but for n of each type, a first model has predicted."""
    return f"--labels_per_type {n} --pseudo_labels_from {first}"
