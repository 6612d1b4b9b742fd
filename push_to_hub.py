"""Push a model folder to the Hugging Face hub.

    hf auth login
    python push_to_hub.py --model_path runs/celltype --repo owner/name --private --license cc-by-4.0
    python predict_cell_type.py --data_path new_cells.h5ad --model_path hf://owner/name

Every file is first compared with the folder's manifest. The repository is made if it does not exist. With --license the
pushed copy's card names it, so that its hash is another one than the folder's; the script prints it.
"""

from dataclasses import dataclass

from utils.cli import flag, parse_flags, run_script
from utils.errors import UserError


@dataclass
class Flags:
    model_path: str = flag("model folder of any stage")
    repo: str = flag("repository on the hub: owner/name")
    private: bool = flag("make a new repository private", False)
    license: str | None = flag("the hub's name of a licence for the weights, such as cc-by-4.0", None)

    def __post_init__(self):
        if self.license is not None and not self.license.replace("-", "").replace(".", "").isalnum():
            raise UserError(f"--license {self.license!r}: is not a name of the hub's list, such as cc-by-4.0 or mit")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)

    # Slow to import: --help and mistaken flags do not wait for them.
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from utils.train.folders import MANIFEST, copy_folder, listed_files
    from utils.train.hub import push_folder, without_front_matter
    from utils.train.model_folder import PRETRAINED, load_model
    from utils.train.tasks import TRAINED

    saved = load_model(flags.model_path, *PRETRAINED, *TRAINED)
    folder, digest = saved.path, saved.hash
    card = (folder / "README.md").read_text()
    text = without_front_matter(card)
    with TemporaryDirectory() as temporary:
        if flags.license or text == card:  # folders of version 0.2 have no lines for the hub
            pushed = Path(temporary) / "model"
            digest = copy_folder(folder, pushed, {"README.md": saved.front_matter(flags.license or "unknown") + text})
            folder = pushed
        files = [*listed_files(folder), MANIFEST]
        page = push_folder(folder, files, flags.repo, flags.private, f"scMomer model {digest[:12]}")
    print(f"pushed {flags.model_path} to {page}: {len(files)} files, hash {digest}; use it as hf://{flags.repo}")


if __name__ == "__main__":
    run_script(main)
