"""The study's data from the public original files: here a small forgery of them."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from benchmarks.snareseq2_data import convert
from utils.errors import UserError


@pytest.fixture
def originals(tmp_path):
    """Six cells in four batches, one of which the study leaves out; counts are features × cells."""
    rng = np.random.default_rng(0)
    rna, atac = (sparse.csr_matrix(rng.poisson(1.0, (n, 6))) for n in (4, 3))
    sparse.save_npz(tmp_path / "GxC1.npz", rna)
    sparse.save_npz(tmp_path / "RxC1.npz", atac)
    meta = {"Batch": ["09A", "08X", "09K", "09A", "09E", "09K"], "Barcode": list("abcdef"), "Ident": ["InP", "?"] * 3}
    meta["Ident"] = ["InP", "strange", "E3Rorb", "OliM", "Mic", "E2Rasgrf2"]
    pd.DataFrame(meta, index=[f"cell{i}" for i in range(6)]).to_csv(tmp_path / "meta_c1.csv")
    (tmp_path / "genes.txt").write_text("Xkr4\nGad1\nSst\nMog\n")
    (tmp_path / "regions.txt").write_text("chr1_100_200\nchr1_GL456210_random_5_9\nchrX_7_8\n")
    return tmp_path, rna.toarray().T, atac.toarray().T


def test_cells_of_the_ten_batches_with_their_counts_types_and_peaks(originals):
    folder, rna, atac = originals
    mdata, kept = convert(folder), [0, 2, 3, 4, 5]
    assert mdata.obs_names.tolist() == [f"cell{i}" for i in kept]
    assert mdata.obs["cell_type"].tolist() == ["Pvalb", "L2/3", "Oligo", "MGC", "L2/3"]
    assert mdata.obs["subclass"].tolist() == ["InP", "E3Rorb", "OliM", "Mic", "E2Rasgrf2"]
    assert mdata.obs["batch"].tolist() == ["09A", "09K", "09A", "09E", "09K"]
    np.testing.assert_array_equal(mdata["rna"].X.toarray(), rna[kept])
    np.testing.assert_array_equal(mdata["atac"].X.toarray(), atac[kept])
    assert mdata["atac"].var_names.tolist() == ["chr1:100-200", "chr1_GL456210_random:5-9", "chrX:7-8"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("genes.txt", lambda text: text + "Extra\n", "not 5 features × 6 cells"),
        ("meta_c1.csv", lambda text: text.replace("Ident", "Type"), "no columns Batch and Ident"),
        ("meta_c1.csv", lambda text: text.replace("Mic", "Martian"), "does not know: Martian"),
    ],
)
def test_files_that_do_not_fit_are_named(originals, name, change, message):
    path = originals[0] / name
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        convert(originals[0])
