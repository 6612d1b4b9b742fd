"""Drugs: what RDKit reads, and graph codes that depend neither on the order of atoms nor on padding."""

import numpy as np
import pytest
import torch
from rdkit import Chem

from models.drug_head import GraphEncoder
from utils.errors import UserError
from utils.features.drugs import FINGERPRINT_BITS, read_drugs, read_smiles

SMILES = {"aspirin": "CC(=O)Oc1ccccc1C(=O)O", "salt": "[Na+].[Cl-]", "imatinib": "Cc1ccc(NC(=O)c2ccccc2)cc1Nc1nccs1"}


def write(path, drugs: dict[str, str], separator: str = "\t"):
    path.write_text("".join(f"{name}{separator}{smiles}\n" for name, smiles in drugs.items()))
    return path


@pytest.fixture
def encode():
    """Codes of drugs by one graph encoder with random weights."""
    torch.manual_seed(0)

    def codes(drugs) -> np.ndarray:
        torch.manual_seed(0)
        encoder = GraphEncoder(drugs.atoms.shape[2], 8)
        with torch.no_grad():
            return encoder(torch.from_numpy(drugs.atoms).float(), torch.from_numpy(drugs.bonds)).numpy()

    return codes


def test_codes_do_not_depend_on_the_order_of_atoms(tmp_path, encode):
    rng, other = np.random.default_rng(0), {}
    for name, smiles in SMILES.items():
        molecule = Chem.MolFromSmiles(smiles)
        turned = Chem.RenumberAtoms(molecule, rng.permutation(molecule.GetNumAtoms()).tolist())
        other[name] = Chem.MolToSmiles(turned, canonical=False)
    assert other != SMILES
    ours, theirs = (read_drugs(write(tmp_path / f"{i}.txt", d), graphs=True) for i, d in enumerate((SMILES, other)))
    assert not np.array_equal(ours.atoms, theirs.atoms)
    assert np.allclose(encode(ours), encode(theirs), atol=1e-6)
    assert np.array_equal(ours.fingerprints, theirs.fingerprints)
    assert len({tuple(code.round(4)) for code in encode(ours)}) == len(SMILES)


def test_codes_do_not_depend_on_padding(tmp_path, encode):
    """A drug's code is the same beside larger drugs, whose graphs set the padding."""
    together = read_drugs(write(tmp_path / "all.txt", SMILES), graphs=True)
    alone = read_drugs(write(tmp_path / "one.txt", {"aspirin": SMILES["aspirin"]}), graphs=True)
    assert alone.atoms.shape[1] == 13 < together.atoms.shape[1]
    assert np.allclose(encode(alone)[0], encode(together)[0], atol=1e-6)


def test_bonds_are_normalised(tmp_path):
    """Water has one atom with a loop; in ethanol the middle atom has degree 3 with its loop, its neighbours 2."""
    drugs = read_drugs(write(tmp_path / "s.txt", {"water": "O", "ethanol": "CCO"}), graphs=True)
    ends = 1 / np.sqrt(6)
    assert np.allclose(drugs.bonds[1], [[1 / 2, ends, 0], [ends, 1 / 3, ends], [0, ends, 1 / 2]])
    assert drugs.bonds[0, 0, 0] == 1 and drugs.bonds[0].sum() == 1 and not drugs.atoms[0, 1:].any()
    assert drugs.fingerprints.shape == (2, FINGERPRINT_BITS)


def test_graphs_of_a_file(tmp_path):
    atoms = np.eye(3) - np.eye(3, k=1)  # a charge is -1
    kept = {"ethanol_x": atoms, "ethanol_e": np.array([[0, 1], [1, 2]])}
    np.savez(tmp_path / "graphs.npz", **kept)
    path = write(tmp_path / "s.txt", {"ethanol": "CCO"})
    drugs = read_drugs(path, graphs_path=tmp_path / "graphs.npz")
    assert np.array_equal(drugs.atoms[0], atoms)
    assert np.array_equal(drugs.bonds, read_drugs(path, graphs=True).bonds)
    with pytest.raises(UserError, match=r"graphs\.npz.*water"):
        read_drugs(write(tmp_path / "t.txt", {"water": "O"}), graphs_path=tmp_path / "graphs.npz")


WRONG_GRAPHS = {
    "fractions": (np.eye(3) / 2, [[0, 1], [1, 2]]),
    "missing values": (np.full((3, 3), np.nan), [[0, 1], [1, 2]]),
    "a bond to no atom": (np.eye(3), [[0, 1], [1, 3]]),
    "three ends": (np.eye(3), [[0, 1], [1, 2], [0, 2]]),
    "one row": (np.ones(3), [[0, 1], [1, 2]]),
    "fewer features": (np.ones((3, 2)), [[0, 1], [1, 2]]),
}


@pytest.mark.parametrize("what", WRONG_GRAPHS)
def test_wrong_graphs_of_a_file(tmp_path, what):
    atoms, bonds = WRONG_GRAPHS[what]
    kept = {"water_x": np.ones((1, 3)), "water_e": np.zeros((2, 0)), "ethanol_x": atoms, "ethanol_e": np.array(bonds)}
    np.savez(tmp_path / "graphs.npz", **kept)
    with pytest.raises(UserError, match=r"graphs\.npz"):
        read_drugs(write(tmp_path / "s.txt", {"water": "O", "ethanol": "CCO"}), graphs_path=tmp_path / "graphs.npz")


@pytest.mark.parametrize("separator", ["\t", ",", ", ", " "])
def test_tables_of_smiles(tmp_path, separator):
    assert read_smiles(write(tmp_path / "s.txt", {"5": "CCO", "6": "[Na+].[Cl-]"}, separator)) == {
        "5": "CCO",
        "6": "[Na+].[Cl-]",
    }


@pytest.mark.parametrize("text, names", [("5\n", "line 1"), ("\n", "no drug"), ("5 CCO\n5 CCC\n", "5 has two")])
def test_wrong_tables_of_smiles(tmp_path, text, names):
    (tmp_path / "s.txt").write_text(text)
    with pytest.raises(UserError, match=f"s.txt.*{names}"):
        read_smiles(tmp_path / "s.txt")


def test_drugs_that_cannot_be_read_are_left_out(tmp_path):
    drugs = read_drugs(write(tmp_path / "s.txt", SMILES | {"broken": "C1CC("}))
    assert drugs.unreadable == ["broken"] and drugs.names == list(SMILES)
    taken = drugs.take(["imatinib", "aspirin"])
    assert np.array_equal(taken.fingerprints, drugs.fingerprints[[2, 0]])
