"""Settings beyond the published method, by the scripts."""

import numpy as np

from tests.helpers import ATAC, MULTIMODAL, TRAINING, error_of, records, run, weights


def test_the_settings_of_the_study_reach_the_models(ready_file, runs, cells, tmp_path):
    """Own maps of patches, each latent alone, blank decoders: told in the records, and kept in the folders."""
    paths = {"data_path": ready_file, "ckpt_dir": tmp_path}
    run("pretrain_atac", **paths, model_name="atac", patch_maps="own", **ATAC)
    rows, shared = (weights(folder)["encoder.peak_rows"] for folder in (tmp_path / "atac", runs["atac"]))
    assert len(rows) == ATAC["n_patches"] * len(shared)
    encoders = {"rna_model_path": runs["rna"], "atac_model_path": tmp_path / "atac"}
    run("pretrain_multimodal", **paths, **encoders, model_name="two", alone_weight=1, pair_weight=0.1, **MULTIMODAL)
    assert records(tmp_path / "two")[-1].keys() >= {"rna_mse_of_rna", "rna_mse_of_atac"}
    run("get_latent_emb", data_path=ready_file, model_path=tmp_path / "two", ckpt_dir=tmp_path, device="cpu")
    latents = {"model_path": tmp_path / "two", "dir_train": tmp_path, "dir_val": tmp_path}
    still = TRAINING | {"epochs": 1, "learning_rate": 0.0}
    run("pretrain_missing_mod", **paths, **latents, model_name="three", alone_weight=2, blank_decoders=True, **still)
    assert "rna_mse_of_student" in records(tmp_path / "three")[-1]
    student = weights(tmp_path / "three")
    assert not student["decoders.rna.weight"].any() and not student["decoders.atac.weight"].any()
    np.testing.assert_allclose(student["decoders.rna.bias"], cells.train_mean("rna"), rtol=1e-6)


def test_false_pairs_within_a_donor(ready_file, runs, tmp_path, capsys):
    """Drawn within donors, they are other pairs; a column that leaves nobody a partner, or is absent, is refused."""
    encoders = {"rna_model_path": runs["rna"], "atac_model_path": runs["atac"]}
    flags = {"data_path": ready_file, "ckpt_dir": tmp_path, **encoders, **MULTIMODAL}
    run("pretrain_multimodal", **flags, model_name="within", pairs_within="donor")
    assert records(tmp_path / "within")[0]["loss"] != records(runs["multimodal"])[0]["loss"]
    for flag in ("pairs_within", "pair_labels"):
        line = error_of(capsys, "pretrain_multimodal", **flags, model_name="not", **{flag: "absent"})
        assert f"--{flag} absent" in line and ready_file.name in line
    line = error_of(capsys, "pretrain_multimodal", **flags, model_name="not", pairs_within="donor", pair_labels="donor")
    assert "--pairs_within" in line and ready_file.name in line
    assert not (tmp_path / "not").exists()
