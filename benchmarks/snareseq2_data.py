"""Make snareseq2_mop.h5mu, the data of the SNARE-seq2 study, from the original public files.

    python -m benchmarks.snareseq2_data --folder scMoMaT/data/real/MOp_5batches --out_path snareseq2_mop.h5mu

The files GxC1.npz, RxC1.npz, meta_c1.csv, genes.txt and regions.txt lie in data/real/MOp_5batches of the public
repository PeterZZQ/scMoMaT (MIT licence). The study uses ten of their batches, with raw counts. The 23 identities of
the original annotation become `subclass`; CELL_TYPES merges them into 15 cell types.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError, reading
from utils.files.write import write_whole

BATCHES = ("09A", "09B", "09D", "09E", "09F", "09G", "09H", "09I", "09J", "09K")
CELL_TYPES = {
    "Astro": ("Ast",),
    "CGE": ("InV",),
    "Clau": ("Clau",),
    "Endo": ("Endo",),
    "L2/3": ("E2Rasgrf2", "E3Rmst", "E3Rorb"),
    "L4/5": ("E4Il1rapl2", "E4Thsd7a", "E5Galnt14", "E5Parm1", "E5Sulf1", "E5Tshz2"),
    "L6": ("E6Tle4",),
    "MGC": ("Mic",),
    "Mis": ("Mis",),
    "Npy": ("InN",),
    "OPC": ("OPC",),
    "Oligo": ("OliI", "OliM"),
    "Peri": ("Peri",),
    "Pvalb": ("InP",),
    "Sst": ("InS",),
}


@dataclass
class Flags:
    folder: str = flag("folder with GxC1.npz, RxC1.npz, meta_c1.csv, genes.txt and regions.txt")
    out_path: str = flag("the file to write, .h5mu")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    folder = Path(flags.folder)
    absent = [
        name
        for name in ("GxC1.npz", "RxC1.npz", "meta_c1.csv", "genes.txt", "regions.txt")
        if not (folder / name).is_file()
    ]
    if absent:
        raise UserError(
            f"{folder}: lacks {', '.join(absent)}; give the folder data/real/MOp_5batches of PeterZZQ/scMoMaT"
        )
    mdata = convert(folder)
    write_whole(mdata, flags.out_path)
    print(
        f"wrote {flags.out_path}: {mdata.n_obs:,} cells, {mdata['rna'].n_vars:,} genes, {mdata['atac'].n_vars:,} peaks"
    )


def convert(folder: Path) -> MuData:
    """Return the paired cells of the ten batches.

    Parameters
    ----------
    folder : the original files: counts as features × cells, and one line of meta_c1.csv per cell

    Raises
    ------
    UserError
        If the files do not match, or an identity is not in CELL_TYPES.
    """
    obs = pd.read_csv(folder / "meta_c1.csv", index_col=0, dtype=str)
    with reading(folder / "meta_c1.csv", "has no columns Batch and Ident", "get the original file"):
        obs = pd.DataFrame({"batch": obs["Batch"], "subclass": obs["Ident"]}).rename_axis(None)
    cell_type = {identity: name for name, identities in CELL_TYPES.items() for identity in identities}
    kept = obs["batch"].isin(BATCHES).to_numpy()
    unknown = sorted(set(obs["subclass"][kept]) - cell_type.keys())
    if unknown:
        raise UserError(f"{folder / 'meta_c1.csv'}: has identities that the study does not know: {', '.join(unknown)}")
    obs["cell_type"] = obs["subclass"].map(cell_type)
    parts = {}
    for name, counts, features in (("rna", "GxC1.npz", "genes.txt"), ("atac", "RxC1.npz", "regions.txt")):
        names = (folder / features).read_text().split()
        if name == "atac":  # chr1_100_200 → chr1:100-200
            names = ["{}:{}-{}".format(*peak.rsplit("_", 2)) for peak in names]
        matrix = sparse.load_npz(folder / counts)
        if matrix.shape != (len(names), len(obs)):
            raise UserError(f"{folder / counts}: is {matrix.shape}, not {len(names)} features × {len(obs)} cells")
        cells = matrix.T.tocsr()[kept].astype(np.float32)
        parts[name] = AnnData(cells, obs[kept][["batch", "cell_type", "subclass"]], pd.DataFrame(index=names))
    mdata = MuData(parts)
    mdata.obs = parts["rna"].obs.copy()
    return mdata


if __name__ == "__main__":
    run_script(main)
