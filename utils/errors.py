"""Errors that a user can fix."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """An error that a user can fix; its message is one sentence: the file or flag, what is wrong, and how to fix it.

    Scripts print the sentence without a traceback and exit with code 2.
    """


class DiskFullError(UserError):
    """The disk is full and an HDF5 file is incomplete.

    HDF5 may crash when such a file is closed, so scripts exit without closing it.
    """


@contextmanager
def reading(path: str | Path, problem: str, remedy: str) -> Iterator[None]:
    """Turn any exception in the block into a `UserError`, "<path>: <problem> (<the exception's message>); <remedy>".

    Libraries raise all kinds of exceptions on damaged files. `UserError` and `MemoryError` pass unchanged.

    Parameters
    ----------
    path : the file that the block reads
    problem : what is wrong with the file if the block fails, such as "is not a valid model folder"
    remedy : what the user can do
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path}: {problem} ({first_line(error)}); {remedy}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, at most 160 characters; its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
