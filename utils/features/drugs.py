"""Drugs by their structure: SMILES become Morgan fingerprints or graphs of atoms. RDKit is used here alone."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.errors import UserError, reading

FINGERPRINT_BITS, FINGERPRINT_RADIUS = 2048, 2
ELEMENTS = ("C", "N", "O", "S", "F", "Cl", "Br", "I", "P", "B", "Si", "Se", "Pt", "Na", "K", "Ca", "H")
MAX_DEGREE, MAX_HYDROGENS, CHARGES, HYBRIDS = 6, 4, (-1, 0, 1), ("SP", "SP2", "SP3")


@dataclass
class Drugs:
    """Drugs as a head reads them.

    Attributes
    ----------
    names : ids
    fingerprints : [drugs, FINGERPRINT_BITS] int8, 0 or 1
    atoms : [drugs, most atoms, atom features] int8, zeros for padding; None if only fingerprints were made
    bonds : [drugs, most atoms, most atoms] float32, the adjacency with a loop at each atom, divided by the roots of
        both atoms' degrees; zeros for padding
    unreadable : ids whose SMILES RDKit cannot read
    """

    names: list[str]
    fingerprints: np.ndarray
    atoms: np.ndarray | None = None
    bonds: np.ndarray | None = None
    unreadable: list[str] = field(default_factory=list)

    def take(self, names: list[str]) -> "Drugs":
        """These drugs, in this order."""
        rows = [self.names.index(name) for name in names]
        pick = lambda values: None if values is None else values[rows]
        return Drugs(names, self.fingerprints[rows], pick(self.atoms), pick(self.bonds), self.unreadable)


def read_smiles(path: str | Path) -> dict[str, str]:
    """Return id → SMILES of a text file with one drug a line, separated by a tab, a comma or a space.

    Raises
    ------
    UserError
        If the file is not such a table, or an id occurs twice with different SMILES.
    """
    path, found = Path(path), {}
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with reading(path, "cannot be read as text", "give one drug per line, its id and its SMILES"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        separator = next((mark for mark in "\t, " if mark in line), None)
        name, smiles = (word.strip().strip('"') for word in line.split(separator, 1)) if separator else (line, "")
        if not name or not smiles:
            raise UserError(f"{path}: line {number} has no id and SMILES; give one drug per line, its id first")
        if found.get(name, smiles) != smiles:
            raise UserError(f"{path}: {name} has two different SMILES; keep one of them")
        found[name] = smiles
    if not found:
        raise UserError(f"{path}: has no drug; give one drug per line, its id and its SMILES")
    return found


def read_drugs(path: str | Path, graphs: bool = False, graphs_path: str | Path | None = None) -> Drugs:
    """Read drugs from a table of SMILES; those that RDKit cannot read are left out.

    Parameters
    ----------
    path : table of SMILES
    graphs : make graphs of atoms, too
    graphs_path : .npz with `<id>_x` [atoms, features] and `<id>_e` [2, bonds] for each drug, in place of RDKit's atoms

    Raises
    ------
    UserError
        If no SMILES can be read, or a drug has no graph in the file, or one that is none.
    """
    from rdkit import Chem, RDLogger
    from rdkit.Chem import rdFingerprintGenerator

    RDLogger.DisableLog("rdApp.*")  # unreadable SMILES are reported by the caller
    molecules = {name: Chem.MolFromSmiles(smiles) for name, smiles in read_smiles(path).items()}
    unreadable = [name for name, molecule in molecules.items() if molecule is None or not molecule.GetNumAtoms()]
    molecules = {name: molecule for name, molecule in molecules.items() if name not in unreadable}
    if not molecules:
        raise UserError(
            f"{path}: RDKit can read none of its {len(unreadable):,} SMILES ({', '.join(unreadable[:3])}); give one "
            "drug a line, its id and its SMILES"
        )
    maker = rdFingerprintGenerator.GetMorganGenerator(radius=FINGERPRINT_RADIUS, fpSize=FINGERPRINT_BITS)
    prints = np.stack([maker.GetFingerprintAsNumPy(molecule) for molecule in molecules.values()]).astype(np.int8)
    drugs = Drugs(list(molecules), prints, unreadable=unreadable)
    if graphs_path:
        drugs.atoms, drugs.bonds = _padded(_graphs_of_file(graphs_path, drugs.names))
    elif graphs:
        drugs.atoms, drugs.bonds = _padded([_graph(molecule) for molecule in molecules.values()])
    return drugs


def _graph(molecule) -> tuple[np.ndarray, np.ndarray]:
    """Atom features [atoms, features] and bonds [2, bonds] of a molecule."""
    ends = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
    return np.array([_atom(atom) for atom in molecule.GetAtoms()]), np.array(ends, dtype=int).reshape(-1, 2).T


def _atom(atom) -> list[int]:
    """Element, degree, hydrogens, charge, hybridisation, aromaticity and ring of an atom, as zeros and ones."""
    one_of = lambda value, known: [int(value == one) for one in known] + [int(value not in known)]
    return [
        *one_of(atom.GetSymbol(), ELEMENTS),
        *one_of(min(atom.GetDegree(), MAX_DEGREE), range(MAX_DEGREE + 1)),
        *one_of(min(atom.GetTotalNumHs(), MAX_HYDROGENS), range(MAX_HYDROGENS + 1)),
        *one_of(atom.GetFormalCharge(), CHARGES),
        *one_of(str(atom.GetHybridization()), HYBRIDS),
        int(atom.GetIsAromatic()),
        int(atom.IsInRing()),
    ]


def _graphs_of_file(path: str | Path, names: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with reading(path, "is not a readable .npz file", "copy or download it again"), np.load(path) as kept:
        absent = [name for name in names if f"{name}_x" not in kept or f"{name}_e" not in kept]
        if absent:
            raise UserError(
                f"{path}: has no graph of {len(absent):,} drugs ({', '.join(absent[:3])}); leave out "
                "--drug_graphs_path, so that RDKit makes the graphs"
            )
        graphs = {name: (kept[f"{name}_x"], kept[f"{name}_e"].astype(int)) for name in names}
    widths = {atoms.shape[1:] for atoms, _ in graphs.values()}
    for name, (atoms, bonds) in graphs.items():
        shaped = len(widths) == 1 and atoms.ndim == bonds.ndim == 2 and len(bonds) == 2
        # Atoms are kept as int8, which would cut off fractions; a charge may be negative.
        whole = np.isin(atoms, np.arange(-128, 128)).all()
        if not shaped or not whole or not np.isin(bonds, np.arange(len(atoms))).all():
            raise UserError(
                f"{path}: {name} needs atoms [atoms, features] in small whole numbers, as many features as others, and "
                "bonds [2, bonds] between its atoms; leave out --drug_graphs_path, so that RDKit makes the graphs"
            )
    return list(graphs.values())


def _padded(graphs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Stack graphs of different sizes: atoms [D, N, features], normalised bonds [D, N, N]."""
    most, width = max(len(atoms) for atoms, _ in graphs), graphs[0][0].shape[1]
    atoms = np.zeros((len(graphs), most, width), np.int8)
    bonds = np.zeros((len(graphs), most, most), np.float32)
    for drug, (features, (one, other)) in enumerate(graphs):
        n = len(features)
        atoms[drug, :n] = features
        adjacency = np.eye(n, dtype=np.float32)
        adjacency[one, other] = adjacency[other, one] = 1
        root = np.sqrt(adjacency.sum(1))
        bonds[drug, :n, :n] = adjacency / root / root[:, None]
    return atoms, bonds
