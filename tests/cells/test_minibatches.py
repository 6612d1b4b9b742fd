"""Plans: every cell once, whatever the number of processes. Datasets: what a minibatch carries is the cell's own."""

import threading

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse import random as random_matrix

from models.minibatch import Minibatch
from utils.cells.false_pairs import FalsePairs
from utils.cells.minibatches import AHEAD, CellDataset, MicroBatch, Plan, make_loader, train_and_val
from utils.errors import UserError


def lengths_of(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 50, n)


def shares(n: int, batch_size: int, micro: int, world: int, epoch: int = 0, **settings) -> list[list[MicroBatch]]:
    """The plan of each of `world` processes."""
    plans = [Plan(lengths_of(n), batch_size, micro, rank, world, **settings) for rank in range(world)]
    for plan in plans:
        plan.epoch = epoch
    return [list(plan) for plan in plans]


def steps(plans: list[list[MicroBatch]], micro: int) -> list[list[int]]:
    """The real cells of each optimiser step, over micro-batches and processes, as a sorted list."""
    out = []
    for first in range(0, len(plans[0]), micro):
        parts = [batch for plan in plans for batch in plan[first : first + micro]]
        out.append(sorted(int(row) for batch in parts for row in batch.rows[batch.weight > 0]))
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_every_cell_once_with_weight_one(n, batch_size, micro, world, shuffle, epoch):
    plans = shares(n, batch_size, micro, world, epoch, shuffle=shuffle)
    plan = Plan(lengths_of(n), batch_size, micro, world_size=world)
    assert {len(p) for p in plans} == {len(plan)} == {plan.n_steps * micro}
    assert plan.n_steps == int(np.ceil(n / (batch_size * micro * world)))
    assert sorted(cell for step in steps(plans, micro) for cell in step) == list(range(n))
    for i in range(len(plan)):
        size = len(steps([p[i - i % micro : i - i % micro + micro] for p in plans], micro)[0])
        for p in plans:
            assert len(p[i].rows) == len(p[i].weight) == batch_size
            assert set(p[i].weight) <= {0.0, 1.0}
            assert (p[i].step_cells, p[i].epoch) == (size, epoch)


@pytest.mark.parametrize(("batch_size", "micro", "world"), [(12, 1, 1), (4, 3, 1), (3, 1, 4), (2, 3, 2), (1, 12, 1)])
def test_a_step_holds_the_same_cells_however_it_is_cut(batch_size, micro, world):
    expected = steps(shares(50, 12, 1, 1, epoch=2, seed=5, shuffle=True), 1)
    assert steps(shares(50, batch_size, micro, world, epoch=2, seed=5, shuffle=True), micro) == expected


def test_order_changes_with_epoch_and_seed_and_is_repeatable():
    draw = lambda seed, epoch: steps(shares(50, 4, 1, 1, epoch, seed=seed, shuffle=True), 1)
    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 0) != draw(0, 1)
    assert draw(0, 0) != draw(1, 0)
    fixed = [steps(shares(50, 4, 1, 1, epoch, seed=seed), 1) for seed, epoch in ((0, 0), (1, 3))]
    assert fixed[0] == fixed[1] == [list(range(start, min(start + 4, 50))) for start in range(0, 50, 4)]


@pytest.mark.parametrize("first_step", [0, 1, 4, 5])
def test_a_plan_starts_in_the_middle(first_step):
    whole = Plan(lengths_of(37), 4, 2, seed=3, shuffle=True)
    part = Plan(lengths_of(37), 4, 2, seed=3, shuffle=True)
    part.first_step = first_step
    tail = list(whole)[first_step * 2 :]
    assert len(part) == len(tail)
    for ours, theirs in zip(part, tail, strict=True):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.weight, theirs.weight)


def test_cells_of_a_step_are_sorted_by_length_to_save_padding():
    lengths = lengths_of(64)
    batches = list(Plan(lengths, 4, 16))
    dealt = lengths[np.concatenate([batch.rows for batch in batches])]
    assert (np.diff(dealt) >= 0).all()
    padded = sum(4 * lengths[batch.rows].max() for batch in batches)
    unsorted = sum(4 * lengths[i : i + 4].max() for i in range(0, 64, 4))
    assert padded < 1.1 * lengths.sum() < unsorted


