import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from utils.errors import UserError
from utils.evaluate import plots


def check_png(path, least_colours=10):
    """The figure is there, of a printable size, has colours, and nothing touches its border but white."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.info["dpi"][0] == pytest.approx(150, abs=1)
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) >= 300 and max(pixels.shape[:2]) <= 4000
    assert len(np.unique(pixels.astype(int) @ [1, 256, 65536])) >= least_colours
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all()
    return pixels


def records(epochs=6, val=True, rate=True):
    rows = []
    for step in range(epochs * 4):
        row = {"epoch": (step + 1) / 4, "phase": "train", "loss": 2 / (step + 1), "rna_mse": 1.0}
        rows.append(row | ({"learning_rate": 1e-4 * (step + 1)} if rate else {}))
        if val and step % 4 == 3:
            rows.append({"epoch": (step + 1) / 4, "phase": "val", "loss": abs(step - 11) + 1.0, "accuracy": 0.5})
    return rows


@pytest.mark.parametrize("val", [True, False])
@pytest.mark.parametrize("rate", [True, False])
def test_loss_curve(tmp_path, val, rate):
    path = plots.loss_curve(records(val=val, rate=rate), tmp_path / "new" / "loss.png", "Stage I")
    check_png(path)


def test_loss_curve_passes_over_what_is_no_loss(tmp_path):
    clean, odd = tmp_path / "clean.png", tmp_path / "odd.png"
    plots.loss_curve(records(), clean, "run")
    extra = [
        {"epoch": 1.0, "phase": "train", "loss": float("nan")},
        {"epoch": 2.0, "phase": "val", "loss": float("-inf")},
        {"epoch": 3.0, "phase": "test", "accuracy": 1.0},
        {"event": "resumed"},
    ]
    plots.loss_curve(extra + records()[::-1], odd, "run")  # and the order of lines is that of the epochs
    assert clean.read_bytes() == odd.read_bytes()
    with pytest.raises(UserError, match="loss"):
        plots.loss_curve(extra, odd, "run")
    with pytest.raises(UserError, match="loss"):
        plots.loss_curve([], odd, "run")


def blobs(n=240, classes=12, seed=0):
    rng = np.random.default_rng(seed)
    kind = rng.integers(classes, size=n)
    embedding = 6 * rng.normal(size=(classes, 8))[kind] + rng.normal(size=(n, 8))
    true = np.array([f"type {k}" for k in range(classes)])[kind]
    return embedding, true, np.where(rng.random(n) < 0.8, true, "type 0"), kind


def test_umap_is_deterministic_and_keeps_neighbours():
    embedding, _, _, kind = blobs()
    points = plots.umap_coordinates(embedding, seed=3)
    assert points.shape == (240, 2) and np.isfinite(points).all()
    np.testing.assert_array_equal(points, plots.umap_coordinates(embedding, seed=3))
    assert not np.array_equal(points, plots.umap_coordinates(embedding, seed=4))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag(np.full(240, np.inf))
    assert np.mean(kind[distance.argmin(axis=1)] == kind) > 0.95


@pytest.mark.parametrize("n", [1, 2, 9, 10, 12])
def test_umap_of_few_cells(n):
    points = plots.umap_coordinates(np.random.default_rng(0).normal(size=(n, 8)))
    assert points.shape == (n, 2) and np.isfinite(points).all()
    assert plots.umap_coordinates(np.ones((n, 1))).shape == (n, 2)


def test_umap_true_predicted(tmp_path, monkeypatch):
    embedding, true, predicted, _ = blobs()
    first = plots.umap_true_predicted(embedding, true, predicted, tmp_path / "a.png")
    second = plots.umap_true_predicted(embedding, true, predicted, tmp_path / "b.png")
    both = check_png(first, least_colours=50)
    assert first.read_bytes() == second.read_bytes()
    only = check_png(plots.umap_true_predicted(embedding, None, predicted, tmp_path / "c.png"), least_colours=50)
    assert only.shape[1] < 0.7 * both.shape[1]
    spared = plots.umap_true_predicted(embedding, true, true, tmp_path / "d.png")
    # Wrong cells have black edges: more darkness than when every cell is right.
    assert (both < 60).all(axis=-1).sum() > (check_png(spared) < 60).all(axis=-1).sum() + 500
    monkeypatch.setattr(plots, "MAX_UMAP_CELLS", 50)
    seen = []
    monkeypatch.setattr(plots, "umap_coordinates", lambda x, seed: seen.append(x) or x[:, :2])
    check_png(plots.umap_true_predicted(embedding, true, predicted, tmp_path / "e.png"))
    assert seen[0].shape == (50, 8) and len(np.unique(seen[0], axis=0)) == 50
    with pytest.raises(ValueError, match="row"):
        plots.umap_true_predicted(embedding[1:], true, predicted, tmp_path / "f.png")
    with pytest.raises(UserError, match="cells"):
        plots.umap_true_predicted(embedding[:0], None, [], tmp_path / "f.png")


@pytest.mark.parametrize("classes", [1, 2, 20, 35])
def test_confusion(tmp_path, classes):
    rng = np.random.default_rng(0)
    names = np.array([f"a cell type with a long name {i}" for i in range(classes)])
    true = rng.integers(classes, size=500)
    predicted = np.where(rng.random(500) < 0.7, true, rng.integers(classes, size=500))
    check_png(plots.confusion(names[true], names[predicted], tmp_path / "confusion.png"))


def test_confusion_with_classes_that_are_only_predicted(tmp_path):
    check_png(plots.confusion(["T", "T", "B"], ["T", "mono", "B"], tmp_path / "confusion.png"))


def test_bars(tmp_path):
    table = {
        "scMomer": {"accuracy": 0.81, "macro_f1": 0.7},
        "logistic regression": {"accuracy": 0.74, "macro_f1": float("nan"), "peak_auroc": 0.62},
    }
    plain = check_png(plots.bars(table, tmp_path / "a.png", "Cell types"))
    whiskers = check_png(plots.bars(table, tmp_path / "b.png", "Cell types", {"scMomer": {"accuracy": (0.79, 0.83)}}))
    assert plain.shape == whiskers.shape and (plain != whiskers).any()
    check_png(plots.bars({f"model {i}": table["scMomer"] for i in range(12)}, tmp_path / "c.png", "Many"))
    with pytest.raises(ValueError, match="metric"):
        plots.bars({}, tmp_path / "d.png", "none")


def test_plots_touch_no_global_state():
    code = "import sys, utils.evaluate.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_scaling(tmp_path):
    rows = [("genes", n, n / 100) for n in (1, 10, 2000)] + [("peaks", n, 0.5 + n / 1e6) for n in (20_000, 10**6)]
    table = pd.DataFrame(rows, columns=["curve", "n", "seconds_per_cell"])
    narrow = check_png(plots.scaling(table.iloc[:3], "one machine", tmp_path / "narrow.png"))
    assert check_png(plots.scaling(table, "one machine", tmp_path / "scaling.png")).shape[1] > 1.8 * narrow.shape[1]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """What `loss_curve` has drawn, as matplotlib's figure."""
    monkeypatch.setattr(plots, "_save", lambda figure, path, **how: figure)
    return lambda *of, **how: plots.loss_curve(*of, path=tmp_path / "loss.png", title="run", **how)


