"""The network with feature dropout: sparse input as a product, equal bits for equal seeds, effects of its options."""

import numpy as np
import torch
from scipy import sparse

from tests.evaluate.marked_cells import cells
from utils.evaluate import dropout_mlp
from utils.evaluate.dropout_mlp import Encoder, class_weights, fit_denoiser, fit_mlp


def test_the_encoder_multiplies_what_is_kept():
    torch.manual_seed(0)
    encoder = Encoder(120, 16)
    x, _ = cells(30, 0)
    x = sparse.vstack([x, sparse.csr_matrix((1, 120), dtype=np.float32)], format="csr")  # with a cell without counts
    keep = np.random.default_rng(0).random(x.nnz) < 0.5
    kept = x.copy()
    kept.data = np.where(keep, 2 * x.data, 0).astype(np.float32)
    as_dense = lambda x: torch.from_numpy(x.toarray()) @ encoder.first.weight + encoder.bias
    expected = torch.nn.functional.gelu(encoder.norm(as_dense(kept)))
    torch.testing.assert_close(encoder(x, keep, 2.0), expected)
    torch.testing.assert_close(encoder(x), torch.nn.functional.gelu(encoder.norm(as_dense(x))))


def test_equal_seeds_give_equal_bits_and_leave_the_other_draws_alone(monkeypatch):
    monkeypatch.setattr(dropout_mlp, "DENOISER_STEPS", 20)
    (x, y), (x_test, _) = cells(200, 0), cells(50, 1)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, same, other = (fit_mlp(x, y, seed, steps=20).predict_proba(x_test) for seed in (0, 0, 1))
    assert (one == same).all() and (one != other).any()
    assert (torch.random.get_rng_state() == before).all()
    np.testing.assert_allclose(one.sum(1), 1, rtol=1e-5)
    a, b = (fit_denoiser(x, 0).first.weight for _ in range(2))
    assert (a == b).all()


def test_a_denoiser_helps_where_few_cells_have_a_label(monkeypatch):
    monkeypatch.setattr(dropout_mlp, "DENOISER_STEPS", 300)
    (x, _), (few, y), (x_test, y_test) = cells(1500, 0), cells(24, 1), cells(1000, 2)
    right = lambda **start: np.mean(fit_mlp(few, y, 0, steps=100, **start).predict(x_test) == y_test)
    denoiser = fit_denoiser(x, 0)
    before = denoiser.first.weight.clone()
    assert right(start=denoiser) > right() + 0.03
    assert (denoiser.first.weight == before).all()  # a copy is trained
    frozen = fit_mlp(few, y, 0, steps=5, start=denoiser, start_rate=0.0).encoder
    slow = fit_mlp(few, y, 0, steps=5, start=denoiser, start_rate=0.1).encoder
    assert (frozen.first.weight == before).all() and (slow.first.weight != before).any()


def test_class_weights():
    codes = np.repeat([0, 1], [90, 10])
    np.testing.assert_allclose(class_weights(codes, 0), [1, 1])
    balanced = class_weights(codes, 1)
    np.testing.assert_allclose(balanced, [100 / 2 / 90, 100 / 2 / 10])  # scikit-learn's "balanced"
    assert class_weights(codes, 0.5)[codes].mean() == 1
