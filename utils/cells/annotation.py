"""The annotation of cells: of a file, filled with that of its modalities."""

import pandas as pd

from utils.files.source import Source


def annotation_of(obs: pd.DataFrame | None, modalities: dict[str, Source]) -> pd.DataFrame:
    """Return the annotation of all cells: a file's own, or else its first modality's, filled with the modalities'."""
    obs = next(iter(modalities.values())).obs if obs is None else obs
    obs.index = obs.index.astype(str).rename(None)
    for source in modalities.values():
        obs = obs if obs is source.obs else fill_in(obs, source.obs)
    return obs


def fill_in(obs: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    """Add columns, and fill missing values, from a modality's annotation of some of the cells.

    Values keep their type. If some cells have no value, integers and booleans get pandas' nullable type. A column that
    holds numbers in one annotation and text in the other becomes text.
    """
    obs = obs.copy()
    for column in more:
        new = more[column]
        if not obs.index.isin(new.index).all() and new.dtype.kind in "biu":
            new = new.convert_dtypes()
        new = new.reindex(obs.index)
        old = obs.get(column)
        if old is None:
            obs[column] = new
        elif old.isna().any() and new[old.isna()].notna().any():
            both = old.astype(object).where(old.notna(), new.astype(object))
            is_number = pd.api.types.is_numeric_dtype(old) and pd.api.types.is_numeric_dtype(new)
            both = both.infer_objects().convert_dtypes() if is_number else both.where(both.isna(), both.astype(str))
            obs[column] = both if is_number else as_category(both, old, new)
    return obs


def as_category(values: pd.Series, *sources: pd.Series) -> pd.Series:
    """Make text a category; its classes keep the order that they have in the sources."""
    known = [str(name) for s in sources if isinstance(s.dtype, pd.CategoricalDtype) for name in s.cat.categories]
    names = list(dict.fromkeys([*known, *sorted(set(values.dropna()))]))
    return values.astype(pd.CategoricalDtype([name for name in names if name in set(values.dropna())]))
