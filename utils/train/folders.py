"""Folders that are whole or absent: written beside their place, renamed into it, with a hash of every file."""

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
"""What our own scripts put into a model folder after its manifest is written."""
OF_OTHERS = {".DS_Store", ".gitattributes", ".git", ".cache"}
"""What the operating system, git and download tools put into folders; nothing here reads it."""
TRIES, PAUSE = 20, 0.01
"""How often a reader starts again when the writer replaces the folder meanwhile; seconds to wait, growing each time."""
T = TypeVar("T")


def _previous(path: Path) -> Path:
    """Where the old folder lies while the new one takes its place."""
    return path.with_name(f".{path.name}.previous")


def is_there(path: Path) -> bool:
    """Whether a folder exists, in its place or, if its writer was killed between two renames, as the previous one."""
    return path.exists() or _previous(path).exists()


def repair_folder(path: Path) -> None:
    """Put the previous folder back into its place, if the writer was killed while it exchanged the two.

    Only a process that no other writes beside may do so (`utils.train.lock.sole_writer`).
    """
    if not path.exists() and _previous(path).exists():
        os.rename(_previous(path), path)


def write_folder(path: str | Path, write: Callable[[Path], None]) -> str:
    """Make a folder by `write(empty folder)`, add the manifest, and only then put it in its place.

    Returns
    -------
    The folder's hash: SHA-256 of its manifest, which lists the SHA-256 of each file

    Raises
    ------
    UserError
        If it cannot be written. The old folder stays, and nothing of the new one.
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
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        cause = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be written ({cause}); free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return file_hash(path / MANIFEST)


def read_folder(path: str | Path, read: Callable[[Path, str], T], *needed: str) -> T:
    """Compare every file of a folder with its manifest, and read it; nothing is renamed or repaired.

    While a writer replaces the folder, the reader gets the old one or the new one: if the folder is another one after
    reading than before, it is read again.

    Parameters
    ----------
    path : the folder, made by `write_folder`
    read : (where the files lie, the folder's hash) → what is returned
    needed : files that the manifest must list

    Raises
    ------
    UserError
        If the folder or a file is missing, or a file is not the one that was written.
    """
    path = Path(path)
    for attempt in range(1, TRIES + 1):
        place = _previous(path) if not path.exists() and _previous(path).exists() else path
        before = _identity(place)
        try:
            found, error = read(place, _check(place, path, needed)), None
        except UserError as problem:
            found, error = None, problem
        except OSError as problem:
            cause = problem.strerror or first_line(problem)
            found, error = None, UserError(f"{path}: cannot be read ({cause}); restore the folder, or train again")
        if before is not None and _identity(place) == before:
            if error:
                raise error
            return found
        if before is None and error and attempt > 2:  # not there; looked at again, as it may be on its way
            raise error
        time.sleep(PAUSE * attempt)
    raise UserError(f"{path}: is being replaced again and again by a training run; try again when that run has ended")


def _identity(place: Path) -> tuple | None:
    """What is another after the folder was replaced, also where a file system uses numbers of files again."""
    with suppress(OSError):
        status = place.stat()
        return status.st_ino, status.st_ctime_ns, (place / MANIFEST).read_bytes()
    return None


def _check(place: Path, path: Path, needed: tuple[str, ...]) -> str:
    """Compare the files at `place` with their manifest; messages name the folder `path`.

    Returns
    -------
    The folder's hash
    """
    if not (place / MANIFEST).is_file():
        raise UserError(f"{path}: not a model folder (no {MANIFEST} in it); give the folder a training script wrote")
    content = (place / MANIFEST).read_bytes()
    try:
        files = json.loads(content)
        if not isinstance(files, dict):
            raise ValueError("not a table of files")
    except ValueError as error:
        raise UserError(f"{path / MANIFEST}: damaged; train the model again or restore the folder") from error
    for name in needed:
        if name not in files:
            raise UserError(f"{path / name}: not in the folder's {MANIFEST}; restore the folder, or train again")
    for name, expected in files.items():
        if Path(name).name != name or not (place / name).is_file():
            raise UserError(f"{path / name}: missing from the folder; restore it, or train the model again")
        if file_hash(place / name) != expected:
            raise UserError(f"{path / name}: is not the file that was saved; restore the folder, or train again")
    known = files.keys() | {MANIFEST} | ADDED_LATER | OF_OTHERS
    for foreign in sorted({file.name for file in place.iterdir()} - known):
        raise UserError(f"{path / foreign}: is not a file of this model ({MANIFEST} lacks it); move it elsewhere")
    return hashlib.sha256(content).hexdigest()