# Minibatches -------------------------------------------------------------------------------------------------------


def micro_batch(rows, epoch: int = 0) -> MicroBatch:
    rows = np.asarray(rows)
    return MicroBatch(rows, np.ones(len(rows), np.float32), epoch, len(rows))


def barcodes(n: int) -> pd.Index:
    return pd.Index([f"cell{i}" for i in range(n)])


def paired(n: int, labels=None, groups=None, **settings) -> CellDataset:
    """Cells whose ATAC is their own number, peak i is open in cell i alone; types and groups restrict false pairs."""
    values = {"rna": random_matrix(n, 20, 0.3, "csr", np.float32, 0), "atac": csr_matrix(np.eye(n, dtype=np.float32))}
    return CellDataset(values, barcodes(n), pairs=FalsePairs(n, labels, groups), **settings)


def partners(batch: Minibatch) -> np.ndarray:
    return batch.atac.dense().numpy().argmax(1)


def test_a_minibatch_carries_the_rows_it_names():
    rng = np.random.default_rng(0)
    values = {"rna": random_matrix(30, 20, 0.3, "csr", np.float32, rng), "atac": csr_matrix(rng.random((30, 9)) < 0.2)}
    values["atac"] = values["atac"].astype(np.float32)
    latents = {"rna": rng.normal(size=(30, 4)), "atac": rng.normal(size=(30, 4))}
    labels = rng.integers(-1, 3, 30)
    dataset = CellDataset(values, barcodes(30), targets={"cell_type": labels}, latents=latents)
    rows = np.array([4, 29, 0, 4])
    batch = dataset[MicroBatch(rows, np.array([1, 1, 1, 0], np.float32), 3, 11)]
    for name in ("rna", "atac"):
        np.testing.assert_array_equal(batch[name].dense().numpy(), values[name][rows].toarray())
        np.testing.assert_array_equal(batch.latent[name].numpy(), latents[name][rows])
    np.testing.assert_array_equal(batch.target["cell_type"].numpy(), labels[rows])
    np.testing.assert_array_equal(batch.row.numpy(), rows)
    assert (batch.weight.tolist(), batch.step_cells, batch.true_pair) == ([1, 1, 1, 0], 11, None)
    np.testing.assert_array_equal(dataset.lengths, (values["rna"] != 0).sum(1).A1)


def test_cells_of_one_modality_have_its_lengths_and_nothing_else():
    atac = csr_matrix(np.tri(5, 8, dtype=np.float32))
    dataset = CellDataset({"atac": atac}, barcodes(5))
    assert dataset.lengths.tolist() == [1, 2, 3, 4, 5]
    batch = dataset[micro_batch([2])]
    assert (batch.rna, batch.target, batch.latent, batch.true_pair) == (None, None, None, None)


def test_keys_change_by_epoch_in_training_and_never_in_validation():
    rows = np.arange(500)
    train, val = (CellDataset({"rna": csr_matrix((500, 3))}, barcodes(500), resample=r) for r in (True, False))
    drawn = torch.stack([train.keys(rows, epoch) for epoch in range(4)])
    assert len(drawn.unique()) == drawn.numel()
    assert torch.equal(val.keys(rows, 0), val.keys(rows, 7))
    assert not np.isin(val.keys(rows, 0).numpy(), drawn.numpy()).any()


def test_keys_belong_to_the_barcode_and_the_seed():
    order = np.random.default_rng(0).permutation(50)
    values = {"rna": csr_matrix((50, 3))}
    straight, shuffled = CellDataset(values, barcodes(50)), CellDataset(values, barcodes(50)[order])
    assert torch.equal(straight.keys(order, 2), shuffled.keys(np.arange(50), 2))
    other = CellDataset(values, barcodes(50), seed=1)
    assert not torch.isin(other.keys(order, 2), straight.keys(order, 2)).any()


