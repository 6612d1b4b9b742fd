"""Folders that are whole or absent: written beside their place, renamed into it, with a hash of every file."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from utils.errors import UserError, first_line

MANIFEST = "manifest.json"


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(path: str | Path, write: Callable[[Path], None]) -> str:
    """Make a folder by `write(empty folder)`, add the manifest, and only then put it in its place.

    Returns
    -------
    The folder's hash: SHA-256 of its manifest, which lists the SHA-256 of each file
    """
    path = Path(path)
    partial, previous = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.previous")
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
    return file_hash(path / MANIFEST)


def check_folder(path: str | Path, *needed: str) -> tuple[Path, str]:
    """Find a folder made by `write_folder` and compare every file with its manifest.

    Parameters
    ----------
    path : the folder
    needed : files that the manifest must list

    Returns
    -------
    The folder, and its hash

    Raises
    ------
    UserError
        If the folder or a file is missing, or a file is not the one that was written.
    """
    path = Path(path)
    previous = path.with_name(f".{path.name}.previous")
    if not path.exists() and previous.exists():  # the writer was killed between its two renames
        os.rename(previous, path)
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path}: not a model folder (no {MANIFEST} in it); give the folder a training script wrote")
    try:
        files = json.loads((path / MANIFEST).read_text())
        if not isinstance(files, dict):
            raise ValueError("not a table of files")
    except ValueError as error:
        raise UserError(f"{path / MANIFEST}: damaged; train the model again or restore the folder") from error
    for name in needed:
        if name not in files:
            raise UserError(f"{path / name}: not in the folder's {MANIFEST}; restore the folder, or train again")
    for name, expected in files.items():
        if Path(name).name != name or not (path / name).is_file():
            raise UserError(f"{path / name}: missing from the folder; restore it, or train the model again")
        if file_hash(path / name) != expected:
            raise UserError(f"{path / name}: is not the file that was saved; restore the folder, or train again")
    return path, file_hash(path / MANIFEST)
