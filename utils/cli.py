"""Command lines: dataclasses become flags, and a user's mistake becomes one sentence."""

import math
import os
import sys
import unicodedata
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import MISSING, field, fields, make_dataclass
from pathlib import Path

from transformers import HfArgumentParser

from utils.errors import DiskFullError, UserError, first_line

_flags: set[str] = set()
"""Names of the script's flags, once they are known: advice names no others."""


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the docstring's lines, and says of every flag what its default is or that it must be given."""

    def _get_help_string(self, action):
        if action.required:
            return f"{action.help} (required)"
        return action.help if action.default is None else super()._get_help_string(action)


def parse_flags(doc: str, *dataclasses: type) -> tuple:
    """Fill dataclasses from the command line; an unknown flag is an error.

    Parameters
    ----------
    doc : the script's docstring, shown above the flags by --help
    dataclasses : a field is a flag, its metadata["help"] the flag's help

    Returns
    -------
    One instance per dataclass
    """
    _flags.update(f.name for config in dataclasses for f in fields(config))
    parser = HfArgumentParser(dataclasses, description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)
    *configs, rest = parser.parse_args_into_dataclasses(return_remaining_strings=True, look_for_args_file=False)
    if rest:
        parser.error(f"unknown flag {' '.join(rest)}; see --help")
    return tuple(configs)


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


def flag(help: str, default=MISSING):
    """A dataclass field that is a flag; without a default it must be given."""
    return field(metadata={"help": help}) if default is MISSING else field(default=default, metadata={"help": help})


def check_numbers(flags: object, *names: str, least: float = 0, below: float = math.inf) -> None:
    """Refuse flags whose number is not at least `least` and below `below`.

    Raises
    ------
    UserError
        That names the flag and the limits.
    """
    for name in names:
        if not least <= getattr(flags, name) < below:
            limits = f"at least {least:g}" + (f" and below {below:g}" if below < math.inf else "")
            raise UserError(f"--{name} {getattr(flags, name)} must be {limits}")


LONGEST_NAME, LONGEST_NAME_BYTES = 100, 200
"""Of a model folder; file systems take 255 bytes, and names beside it are longer."""
ENDINGS = (".training", ".partial", ".previous")
"""Of what lies beside model folders."""


def check_name(flags: object, name: str) -> None:
    """Refuse a model's name that is none: a path, one that is hidden or cannot be read, or a run's other folder.

    Parameters
    ----------
    flags, name : the flag's value is `getattr(flags, name)`

    Raises
    ------
    UserError
        That names the flag.
    """
    value = getattr(flags, name)
    if not value.strip():
        problem = "is empty"
    elif any(separator in value for separator in "/\\"):
        problem = "is a path (the folder for models is --ckpt_dir)"
    elif any(unicodedata.category(letter).startswith("C") for letter in value):
        problem = "has a character that cannot be read"
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
    """Run a script's main; what a user can mend is printed as one sentence without traceback, and the exit code is 2.

    When several processes run and one of them fails, the others only say so: what matters is the first one's message.
    """
    rank = int(os.environ.get("RANK", "0"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names in a file may be what a terminal cannot show
            stream.reconfigure(errors="backslashreplace")

    def leave(message: object, code: int) -> None:
        who = f"[process {rank}] " if rank else ""
        print(f"{who}{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(code)

    try:
        main()
    except UserError as error:
        if isinstance(error, DiskFullError):  # HDF5 may crash while it is closed
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
        leave(f"another process has failed or was stopped ({first_line(error)}); its message gives the reason", 1)


OUT_OF_MEMORY = ("outofmemoryerror", "out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""Words of torch, CUDA and cuBLAS for a full memory, in small letters."""
LOST_PEER = (
    *("connection closed by peer", "connection reset by peer", "gloo", "nccl communicator was aborted"),
    *("distbackenderror", "watchdog caught collective operation timeout", "nccl error"),
    "remote process exited or there was a network error",
)
"""Words of processes for one that they wait for and that is gone, in small letters."""


def _less_memory() -> str:
    """What helps where memory is full, by flags that the script has."""
    flags = {"batch_size": "lower --batch_size", "tokens": "use --tokens expressed"}
    ways = [way for name, way in flags.items() if name in _flags]
    return ", or ".join(ways) or "close other programs, or split the file into parts with fewer cells"
