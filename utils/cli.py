"""Command lines: dataclasses become flags, and a user's mistake becomes one sentence."""

import math
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import MISSING, field, fields, make_dataclass
from pathlib import Path

from utils.errors import DiskFullError, UserError, first_line


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
    from transformers import HfArgumentParser  # here, so that Ctrl-C meanwhile ends without traceback

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
    except _out_of_memory() as error:
        leave(f"out of memory ({first_line(error)}); lower --batch_size, or use --tokens expressed", 2)
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # torch's words for a full memory of the machine
            leave(f"out of memory ({first_line(error)}); lower --batch_size, or use --tokens expressed", 2)
        if not any(words in str(error) for words in LOST_PEER):
            raise
        leave("another process has failed or was stopped; its message tells why", 1)


def _out_of_memory() -> tuple[type[BaseException], ...]:
    """What is raised when memory is full; torch's own error, where torch is loaded."""
    torch = sys.modules.get("torch")
    return (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)


LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL communicator was aborted")
"""What processes say when one they wait for is gone."""
