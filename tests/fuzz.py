"""Broken files by the thousand: bytes of real ones flipped, cut, doubled or zeroed, and read in a process of its own.

A reader may succeed or end with our own error. Anything else (another exception, a signal, more than 10 s of computing,
more than 2 GB) is a finding, and the number of the file makes it again.
"""

import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.builders import make_cells, make_peaks
from tests.formats import FORMATS, tenx_h5
from tests.helpers import call, command_line
from utils.train.folders import MANIFEST, file_hash

SECONDS, MEMORY = 10, 2 * 2**30
LONGEST_WAIT = 120  # seconds on the clock, on a busy machine too
TEXT = ("csv genes down", "tsv gz", "10x folder v3")


def make_bases(folder: Path, model: Path) -> list[tuple[str, Path, dict]]:
    """Files to break: kind, the file, and the script and flags that read it."""
    adata = make_cells()
    bases = []
    for name in ("h5ad csr", "h5ad csc", "h5ad dense", "h5mu", "10x h5", "10x h5 v2", "loom", *TEXT):
        place = folder / name.replace(" ", "_")
        place.mkdir()
        path = FORMATS[name](adata, place)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        bases += [("preprocess", file, {"data_path": path, "check": True}) for file in files]
    multiome = folder / "multiome"
    multiome.mkdir()
    path = tenx_h5(adata, multiome, make_peaks(adata.obs_names))
    bases.append(("preprocess", path, {"data_path": path, "check": True}))
    copy = Path(shutil.copytree(model, folder / "model"))
    for name in (MANIFEST, "config.json", "genes.txt", "model.safetensors"):
        query = {"data_path": folder / "h5ad_csr" / "cells.h5ad", "model_path": copy, "device": "cpu"}
        bases.append(("predict_cell_type", copy / name, query | {"out_path": folder / "out.h5ad"}))
    return bases


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to eight small accidents."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        if not data:
            break
        at, length = rng.randrange(len(data)), rng.choice((1, 1, 1, 4, 16, 256))
        how = rng.choice(("flip", "flip", "random", "zero", "ones", "cut", "double", "drop"))
        if how == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif how == "random":
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        elif how in ("zero", "ones"):
            data[at : at + length] = (b"\x00" if how == "zero" else b"\xff") * len(data[at : at + length])
        elif how == "cut":
            del data[at:]
        elif how == "double":
            data[at:at] = data[at : at + length]
        else:
            del data[at : at + length]
    return bytes(data)


def read_broken(script: str, flags: dict, output: Path, memory: int = MEMORY) -> str:
    """Run a script in a fork with limits on time and memory (bytes); returns what went wrong, or an empty string."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            call(script, *command_line(flags))
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            words = output.read_text(errors="replace")[-300:] if code not in (0, 2) else ""
            return "" if code in (0, 2) else f"exit code {code}: {words}"
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"more than {LONGEST_WAIT} s"


def fuzz(folder: Path, model: Path, first: int, number: int) -> dict[int, str]:
    """Break and read `number` files, counted from `first`.

    Returns
    -------
    number of the file → the file and what went wrong
    """
    bases = make_bases(folder, model)
    whole = {path: path.read_bytes() for _, path, _ in bases}
    findings = {}
    for index in range(first, first + number):
        rng = random.Random(index)
        script, path, flags = bases[index % len(bases)]
        path.write_bytes(mutate(whole[path], rng))
        manifest = path.parent / MANIFEST
        if script == "predict_cell_type" and path != manifest and rng.random() < 0.7:  # and vouched for
            text = whole[manifest].decode().replace(hashlib.sha256(whole[path]).hexdigest(), file_hash(path))
            manifest.write_text(text)
        wrong = read_broken(script, flags, folder / "output.txt")
        if wrong:
            findings[index] = f"{path.parent.name}/{path.name}: {wrong}"
        path.write_bytes(whole[path])
        if manifest in whole:
            manifest.write_bytes(whole[manifest])
    return findings
