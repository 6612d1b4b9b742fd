"""The paired data sets of the study: their files, folds, numbers of labels, and flags beside --preset small."""

from dataclasses import dataclass, field

FEW_LABELS = (10, 30, 100)


@dataclass(frozen=True)
class Data:
    """A data set of the study.

    Attributes
    ----------
    inputs : flags of preprocess.py that name the files, with {} for --data_path
    group : column of obs whose values are set aside
    folds : values that each fold sets aside for testing
    few : numbers of labels per type
    subclass : a column of obs with finer types, if there is one
    more : flags of preprocess.py
    pace : script → flags that are added to --preset small
    """

    inputs: str
    group: str
    folds: tuple[str, ...]
    few: tuple[int, ...] = FEW_LABELS
    subclass: str | None = None
    more: str = ""
    pace: dict[str, str] = field(default_factory=dict)


DATA = {
    "snareseq2": Data(
        "--data_path {}/snareseq2_mop.h5mu",
        "batch",
        ("09J,09K", "09H,09I", "09F,09G"),
        FEW_LABELS,
        "subclass",
        "--target_sum 1000",
    ),
    # Some hundred cells: more epochs, set once from those of benchmarks/rna_only.py.
    "bmmc": Data(
        "--rna_path {0}/multiome/bmmc/v1_rna.h5ad --atac_path {0}/multiome/bmmc/v1_atac.h5ad",
        "batch",
        ("s1d1", "s1d2"),
        (),
        None,
        "--target_sum median --genome hg38",
        {
            "pretrain_rna": "--epochs 20 --cycle_epochs 19",
            "pretrain_atac": "--epochs 20 --cycle_epochs 19",
            "pretrain_multimodal": "--epochs 20 --cycle_epochs 19",
            "pretrain_missing_mod": "--epochs 60 --cycle_epochs 59",
            "train_missing_celltype_func": "--epochs 40 --cycle_epochs 39 --grad_acc 1",
        },
    ),
}
