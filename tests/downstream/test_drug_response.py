"""Drug response: the planted signal is found, permuted responses score at chance, and the splits leak nothing."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers import ATAC, RNA, error_of, lacks, run
from utils.evaluate.drug_response import per_drug_pearson, split_responses
from utils.features.drugs import read_drugs
from utils.files.drug_tables import read_responses
from utils.train.model_folder import load_model

SCRIPT = "downstream.drug_response"
ALONE, JOINED, BLEND = (
    "ours: embedding alone",
    "ours: embedding + expression",
    "ours, blended with the best baseline",
)
N_LINES, N_GENES = 100, 30
LINES = [f"ACH-{i:03d}" for i in range(N_LINES)]
SMILES = {
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "salicylate": "OC(=O)c1ccccc1O",
    "ibuprofen": "CC(C)Cc1ccc(cc1)C(C)C(=O)O",
    "naproxen": "COc1ccc2cc(ccc2c1)C(C)C(=O)O",
    "ketoprofen": "CC(C(=O)O)c1cccc(c1)C(=O)c1ccccc1",
    "benzoate": "OC(=O)c1ccccc1",
    "caffeine": "Cn1cnc2c1c(=O)n(C)c(=O)n2C",
    "theophylline": "Cn1c(=O)c2[nH]cnc2n(C)c1=O",
    "theobromine": "Cn1cnc2c1c(=O)[nH]c(=O)n2C",
    "xanthine": "O=c1[nH]c(=O)c2[nH]cnc2[nH]1",
    "hypoxanthine": "O=c1[nH]cnc2[nH]cnc12",
    "uric acid": "O=c1[nH]c(=O)c2[nH]c(=O)[nH]c2[nH]1",
}
DRUGS = list(SMILES)
IS_ACID = np.arange(len(DRUGS)) < 6
TRAINING = {"epochs": 12, "batch_size": 64, "learning_rate": 1e-2, "device": "cpu", "val_fraction": 0.2}


@pytest.fixture(scope="module")
def made(tmp_path_factory, simulation):
    """Files of lines in which one gene program protects from acids, and another one from xanthines."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("drugs")
    program = rng.normal(size=(N_LINES, 2))
    loading = np.zeros((2, N_GENES))
    loading[0, :8] = loading[1, 8:16] = 1
    tpm = np.exp(3 + program @ loading + 0.3 * rng.normal(size=(N_LINES, N_GENES)))
    genes = list(simulation.mdata["rna"].var_names[:N_GENES])
    pd.DataFrame(np.log2(1 + tpm), LINES, genes).to_csv(folder / "expression.csv")
    embedded = np.hstack([program, rng.normal(size=(N_LINES, 4))]).astype(np.float32)
    ad.AnnData(embedded, obs=pd.DataFrame(index=LINES)).write_h5ad(folder / "lines.h5ad")
    response = np.where(IS_ACID, program[:, :1], program[:, 1:]) + 0.4 * rng.normal(size=(N_LINES, len(DRUGS)))
    response += 2 * rng.normal(size=len(DRUGS))
    response[rng.random(response.shape) < 0.05] = np.nan
    table = pd.DataFrame(response.T, DRUGS, LINES)
    table.to_csv(folder / "ic50.csv")
    table.T.to_csv(folder / "transposed.csv")
    pd.DataFrame([rng.permutation(row) for row in response.T], DRUGS, LINES).to_csv(folder / "permuted.csv")
    (folder / "smiles.txt").write_text("".join(f"{name}\t{smiles}\n" for name, smiles in SMILES.items()))
    return folder


@pytest.fixture(scope="module")
def encoder(made):
    """A model folder that read the lines' expression."""
    run("preprocess", data_path=made / "expression.csv", out_path=made / "ready.h5ad", values="log2", val_fraction=0.2)
    run("pretrain_rna", data_path=made / "ready.h5ad", ckpt_dir=made, model_name="rna", **RNA)
    return made / "rna"


