"""`--preset`: what the names stand for, and that flags on the command line win over them."""

import json
import sys
from dataclasses import asdict

import pytest

import pretrain_atac
import pretrain_missing_mod
import pretrain_multimodal
import pretrain_rna
import train_missing_celltype_func
from models import shapes
from tests.helpers import error_of, run
from utils import cli
from utils.presets import PRESETS
from utils.train.config import TrainConfig

STAGES = {
    "pretrain_rna": (pretrain_rna.Flags, shapes.RNAEncoderConfig),
    "pretrain_atac": (pretrain_atac.Flags, shapes.ATACEncoderConfig),
    "pretrain_multimodal": (pretrain_multimodal.Flags, shapes.FusionConfig),
    "pretrain_missing_mod": (pretrain_missing_mod.Flags, shapes.StudentConfig),
    "train_missing_celltype_func": (train_missing_celltype_func.Flags, shapes.ClassifierConfig),
}
PARENTS = {
    "pretrain_multimodal": "--rna_model_path a --atac_model_path b",
    "pretrain_missing_mod": "--model_path a --dir_train b --dir_val c",
    "train_missing_celltype_func": "--pretrained_model_path a",
}

# By these command lines the tables of docs/results.md (small) and the README's of the demo (tiny) were made.
MADE_BY = {
    ("pretrain_rna", "small"): "--tokens expressed --dim 64 --depth 2 --heads 2 --dim_head 32 --mask_ratio 0.3 "
    "--epochs 4 --cycle_epochs 3 --batch_size 16 --grad_acc 1 --learning_rate 1e-3 --warmup_epochs 1",
    ("pretrain_atac", "small"): "--dim 64 --depth 2 --heads 4 --dim_head 16 --n_patches 32 --patch_maps own "
    "--mask_ratio 0.5 --epochs 4 --cycle_epochs 3 --batch_size 16 --learning_rate 2e-3 --warmup_epochs 1",
    ("pretrain_multimodal", "small"): "--trainable_blocks -1 --epochs 5 --cycle_epochs 4 --batch_size 16 "
    "--learning_rate 1e-3 --feature_dropout 0.3 --alone_weight 1 --pair_weight 0.03 --warmup_epochs 1",
    ("pretrain_missing_mod", "small"): "--epochs 12 --cycle_epochs 11 --batch_size 32 --learning_rate 1e-3 "
    "--feature_dropout 0.5 --alone_weight 20 --blank_decoders --adam_epsilon 1e-6 --weight_decay 0.3 --patience 0 "
    "--keep last --warmup_epochs 1",
    ("train_missing_celltype_func", "small"): "--batch_size 16 --grad_acc 2 --learning_rate 1e-3 "
    "--trainable_blocks 0 --class_balance 0.3 --feature_dropout 0.5 --patience 0 --keep last --epochs 12 "
    "--cycle_epochs 11 --warmup_epochs 1 --mix_baselines auto",
    ("pretrain_rna", "tiny"): "--tokens expressed --dim 64 --depth 2 --heads 2 --dim_head 32 --warmup_epochs 1 "
    "--learning_rate 1e-3 --epochs 3 --cycle_epochs 2 --batch_size 8 --grad_acc 2",
    ("pretrain_atac", "tiny"): "--n_patches 64 --dim 64 --depth 2 --heads 2 --dim_head 32 --warmup_epochs 1 "
    "--learning_rate 1e-3 --epochs 10 --cycle_epochs 9 --batch_size 32",
    ("pretrain_multimodal", "tiny"): "--warmup_epochs 1 --learning_rate 1e-3 --epochs 4 --cycle_epochs 3 "
    "--batch_size 8 --grad_acc 2 --feature_dropout 0.3 --alone_weight 1 --pair_weight 0.03",
    ("pretrain_missing_mod", "tiny"): "--warmup_epochs 1 --learning_rate 3e-3 --epochs 40 --cycle_epochs 39 "
    "--batch_size 32 --feature_dropout 0.5 --alone_weight 20 --blank_decoders --adam_epsilon 1e-6 --weight_decay 0.3 "
    "--keep last",
    ("train_missing_celltype_func", "tiny"): "--warmup_epochs 1 --learning_rate 1e-3 --epochs 8 --cycle_epochs 7 "
    "--batch_size 16 --trainable_blocks 0 --feature_dropout 0.5 --class_balance 0.3 --keep last",
}


