"""Train scANVI or MultiVI on the cells of a preprocessed file, and predict the types of its test cells.

    python -m benchmarks.peers --method scANVI --data_path snareseq2_mop.h5mu \\
        --ready_path runs/snareseq2/fold0_seed0/ready.h5mu --out_path runs/snareseq2/fold0_seed0/scANVI

All see the raw counts of all cells, including the RNA of the test cells, but only the labels of training cells. The
settings are those of the scvi-tools tutorials, with one exception: the number of labelled cells that scANVI draws per
epoch is chosen on validation cells. Output in --out_path: "<group>.csv" with predicted types by barcode, a column per
method, for all labels and for each number in --labels_per_type; and details.json with the chosen settings, the seconds
of each part, and the translation scores of MultiVI. Beside scANVI there is logistic regression on the latent of scVI,
with which scANVI starts, and for MultiVI on its own.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse
from sklearn.preprocessing import StandardScaler

from utils.cells.labels import label_codes, limit_labels
from utils.cells.preprocessed import Cells, read_cells, read_raw
from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError
from utils.evaluate.metrics import classification_scores, translation_scores
from utils.evaluate.type_baselines import logistic_regression

UNKNOWN = "unknown"
TUTORIAL_LABELS = 100
"""Labelled cells per type and epoch in the tutorial of scANVI."""
BATCH_SIZES = (128, 127, 126)  # the default of scvi-tools, then others for when its last minibatch has one cell


@dataclass
class Flags:
    method: Literal["scANVI", "MultiVI"] = flag("which method to train")
    data_path: str = flag("raw counts, .h5ad or .h5mu")
    ready_path: str = flag("the same cells from preprocess.py, which define the split")
    out_path: str = flag("folder for the results")
    label_column: str = flag("column of obs with cell types", "cell_type")
    batch_column: str = flag("column of obs with batches", "batch")
    seed: int = flag("random seed of the training and of the choice of few labels", 0)
    labels_per_type: str = flag("comma-separated numbers of labelled training cells per type", "")
    scvi_epochs: int = flag("epochs of scVI; 0 for the default of scvi-tools (400 for up to 20,000 cells)", 0)
    multivi_epochs: int = flag("largest number of epochs of MultiVI; 0 for the default of scvi-tools (500)", 0)


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    try:
        import scvi
    except ImportError:
        raise UserError("scvi-tools is not installed; run `make study`, or pip install scvi-tools==1.4.2") from None
    scvi.settings.seed = flags.seed
    modalities = ("rna", "atac") if flags.method == "MultiVI" else ("rna",)
    cells = read_cells(flags.ready_path, modalities)
    counts = raw_counts(flags.data_path, cells, modalities)
    groups = {"all labels": 0} | {f"{n} labels per type": int(n) for n in flags.labels_per_type.split(",") if n}
    details: dict = {"scvi-tools": scvi.__version__, "seconds": {}, "translation": {}}
    train = {"scANVI": scanvi, "MultiVI": multivi}[flags.method]
    predicted = train(scvi, counts, cells, flags, groups, details)
    out = Path(flags.out_path)
    out.mkdir(parents=True, exist_ok=True)
    for group, table in predicted.items():
        table.to_csv(out / f"{group}.csv", index_label="barcode")
    (out / "details.json").write_text(json.dumps(details, indent=1))


def raw_counts(path: str, cells: Cells, modalities: tuple[str, ...]) -> dict[str, AnnData]:
    """Return modality → raw counts of the preprocessed file's cells and features, in its order."""
    with read_raw(path) as file:
        raw = file.content()
    parts = {name: raw[name] for name in modalities} if isinstance(raw, MuData) else {"rna": raw}
    out = {}
    for name, part in parts.items():
        part = part[cells.obs.index, cells.features[name]]
        out[name] = AnnData(part.X.tocsr().astype(np.float32), obs=pd.DataFrame(index=cells.obs.index.astype(str)))
        out[name].var_names = cells.features[name]
    return out


def known_labels(cells: Cells, flags: Flags, per_type: int) -> np.ndarray:
    """Return the labels of the training cells that a group may see, and UNKNOWN for all other cells: [cells]."""
    labels = cells.labels(flags.label_column)
    codes = limit_labels(label_codes(labels, sorted(set(labels.dropna()))), cells, per_type, flags.seed)
    known = np.full(len(labels), UNKNOWN, dtype=object)
    train = cells.rows("train")[codes[cells.rows("train")] >= 0]
    known[train] = labels.iloc[train]
    return known


def trained_scvi(scvi, counts: dict[str, AnnData], cells: Cells, flags: Flags, details: dict) -> tuple[AnnData, object]:
    """Train scVI on the RNA of all cells; return the cells as it reads them, and the model."""
    started, rna = time.monotonic(), counts["rna"].copy()
    rna.obs["batch"] = cells.obs[flags.batch_column].astype(str).to_numpy() if flags.batch_column in cells.obs else "0"
    scvi.model.SCVI.setup_anndata(rna, batch_key="batch")
    base = scvi.model.SCVI(rna, n_layers=2, n_latent=30, gene_likelihood="nb")
    base.train(max_epochs=flags.scvi_epochs or None, enable_progress_bar=True)
    details["seconds"]["scVI"] = round(time.monotonic() - started, 1)
    return rna, base