def files(made, **changed) -> dict:
    """Flags of the route by embeddings."""
    flags = {"embedding_path": "lines.h5ad", "ic50_path": "ic50.csv", "smiles_path": "smiles.txt"} | changed
    return {name: made / path for name, path in flags.items()}


def results(folder) -> dict:
    return json.loads((folder / "drug_response.json").read_text())


def test_the_planted_signal_is_found_and_the_folder_predicts_the_same(tmp_path, made, capsys):
    run(SCRIPT, **files(made), out_path=tmp_path, **TRAINING)
    found = results(tmp_path)
    ours, scores = found["scores"][ALONE], found["scores"]
    assert ours["per_drug_pearson"] > 0.8
    assert ours["per_drug_pearson_95%"][0] < ours["per_drug_pearson"] < ours["per_drug_pearson_95%"][1]
    assert scores["drug mean"]["per_drug_pearson"] == 0 and scores["drug mean"]["pearson"] > 0.7
    assert scores["drug + line + factors"]["pearson"] == pytest.approx(scores["drug mean"]["pearson"])
    assert "wins against the best baseline, drug mean" in found["verdict"][0]
    assert not lacks(capsys.readouterr().out, *found["verdict"], BLEND)
    assert {path.name for path in tmp_path.iterdir()} >= {f"drug_response.{kind}" for kind in ("json", "csv", "png")}

    drugs, embedded = read_drugs(made / "smiles.txt"), ad.read_h5ad(made / "lines.h5ad")
    table = read_responses(made / "ic50.csv", LINES, drugs.names)
    test = split_responses(table.rows, "lines", 0.2, 0.2, np.random.default_rng(0))["test"]
    head = load_model(tmp_path / "model", "drug_response").build().eval()
    condition = {"drug": torch.from_numpy(test.drug), "line": torch.from_numpy(test.line + 1)}
    with torch.no_grad():
        predicted = head.decode(head(torch.from_numpy(embedded[table.lines].X[test.line]), None, condition))
    assert per_drug_pearson(test, predicted["ln_ic50"].double().numpy()) == pytest.approx(
        ours["per_drug_pearson"], rel=1e-5
    )
    assert list(load_model(tmp_path / "model", "drug_response").outputs) == table.drugs


def test_permuted_responses_score_at_chance(tmp_path, made):
    """Within each drug, responses are permuted among lines: the drugs' means stay, and nothing else."""
    run(SCRIPT, **files(made, ic50_path="permuted.csv"), out_path=tmp_path, **TRAINING)
    found = results(tmp_path)
    assert all(abs(row["per_drug_pearson"]) < 0.2 for row in found["scores"].values())
    assert found["scores"][ALONE]["pearson"] > 0.6  # that of the drugs' means
    assert not any("wins" in line for line in found["verdict"])


def test_an_encoder_reads_expression(tmp_path, made, encoder, capsys):
    """One line has no expression, so it is left out; expression also gives the rows of ridge and forest."""
    expression = pd.read_csv(made / "expression.csv", index_col=0).iloc[1:]
    expression.to_csv(tmp_path / "expression.csv")
    how = {"model_path": encoder, "expression_path": tmp_path / "expression.csv"}
    shared = {name: path for name, path in files(made).items() if name != "embedding_path"}
    run(SCRIPT, **how, **shared, out_path=tmp_path / "out", **TRAINING)
    found, out = results(tmp_path / "out"), capsys.readouterr().out
    assert "1 lines without an embedding are left out" in out
    assert found["scores"][JOINED]["per_drug_pearson"] > 0.7
    assert found["scores"]["ridge on expression, per drug"]["per_drug_pearson"] > 0.7
    assert found["scores"]["random forest on expression and fingerprint"]["per_drug_pearson"] > 0.5
    assert sum(side["lines"] for side in found["sides"].values()) == N_LINES - 1
    assert (
        load_model(tmp_path / "out" / "model", "drug_response").parents["pretrained"] == load_model(encoder, "rna").hash
    )


