"""Command lines: dataclasses become flags, and an error that a user can fix becomes one sentence."""

import math
import os
import sys
import traceback
import unicodedata
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import NoReturn

from utils.errors import DiskFullError, UserError, first_line
from utils.presets import PRESETS, Preset

SPIN = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
"""How long a waiting OpenMP thread spins before it sleeps: rounds in libgomp (pip's torch on Linux), milliseconds in
libomp (macOS). The defaults are about 3 ms and 200 ms. Beside another busy process, a spinning thread occupies the core
that the thread it waits for needs, and training nearly stops (benchmarks/busy_neighbour.py)."""
if os.environ.keys().isdisjoint({"OMP_WAIT_POLICY", *SPIN}):  # a user's own setting wins
    os.environ.update(SPIN)  # at import: OpenMP reads it once, when torch is loaded
if "OMP_NUM_THREADS" in os.environ:
    # numba, which scanpy's normalisation calls, sets OpenMP's number of threads for torch as well: to all cores, unless
    # it is limited.
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])


_flags: set[str] = set()
"""Names of the script's flags, so that advice names only flags that exist."""


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the docstring's line breaks, and shows each flag's default, or that it is required."""

    def _get_help_string(self, action):
        if action.required:
            return f"{action.help} (required)"
        return action.help if action.default is None else super()._get_help_string(action)


def parse_flags(doc: str, *dataclasses: type, stage: str | None = None) -> tuple:
    """Fill dataclasses from the command line; an unknown flag is an error.

    Parameters
    ----------
    doc : the script's docstring, shown above the flags by --help
    dataclasses : each field becomes a flag, with metadata["help"] as its help
    stage : a stage of utils.presets; adds the flag --preset, which sets the defaults of the others

    Returns
    -------
    One instance per dataclass

    Raises
    ------
    UserError
        If the name of the model to write is not a plain name.
    """
    from transformers import HfArgumentParser  # late, so that Ctrl-C during the import shows no traceback

    if stage:
        dataclasses = (*with_preset(dataclasses, stage), PresetFlag)
    _flags.update(f.name for config in dataclasses for f in fields(config))
    parser = HfArgumentParser(dataclasses, description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)
    *configs, rest = parser.parse_args_into_dataclasses(return_remaining_strings=True, look_for_args_file=False)
    if rest:
        parser.error(f"unknown flag {' '.join(rest)}; see --help")
    if not stage:
        return tuple(configs)
    check_name(configs[0], next(f.name for f in fields(configs[0]) if f.name in ("model_name", "model")))
    return tuple(configs[:-1])


def with_defaults(config: type, **defaults) -> type:
    """The same dataclass with other default values."""
    changed = [
        (f.name, f.type, field(default=defaults.pop(f.name), metadata=f.metadata))
        for f in fields(config)
        if f.name in defaults
    ]
    if defaults:
        raise ValueError(f"{config.__name__} has no field {', '.join(defaults)}")
    return make_dataclass(config.__name__, changed, bases=(config,), frozen=config.__dataclass_params__.frozen)


def given(config: object) -> dict:
    """Return those fields of a parsed dataclass whose flags stand on the command line, name → value."""
    words = {word.partition("=")[0] for word in sys.argv[1:]}
    return {f.name: getattr(config, f.name) for f in fields(config) if f"--{f.name}" in words}


def flag(help: str, default=MISSING, aliases: tuple[str, ...] = ()):
    """A dataclass field for a flag, required if it has no default. Aliases are other names of the flag."""
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


@dataclass
class PresetFlag:
    preset: Preset = flag(
        "defaults of the other flags: published (for GPUs), small (thousands of cells on two CPU cores) or tiny (a "
        "first try on hundreds of cells); --preset small --help shows them",
        "published",
    )


def with_preset(dataclasses: tuple[type, ...], stage: str) -> list[type]:
    """The dataclasses, with the values of the preset on the command line as their defaults."""
    first_look = ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset", choices=PRESETS[stage], default=PresetFlag.preset)
    values = PRESETS[stage]["published"] | PRESETS[stage][first_look.parse_known_args()[0].preset]
    changed = []
    for config in dataclasses:
        names = [f.name for f in fields(config) if f.name in values]
        changed.append(with_defaults(config, **{name: values.pop(name) for name in names}))
    if values:
        raise ValueError(f"{stage} has no flag {', '.join(values)}")
    return changed


def check_numbers(flags: object, *names: str, least: float = 0, below: float = math.inf) -> None:
    """Refuse flags whose number is not at least `least` and below `below`.

    Raises
    ------
    UserError
        The message names the flag and its limits.
    """
    for name in names:
        if not least <= getattr(flags, name) < below:
            limits = f"at least {least:g}" + (f" and below {below:g}" if below < math.inf else "")
            raise UserError(f"--{name} {getattr(flags, name)} must be {limits}")


LONGEST_NAME, LONGEST_NAME_BYTES = 100, 200
"""Limits of a model folder's name. File systems allow 255 bytes, and the folders beside a model have longer names."""
ENDINGS = (".training", ".partial", ".previous")
"""Endings of the folders beside a model folder, which a model's name must not have."""


