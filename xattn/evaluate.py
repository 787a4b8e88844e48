"""``xattn evaluate``: what a run's model loses on any text, at any length, and what its probes find."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xattn import run_folder
from xattn.arguments import Parser
from xattn.errors import BadInput, ExitCode, storage_error
from xattn.loaded_run import load

EPILOG = """OVERRIDES are as train.py's: data=text data.path=FILE, evaluation.windows=all, backend.context_length=512,
'evaluation.probes=[in_context,extrapolation]', backend.theta, backend.window, trainer.batch_size.
Another context_length is another length of the windows: sigmoid's n stays that of training, unless backend.sigmoid_bias
is given too (auto: the n of the new length)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates a run's model as its own evaluations did, or as the overrides say."""
    parser = Parser(prog="xattn evaluate", description=main.__doc__, epilog=EPILOG)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDES")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--save", action="store_true", help="append the result to the run's evaluations.jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_intermixed_args(argv)
    run = load(asked.run, checkpoint=asked.checkpoint)
    results = run.evaluate(asked.overrides)
    if asked.save:
        row = {"step": run.step, "overrides": asked.overrides, "results": results}
        _append(run.path / run_folder.EVALUATIONS, row)
    if asked.json:
        print(run_folder.to_json({"run": str(run.path), "step": run.step, "overrides": asked.overrides} | results))
    else:
        width = max(map(len, results))
        for name, value in results.items():
            print(f"{name:{width}}  {'none' if value is None else f'{value:.4f}'}")
    return ExitCode.DONE


def _append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row in one write, on a line of its own even where an earlier one was cut short."""
    try:
        whole = not path.exists() or not (before := path.read_bytes()) or before.endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + run_folder.to_json(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(error, path) or BadInput(f"{path}: cannot be written: {error.strerror}") from error