@pytest.mark.parametrize("split, over", [("drugs", "drugs"), ("both", "both"), ("pairs", "lines")])
def test_the_signal_is_found_in_other_splits(tmp_path, made, split, over):
    """Acids and xanthines differ in their fingerprints, so an unseen drug is like those seen."""
    run(SCRIPT, **files(made), out_path=tmp_path, split=split, **TRAINING | {"test_fraction": 0.35})
    found = results(tmp_path)
    assert found["intervals"] == over and found["scores"][ALONE]["per_drug_pearson"] > 0.6
    assert found["scores"]["line mean"]["per_drug_pearson"] < found["scores"][ALONE]["per_drug_pearson"] - 0.1
    assert "note:" in found["verdict"][-1]


@pytest.mark.parametrize("how", [{"drug": "graph"}, {"head": "published"}])
def test_each_way_to_read_drugs_runs(tmp_path, made, how):
    run(SCRIPT, **files(made), out_path=tmp_path, **how, **TRAINING | {"epochs": 1})
    found = results(tmp_path)
    assert np.isfinite(found["scores"][ALONE]["rmse"])
    config = load_model(tmp_path / "model", "drug_response").config["head"]
    assert {name: getattr(config, name) for name in how} == how


def test_a_transposed_table_gives_the_same(tmp_path, made, capsys):
    for name in ("ic50", "transposed"):
        run(SCRIPT, **files(made, ic50_path=f"{name}.csv"), out_path=tmp_path / name, **TRAINING | {"epochs": 1})
    assert "transposed" in capsys.readouterr().out
    ours, theirs = (results(tmp_path / name)["scores"] for name in ("ic50", "transposed"))
    assert ours == theirs


# Bad input -------------------------------------------------------------------------------------------------------


def test_unreadable_structures(tmp_path, made, capsys):
    """One is named, counted and left out; without a readable one there is nothing to do."""
    smiles = SMILES | {"caffeine": "Cn1cnc2c1c(=O"}
    some, none = tmp_path / "some.txt", tmp_path / "none.txt"
    some.write_text("".join(f"{name},{text}\n" for name, text in smiles.items()))
    none.write_text("".join(f"{name} C1CC(\n" for name in ("aspirin", "caffeine")))
    run(SCRIPT, **files(made) | {"smiles_path": some}, out_path=tmp_path / "out", **TRAINING | {"epochs": 1})
    found = results(tmp_path / "out")
    assert found["unreadable"] == ["caffeine"] and found["sides"]["test"]["drugs"] == len(DRUGS) - 1
    assert not lacks(capsys.readouterr().out, "RDKit", "1 left out", "caffeine", "1 drugs without a structure")
    error = error_of(capsys, SCRIPT, **files(made) | {"smiles_path": none}, out_path=tmp_path / "none")
    assert not lacks(error, "none.txt", "RDKit", "aspirin")
    assert not (tmp_path / "none").exists()


def test_lines_without_expression(tmp_path, made, capsys):
    """With embeddings of your own, too, lines without expression are counted, and a file with none of them refused."""
    expression = pd.read_csv(made / "expression.csv", index_col=0)
    expression.iloc[3:].to_csv(tmp_path / "some.csv")
    expression.set_axis([f"X{i}" for i in range(N_LINES)]).to_csv(tmp_path / "none.csv")
    how = files(made) | {"out_path": tmp_path / "out"}
    run(SCRIPT, **how, expression_path=tmp_path / "some.csv", with_expression="no", **TRAINING | {"epochs": 1})
    assert "3 lines with an embedding have no expression" in capsys.readouterr().out
    assert JOINED not in results(tmp_path / "out")["scores"]
    assert not lacks(error_of(capsys, SCRIPT, **how, expression_path=tmp_path / "none.csv"), "none.csv", "lines.h5ad")


