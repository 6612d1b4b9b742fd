"""The split: exact test groups, validation cells balanced over types, the same result for the same seed."""

import numpy as np
import pandas as pd
import pytest

from utils.cells.split import SPLITS, assign_split
from utils.errors import UserError

SIZES = {"B": 40, "T": 25, "NK": 14, "pDC": 1}


@pytest.fixture
def obs() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    types = rng.permutation(np.repeat(list(SIZES), list(SIZES.values())))
    return pd.DataFrame({"cell_type": pd.Categorical(types), "donor": rng.integers(1, 4, len(types))})


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5])
def test_each_type_has_its_share_of_validation_cells(obs, fraction):
    split = assign_split(obs, fraction, 0, label_column="cell_type")
    assert set(split) <= set(SPLITS)
    for name, size in SIZES.items():
        assert (split[obs["cell_type"] == name] == "val").sum() == round(fraction * size)
    assert not (split == "test").any()


@pytest.mark.parametrize("groups", ["2", "1,3", "1, 3"])
def test_groups_are_test_cells_exactly(obs, groups):
    split = assign_split(obs, 0.2, 0, "donor", groups, "cell_type")
    inside = obs["donor"].astype(str).isin(groups.replace(" ", "").split(",")).to_numpy()
    assert (split[inside] == "test").all()
    assert not (split[~inside] == "test").any()
    for name in SIZES:
        others = split[~inside & (obs["cell_type"] == name).to_numpy()]
        assert (others == "val").sum() == round(0.2 * len(others))


def test_the_seed_determines_the_draw(obs):
    first, again, other = (assign_split(obs, 0.3, seed, label_column="cell_type") for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("label_column", [None, "absent"])
def test_without_labels_the_share_is_drawn_from_all_cells(obs, label_column):
    split = assign_split(obs, 0.3, 0, label_column=label_column)
    assert (split == "val").sum() == round(0.3 * len(obs))


def test_unlabelled_cells_are_split_too(obs):
    obs["cell_type"] = obs["cell_type"].where(obs["cell_type"] != "B")
    split = assign_split(obs, 0.25, 0, label_column="cell_type")
    assert (split[obs["cell_type"].isna()] == "val").sum() == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 1.0}, r"--val_fraction 1\.0"),
        ({"val_fraction": -0.1}, r"--val_fraction -0\.1"),
        ({"val_fraction": float("nan")}, "--val_fraction nan"),
        ({"split_by": "donor"}, "--test_groups"),
        ({"test_groups": "1"}, "--split_by"),
        (
            {"split_by": "plate", "test_groups": "1"},
            "--split_by plate: .* cell_type, donor",
        ),
        ({"split_by": "donor", "test_groups": "1,7"}, "--test_groups 7: .* donor.* 1, 2, 3"),
        ({"split_by": "donor", "test_groups": "1,2,3"}, "--test_groups"),
    ],
)
def test_mistakes_are_named(obs, arguments, message):
    with pytest.raises(UserError, match=message):
        assign_split(**{"obs": obs, "val_fraction": 0.1, "seed": 0, "label_column": "cell_type"} | arguments)