def check_name(flags: object, name: str) -> None:
    """Refuse a model name that is a path, hidden, unreadable, too long, or the name of another folder of a run.

    Parameters
    ----------
    flags, name : the model's name is `getattr(flags, name)`

    Raises
    ------
    UserError
        The message names the flag.
    """
    value = getattr(flags, name)
    if not value.strip():
        problem = "is empty"
    elif any(separator in value for separator in "/\\"):
        problem = "is a path (the folder for models is --ckpt_dir)"
    elif any(unicodedata.category(letter).startswith("C") for letter in value):
        problem = "has an unreadable character"
    elif value.startswith("."):
        problem = "begins with a dot"
    elif value.endswith(ENDINGS):
        problem = f"ends in {Path(value).suffix}, as folders beside a model do"
    elif len(value) > LONGEST_NAME or len(os.fsencode(value)) > LONGEST_NAME_BYTES:
        problem = f"is longer than {LONGEST_NAME} characters"
    else:
        return
    raise UserError(f"--{name} {value[:LONGEST_NAME]!r} {problem}; give a plain name like rna_1")


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main. An error that a user can fix prints one sentence, without traceback, and exits with code 2.

    If one of several processes fails, the others print one short line that points to its message.
    """
    rank = int(os.environ.get("RANK", "0"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names in a file may not fit the terminal's encoding
            stream.reconfigure(errors="backslashreplace")

    def leave(message: object, code: int) -> None:
        who = f"[process {rank}] " if rank else ""
        print(f"{who}{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(code)

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _end_at_once(lambda: _run(main, leave))
    _run(main, leave)


def _end_at_once(script: Callable[[], None]) -> NoReturn:
    """Run one of several processes and end it without the interpreter's clean-up.

    Gloo's threads may still be running then. In about one of twenty short runs they aborted the process after its work
    was saved. One run never ended, probably for the same reason.
    """
    code = 0
    try:
        script()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(main: Callable[[], None], leave: Callable[[object, int], None]) -> None:
    """Run main; call `leave` with errors that a user can fix."""
    try:
        with quiet_libraries():
            main()
    except UserError as error:
        if isinstance(error, DiskFullError):  # closing HDF5 on a full disk may crash
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(2)
        leave(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:  # torch's and NCCL's own errors are RuntimeErrors
        text = f"{type(error).__name__}: {error}".lower()
        if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
            leave(f"out of memory ({first_line(error)}); {_less_memory()}", 2)
        if not any(words in text for words in LOST_PEER):
            raise
        leave(f"another process has failed or was stopped ({first_line(error)}); see its message for the reason", 1)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, hide warnings of libraries that a user of the scripts can do nothing about.

    Our own notices are printed. `python -W …` or PYTHONWARNINGS shows all warnings.
    """
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
            for library in ("anndata", "mudata", "scanpy"):
                warnings.filterwarnings("ignore", module=rf"{library}\b")
            for message in IDLE_WARNINGS:
                warnings.filterwarnings("ignore", message)
        yield


IDLE_WARNINGS = (
    "Some cells have zero counts",  # scanpy, reported under another library; we count such cells
    "Initializing zero-element tensors",  # torch, for a modality without features
    "Transforming to str index",  # anndata, reported under the caller; so are the next two
    "Trying to (modify|set) ",
    "Setting element ",
)
"""Beginnings of warnings that are reported under another library's name."""


OUT_OF_MEMORY = ("outofmemoryerror", "out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""How torch, CUDA and cuBLAS report full memory, in lower case."""
LOST_PEER = (
    *("connection closed by peer", "connection reset by peer", "gloo", "nccl communicator was aborted"),
    *("distbackenderror", "watchdog caught collective operation timeout", "nccl error"),
    "remote process exited or there was a network error",
)
"""How a process reports that another one has gone, in lower case."""


def _less_memory() -> str:
    """Advice for full memory, using the script's own flags."""
    flags = {"batch_size": "lower --batch_size", "tokens": "use --tokens expressed"}
    ways = [way for name, way in flags.items() if name in _flags]
    return ", or ".join(ways) or "close other programs, or split the file into parts with fewer cells"
