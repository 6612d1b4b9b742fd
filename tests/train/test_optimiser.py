"""What the optimiser does to which weights."""

import torch

from models.objectives import Objective
from tests.helpers import KINDS, make_stage, take, train
from utils.train.loop import decayed_groups


def test_weight_decay_is_of_matrices_alone():
    """Without a gradient, a step multiplies a matrix by 1 - learning rate * decay and leaves the rest."""

    class Still(Objective):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)

    objective = Still()
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimizer = torch.optim.AdamW(decayed_groups(objective, 0.5), lr=0.1)
    for p in objective.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in objective.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name == "layer.weight" else 1.0))


def test_epsilon_and_the_scale_of_a_group_reach_the_optimiser(cells, tmp_path):
    """What was pretrained stays at scale 0; with a huge epsilon hardly anything moves."""
    cells = take(cells, 16, 4)
    for name, scale, epsilon in (("still", 0.0, 1e-8), ("slow", 1.0, 1e6), ("plain", 1.0, 1e-8)):
        stage = make_stage("celltype", cells)
        stage.objective.pretrained_lr_scale = scale
        before = {key: p.detach().clone() for key, p in stage.objective.named_parameters()}
        train(stage, tmp_path / name, epochs=1, adam_epsilon=epsilon)
        moved = {key: (p.detach() - before[key]).abs().max().item() for key, p in stage.objective.named_parameters()}
        head, rest = ([size for key, size in moved.items() if (".head." in key) == new] for new in (True, False))
        assert (max(head) > 1e-4) == (name != "slow") and (max(rest) > 1e-4) == (name == "plain"), name


def test_frozen_weights_stay_and_all_others_move(cells, tmp_path):
    for kind in KINDS:
        stage = make_stage(kind, take(cells, 16, 4))
        before = {name: p.detach().clone() for name, p in stage.objective.named_parameters()}
        train(stage, tmp_path / kind, epochs=2)
        for name, parameter in stage.objective.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved == parameter.requires_grad, (kind, name)
