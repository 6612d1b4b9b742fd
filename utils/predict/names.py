"""The names of what a prediction writes into a file, and the check that they are free."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from anndata.io import read_elem

from models.shapes import MODALITIES
from utils.cells.preprocessed import RawFile
from utils.errors import UserError
from utils.predict.infer import latents_of
from utils.train.cell_types import CELL_TYPES
from utils.train.model_folder import SavedModel

MEASURED = {"rna": "rna_measured", "atac": "atac_measured"}
"""Modality → column of obs: whether the model has read this modality of a cell, which is else inferred or missing."""

LABELLED_BY = "labelled_by"
"""Column of obs with the name of the model folder that has labelled a cell, where there are several."""


@dataclass(frozen=True)
class Names:
    """Names of what a prediction writes into a file.

    Attributes
    ----------
    prefix : put before every name, so that predictions of several models, or a user's own columns, do not clash
    columns : columns of obs, without prefix
    latents : the modalities whose latents are written
    table : key of obsm for the probability of each output, without prefix; empty for none
    """

    prefix: str = ""
    columns: tuple[str, ...] = (*CELL_TYPES.columns, *MEASURED.values())
    latents: tuple[str, ...] = MODALITIES
    table: str = CELL_TYPES.table

    def __post_init__(self):
        if not re.fullmatch(r"[\w.-]{0,50}", self.prefix):
            raise UserError(f"--prefix {self.prefix!r}: at most 50 letters, digits, dots, hyphens and underscores")

    @classmethod
    def of(cls, prefix: str, *models: SavedModel) -> "Names":
        """The names of what the predictions of one model are, or of several that share the cells."""
        columns = dict.fromkeys(name for saved in models for name in saved.task.columns_of(saved.fitted))
        latents = {name for saved in models for name in latents_of(saved)}
        which = (LABELLED_BY,) if len(models) > 1 else ()
        return cls(
            prefix,
            (*columns, *MEASURED.values(), *which),
            tuple(name for name in MODALITIES if name in latents),
            models[0].task.table,
        )

    @property
    def embedding(self) -> str:
        """Key of obsm for the cell embedding."""
        return f"X_{self.prefix}scmomer"

    def latent(self, modality: str) -> str:
        """Key of obsm for the latent of a modality."""
        return f"{self.embedding}_{modality}"

    @property
    def provenance(self) -> str:
        """Key of uns for what made the predictions."""
        return f"{self.prefix}scmomer"

    @property
    def places(self) -> list[str]:
        """Everything written per cell, as messages name it."""
        keys = [self.embedding, *map(self.latent, self.latents), *([self.prefix + self.table] if self.table else [])]
        columns = [f"obs['{self.prefix}{column}']" for column in self.columns]
        return columns + [f"obsm['{key}']" for key in keys]

    def claim(self, file: RawFile) -> list[str]:
        """Check that the names are free, or hold an earlier prediction, which may be replaced.

        Returns
        -------
        Lines that report what is replaced

        Raises
        ------
        UserError
            If the file holds something else under one of the names.
        """
        held = {f"obs['{column}']" for column in file.obs}
        held |= {name for source in file.modalities.values() for name in source.others}
        held |= {f"obsm['{key}']" for key in file.part("obsm")}
        entry, earlier = file.part("uns").get(self.provenance), None
        if isinstance(entry, Mapping) and "written" in entry:
            read = read_elem if file.on_disk else lambda value: value
            earlier = {key: read(entry[key]) for key in ("model", "written") if key in entry}
        clashes = [name for name in self.places if name in held]
        if earlier is not None and set(clashes) <= set(map(str, earlier["written"])):
            return [f"replacing the earlier predictions of model {earlier.get('model', 'unknown')}"] if clashes else []
        if clashes:
            raise UserError(
                f"{file.path}: has its own {' and '.join(clashes)}, which predictions would replace; choose other "
                "names with --prefix, for example --prefix new_"
            )
        return []
