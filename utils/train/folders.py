"""Write folders completely or not at all, and read them with a check of every file.

A folder is written under a temporary name beside its place and then renamed. Its manifest holds the SHA-256 of every
file. To replace an old folder takes two renames; if the writer is killed between them, the old folder has the name that
`_previous` returns, and readers find it there.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from utils.errors import UserError, first_line
from utils.files.file_hash import file_hash

MANIFEST = "manifest.json"
METRICS, CURVE, TENSORBOARD = "metrics.jsonl", "loss_curve.png", "tensorboard"
ADDED_LATER = {METRICS, CURVE, TENSORBOARD, "evaluation"}
"""Names that our own scripts add to a model folder after its manifest has been written."""
FOREIGN = {".DS_Store", ".gitattributes", ".git", ".cache"}
"""Names that the operating system, git and download tools add to folders; they are ignored."""
TRIES, PAUSE = 20, 0.01
"""A reader tries this often if a writer replaces the folder meanwhile; seconds before the second try, then growing."""
T = TypeVar("T")


def _previous(path: Path) -> Path:
    """Return the path of the old folder while the new one takes its place."""
    return path.with_name(f".{path.name}.previous")


def is_there(path: Path) -> bool:
    """Return whether a folder exists, in its place or as the previous one (see the top of this file)."""
    return path.exists() or _previous(path).exists()


def repair_folder(path: Path) -> None:
    """Move the previous folder back into its place, if its writer was killed between the two renames.

    Only the process that holds the folder's lock may do this (`utils.train.lock.sole_writer`).
    """
    if not path.exists() and _previous(path).exists():
        os.rename(_previous(path), path)


def write_folder(path: str | Path, write: Callable[[Path], None]) -> str:
    """Write a folder and its manifest under a temporary name, then move it into its place.

    Parameters
    ----------
    path : the folder to write or replace
    write : function that writes the files into an empty folder

    Returns
    -------
    The folder's hash: the SHA-256 of its manifest, which lists the SHA-256 of each file

    Raises
    ------
    UserError
        If the folder cannot be written. The old folder then stays, and nothing is left of the new one.
    """
    path = Path(path)
    partial, previous = path.with_name(f".{path.name}.partial"), _previous(path)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        files = {file.name: file_hash(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(files, indent=1))
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(path, previous)
        os.rename(partial, path)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error when the disk is full
        cause = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be written ({cause}); free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return file_hash(path / MANIFEST)


def copy_folder(path: Path, target: Path, texts: dict[str, str]) -> str:
    """Write a copy of a folder, in which some of the files hold other texts, and return the copy's hash.

    Parameters
    ----------
    path, target : the folder, and the one to write or replace, which may be the same
    texts : name of a file → its text in the copy
    """

    def write(folder: Path) -> None:
        for name in listed_files(path):
            if name in texts:
                (folder / name).write_text(texts[name])
            else:
                shutil.copyfile(path / name, folder / name)

    return write_folder(target, write)


def listed_files(path: Path) -> list[str]:
    """Return the names of the files that a folder's manifest lists."""
    return list(json.loads((path / MANIFEST).read_text()))


def read_folder(path: str | Path, read: Callable[[Path, str], T], *needed: str) -> T:
    """Compare every file of a folder with its manifest, then read the folder; nothing is renamed or repaired.

    A writer may replace the folder meanwhile. If the folder has changed during reading, it is read again, so that the
    result comes from the old folder or from the new one, never from a mixture.

    Parameters
    ----------
    path : a folder made by `write_folder`
    read : function (where the files lie, the folder's hash) → result
    needed : files that the manifest must list

    Returns
    -------
    The result of `read`

    Raises
    ------
    UserError
        If the folder or a file is missing, or a file differs from the one that was written.
    """
    path = Path(path)
    for attempt in range(1, TRIES + 1):
        place = _previous(path) if not path.exists() and _previous(path).exists() else path
        before = _identity(place)
        try:
            result, error = read(place, _check(place, path, needed)), None
        except UserError as problem:
            result, error = None, problem
        except OSError as problem:
            cause = problem.strerror or first_line(problem)
            result, error = None, UserError(f"{path}: cannot be read ({cause}); restore the folder, or train again")
        if before is not None and _identity(place) == before:
            if error:
                raise error
            return result
        if before is None and error and attempt > 2:  # absent; tried twice, since a writer may be between two renames
            raise error
        time.sleep(PAUSE * attempt)
    raise UserError(f"{path}: a training run keeps replacing it; try again when that run has ended")


def _identity(place: Path) -> tuple | None:
    """Return a value that changes when the folder is replaced; None if there is no folder.

    The inode number alone is not enough, since file systems reuse it.
    """
    with suppress(OSError):
        status = place.stat()
        return status.st_ino, status.st_ctime_ns, (place / MANIFEST).read_bytes()
    return None


def _check(place: Path, path: Path, needed: tuple[str, ...]) -> str:
    """Compare the files in `place` with their manifest and return the folder's hash; messages name `path`."""
    if not (place / MANIFEST).is_file():
        raise UserError(f"{path}: not a model folder (no {MANIFEST} in it); give the folder a training script wrote")
    content = (place / MANIFEST).read_bytes()
    try:
        files = json.loads(content)
        if not isinstance(files, dict):
            raise ValueError("the manifest is not a table of files")
    except ValueError as error:
        raise UserError(f"{path / MANIFEST}: damaged; train the model again or restore the folder") from error
    for name in needed:
        if name not in files:
            raise UserError(f"{path / name}: not in the folder's {MANIFEST}; restore the folder, or train again")
    for name, expected in files.items():
        # A manifest that was tampered with must not lead to files outside the folder.
        if Path(name).name != name or not (place / name).is_file():
            raise UserError(f"{path / name}: missing from the folder; restore it, or train the model again")
        if file_hash(place / name) != expected:
            raise UserError(f"{path / name}: is not the file that was saved; restore the folder, or train again")
    known = files.keys() | {MANIFEST} | ADDED_LATER | FOREIGN
    for unknown in sorted({file.name for file in place.iterdir()} - known):
        raise UserError(f"{path / unknown}: is not a file of this model ({MANIFEST} lacks it); move it elsewhere")
    return hashlib.sha256(content).hexdigest()
