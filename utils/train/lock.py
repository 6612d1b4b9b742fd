"""Allow one writer per model folder, by a lock file beside it that names the process and the machine holding it.

The lock itself is the operating system's (`flock`), which ends with its process. The content of the file is needed only
where that lock cannot be seen: between machines that share a disk, and on file systems without locks.
"""

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
"""Open lock files of this process. A forked child closes its copies, or the lock would outlive the process."""


def _close_all() -> None:
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_close_all)


def lock_file(folder: Path) -> Path:
    """Return the path of a model folder's lock file: beside the folder, which is replaced while we hold the lock."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def sole_writer(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Keep other runs from writing a model folder and its training state while the block runs.

    The first process holds the lock for all processes of the run. The operating system releases it when that process
    ends, even if it is killed.

    Parameters
    ----------
    folder : the model folder; it need not exist
    runtime : this process

    Raises
    ------
    UserError
        On all processes of the run, if another run holds the lock, or may hold it on a machine that we cannot see.
    """
    path, descriptor, refusal = lock_file(folder), None, ""
    if runtime.is_main:
        try:
            descriptor = _take(path, folder)
            repair_folder(folder)
        except UserError as error:
            refusal = str(error)
    try:
        refusal = runtime.gather(refusal)[0]  # all processes must fail, or the others would wait for the first one
        if refusal:
            raise UserError(refusal)
        yield
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def _take(path: Path, folder: Path) -> int:
    """Open the lock file, lock it and write this process into it; return the file descriptor."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            _open.add(descriptor)
            try:
                is_locked = _lock(descriptor)
                if is_locked and not _is_at(descriptor, path):  # its holder has just deleted it: lock the new one
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
    """Return whether we got the lock of the operating system; None on file systems without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is still the one at this path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _read(descriptor: int) -> dict:
    """Return the holder written in a lock file; an empty dict if the file is empty or was only half written."""
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
    """Return what a process number refers to: the machine, its last boot, and the container in it."""
    place = {"machine": platform.node(), "boot": "", "container": ""}
    with suppress(OSError):
        place["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place["container"] = os.readlink("/proc/self/ns/pid")
    return place


def _start_of(process: int) -> str:
    """Return the start time of a process in the system's clock ticks, as text; empty if it is not known.

    Number and start time together identify a process, since numbers are reused.
    """
    with suppress(OSError, IndexError):
        # The second entry is the program's name in parentheses, which may contain anything. Behind it, count to 20.
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return ""


def _may_live(holder: dict, is_locked: bool | None) -> bool:
    """Return whether the process named in a lock file may still be writing.

    Parameters
    ----------
    holder : content of the lock file
    is_locked : True if we hold the system's lock, None on file systems without locks
    """
    if not holder:
        return False
    here = _place()
    if is_locked and here["boot"] and holder.get("boot") == here["boot"]:
        return False  # same operating system, perhaps another container: our lock proves that the holder has ended
    if holder.get("machine") != here["machine"]:
        return True  # another machine's locks may be invisible here, so its process may be alive
    if is_locked or holder.get("boot") != here["boot"]:
        return False  # our lock proves that the holder has ended, or the machine has been restarted since
    if holder.get("container") != here["container"]:
        return True  # its process number means nothing here
    process = holder.get("process")
    if not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process exists and belongs to another user
    return not holder.get("process_started") or holder["process_started"] == _start_of(process)


def _refusal(folder: Path, path: Path, holder: dict) -> str:
    machine, process = holder.get("machine", "an unknown machine"), holder.get("process", "unknown")
    since = f", since {holder['since']}" if "since" in holder else ""
    return (
        f"{folder}: another run writes here (process {process} on {machine}{since}); wait for it or choose another "
        f"name, or, if that run is over, delete {path}"
    )
