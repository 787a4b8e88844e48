"""``xattn evaluate``: what a run's model loses on any text, at any length, and what its probes find.

What is kept of it stands in the run's evaluations.jsonl, and is measured once. Importing this module imports no jax.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

import xattn.config
from xattn import entry, run_folder
from xattn.arguments import Parser
from xattn.errors import BadInput, ExitCode, IntegrityError, XattnError, storage_error
from xattn.loaded_run import MAY_DIFFER, LoadedRun, load, read
from xattn.screen import say

EPILOG = """A word with = is an override as train.py takes it: data=text data.path=FILE, evaluation.windows=all,
backend.context_length=512, 'evaluation.probes=[in_context,extrapolation]', backend.theta, backend.window,
trainer.batch_size, trainer.attention_stats_every=1 (for the attention statistics). Any other word is one more run.
Another context_length is another length of the windows: sigmoid's n stays that of training, unless backend.sigmoid_bias
is given too (auto: the n of the new length)."""

Row = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates runs' models as their own evaluations did, or as the overrides say."""
    parser = Parser(prog="xattn evaluate", description=main.__doc__, epilog=EPILOG)
    parser.add_argument("run", type=Path, help="a run's folder, or a study's for all its runs that are done")
    parser.add_argument("words", nargs="*", metavar="RUN_OR_OVERRIDE")
    parser.add_argument("--config-dir", type=Path, metavar="FOLDER", help="with YAML files of your own, as conf/ is")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument(
        "--save", action="store_true", help="append each result to its run's evaluations.jsonl, unless it is there"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a run")
    asked = parser.parse_intermixed_args(argv)
    overrides = [word for word in asked.words if "=" in word and not Path(word).is_dir()]
    folders = [asked.run, *(Path(word) for word in asked.words if word not in overrides)]
    runs = list(dict.fromkeys(run for folder in folders for run in _runs_in(folder)))
    evaluation = partial(
        _evaluate, overrides=overrides, checkpoint=asked.checkpoint, save=asked.save, config_dir=asked.config_dir
    )
    if runs != [asked.run]:
        return _evaluate_all(runs, evaluation, as_json=asked.json)
    row, was_there = evaluation(asked.run)
    if was_there:
        say(f"not measured again: its {run_folder.EVALUATIONS} has it", file=sys.stderr)
    if asked.json:
        print(_json_line(asked.run, row))
    else:
        width = max(map(len, row["results"]))
        for name, value in row["results"].items():
            print(f"{name:{width}}  {_shown(value)}")
    return ExitCode.DONE


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself; for a study's folder, those of its runs that are done."""
    if (folder / run_folder.CONFIG).is_file() or not folder.is_dir():
        return [folder]
    runs = sorted(path.parent for path in folder.glob(f"*/{run_folder.CONFIG}") if not path.parent.name.startswith("."))
    if not runs:
        return [folder]
    done = [run for run in runs if _status(run) == "done"]
    if not done:
        raise BadInput(f"{folder}: none of its {len(runs)} runs is done")
    if len(done) < len(runs):
        say(f"{folder}: {len(done)} of {len(runs)} runs are done; the others are left out", file=sys.stderr)
    return done


def _status(run: Path) -> Any:
    try:
        return (run_folder.read_summary(run) or {}).get("status")
    except BadInput:
        return None


def _evaluate_all(runs: Sequence[Path], evaluate: Callable[[Path], tuple[Row, bool]], *, as_json: bool) -> int:
    """Prints a line a run. Those that fail stop no other; the exit code is theirs, or 1 where they differ."""
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
            entry.tell(f"as {first}: {len(others)} more")
    return ExitCode(codes.pop()) if len(codes) == 1 else ExitCode.ERROR if codes else ExitCode.DONE


def _evaluate(
    run: Path, *, overrides: Sequence[str], checkpoint: Literal["last", "best"], save: bool, config_dir: Path | None
) -> tuple[Row, bool]:
    if save:
        return evaluate_once(run, overrides, checkpoint=checkpoint, config_dir=config_dir)
    if (run / run_folder.CONFIG).is_file():  # no Llama folder, whose config is made as it is loaded
        _check(run, overrides, config_dir)
    opened = load(run, checkpoint=checkpoint)
    return _measured(opened, overrides, config_dir), False


def _measured(opened: LoadedRun, overrides: Sequence[str], config_dir: Path | None) -> Row:
    results = opened.evaluate(overrides, config_dir=config_dir)
    return {"step": opened.step, "overrides": list(overrides), "results": results}


def _check(run: Path, overrides: Sequence[str], config_dir: Path | None) -> dict[str, Any]:
    """The run's summary. Raises :class:`BadInput` for overrides that do not fit it, before anything is loaded."""
    config, summary = read(run.absolute())
    xattn.config.amend(config, overrides, may_differ=MAY_DIFFER, config_dir=config_dir)
    return summary


def evaluate_once(
    run: Path,
    overrides: Sequence[str],
    *,
    checkpoint: Literal["last", "best"] = "last",
    step: int | None = None,
    config_dir: Path | None = None,
) -> tuple[Row, bool]:
    """The row of evaluations.jsonl for these overrides, measured and appended if it is not there; whether it was.

    Processes that ask for the same take turns, and the first measures. On data that the overrides name, which may have
    changed since, it is measured each time, and appended where it differs.

    step: of the parameters; None takes those of the checkpoint. config_dir: as of :meth:`LoadedRun.evaluate`.

    Raises :class:`IntegrityError` where no checkpoint of that step is whole, and what :func:`xattn.load` and
    :meth:`LoadedRun.evaluate` raise.
    """
    run = run.absolute()
    summary = _check(run, overrides, config_dir)
    known = summary.get("step") if checkpoint == "last" and summary.get("status") == "done" else None
    may_change = any(override.lstrip("+~").startswith("data") for override in overrides)
    with _held(run / run_folder.EVALUATIONS) as file:
        rows = _rows(file)
        there = None if may_change else equal_row(rows, known, overrides)
        if there is not None:
            return there, True
        opened = load(run, checkpoint=checkpoint)
        if step not in (None, opened.step):
            raise IntegrityError(f"{run}: has no whole checkpoint of step {step}")
        there = None if may_change else equal_row(rows, opened.step, overrides)
        if there is not None:
            return there, True
        row = _measured(opened, overrides, config_dir)
        if row not in rows:
            _append(file, row)
        return row, False


def stored_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of the run's evaluations.jsonl; lines that are cut short or no JSON objects are passed over."""
    try:
        with (run / run_folder.EVALUATIONS).open(encoding="utf-8", errors="replace") as file:
            return _rows(file)
    except FileNotFoundError:
        return []


def equal_row(rows: Sequence[dict[str, Any]], step: int | None, overrides: Sequence[str]) -> dict[str, Any] | None:
    """The last row of that step and these overrides, in whichever order they stand."""
    wanted = _by_key(overrides)
    for row in reversed(rows):
        typed = row.get("overrides")
        if row.get("step") == step and isinstance(typed, list) and _by_key(typed) == wanted:
            return row if isinstance(row.get("results"), dict) else None
    return None


def in_a_line(results: Mapping[str, float | None]) -> str:
    """Names and values; of the attention statistics, a few for each head, only how many there are."""
    told = [f"{name} {_shown(value)}" for name, value in results.items() if not name.startswith("attention/")]
    statistics = len(results) - len(told)
    return "  ".join([*told, *([f"and {statistics} statistics of attention/…"] if statistics else [])])


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _json_line(run: Path, row: Row) -> str:
    return run_folder.to_json(
        {"run": str(run.absolute()), "step": row["step"], "overrides": row["overrides"], **row["results"]}
    )


def _by_key(overrides: Sequence[Any]) -> dict[str, str]:
    return dict(str(override).partition("=")[::2] for override in overrides)


def _rows(file: TextIO) -> list[dict[str, Any]]:
    file.seek(0)
    rows = []
    for line in file:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


@contextlib.contextmanager
def _held(path: Path) -> Iterator[TextIO]:
    """The file, open to read and append, while no other process has it so. It is removed if nothing is in it then."""
    with _opened(path) as file:
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


def _opened(path: Path) -> TextIO:
    try:
        while True:
            file = path.open("a+", encoding="utf-8", errors="replace")
            run_folder.flock(file.fileno(), fcntl.LOCK_EX, path)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()  # another process removed it between the open and the lock
    except OSError as error:
        raise storage_error(error, path) or BadInput(f"{path}: cannot be written: {error.strerror}") from error


def _append(file: TextIO, row: Row) -> None:
    """Adds a row in one write, on a line of its own even where an earlier one was cut short."""
    try:
        file.seek(0)
        text = file.read()
        file.write(("" if not text or text.endswith("\n") else "\n") + run_folder.to_json(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(error, Path(file.name)) or BadInput(
            f"{file.name}: cannot be written: {error.strerror}"
        ) from error
