"""From a pretrained model folder to a model with a head."""

from collections.abc import Callable

from models.heads import Head
from models.scmomer import ScMomer
from models.shapes import MODALITIES, FusionConfig, ScMomerConfig, other
from utils.errors import UserError
from utils.train.model_folder import SavedModel, load_parts

SCBERT_HIDDEN = 512
"""Width of the first hidden layer of scBERT's classifier; the second has --classifier_hidden (in scBERT 128)."""


def parts_for_head(parent: SavedModel, other_modality: str, missing: str) -> tuple[dict, dict]:
    """The parts and options of a model, without its head, that reads cells as `other_modality` says.

    Parameters
    ----------
    parent : a folder of stage I, II or III
    other_modality : student, zeros, measured or none, as in `ScMomerConfig`
    missing : the modality to leave out, for zeros with a parent that has both towers

    Returns
    -------
    parts, name → dataclass, and options, both for `ScMomerConfig`

    Raises
    ------
    UserError
        If `other_modality` needs a student or a second encoder that the parent lacks, or an RNA encoder alone.
    """
    is_alone = len(parent.features) == 1  # one encoder of stage I, or stage II of one modality
    if other_modality == "none":
        if parent.kind != "rna":
            raise UserError(
                f"--other_modality none: reads RNA alone, as scBERT does, but {parent.path} is no RNA encoder of "
                "stage I; give a folder of pretrain_rna.py"
            )
        parts = parent.config | {"fusion": FusionConfig(latent_dim=SCBERT_HIDDEN)}
        return parts, {"missing": "atac", "other_modality": "none"}
    lacks_student = other_modality == "student" and parent.kind != "student"
    if lacks_student or (other_modality != "zeros" and is_alone):
        raise UserError(
            f"{parent.path}: has no student; run pretrain_missing_mod.py first, "
            f"or choose --other_modality {'zeros' if is_alone else 'zeros or measured'}"
        )
    parts = {name: shape for name, shape in parent.config.items() if name != "student"}
    options = {"missing": other(*parent.features) if is_alone else missing, "other_modality": other_modality}
    if other_modality == "student":
        parts["student"], options["missing"] = parent.config["student"], parent.options["missing"]
    return parts, options


def with_head(parent: SavedModel, parts: dict, options: dict, make_head: Callable[[int], Head]) -> ScMomer:
    """The model with a fresh head and the parent's weights.

    A parent of stage I has only an encoder: the tower around it and the fusion are fresh, too.
    """
    n_features = [len(parent.features.get(name, ())) for name in MODALITIES]
    model = ScMomer(ScMomerConfig(**parts, **options), *n_features, make_head)
    state, fresh = parent.state, ("head.",)
    if parent.kind in MODALITIES:
        tower = f"towers.{parent.kind}."
        state, fresh = {tower + name: weights for name, weights in state.items()}, ("head.", "fusion.", tower)
    load_parts(model, state, fresh, parent.path)
    return model
