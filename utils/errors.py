"""The one kind of error that a user can fix."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake in the input, in one sentence: the file, what is wrong, and the command or change that fixes it.

    Scripts print the sentence and exit with code 2; no traceback is shown.
    """


class DiskFullError(UserError):
    """An HDF5 file could not be finished; HDF5 may crash when its handles are closed, so the process ends without."""


@contextmanager
def reading(path: str | Path, problem: str, remedy: str) -> Iterator[None]:
    """Whatever a reader trips over, the file is what is wrong: `<path>: <problem> (<the reader's words>); <remedy>`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path}: {problem} ({first_line(error)}); {remedy}") from error


def first_line(error: Exception) -> str:
    """An exception in some words."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
