"""One writer per model folder: a lock file beside it, which names the process and the machine that hold it."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError
from utils.train.distributed import Runtime
from utils.train.folders import repair_folder

_open: set[int] = set()
"""Lock files held by this process. A forked child closes its copies: a lock ends with the process that took it."""


def _close_all() -> None:
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_close_all)


def lock_file(folder: Path) -> Path:
    """Where the lock of a model folder lies: beside it, as the folders of a run come and go."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def sole_writer(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Within the block, no other run may write this model folder or its training state.

    The first process takes the lock for all processes of the run. The system releases it when that process ends,
    however it ends.

    Parameters
    ----------
    folder : of the model; it need not exist
    runtime : this process

    Raises
    ------
    UserError
        In all processes of the run, if another run holds the lock, or may hold it on a machine that cannot be asked.
    """
    path, descriptor, refusal = lock_file(folder), None, ""
    if runtime.is_main:
        try:
            descriptor = _take(path, folder)
            repair_folder(folder)
        except UserError as error:
            refusal = str(error)
    try:
        refusal = runtime.gather(refusal)[0]
        if refusal:
            raise UserError(refusal)
        yield
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def _take(path: Path, folder: Path) -> int:
    """Open the lock file, lock it and write this process into it; returns the file's descriptor."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            _open.add(descriptor)
            try:
                is_locked = _lock(descriptor)
                if is_locked and not _is_at(descriptor, path):  # its holder removed it just now
                    _close(descriptor)
                    continue
                holder = _read(descriptor)
                if is_locked is False or _may_live(holder, is_locked):
                    raise UserError(_refusal(folder, path, holder))
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
            except BaseException:
                _close(descriptor)
                raise
            return descriptor
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space or choose another folder") from error


def _release(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        if _is_at(descriptor, path):
            path.unlink()
    _close(descriptor)


def _close(descriptor: int) -> None:
    if descriptor in _open:
        _open.remove(descriptor)
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether the system gives us the lock; None on file systems without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at this path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _read(descriptor: int) -> dict:
    """Who is written into a lock file; nobody if it is empty, or was only half written."""
    with suppress(ValueError):
        holder = json.loads(os.pread(descriptor, 2**12, 0))
        return holder if isinstance(holder, dict) else {}
    return {}


def _this_process() -> dict:
    return _place() | {
        "process": os.getpid(),
        "process_started": _start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _place() -> dict:
    """Where process numbers mean what they mean here: the machine, since its last start, and the container in it."""
    place = {"machine": platform.node(), "boot": "", "container": ""}
    with suppress(OSError):
        place["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place["container"] = os.readlink("/proc/self/ns/pid")
    return place


def _start_of(process: int) -> str:
    """When a process was started, as the system counts: its number may be used again. Empty where it is not known."""
    with suppress(OSError, IndexError):
        # The name, in parentheses, may hold anything; the start is the 20th entry behind it.
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return ""


def _may_live(holder: dict, is_locked: bool | None) -> bool:
    """Whether the process in a lock file may still write, when nobody here holds the lock, or none can be held."""
    if not holder:
        return False
    here = _place()
    if is_locked and here["boot"] and holder.get("boot") == here["boot"]:
        return False  # the same system, be it in another container: it releases a process's locks when that ends
    if holder.get("machine") != here["machine"]:
        return True  # its locks need not be seen from here
    if is_locked or holder.get("boot") != here["boot"]:
        return False
    if holder.get("container") != here["container"]:
        return True
    process = holder.get("process")
    if not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not holder.get("process_started") or holder["process_started"] == _start_of(process)


def _refusal(folder: Path, path: Path, holder: dict) -> str:
    machine, process = holder.get("machine", "an unknown machine"), holder.get("process", "unknown")
    since = f", since {holder['since']}" if "since" in holder else ""
    return (
        f"{folder}: another run writes here (process {process} on {machine}{since}); wait for it or choose another "
        f"name, or, if that run is over, delete {path}"
    )
