"""``xattn evaluate``: the loss of a run's model on any text, at any length, and the results of its probes.

Saved results go to the run's evaluations.jsonl, and are measured once. Importing this module imports no jax.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from xattn.errors import BadInput, ExitCode, XattnError
from xattn.runs import run_folder
from xattn.runs.evaluations import Row, check, evaluate_once, in_a_line, measured, shown_value
from xattn.runs.loaded_run import load
from xattn.system import entry
from xattn.system.arguments import Parser
from xattn.system.screen import say

EPILOG = """A word with = is an override, as for train.py: data=text data.path=FILE, evaluation.sequences=all,
backend.context_length=512, 'evaluation.probes=[in_context,extrapolation]', backend.theta, backend.window,
trainer.batch_size, trainer.attention_stats_every=1 (for the attention statistics). Any other word is another run.
A new context_length changes the length of the sequences; sigmoid's n stays that of training, unless
backend.sigmoid_bias is given too (auto: the n of the new length)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate the models of runs as their own evaluations did, or under the given overrides."""
    parser = Parser(prog="xattn evaluate", description=main.__doc__, epilog=EPILOG)
    parser.add_argument("run", type=Path, help="a run's folder, or a study's, for all its runs that are done")
    parser.add_argument("words", nargs="*", metavar="RUN_OR_OVERRIDE")
    parser.add_argument(
        "--config-dir", type=Path, metavar="FOLDER", help="a folder of your own YAML files, laid out like conf/"
    )
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--save", action="store_true", help="append each new result to its run's evaluations.jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run")
    asked = parser.parse_intermixed_args(argv)
    overrides = [word for word in asked.words if "=" in word and not Path(word).is_dir()]
    folders = [asked.run, *(Path(word) for word in asked.words if word not in overrides)]
    runs = list(dict.fromkeys(run for folder in folders for run in _runs_in(folder)))

    def evaluation(run: Path) -> tuple[Row, bool]:
        if asked.save:
            return evaluate_once(run, overrides, checkpoint=asked.checkpoint, config_dir=asked.config_dir)
        if (run / run_folder.CONFIG).is_file():  # not a Llama folder; its config exists only once loaded
            check(run, overrides, asked.config_dir)
        return measured(load(run, checkpoint=asked.checkpoint), overrides, asked.config_dir), False

    if runs != [asked.run]:
        return _evaluate_all(runs, evaluation, as_json=asked.json)
    row, was_there = evaluation(asked.run)
    if was_there:
        say(f"not measured again: {run_folder.EVALUATIONS} already has it", file=sys.stderr)
    if asked.json:
        print(_json_line(asked.run, row))
    else:
        width = max(map(len, row["results"]))
        for name, value in row["results"].items():
            print(f"{name:{width}}  {shown_value(value)}")
    return ExitCode.DONE


def _runs_in(folder: Path) -> list[Path]:
    """Return the folder itself, or a study's runs that are done."""
    if (folder / run_folder.CONFIG).is_file() or not folder.is_dir():
        return [folder]
    runs = run_folder.runs_in(folder)
    if not runs:
        return [folder]
    done = [run for run in runs if run_folder.read_or_empty(run / run_folder.SUMMARY).get("status") == "done"]
    if not done:
        raise BadInput(f"{folder}: none of its {len(runs)} runs is done")
    if len(done) < len(runs):
        say(f"{folder}: {len(done)} of {len(runs)} runs are done; the others are left out", file=sys.stderr)
    return done


def _evaluate_all(runs: Sequence[Path], evaluate: Callable[[Path], tuple[Row, bool]], *, as_json: bool) -> int:
    """Print a line per run. A failure does not stop the others; return its exit code, or 1 if failures differ."""
    failures: dict[str, list[Path]] = {}
    codes: set[int] = set()
    for run in runs:
        try:
            row, was_there = evaluate(run)
        except XattnError as error:
            codes.add(error.exit_code)
            if str(error) not in failures:
                entry.tell(f"{run}: {str(error).removeprefix(f'{run.absolute()}: ')}")
            failures.setdefault(str(error), []).append(run)
            continue
        again = "  (not measured again)" if was_there else ""
        print(
            _json_line(run, row)
            if as_json
            else f"{run_folder.shown(run.absolute())}  {in_a_line(row['results'])}{again}",
            flush=True,
        )
    for first, *others in failures.values():
        if others:
            entry.tell(f"the same as {first}: {len(others)} more")
    return ExitCode(codes.pop()) if len(codes) == 1 else ExitCode.ERROR if codes else ExitCode.DONE


def _json_line(run: Path, row: Row) -> str:
    return run_folder.to_json(
        {"run": str(run.absolute()), "step": row["step"], "overrides": row["overrides"], **row["results"]}
    )
