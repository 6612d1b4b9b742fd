"""Runs of the study: the arms' commands, the embeddings that a classifier reads, and who sees which labels."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from benchmarks import paired, peers, rna_only
from benchmarks.lib import fine_tune, probe
from benchmarks.lib.stages import Stages
from benchmarks.lib.study import COLUMNS, MIXED, OURS, SHUFFLED, add_rows, done_in
from tests.helpers import command_line
from tests.test_docs import flags_of
from utils.cells.preprocessed import Cells, read_cells
from utils.errors import UserError
from utils.files.write import write_whole


@pytest.fixture
def fold(tmp_path, monkeypatch):
    """A fold whose commands are recorded and not run."""
    ran = {}
    monkeypatch.setattr(Stages, "run", lambda self, name, command: ran.setdefault(name, command))
    made = paired.Fold(paired.DATA["snareseq2"], tmp_path, tmp_path / "out", 1)
    made.preprocess()
    made.pretrain_on_shuffled()
    made.pretrain_controls()
    made.pretrain_shuffled_denoiser()
    made.fine_tune(OURS, "student", 30, seed=2)
    made.fine_tune(SHUFFLED, "student_shuffled", 0, seed=2)
    return ran


def test_arms_are_flags_of_the_scripts(fold):
    """Every flag exists; test batches are those of the fold; each arm differs from ours in its flags alone."""
    for command in fold.values():
        script, *words = command.split()
        known = flags_of(script.removesuffix(".py"))
        assert {word for word in words if word.startswith("--")} <= known, command
    assert "--test_groups 09H,09I" in fold["preprocess"]
    control = fold["preprocess, shuffled pairs"].split()
    assert control[-2:] == ["--shuffle_pairs", "batch"]
    expected = {
        "stage III, student_untrained": set(),
        "stage III, denoiser_both": {"--teacher_weight"},
        "stage III, denoiser_rna": {"--teacher_weight", "--missing_weight"},
    }
    ours = {word for word in fold["stage III, student"].split() if word.startswith("--")}
    for name, more in expected.items():
        assert {word for word in fold[name].split() if word.startswith("--")} - ours == more
    assert "shuffled.h5mu" in fold["stage II, multimodal_shuffled"]
    real, shuffled = (fold[f"stage III, {name}"].split() for name in ("denoiser_both", "denoiser_shuffled"))
    differ = [(one, other) for one, other in zip(real, shuffled, strict=True) if one != other]
    assert [other.rsplit("/")[-1] for _, other in differ] == [
        *("shuffled.h5mu", "denoiser_shuffled", "untrained_shuffled"),
        *("latents_untrained_shuffled", "latents_untrained_shuffled"),
    ]
    assert "shuffled" not in fold["stage II, multimodal"] + fold["stage III, denoiser_rna"]


def test_few_labels_are_learned_in_two_steps_and_all_in_one(fold):
    few = [command for name, command in fold.items() if name.startswith(f"fine-tune {OURS}, 30")]
    assert len(few) == 2 and all("--labels_per_type 30" in command and "--seed 2" in command for command in few)
    assert "--pseudo_labels_from" in few[1] and "student_30_labels_2_alone" in few[1]
    (everything,) = [command for name, command in fold.items() if SHUFFLED in name]
    assert "--labels_per_type" not in everything and "shuffled.h5mu" not in everything  # RNA is the same in both files


def test_finer_types_are_learned_in_two_steps_and_have_folders_of_their_own(tmp_path, monkeypatch):
    ran, made = {}, paired.Fold(paired.DATA["snareseq2"], tmp_path, tmp_path / "out", 1)
    monkeypatch.setattr(Stages, "run", lambda self, name, command: ran.setdefault(name, command))
    monkeypatch.setattr(paired, "scores_in", lambda folder, *_: [folder.name])
    monkeypatch.setattr(fine_tune, "copy_to_mix", lambda *_: None)
    monkeypatch.setattr(fine_tune, "is_mixed", lambda _: True)
    name = "student_30_labels_3_subclass"
    assert list(made.subclasses([(3, 30)])) == [[name, f"{name}{fine_tune.RELABELLED}"]]
    tuned = {command.split("--model_name ")[1].split()[0]: command for command in ran.values() if "celltype" in command}
    assert set(tuned) == {f"{name}_alone", name, f"{name}{fine_tune.RELABELLED}"}
    assert all("--label_column subclass" in command for command in tuned.values())
    scored = [command for name, command in ran.items() if name.startswith("evaluate")]
    assert ["--model_alone" in command for command in scored] == [False, True]


def test_another_pretraining_has_its_own_seed_and_files(tmp_path, monkeypatch):
    """The seed goes to the three stages; draws of labels keep their own seeds."""
    ran = {}
    monkeypatch.setattr(Stages, "run", lambda self, name, command: ran.setdefault(name, command))
    made = []

    def embeddings(fold, todo):
        made.append(fold)
        fold.pretrain()
        yield [(seed, 0, "student", "accuracy", 0.5) for seed in todo]

    monkeypatch.setattr(paired.Fold, "embeddings", embeddings)
    flags = {"fold": 2, "parts": "embeddings", "pretraining_seed": 7, "draws": 2, "results_path": tmp_path}
    monkeypatch.setattr("sys.argv", ["paired.py", *command_line(flags | {"out_path": tmp_path / "out"})])
    paired.main()
    stages = [command for name, command in ran.items() if name.startswith("stage")]
    assert len(stages) == 4 and all("--seed 7" in command for command in stages)
    made[0].fine_tune(OURS, "student", 0, seed=3)
    assert "--seed 3" in ran[f"fine-tune {OURS}, all labels, seed 3"]
    assert done_in(tmp_path / "snareseq2_fold2_pretraining7_embeddings.csv") == {(0, 0), (1, 0)}


def test_the_quick_part_needs_no_shuffled_pairs(tmp_path, monkeypatch):
    ran, made = {}, paired.Fold(paired.DATA["snareseq2"], tmp_path, tmp_path / "out", 0)
    monkeypatch.setattr(Stages, "run", lambda self, name, command: ran.setdefault(name, command))
    monkeypatch.setattr(
        paired.Fold, "probed", lambda fold, arms, seeds, thin: [[(0, 10, arm, "f1", 1)] for arm in arms]
    )
    monkeypatch.setattr(paired.Fold, "translated", lambda fold, arms, seed: [(seed, 0, *arms, "auroc", 1)])
    rows = [row for found in made.quick([0]) for row in found]
    assert {row[2] for row in rows} == set(paired.QUICK)
    assert not [name for name in ran if "shuffled" in name]


@pytest.mark.parametrize("first_is_mixed", [True, False])
def test_a_mixture_goes_into_a_copy_of_the_run(tmp_path, monkeypatch, first_is_mixed):
    """With pairs and without: the copy is mixed with the flags of the run, and the run itself stays as it is.

    Only where the first of two trainings has become a mixture does another second one learn its labels.
    """
    ran, scored = {}, []
    monkeypatch.setattr(fine_tune, "is_mixed", lambda folder: first_is_mixed)

    def record(self, name, command):
        ran[name] = command
        if name.startswith("fine-tune"):
            words = command.split()
            model = words[max(words.index(flag) for flag in ("--model", "--model_name") if flag in words) + 1]
            for end in ("", ".training"):
                (tmp_path / "out" / f"{model}{end}").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(Stages, "run", record)
    for module in (paired, rna_only):
        monkeypatch.setattr(module, "scores_in", lambda folder, method, *_: scored.append((folder, method)) or [])
    made = paired.Fold(paired.DATA["snareseq2"], tmp_path, tmp_path / "out", 1)
    for part in ("mixed", "types"):
        assert len(list(getattr(made, part)([(3, 10), (3, 0)]))) == 2
    cells = ad.AnnData(np.ones((2, 2), np.float32))
    for part, mix in (("mixed", fine_tune.MIX), ("types", None)):
        assert [n for n, _ in rna_only.run(part, cells, 0, 0, tmp_path / "out", [0, 10], mix)] == [0, 10]
    mixes = {name.removeprefix("mix "): command for name, command in ran.items() if name.startswith("mix ")}
    assert len(mixes) == 6
    for title, command in mixes.items():
        new, old = command.split(), ran[f"fine-tune {title}"].split()
        assert set(old) - set(new) == {"--overwrite", "no", old[old.index("--ckpt_dir") + 1]}
        assert set(new) - set(old) == {"--resume", "auto", new[new.index("--ckpt_dir") + 1]}
    copies = {folder for folder, method in scored if method == MIXED}
    plain = {folder for folder, method in scored if method == OURS}
    assert len(copies) == len(plain) == 4
    assert {path.name.removesuffix(fine_tune.RELABELLED) for path in copies} == {path.name for path in plain}
    again = [command for command in ran.values() if "--pseudo_labels_from" in command and "--overwrite" in command]
    of_mixture = ["mixed" in command.split("--pseudo_labels_from ")[1].split()[0] for command in again]
    assert of_mixture == [fine_tune.RELABELLED in command for command in again]
    assert sorted(of_mixture) == ([0, 0, 1, 1] if first_is_mixed else [0, 0])
    copied = [command for title, command in mixes.items() if "--pseudo_labels_from" in command]
    assert len(copied) == 2 and all(
        ("mixed/" in command.split("labels_from")[1]) == first_is_mixed for command in copied
    )
    assert all((path.is_dir(), path.parent) == (True, tmp_path / "out" / "mixed") for path in copies)
    for command in ran.values():
        script, *words = command.split()
        assert {word for word in words if word.startswith("--")} <= flags_of(script.removesuffix(".py")), command


def test_a_copy_is_fresh_until_it_is_mixed(tmp_path):
    """A run that was trained again replaces its old copy; the copy of a stage that has run stays."""
    stages = Stages(tmp_path / "stages.json")
    for end in ("", ".training"):
        (tmp_path / f"run{end}").mkdir()
    for text, ran in (("first", False), ("second", False), ("third", True)):
        (tmp_path / "run" / "weights").write_text(text)
        stages.used |= {"mix run": {}} if ran else {}
        fine_tune.copy_to_mix(stages, "mix run", tmp_path, "run")
    assert (tmp_path / fine_tune.MIXED / "run" / "weights").read_text() == "second"
    assert (tmp_path / fine_tune.MIXED / "run.training").is_dir()


def test_what_a_file_has_is_not_run_again(tmp_path, monkeypatch):
    """Of seeds 0 and 1, 10 labels of seed 0 are there; then all are."""
    asked = []

    def types(fold, todo):
        asked.append(todo)
        for seed, n in todo:
            yield [(seed, n, "scMomer", "accuracy", 0.5)]

    monkeypatch.setattr(paired.Fold, "preprocess", lambda fold: None)
    monkeypatch.setattr(paired.Fold, "types", types)
    add_rows(tmp_path / "snareseq2_fold1_types.csv", [(0, 10, "scMomer", "accuracy", 0.4)])
    flags = {"fold": 1, "parts": "types", "seeds": "0,1", "out_path": tmp_path / "out", "results_path": tmp_path}
    monkeypatch.setattr("sys.argv", ["paired.py", *command_line(flags)])
    for _ in range(2):
        paired.main()
    assert asked == [[(0, 30), (0, 100), (0, 0), (1, 10), (1, 30), (1, 100), (1, 0)]]
    assert len(done_in(tmp_path / "snareseq2_fold1_types.csv")) == 8


def test_mistaken_flags_are_refused():
    for flags in ({"parts": "types,nobody"}, {"fold": 3}, {"data": "bmmc", "fold": 2}, {"seeds": "0,one"}):
        with pytest.raises(UserError, match=f"--{list(flags)[-1]}"):
            paired.Flags(**flags)


@pytest.fixture
def separable(tmp_path):
    """300 cells of three types: one embedding knows the type, one is noise; the expression is noise, too."""
    rng = np.random.default_rng(0)
    names = [f"cell{i}" for i in range(300)]
    types = np.repeat(["A", "B", "C"], 100)
    split = np.tile(["train", "train", "val", "test"], 75)
    obs = pd.DataFrame({"cell_type": types, "split": split, "fine": types}, index=names)
    x = csr_matrix(rng.poisson(0.3, (300, 60)).astype(np.float32))
    cells = Cells(
        tmp_path / "x.h5mu", obs, {"rna": x}, {"rna": np.arange(60).astype(str)}, {"label_column": "cell_type"}
    )
    good = np.eye(3)[np.unique(types, return_inverse=True)[1]] * 5 + rng.normal(size=(300, 3))
    files = {}
    for arm, values in {"good": good, "noise": rng.normal(size=(300, 3))}.items():
        path = tmp_path / f"{arm}.h5ad"
        write_whole(ad.AnnData(values.astype(np.float32), obs[[]]), path)
        files[arm, ""] = path
    turned = ad.AnnData(-good[split == "test"].astype(np.float32), obs.loc[split == "test", []])
    write_whole(turned, tmp_path / "half.h5ad")
    return cells, files | {("good", "half"): tmp_path / "half.h5ad"}


def test_the_classifier_finds_what_an_embedding_holds(separable):
    cells, files = separable
    table = pd.DataFrame(probe.probe(cells, files, (10, 0), 0, "fine"), columns=list(COLUMNS))
    value = lambda method, n, measure="accuracy": table[
        (table.method == method) & (table.labels == n) & (table.measure == measure)
    ]["value"].item()
    for n in (10, 0):
        assert value("good", n) > 0.95 and value("noise", n) < 0.6
        assert value("good, half of the RNA", n) < 0.3  # the same classifier, on what a thinned cell's embedding says
    assert value("good, fine", probe.SUBCLASS_LABELS) > 0.95
    assert value("50 principal components", 0) < 0.6
    again = pd.DataFrame(probe.probe(cells, files, (10, 0), 1, None), columns=list(COLUMNS))
    assert set(again.labels) == {10} and set(again.seed) == {1}  # all labels leave nothing to draw


def test_thinned_cells_keep_their_share_of_counts(raw_file, simulation, tmp_path):
    barcodes = simulation.mdata.obs_names[:20]
    assert probe.thinned(tmp_path, raw_file, barcodes) == ["half", "quarter"]
    counts = simulation.mdata["rna"][barcodes].X
    for name, share in probe.SHARES.items():
        thin = ad.read_h5ad(tmp_path / f"{name}.h5ad")
        assert thin.obs_names.tolist() == list(barcodes)
        total = np.asarray(counts.sum(1)).ravel()
        np.testing.assert_allclose(np.asarray(thin.X.sum(1)).ravel(), share * total, atol=1)
        assert (counts < thin.X).nnz == 0


def test_peers_see_the_labels_of_training_cells_alone(ready_file):
    cells = read_cells(ready_file, ("rna",))
    flags = peers.Flags("scANVI", "", "", "", seed=3)
    train, labels = cells.rows("train"), cells.labels("cell_type").to_numpy()
    known = peers.known_labels(cells, flags, 0)
    assert (known[train] == labels[train]).all()
    assert set(np.delete(known, train)) == {peers.UNKNOWN}
    few = peers.known_labels(cells, flags, 4)
    names, counts = np.unique(few[few != peers.UNKNOWN], return_counts=True)
    assert set(names) == set(labels) and set(counts) == {4}
    assert (few[few != peers.UNKNOWN] == labels[few != peers.UNKNOWN]).all()
    assert set(np.flatnonzero(few != peers.UNKNOWN)) <= set(train)


def test_a_latent_that_tells_types_apart_labels_test_cells(ready_file):
    cells = read_cells(ready_file, ("rna",))
    test = np.arange(len(cells.obs)) % 3 == 0
    cells = replace(cells, obs=cells.obs.assign(split=np.where(test, "test", cells.obs["split"])))
    labels = cells.labels("cell_type")
    codes, noise = pd.factorize(labels)[0], np.random.default_rng(0).normal(size=(len(labels), 3))
    flags, groups = peers.Flags("scANVI", "", "", "", seed=3), {"all": 0, "few": 2}
    found = peers.types_by_latent("scVI", 3 * np.eye(3)[codes] + 0.3 * noise, cells, flags, groups)
    assert [len(table.columns) for table in found.values()] == [1, 2]
    for table in found.values():
        for types in table:
            assert (table[types] == labels.loc[table.index]).mean() > 0.95
    wrong = peers.types_by_latent("scVI", noise, cells, flags, {"all": 0})["all"]
    assert (wrong.iloc[:, 0] == labels.loc[wrong.index]).mean() < 0.8


def test_folds_leave_out_each_cell_once_and_a_fifth_of_each_type():
    types = np.repeat(["many", "few", "one"], [52, 7, 1])
    fold = rna_only.folds(types)
    assert fold[-1] == "-" and set(fold[:-1]) == set("01234")  # a type of one cell is never tested
    for name, least, most in (("many", 10, 11), ("few", 1, 2)):
        counts = [(fold[types == name] == str(i)).sum() for i in range(5)]
        assert min(counts) == least and max(counts) == most
    assert (rna_only.folds(types) == fold).all()
