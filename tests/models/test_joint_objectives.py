"""Objectives of stages II, III and of fine-tuning: the losses by hand, and exactly which weights they train."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.fusion import ATACTower, RNATower
from models.heads import CellTypeHead
from models.masking import drop_features
from models.objectives import (
    DROP_STREAMS,
    Denoising,
    Distillation,
    FineTuning,
    JointPairs,
    MaskedRNA,
    Objective,
    unfreeze_last_blocks,
)
from models.peak_loss import peak_bce
from models.scmomer import ScMomer, ScMomerConfig
from models.shapes import ClassifierConfig
from models.student import Student
from tests.models.helpers import (
    LATENT_DIM,
    N_CLASSES,
    N_GENES,
    N_PEAKS,
    accessibility,
    celltypes,
    expression,
    masked_atac,
    minibatch,
    ragged,
    rna_encoder,
    scmomer,
    type_head,
)

DEPTH = 3
KINDS = ("all", "expressed")


# ----------------------------------------------------------------------------------------------------- JointPairs


def expected_trainable(model: nn.Module, n_blocks: int, prefix: str = "") -> set[str]:
    """Names of what stage II and fine-tuning train in the towers and fusion, by the list in the documentation."""
    parts = ["fusion.", "towers.rna.pooling.", "towers.rna.norm.", "towers.atac.projection.", "towers.atac.norm."]
    parts += ["towers.rna.encoder.norm.", "towers.atac.encoder.norm.", "towers.atac.encoder.pooler."]
    blocks = range(DEPTH - n_blocks, DEPTH) if n_blocks >= 0 else range(DEPTH)
    parts += [f"towers.{name}.encoder.blocks.{i}." for name in ("rna", "atac") for i in blocks]
    if n_blocks < 0:
        parts += [f"towers.rna.encoder.{name}_embedding." for name in ("token", "gene")]
        parts += [f"towers.atac.encoder.{name}" for name in ("peak_rows", "patch_bias", "cls_token", "positions")]
    parts += ["decoders.", "pair_head.", "head."]
    names = {name for name, _ in model.named_parameters()}
    return {name for name in names if name.startswith(tuple(prefix + part for part in parts))}


@pytest.mark.parametrize("n_blocks", [0, 1, 2, 3, -1])
def test_joint_pairs_trains_exactly_this(n_blocks):
    objective = JointPairs(scmomer(), n_blocks)
    trainable = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trainable == expected_trainable(objective, n_blocks)
    n_blocks_trained = DEPTH if n_blocks < 0 else n_blocks
    assert len({name.split(".")[4] for name in trainable if ".blocks." in name}) == n_blocks_trained
    assert {name.split(".")[0] for name, _ in objective.named_children()} == {
        "towers",
        "fusion",
        "decoders",
        "pair_head",
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_joint_pairs_loss_by_hand(kind):
    """Reconstruction counts for true pairs only, and twice, since half of the pairs are false."""
    model, batch = scmomer(kind), minibatch()
    loss, metrics = JointPairs(model)(batch)
    embedding = model.embed(batch)
    mse = (model.decoders["rna"](embedding) - batch.rna.dense()).square().mean(1)
    bce = F.binary_cross_entropy_with_logits(
        model.decoders["atac"](embedding), batch.atac.dense(), pos_weight=torch.tensor(5.0), reduction="none"
    ).mean(1)
    logits = model.pair_head(embedding)
    is_true = batch.true_pair
    ce = -logits.log_softmax(1)[torch.arange(5), is_true.long()]
    torch.testing.assert_close(loss, torch.where(is_true, 2 * (mse + bce), 0) + ce, atol=1e-5, rtol=1e-5)
    assert metrics["rna_mse"][0].item() == pytest.approx(mse[is_true].sum().item(), rel=1e-5)
    assert metrics["atac_bce"][0].item() == pytest.approx(bce[is_true].sum().item(), rel=1e-5)
    assert metrics["rna_mse"][1] == metrics["atac_bce"][1] == is_true.sum() == 3
    assert metrics["pair_accuracy"][0] == (logits.argmax(1) == is_true).sum()
    assert metrics["pair_accuracy"][1] == 5


def test_false_pairs_teach_the_decoders_nothing():
    objective = JointPairs(scmomer())
    loss, _ = objective(minibatch(true_pair=torch.zeros(5, dtype=torch.bool)))
    loss.sum().backward()
    assert all((p.grad == 0).all() for p in objective.decoders.parameters())
    assert all(p.grad.any() for p in objective.pair_head.parameters())

    def decoder_gradient(true_pair: list[bool], cells: list[int]) -> Tensor:
        objective.zero_grad()
        objective(minibatch(cells=cells, true_pair=torch.tensor(true_pair)))[0].sum().backward()
        return torch.cat([p.grad.flatten() for p in objective.decoders.parameters()])

    mixed = decoder_gradient([True, False, True, False, False], [0, 1, 2, 3, 4])
    torch.testing.assert_close(mixed, decoder_gradient([True] * 5, [0, 2]), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ CellTypes

PARTS = [
    ("student", "atac", {"towers.rna", "student"}),
    ("student", "rna", {"towers.atac", "student"}),
    ("zeros", "atac", {"towers.rna"}),
    ("zeros", "rna", {"towers.atac"}),
    ("measured", "atac", {"towers.rna", "towers.atac"}),
    ("measured", "rna", {"towers.rna", "towers.atac"}),
]


@pytest.mark.parametrize(("other_modality", "missing", "parts"), PARTS)
def test_cell_types_own_the_way_to_the_label_and_no_more(other_modality, missing, parts):
    objective = celltypes(other_modality, missing)
    owned = {".".join(name.split(".")[1 : 3 if ".towers." in name else 2]) for name in objective.state_dict()}
    assert owned == parts | {"fusion", "head"}
    # and it needs none of what it does not own
    batch = replace(minibatch(), latent=None, true_pair=None)
    if other_modality != "measured":
        batch = replace(batch, **{missing: None})
    assert objective(batch)[0].isfinite().all()


@pytest.mark.parametrize("train_student", [False, True])
@pytest.mark.parametrize("n_blocks", [0, 2, -1])
@pytest.mark.parametrize(("other_modality", "missing", "parts"), PARTS)
def test_cell_types_train_exactly_this(other_modality, missing, parts, n_blocks, train_student):
    objective = celltypes(other_modality, missing, n_blocks, train_student)
    expected = expected_trainable(objective, n_blocks, "model.")
    if train_student:
        expected |= {name for name, _ in objective.named_parameters() if name.startswith("model.student.")}
    assert {name for name, p in objective.named_parameters() if p.requires_grad} == expected


@torch.no_grad()
@pytest.mark.parametrize("class_weight", [None, torch.tensor([1.0, 0.5, 2.0, 4.0])])
def test_cell_type_loss_by_hand(class_weight):
    objective, batch = celltypes(class_weight=class_weight), minibatch()
    logits = objective.model(batch)[1]
    expected = -logits.log_softmax(1)[torch.arange(5), batch.target["cell_type"]]
    if class_weight is not None:
        expected = expected * class_weight[batch.target["cell_type"]]
    loss, metrics = objective(batch)
    assert logits.shape == (5, N_CLASSES)
    torch.testing.assert_close(loss, expected)
    assert metrics["accuracy"][0] == (logits.argmax(1) == batch.target["cell_type"]).sum()
    assert "class_weight" not in objective.state_dict()


# ------------------------------------------------------------------------------- weights that come from elsewhere


def with_given_genes(**options):
    """A model whose gene embedding came from a file."""
    return scmomer(freeze_gene_embedding=True, **options)


@pytest.mark.parametrize("trainable_blocks", [0, 2, -1])
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda k: MaskedRNA(rna_encoder(freeze_gene_embedding=True), 0), id="MaskedRNA"),
        pytest.param(lambda k: JointPairs(with_given_genes(), k), id="JointPairs"),
        pytest.param(
            lambda k: FineTuning(with_given_genes(classes=True, other_modality="zeros"), k), id="FineTuning zeros"
        ),
        pytest.param(lambda k: FineTuning(with_given_genes(classes=True), k), id="FineTuning measured"),
        pytest.param(
            lambda k: FineTuning(with_given_genes(classes=True, other_modality="student"), k, True), id="FineTuning all"
        ),
    ],
)
def test_a_gene_embedding_from_a_file_stays_frozen(build, trainable_blocks):
    objective: Objective = build(trainable_blocks)
    (name,) = [name for name, _ in objective.named_parameters() if "gene_embedding" in name]
    assert not objective.get_parameter(name).requires_grad
    loss, _ = objective(minibatch())
    loss.sum().backward()
    assert objective.get_parameter(name).grad is None
    other = {name for name, p in objective.named_parameters() if "token_embedding" in name and p.requires_grad}
    assert bool(other) == (isinstance(objective, MaskedRNA) or trainable_blocks < 0)


def test_unfreezing_twice_leaves_what_the_last_call_says():
    model = scmomer()
    JointPairs(model, -1)
    objective = JointPairs(model, 1)
    trainable = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trainable == expected_trainable(objective, 1)


def test_the_pooler_is_trained_on_wherever_it_is_read():
    """Stage I gives it no gradient, and freezes it; without training it would stay random."""
    encoder = masked_atac().encoder
    assert not encoder.pooler.weight.requires_grad
    unfreeze_last_blocks(encoder, 0)
    assert encoder.pooler.weight.requires_grad
    assert not encoder.mask_token.requires_grad


# -------------------------------------------------------------------------------------------- decoders' first step


@torch.no_grad()
def test_decoders_start_at_the_best_constant():
    """Blank, they say the same of all cells, and no other constants have a lower loss on these cells."""
    model = scmomer()
    rna, atac = torch.from_numpy(expression()), torch.from_numpy(accessibility())
    drawn = model.decoders["rna"].weight.clone()
    model.start_decoders_at_mean({"rna": rna.mean(0), "atac": atac.mean(0)})
    assert torch.equal(model.decoders["rna"].weight, drawn)
    model.start_decoders_at_mean({"rna": rna.mean(0), "atac": atac.mean(0)}, blank=True)
    torch.testing.assert_close(model.decoders["rna"].bias, rna.mean(0))
    bias = model.decoders["atac"].bias
    assert bias.isfinite().all()

    def loss(shift: Tensor | float) -> float:
        return peak_bce((bias + shift).expand(5, -1), ragged(atac), 5.0).mean().item()

    seldom = (atac.mean(0) > 0) & (atac.mean(0) < 1)  # the others have no finite best
    assert seldom.sum() > 20
    for embedding in (torch.zeros(1, LATENT_DIM), torch.randn(1, LATENT_DIM)):
        assert model.decoders["rna"](embedding)[0].tolist() == rna.mean(0).tolist()
    for shift in (0.3, -0.3):
        for peak in seldom.nonzero().flatten().tolist()[:10]:
            assert loss(F.one_hot(torch.tensor(peak), N_PEAKS) * shift) > loss(0.0)
        assert loss(seldom * shift) > loss(0.0)


THINNED = {
    "JointPairs": lambda: JointPairs(scmomer()),
    "Distillation": lambda: Distillation(scmomer(other_modality="student")),
    "FineTuning student": celltypes,
    "FineTuning measured": lambda: celltypes("measured"),
}


@pytest.mark.parametrize("make", THINNED.values(), ids=THINNED)
def test_feature_dropout_hides_part_of_the_cell_from_training_alone(make):
    """In training the model sees the thinned cell and must predict the whole one; in evaluation it sees all of it."""
    objective = make()
    batch = minibatch(target={"cell_type": torch.zeros(5, dtype=torch.int64)})
    plain = objective.eval()(batch)[0]
    objective.feature_dropout = 0.5
    thinned = replace(
        batch, **{name: drop_features(batch.key, batch[name], 0.5, stream) for name, stream in DROP_STREAMS.items()}
    )
    shown = []
    with pytest.MonkeyPatch.context() as patch:  # what the objective's modules are given
        for module in objective.modules():
            if isinstance(module, (RNATower, ATACTower, Student)):
                patch.setattr(module, "forward", lambda x, *key, was=module.forward: shown.append(x) or was(x, *key))
        torch.manual_seed(0)
        dropped = objective.train()(batch)[0]
    assert shown and all(torch.equal(x.indices, thinned[name].indices) for x, name in named(shown))
    assert not torch.allclose(dropped, plain)
    torch.testing.assert_close(objective.eval()(batch)[0], plain)


def named(shown):
    """What modules were shown, with the modality it is of."""
    return [(x, "rna" if x.width == N_GENES else "atac") for x in shown]


def test_the_reconstructed_cell_is_the_whole_one():
    """Stage II on thinned cells, by hand."""
    model, batch = scmomer(), minibatch(true_pair=torch.ones(5, dtype=torch.bool))
    objective = JointPairs(model, feature_dropout=0.5).train()
    shown = objective.leave_out(batch, 0.5)
    assert len(shown.rna.indices) < len(batch.rna.indices)
    _, metrics = objective(batch)
    mse = (model.decoders["rna"](model.embed(shown)) - batch.rna.dense()).square().mean(1)
    assert metrics["rna_mse"][0].item() == pytest.approx(mse.sum().item(), rel=1e-5)


@torch.no_grad()
def test_each_modality_alone_reconstructs_the_whole_cell():
    """Loss of stage II with its two weights, by hand: of true pairs, with the other latent at zero."""
    model, batch = scmomer(), minibatch(true_pair=torch.tensor([True, False, True, True, False]))
    plain, metrics = JointPairs(model)(batch)
    loss, metrics_alone = JointPairs(model, alone_weight=0.3, pair_weight=0.1)(batch)
    pair_logits = model.pair_head(model.embed(batch))
    expected = plain - 0.9 * F.cross_entropy(pair_logits, batch.true_pair.long(), reduction="none")
    for name in ("rna", "atac"):
        z = {key: torch.zeros(5, LATENT_DIM) for key in ("rna", "atac")} | {name: model.towers[name](batch[name])}
        mse = (model.decoders["rna"](model.fusion(z)) - batch.rna.dense()).square().mean(1)
        bce = peak_bce(model.decoders["atac"](model.fusion(z)), batch.atac, 5.0)
        expected += 0.3 * batch.true_pair * (mse + bce) / 0.5
        assert metrics_alone[f"rna_mse_of_{name}"][0].item() == pytest.approx(
            mse[batch.true_pair].sum().item(), rel=1e-5
        )
        assert metrics_alone[f"rna_mse_of_{name}"][1] == 3
    torch.testing.assert_close(loss, expected)
    assert metrics_alone["rna_mse"][0] == metrics["rna_mse"][0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["rna", "atac"])
def test_one_modality_reconstructs_the_whole_cell(name):
    """Stage II of one modality on thinned cells, by hand; the other latent is zero."""
    model, batch = scmomer(), minibatch()
    other = {"rna": "atac", "atac": "rna"}[name]
    del model.towers[other], model.decoders[other]
    objective = Denoising(model, feature_dropout=0.5).train()
    z = model.towers[name](objective.leave_out(batch, 0.5)[name])
    embedding = model.fusion({name: z, other: torch.zeros_like(z)})
    mse = lambda: (model.decoders["rna"](embedding) - batch.rna.dense()).square().mean(1)
    expected = mse() if name == "rna" else peak_bce(model.decoders["atac"](embedding), batch.atac, 5.0)
    loss, metrics = objective(batch)
    torch.testing.assert_close(loss, expected)
    assert list(metrics) == [{"rna": "rna_mse", "atac": "atac_bce"}[name]]


def test_embeddings_are_standardised_before_the_head():
    """By the cells it was shown; an element in which they do not differ is left small."""
    head = CellTypeHead(ClassifierConfig(classifier_dropout=0.0), 3, 2)
    embeddings = torch.randn(50, 3) * torch.tensor([1e-2, 5.0, 0.0]) + torch.tensor([3.0, -1.0, 2.0])
    as_drawn = head(embeddings)
    torch.testing.assert_close(as_drawn, head.layers(embeddings))
    head.standardise(embeddings)
    seen = []
    head.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    head(embeddings)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[0].std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-4, rtol=0)


def test_the_head_may_learn_faster_than_what_was_pretrained():
    """One step of Adam moves every weight by its own learning rate."""
    objective = FineTuning(scmomer(classes=True, other_modality="zeros"), -1, pretrained_lr_scale=0.1)
    assert {id(p) for group in objective.parameter_groups() for p in group["params"]} == {
        id(p) for p in objective.parameters() if p.requires_grad
    }
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    groups = [group | {"lr": 1e-2 * group["scale"]} for group in objective.parameter_groups()]
    optimizer = torch.optim.Adam(groups, eps=1e-12)
    objective(minibatch(target={"cell_type": torch.arange(5) % 3}))[0].sum().backward()
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in objective.named_parameters()}
    for name, size in moved.items():
        if size > 1e-5:  # where the gradient is not of rounding alone
            assert size == pytest.approx(1e-2 if ".head." in name else 1e-3, rel=0.01), name
    assert moved["model.head.layers.1.weight"] and moved["model.towers.rna.pooling.projection.weight"]


def test_a_model_of_one_modality_has_no_other_tower():
    config = ScMomerConfig(rna=rna_encoder().config, other_modality="zeros")
    model = ScMomer(config, N_GENES, 0, type_head)
    assert set(model.towers) == {"rna"}
    assert model(minibatch())[1].shape == (5, N_CLASSES)