def test_a_loader_gives_the_plan():
    dataset = paired(37, np.arange(37) % 3)
    plan = Plan(dataset.lengths, 4, 2, seed=1, shuffle=True)
    for epoch in (0, 1):
        plan.epoch = epoch
        for batch, expected in zip(make_loader(dataset, plan), plan, strict=True):
            np.testing.assert_array_equal(batch.row.numpy(), expected.rows)
            assert torch.equal(batch.key, dataset.keys(expected.rows, epoch))
            np.testing.assert_array_equal(partners(batch), partners(dataset[expected]))


def test_a_loader_works_ahead_tells_errors_and_ends():
    dataset = paired(37, np.arange(37) % 3)
    made, make = [], dataset.__class__.__getitem__

    class Noted(CellDataset):
        def __getitem__(self, cells):
            made.append(cells.rows)
            if 30 in cells.rows:
                raise UserError("cell 30 is odd")
            return make(self, cells)

    dataset.__class__ = Noted
    loader = make_loader(dataset, Plan(dataset.lengths, 4))
    first = next(loader)
    assert isinstance(first, Minibatch)
    loader.close()
    assert 1 < len(made) <= 1 + AHEAD
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    with pytest.raises(UserError, match="cell 30"):
        list(make_loader(dataset, Plan(dataset.lengths, 4)))


# False pairs -------------------------------------------------------------------------------------------------------

