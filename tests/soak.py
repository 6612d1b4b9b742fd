"""The long form of the promises in docs/reliability.md: kills by the hundred, broken files by the ten thousand.

    python -m tests.soak --kills 20 --files 10000          (make soak; half an hour on two cores)

Kills every training script at random moments, or asks it to stop as schedulers do, by one process and by two, resumes
it each time, and compares the end with an uninterrupted run, bit by bit. Then reads broken files. Prints a line for
each, writes soak.json, and exits with 1 if a promise was broken.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests import helpers
from tests.builders import make_runs, make_simulation
from tests.fuzz import fuzz
from tests.processes import finish
from tests.train.kills import assert_same_run, kill_and_resume, stop_and_resume, training_scripts
from utils.cli import flag, parse_flags, run_script
from utils.files.write import write_whole


@dataclass
class Flags:
    kills: int = flag("kills, and requests to stop, per training script and number of processes", 20)
    files: int = flag("broken files to read", 10_000)
    seed: int = flag("of the kills' moments, and number of the first file", 0)
    out_path: str = flag("file to write the figures to", "soak.json")


def main() -> None:
    (flags,) = parse_flags(__doc__, Flags)
    torch.set_num_threads(1)
    start, found = time.monotonic(), {"kills": {}, "stops": {}, "files": flags.files}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_whole(make_simulation().mdata, folder / "cells.h5mu")
        helpers.run("preprocess", data_path=folder / "cells.h5mu", out_path=folder / "ready.h5mu", val_fraction=0.2)
        runs = make_runs(folder / "ready.h5mu", folder / "runs")
        for script, settings in training_scripts(folder / "ready.h5mu", runs).items():
            for size in (1, 2):
                for how, end in (("kills", kill_and_resume), ("stops", stop_and_resume)):
                    hits = interrupt(
                        end, script, settings | {"epochs": 40}, size, flags, folder / f"{script}{size}{how}"
                    )
                    found[how][f"{script}, {size} process(es)"] = hits
                    print(f"{script}, {size} process(es): {hits} {how}, same end", flush=True)
        (folder / "fuzz").mkdir()
        found["findings"] = fuzz(folder / "fuzz", runs["celltype_atac"], flags.seed, flags.files)
    found["minutes"] = round((time.monotonic() - start) / 60, 1)
    Path(flags.out_path).write_text(json.dumps(found, indent=1))
    print(f"{flags.files:,} broken files: {len(found['findings'])} findings; {found['minutes']} minutes in all")
    for number, words in found["findings"].items():
        print(f"  file {number}: {words}")
    sys.exit(1 if found["findings"] else 0)


def interrupt(end: Callable, script: str, settings: dict, size: int, flags: Flags, folder: Path) -> int:
    """End a run early `flags.kills` times, in as many runs as it takes; compare each with an uninterrupted one."""
    hits, round_ = 0, 0
    (folder / "whole").mkdir(parents=True)
    finish(script, settings | {"ckpt_dir": folder / "whole"}, size, folder / "output.txt")
    while hits < flags.kills:
        place = folder / f"killed{round_}"
        place.mkdir()
        hits += end(script, settings | {"ckpt_dir": place}, size, flags.kills - hits, flags.seed + round_)
        assert_same_run(place / "run", folder / "whole" / "run")
        round_ += 1
    return hits


if __name__ == "__main__":
    run_script(main)