def test_wrong_tables_and_embeddings(tmp_path, made, capsys):
    table, embedded = pd.read_csv(made / "ic50.csv", index_col=0), ad.read_h5ad(made / "lines.h5ad")
    how = {"out_path": tmp_path / "out"}

    def error(**changed) -> str:
        return error_of(capsys, SCRIPT, **files(made) | changed, **how)

    wordy = table.astype(object)
    wordy.iloc[2, 5] = "resistant"
    wordy.to_csv(tmp_path / "wordy.csv")
    assert not lacks(error(ic50_path=tmp_path / "wordy.csv"), "wordy.csv", LINES[5], "text")
    table.set_axis([f"X{i}" for i in range(N_LINES)], axis=1).to_csv(tmp_path / "others.csv")
    assert not lacks(error(ic50_path=tmp_path / "others.csv"), "others.csv", "X0", "ACH-000")
    table.set_axis([f"D{i}" for i in range(len(DRUGS))]).to_csv(tmp_path / "drugs.csv")
    assert not lacks(error(ic50_path=tmp_path / "drugs.csv"), "drugs.csv", "D0", "--smiles_path")
    table.iloc[:, :5].to_csv(tmp_path / "few.csv")
    assert not lacks(error(ic50_path=tmp_path / "few.csv"), "few.csv", "too few")
    (table * np.nan).to_csv(tmp_path / "empty.csv")
    assert "empty.csv" in error(ic50_path=tmp_path / "empty.csv")
    assert "absent.csv" in error(ic50_path=tmp_path / "absent.csv")
    embedded.X[4, 2] = np.nan
    embedded.write_h5ad(tmp_path / "nan.h5ad")
    assert not lacks(error(embedding_path=tmp_path / "nan.h5ad"), "nan.h5ad", "NaN", LINES[4])
    assert "ic50.csv" in error(embedding_path=made / "ic50.csv")
    ad.AnnData(np.zeros((2, 0), np.float32), obs=pd.DataFrame(index=LINES[:2])).write_h5ad(tmp_path / "none.h5ad")
    assert "none.h5ad" in error(embedding_path=tmp_path / "none.h5ad")
    ad.AnnData(np.eye(3, dtype=np.float32), obs=pd.DataFrame(index=[*LINES[:2], LINES[1]])).write_h5ad(
        tmp_path / "d.h5ad"
    )
    assert not lacks(error(embedding_path=tmp_path / "d.h5ad"), "d.h5ad", LINES[1])
    (tmp_path / "types.tsv").write_text(f"depMapID\ttcga_code\n{LINES[0]}\tUNKNOWN\n")
    assert not lacks(error(annotation_path=tmp_path / "types.tsv"), "types.tsv", "--annotation_path")
    assert not (tmp_path / "out").exists()


def test_wrong_flags_and_a_model_of_atac(tmp_path, made, ready_file, capsys):
    how = {name: path for name, path in files(made).items() if name != "embedding_path"} | {
        "out_path": tmp_path / "out"
    }
    assert "--embedding_path" in error_of(capsys, SCRIPT, **how)
    assert "--expression_path" in error_of(capsys, SCRIPT, **how, model_path=tmp_path)
    assert "--expression_path" in error_of(
        capsys, SCRIPT, **how, embedding_path=made / "lines.h5ad", with_expression="yes"
    )
    assert "--test_fraction" in error_of(capsys, SCRIPT, **files(made) | how, test_fraction=0.95)
    run("pretrain_atac", data_path=ready_file, ckpt_dir=tmp_path, model_name="atac", **ATAC | {"epochs": 1})
    model = {"model_path": tmp_path / "atac", "expression_path": made / "expression.csv"}
    assert not lacks(error_of(capsys, SCRIPT, **how, **model), "atac", "pretrain_rna.py")