@pytest.fixture
def parsed(monkeypatch):
    """(script, further words) → all flags with their values."""

    def parse(script: str, words: str = "") -> dict:
        given = f"--data_path x --ckpt_dir y --model z {PARENTS.get(script, '')} {words}".split()
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *given])
        flags, shape = STAGES[script]
        values = {}
        for config in cli.parse_flags("", flags, TrainConfig, shape, stage=script):
            values |= asdict(config)
        return values

    return parse


@pytest.mark.parametrize(("script", "preset"), MADE_BY)
def test_a_preset_is_the_command_line_that_made_the_tables(script, preset, parsed):
    assert parsed(script, f"--preset {preset}") == parsed(script, MADE_BY[script, preset])
    assert parsed(script, f"--preset {preset}") != parsed(script)


@pytest.mark.parametrize("script", STAGES)
def test_published_is_the_default(script, parsed):
    assert parsed(script, "--preset published") == parsed(script)
    assert "preset" not in parsed(script)  # the same settings are the same run, whatever they were asked for by


@pytest.mark.parametrize("script", STAGES)
@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_flags_win_over_the_preset(script, preset, parsed):
    assert PRESETS[script][preset]
    for name, value in PRESETS[script][preset].items():
        if isinstance(value, bool):
            other, words = not value, f"--{name} {not value}"
        elif isinstance(value, str):
            other = {"expressed": "all", "own": "shared", "last": "best", "auto": "yes"}[value]
            words = f"--{name} {other}"
        else:
            other = type(value)(value / 2) if isinstance(value, float) else value + 1
            words = f"--{name} {other}"
        for line in (f"{words} --preset {preset}", f"--preset={preset} {words}"):
            assert parsed(script, line) == parsed(script, f"--preset {preset}") | {name: other}


def test_batch_size_auto_cuts_the_presets_step(parsed, monkeypatch):
    """The cells of a step are those of the preset's minibatch, not of the published one."""
    words = "--data_path x --ckpt_dir y --model z --preset small --batch_size auto"
    monkeypatch.setattr(sys, "argv", ["pretrain_rna.py", *words.split()])
    flags, shape = STAGES["pretrain_rna"]
    _, config, _ = cli.parse_flags("", flags, TrainConfig, shape, stage="pretrain_rna")
    assert config.batch_size is None and type(config).batch_size == 16


def test_help_names_presets_and_shows_their_values(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    for preset, dim in (("published", 200), ("small", 64)):
        with pytest.raises(SystemExit):
            run("pretrain_rna", preset=preset, help=True)
        text = capsys.readouterr().out
        assert "--preset {published,small,tiny}" in text
        assert f"width of a gene's token (default: {dim})" in text


@pytest.mark.parametrize("script", STAGES)
def test_unknown_presets_are_refused(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(script, preset="huge")
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"{script}.py: error: ") and "--preset" in last and "small" in last


def test_a_run_goes_on_by_the_same_settings_spelled_otherwise(ready_file, tmp_path, capsys):
    """Name and settings may be spelled either way: it is the same run; other settings are another."""
    where = {"data_path": ready_file, "ckpt_dir": tmp_path, "device": "cpu"}
    run("pretrain_atac", **where, model="atac", preset="tiny", epochs=1)
    saved = json.loads((tmp_path / "atac" / "config.json").read_text())
    assert saved["training"]["model_name"] == "atac" and "model" not in saved["training"]
    words = MADE_BY["pretrain_atac", "tiny"].replace("--epochs 10", "--epochs 2").split()
    spelled = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2], strict=True))
    run("pretrain_atac", **where, model_name="atac", resume=True, **spelled)
    assert "saved" in capsys.readouterr().out
    error = error_of(capsys, "pretrain_atac", **where, model_name="atac", resume=True, preset="small", epochs=3)
    assert "--batch_size" in error or "--n_patches" in error or "--mask_ratio" in error
