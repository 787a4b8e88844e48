"""``xattn resume STUDY``: run the command that started an interrupted sweep."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from xattn.errors import BadInput, ExitCode
from xattn.runs import run_folder
from xattn.sweep import planned
from xattn.system import screen
from xattn.system.arguments import Parser


def main(argv: Sequence[str]) -> int:
    """Replace this process by the sweep, which gives the exit code. If nothing is missing, print that instead."""
    parser = Parser(
        prog="xattn resume",
        description="Continue an interrupted sweep: repeat the command that started it, in the folder where it was "
        "typed. `xattn runs` shows what is missing.",
    )
    parser.add_argument("study", type=Path, help="outputs/<study>")
    study = parser.parse_args(argv).study
    _check(study)
    left = planned.unfinished(study)
    if not left:
        screen.say(f"{study}: all planned runs are done")
        return ExitCode.DONE
    sweep = left[0]
    program = planned.program_of(sweep)
    if program is not None and not program.is_file():
        raise BadInput(
            f"{program}: no such file, but it started this sweep; to continue, give its new path in `{sweep.typed}`, "
            f"in {sweep.cwd}"
        )
    if not sweep.cwd.is_dir():
        raise BadInput(f"{sweep.cwd}: no such folder; this sweep was started there")
    if len(left) > 1:
        screen.say(f"{len(left)} sweeps are incomplete; this continues the first; repeat the command for the next")
    screen.say(f"{study}: {sweep.says}; continuing with", sweep.typed)
    sys.stdout.flush()
    os.chdir(sweep.cwd)
    return os.execv(sys.executable, [sys.executable, *sweep.command[1:]])


def _check(study: Path) -> None:
    if not study.is_dir():
        raise BadInput(f"{study}: no such folder")
    if (study / run_folder.CONFIG).is_file():
        command = (run_folder.read_provenance(study) or {}).get("command", "its own command")
        raise BadInput(f"{study}: is a run, but this command continues a study; continue the run with\n`{command}`")
    if not planned.sweeps_of(study):
        raise BadInput(
            f"{study}: holds no plan of a sweep; repeat the command that started it, which is "
            f"`command` in a run's {run_folder.PROVENANCE}"
        )