def legend_of(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize("epochs", [0.2, 1, 3, 6, 250])
def test_epochs_on_the_axis_are_whole(epochs, drawn):
    rows = [{"epoch": epochs * share, "phase": "train", "loss": 2 - share} for share in (0.25, 0.5, 1.0)]
    figure = drawn(rows)
    figure.draw_without_rendering()
    low, high = figure.axes[-1].get_xlim()
    ticks = [tick for tick in figure.axes[-1].get_xticks() if low <= tick <= high]
    assert len(ticks) >= 2 and all(tick == round(tick) for tick in ticks)
    assert low == 0 and high >= epochs
    labels = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert all(label.isdigit() for label in labels if label)


def test_the_kept_epoch_is_marked_and_no_other(drawn):
    """The records are lowest at epoch 3; by --keep last it is the last one that is kept."""
    assert legend_of(drawn(records(), kept=3.0, keep="best"))[-1] == "saved model (best): epoch 3, validation loss 1"
    figure = drawn(records(), kept=6.0, keep="last")
    assert legend_of(figure)[-1] == "saved model (last): epoch 6, validation loss 13"
    (star,) = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert star.get_xdata().tolist() == [6.0] and star.get_ydata().tolist() == [13.0]
    assert legend_of(drawn(records(val=False), kept=6.0))[-1].startswith("saved model (best): epoch 6, training")
    assert legend_of(drawn(records())) == ["training", "validation"]


def test_a_part_of_an_epoch_has_no_fraction_in_the_legend(drawn):
    rows = [{"epoch": 4.2857, "phase": phase, "loss": 1.5} for phase in ("train", "val")]
    (label,) = [text for text in legend_of(drawn(rows, kept=4.2857)) if "saved" in text]
    assert label == "saved model (best): a part of epoch 5, validation loss 1.5"


def test_the_axis_names_the_loss(drawn):
    assert drawn(records()).axes[0].get_ylabel() == "loss"
    assert drawn(records(), loss_name="cross-entropy (nats)").axes[0].get_ylabel() == "cross-entropy (nats)"