def types_by_latent(name: str, latent: np.ndarray, cells: Cells, flags: Flags, groups: dict) -> dict:
    """Predict types by logistic regression on a latent, with few labels once more with its own types as labels.

    Parameters
    ----------
    name : of the method
    latent : [cells, dimensions] of all cells
    cells, flags : the cells, and which labels to use
    groups : group → labels per type, 0 for all

    Returns
    -------
    group → types of the test cells, a column per method
    """
    labels, predicted = cells.labels(flags.label_column), {}
    train, val, test = (cells.rows(part) for part in ("train", "val", "test"))
    val = val[labels.notna().to_numpy()[val]]
    z = StandardScaler().fit(latent[train]).transform(latent)
    fit = lambda x, y: logistic_regression(x, y, z[val], labels.iloc[val].to_numpy())[0]
    for group, per_type in groups.items():
        known = known_labels(cells, flags, per_type)
        rows = np.flatnonzero(known != UNKNOWN)
        found = fit(z[rows], known[rows])
        types = {f"{name} + logistic regression": found.predict(z[test])}
        if per_type:
            both = np.concatenate([rows, train])
            again = fit(z[both], np.concatenate([known[rows], found.predict(z[train])]))
            types[f"{name} + logistic regression, self-trained"] = again.predict(z[test])
        predicted[group] = pd.DataFrame(types, index=cells.obs.index[test])
    return predicted


def scanvi(scvi, counts: dict[str, AnnData], cells: Cells, flags: Flags, groups: dict, details: dict) -> dict:
    """Train scVI once and scANVI for every group; return group → types of the test cells, predicted by both."""
    (rna, base), details["n_samples_per_label"] = trained_scvi(scvi, counts, cells, flags, details), {}
    predicted = types_by_latent("scVI", base.get_latent_representation(), cells, flags, groups)
    test, val = cells.rows("test"), cells.rows("val")
    labels = cells.labels(flags.label_column)
    val = val[labels.notna().to_numpy()[val]]
    for group, per_type in groups.items():
        started, best = time.monotonic(), -1.0
        rna.obs["known"] = known_labels(cells, flags, per_type)
        choices = (TUTORIAL_LABELS,) if 0 < per_type <= TUTORIAL_LABELS else (TUTORIAL_LABELS, None)
        for n_samples in choices:  # of labelled cells per type and epoch; None for all
            model = trained_scanvi(scvi, base, rna, n_samples)
            types = np.asarray(model.predict(rna))
            scores = classification_scores(labels.iloc[val].to_numpy(), types[val])
            score = (scores["accuracy"] + scores["macro_f1"]) / 2  # the same criterion as for the baselines
            if score > best:
                best, details["n_samples_per_label"][group] = score, n_samples
                predicted[group]["scANVI"] = types[test]
        details["seconds"][f"scANVI, {group}"] = round(time.monotonic() - started, 1)
    return predicted


def trained_scanvi(scvi, base, rna: AnnData, n_samples: int | None):
    """Return a scANVI model trained on `rna`, with the labels in rna.obs["known"]."""
    for batch_size in BATCH_SIZES:
        model = scvi.model.SCANVI.from_scvi_model(base, UNKNOWN, labels_key="known", adata=rna)
        try:
            model.train(max_epochs=20, n_samples_per_label=n_samples, batch_size=batch_size)
            return model
        except ValueError as error:  # batch normalisation fails if the last minibatch has one cell
            if "more than 1 value per channel" not in str(error) or batch_size == BATCH_SIZES[-1]:
                raise


def multivi(scvi, counts: dict[str, AnnData], cells: Cells, flags: Flags, groups: dict, details: dict) -> dict:
    """Train MultiVI and put its translation scores into `details`.

    Returns
    -------
    group → types of the test cells, predicted by logistic regression on MultiVI's latent space
    """
    started = time.monotonic()
    test = cells.rows("test")
    is_paired = np.ones(len(cells.obs), np.float32)
    is_paired[test] = 0
    atac = sparse.csr_matrix(sparse.diags(is_paired) @ (counts["atac"].X > 0).astype(np.float32))
    atac.eliminate_zeros()  # the model sees only the RNA of test cells
    mdata = MuData({"rna": counts["rna"].copy(), "atac": AnnData(atac, obs=counts["atac"].obs, var=counts["atac"].var)})
    mdata.obs["modality"] = np.where(is_paired, "paired", "expression")
    mdata.obs["batch"] = cells.obs[flags.batch_column].astype(str).to_numpy()
    scvi.model.MULTIVI.setup_mudata(
        mdata,
        batch_key="modality",
        categorical_covariate_keys=["batch"],
        modalities={"rna_layer": "rna", "atac_layer": "atac"},
    )
    model = scvi.model.MULTIVI(mdata)
    model.train(max_epochs=flags.multivi_epochs or 500)
    details["multivi_epochs"] = model.trainer.current_epoch

    def accessibility(start: int, stop: int) -> np.ndarray:
        return model.get_normalized_accessibility(
            indices=test[start:stop], transform_batch="paired", normalize_regions=True, return_numpy=True
        )

    scores = accessibility(0, len(test)).astype(np.float32)
    details["translation"]["MultiVI"] = translation_scores(
        cells.values["atac"][test],
        lambda start, stop: scores[:, start:stop],
        cell_scores=lambda start, stop: scores[start:stop],
    )
    predicted = types_by_latent("MultiVI", model.get_latent_representation(), cells, flags, groups)
    details["seconds"]["MultiVI"] = round(time.monotonic() - started, 1)
    return predicted


if __name__ == "__main__":
    run_script(main)
