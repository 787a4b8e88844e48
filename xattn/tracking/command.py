"""``xattn wandb RUN``: prints the commands to view a run's wandb files and to send them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from xattn.errors import BadInput, ExitCode
from xattn.runs import run_folder
from xattn.runs.run_folder import shown
from xattn.system.arguments import Parser
from xattn.system.screen import say


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="xattn wandb", description="Print the commands that show a run's wandb files and send them.")
    parser.add_argument("run", type=Path, help="a run's folder")
    run = parser.parse_args(argv).run
    if not (run / run_folder.CONFIG).is_file():
        raise BadInput(f"{run}: not a run folder: it has no {run_folder.CONFIG}")
    folder = (run / "wandb").absolute()
    again = shlex.join(["xattn", "sync", shown(run.absolute())])
    offline = sorted(path for path in folder.glob("offline-run-*") if path.is_dir())
    online = [path for path in folder.glob("run-*") if path.is_dir()]
    if not offline and not online:
        say(f"wandb has no files of this run; make them from {run_folder.METRICS} with", again)
        return ExitCode.DONE
    say("look at it here:", shlex.join(["wandb", "leet", shown(folder / "latest-run")]))
    for path in offline:
        say("send it to wandb's server:", shlex.join(["wandb", "sync", shown(path)]))
    say(f"if wandb lacks rows, send it again from {run_folder.METRICS}:", again)
    return ExitCode.DONE