LABELS = {
    "types": np.repeat([0, 1, 2, 3], [500, 300, 150, 50]),
    "unordered types": np.random.default_rng(0).integers(0, 3, 1000),
    "some unknown": np.random.default_rng(1).integers(-1, 3, 1000),
    "one cell of a type": np.array([0] * 999 + [1]),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_false_partner_is_of_another_type_and_half_of_the_pairs_are_false(name):
    labels = LABELS[name]
    dataset = paired(1000, labels)
    shown = []
    for epoch in range(4):
        batch = dataset[micro_batch(np.arange(1000), epoch)]
        partner, true = partners(batch), batch.true_pair.numpy()
        assert (partner[true] == np.flatnonzero(true)).all()
        known = ~true & (labels >= 0)
        assert (labels[partner[known]] != labels[known]).all()
        assert (partner[~true] != np.flatnonzero(~true)).all()
        assert abs(true.mean() - 0.5) < 4 * 0.5 / 1000**0.5
        shown.append(partner)
    assert (shown[0] != shown[1]).any()
    np.testing.assert_array_equal(batch.rna.dense().numpy(), dataset.values["rna"][:].toarray())  # RNA stays its own


def test_few_labels_leave_every_cell_an_equally_likely_partner():
    """900 of 1,000 cells have no label: false pairs must not all carry the ATAC of the labelled ones."""
    labels = np.where(np.arange(1000) < 100, np.arange(1000) % 2, -1)
    dataset, drawn = paired(1000, labels), []
    for epoch in range(20):
        batch = dataset[micro_batch(np.arange(1000), epoch)]
        drawn.append(partners(batch)[~batch.true_pair.numpy()])
    drawn = np.concatenate(drawn)
    for labelled in (labels >= 0, labels < 0):  # 10 % and 90 %; a labelled cell cannot be drawn by those of its type
        assert abs(labelled[drawn].mean() - labelled.mean()) < 0.01


def test_partners_stay_within_their_group():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(-1, 3, 500), rng.integers(0, 4, 500)
    dataset, seen = paired(500, labels, groups), [set() for _ in range(500)]
    for epoch in range(300):
        batch = dataset[micro_batch(np.arange(500), epoch)]
        for cell in np.flatnonzero(~batch.true_pair.numpy()):
            seen[cell].add(int(partners(batch)[cell]) if cell < 3 else -1)
        false = ~batch.true_pair.numpy()
        assert (groups[partners(batch)[false]] == groups[false]).all()
    for cell in range(3):
        allowed = (groups == groups[cell]) & (np.arange(500) != cell)
        allowed &= (labels != labels[cell]) | (labels < 0)
        assert seen[cell] <= set(np.flatnonzero(allowed)) and len(seen[cell]) > 0.6 * allowed.sum()
        assert dataset.pairs.n_partners[cell] == allowed.sum()


def test_a_cell_whose_group_is_of_its_own_type_keeps_its_own_atac():
    dataset = paired(6, labels=[0, 0, 0, 0, 1, 1], groups=[0, 0, 0, 1, 1, 1])
    assert dataset.pairs.n_partners.tolist() == [0, 0, 0, 2, 1, 1]
    true = np.stack([dataset[micro_batch(np.arange(6), epoch)].true_pair.numpy() for epoch in range(50)])
    assert true[:, :3].all()
    assert (true[:, 3:].mean(0) < 0.8).all()


@pytest.mark.parametrize("labels", [None, np.full(1000, -1)], ids=["none", "unknown"])
def test_without_types_the_partner_is_any_other_cell(labels):
    batch = paired(1000, labels)[micro_batch(np.arange(1000))]
    true = batch.true_pair.numpy()
    assert ((partners(batch) == np.arange(1000)) == true).all()
    assert abs(true.mean() - 0.5) < 4 * 0.5 / 1000**0.5


def test_every_cell_of_another_type_is_an_equally_likely_partner():
    labels = np.array([0, 1, 0, 2, 1, 2, 0, 1])
    dataset, drawn = paired(8, labels), []
    for epoch in range(1500):
        batch = dataset[micro_batch([2], epoch)]
        drawn += [] if batch.true_pair.item() else [partners(batch).item()]
    counts = np.bincount(drawn, minlength=8)
    assert (counts[labels == 0] == 0).all()
    expected = len(drawn) / 5
    assert (np.abs(counts[labels != 0] - expected) < 5 * expected**0.5).all()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_pairs_do_not_depend_on_the_minibatch(size):
    dataset = paired(64, np.arange(64) % 3)
    whole = dataset[micro_batch(np.arange(64))]
    order = np.random.default_rng(0).permutation(64)
    for start in range(0, 64, size):
        rows = order[start : start + size]
        batch = dataset[micro_batch(rows)]
        np.testing.assert_array_equal(partners(batch), partners(whole)[rows])
        np.testing.assert_array_equal(batch.true_pair.numpy(), whole.true_pair.numpy()[rows])


def test_a_lonely_cell_has_only_itself():
    batch = paired(1)[micro_batch([0, 0])]
    assert batch.true_pair.tolist() == [True, True]
    assert partners(batch).tolist() == [0, 0]


def test_validation_pairs_are_the_same_in_every_epoch():
    dataset = paired(100, np.arange(100) % 2, resample=False)
    first, later = (dataset[micro_batch(np.arange(100), epoch)] for epoch in (0, 9))
    np.testing.assert_array_equal(partners(first), partners(later))


def test_training_and_validation_cells_are_those_of_the_file(cells):
    labels = cells.codes("cell_type", "--label_column")
    keep = labels != 1
    latents = {"rna": np.arange(96.0)[:, None]}
    train, val = train_and_val(cells, 4, keep=keep, targets={"cell_type": labels}, latents=latents)
    for dataset, split, resample in ((train, "train", True), (val, "val", False)):
        rows = np.flatnonzero((cells.obs["split"] == split).to_numpy() & keep)
        assert len(dataset) == len(rows) > 0
        assert (dataset.resample, dataset.seed) == (resample, 4)
        np.testing.assert_array_equal(dataset.targets["cell_type"], labels[rows])
        np.testing.assert_array_equal(dataset.latents["rna"][:, 0], rows)
        for name in ("rna", "atac"):
            assert (dataset.values[name][:] != cells.values[name][rows]).nnz == 0
        expected = CellDataset(dataset.values, cells.obs.index[rows], 4, resample=resample)
        assert torch.equal(dataset.keys(np.arange(len(rows)), 2), expected.keys(np.arange(len(rows)), 2))
