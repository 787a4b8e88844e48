"""Reads a study's run folders. Missing, partial and foreign files are reported and never raise an error."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from xattn import keys
from xattn.errors import BadInput
from xattn.keys import up_to_date
from xattn.runs import run_folder

REPORT = run_folder.REPORT
# How a row's attention statistics are reduced over layers and heads.
ATTENTION_CURVES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "attention/max_logit": max,
    "attention/entropy": fmean,
    "attention/output_norm": fmean,
}
CURVES = ("step", "train_loss", "val_loss", "val_bpb", "grad_norm", "tokens_per_second", *ATTENTION_CURVES)
# Other programs may have written into a run folder; their values are used only if they have these types.
_KINDS: Mapping[str, tuple[type, ...]] = {
    "status": (str,),
    "step": (int, type(None)),
    "implementation": (str, dict, type(None)),
    "versions": (dict,),
    "registered": (dict,),
    "command": (str,),
    "git_commit": (str, type(None)),
    "git_dirty": (bool, type(None)),
    "data_sha256": (str, type(None)),
    "corpus": (dict,),
    "source_sha256": (str, type(None)),
    "device_kind": (str, type(None)),
    "device_count": (int, type(None)),
    "packed_with": (int, type(None)),
    "host": (str, type(None)),
    "started_at": (str,),
}
YAML_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder as it was found."""

    folder: Path
    config: Values
    """dotted key → value"""
    overrides: tuple[str, ...]
    provenance: Values
    summary: Values
    curves: Mapping[str, np.ndarray]
    """an array for each of :data:`CURVES`, one element per row of metrics.jsonl; NaN if the row lacks the number"""
    evaluations: tuple[Values, ...]
    status: str
    """the summary's; ``killed`` if it says running but no process holds the folder; ``not begun`` without one"""
    problems: tuple[str, ...]
    """what could not be read"""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def program(self) -> str:
        """Return what started it: ``xattn train``, ``python train.py``, or a script with its own registrations."""
        own = self.provenance.get("registered") or {}
        words = self.provenance.get("command", "").split()
        if words[:2] == ["xattn", "train"]:
            return "xattn train"
        file = next((word for word in words if Path(word).name in own), next(iter(own), "train.py"))
        return shlex.join(["python", file])

    @property
    def command(self) -> str:
        """Return the command that was typed for this run, quoted for a shell."""
        return f"{self.program} {shlex.join(self.overrides)}".strip()

    @property
    def tokens_per_step(self) -> int | None:
        batch, length = self.config.get("trainer.batch_size"), self.config.get("backend.context_length")
        return batch * length if isinstance(batch, int) and isinstance(length, int) else None

    @property
    def tokens_seen(self) -> int | None:
        """Return the tokens of the whole run, according to its config."""
        steps, each = self.config.get("trainer.steps"), self.tokens_per_step
        return steps * each if isinstance(steps, int) and each is not None else None

    def number(self, key: str) -> float | None:
        """Return a finite number from the summary, or None."""
        return finite(self.summary.get(key))

    def result(self, metric: str) -> float | None:
        """Return the metric at the end of a finished run; None for every other run."""
        return self.number(metric) if self.status == "done" else None


@dataclass(frozen=True)
class Study:
    """The runs below one folder, sorted by name, and the names of its folders that are not runs."""

    folder: Path
    runs: tuple[Run, ...]
    foreign: tuple[str, ...] = field(default=())


def read_study(folder: Path) -> Study:
    """Read ``outputs/<study>``. Hidden folders (``.superseded``) and the report's own folder are skipped.

    Raises :class:`BadInput` if there is no such folder or it contains no run.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    runs, foreign = [], []
    for path in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        if path.name.startswith("."):
            continue
        if (path / run_folder.CONFIG).is_file():
            runs.append(read_run(path))
        elif path.name != REPORT:
            foreign.append(path.name)
    if not runs:
        raise BadInput(f"{folder}: no run in it; a run is a folder with a {run_folder.CONFIG}")
    return Study(folder, tuple(runs), tuple(foreign))


def read_run(folder: Path) -> Run:
    """Read one run folder. Raises :class:`BadInput` if it has no config.yaml."""
    if not (folder / run_folder.CONFIG).is_file():
        raise BadInput(f"{folder}: not a run folder: it has no {run_folder.CONFIG}")
    problems: list[str] = []
    config = read_config(folder, problems)
    overrides = _read_yaml(folder / run_folder.OVERRIDES, list, problems)
    summary = _read_json(folder / run_folder.SUMMARY, problems)
    provenance = _read_json(folder / run_folder.PROVENANCE, problems)
    status = str(summary.get("status", "not begun"))
    if status in ("done", "diverged"):
        names = (run_folder.OVERRIDES, run_folder.PROVENANCE, run_folder.METRICS)
        problems += [f"{name} is missing" for name in names if not (folder / name).exists()]
    if status == "running" and not run_folder.is_held(folder):
        status = "killed"
    return Run(
        folder=folder,
        config=config,
        overrides=tuple(str(override) for override in overrides),
        provenance=provenance,
        summary=summary,
        curves=_curves(folder, problems),
        evaluations=tuple(_rows(folder / run_folder.EVALUATIONS, problems)),
        status=status,
        problems=tuple(problems),
    )


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Return each leaf by its dotted key. A list is one leaf, as JSON, so that all values can be compared."""
    return {key: _leaf(value) for key, value in keys.flatten(tree) if key}


def _leaf(value: Any) -> Any:
    """Return a value that equals itself and can be a dictionary key: NaN and YAML dates become text."""
    if isinstance(value, list | dict):
        try:
            return json.dumps(value, default=str)
        except (ValueError, TypeError, RecursionError):  # YAML can contain cycles, and keys of any type
            return str(value)
    plain = value is None or isinstance(value, str | bool) or finite(value) is not None
    return value if plain else str(value)


def finite(value: Any) -> float | None:
    """Return the value if it is a number that a float can hold and not a bool; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def read_config(folder: Path, problems: list[str]) -> dict[str, Any]:
    """Return the dotted keys of a run's config.yaml with their values; empty if it is missing or unreadable.

    problems: takes what could not be read.
    """
    config = _read_yaml(folder / run_folder.CONFIG, dict, problems)
    try:
        config = up_to_date(config) if config else config
    except BadInput as error:
        problems.append(f"{run_folder.CONFIG}: {error}")
    try:
        return flatten(config)
    except RecursionError:  # YAML can contain cycles
        problems.append(f"{run_folder.CONFIG} is not readable")
        return {}


def _parsed(path: Path, parse: Callable[[str], Any], kind: type, problems: list[str]) -> Any:
    """Return the file's content; empty if it is missing or, with a noted problem, if it cannot be read."""
    try:
        text = path.read_text("utf-8")
        loaded = parse(text) if text else kind()
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # ValueError: no UTF-8, no JSON, an invalid date
        loaded = None
    if not isinstance(loaded, kind):
        problems.append(f"{path.name} is not readable")
        return kind()
    return loaded


def _read_yaml(path: Path, kind: type, problems: list[str]) -> Any:
    return _parsed(path, lambda text: yaml.load(text, YAML_LOADER), kind, problems)


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    loaded = _parsed(path, json.loads, dict, problems)
    odd = [key for key, kinds in _KINDS.items() if key in loaded and not isinstance(loaded[key], kinds)]
    problems += [f"{path.name}: {key} is ignored, since it is a {type(loaded[key]).__name__}" for key in odd]
    return {key: value for key, value in loaded.items() if key not in odd}


def _rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file. An unterminated last line is still being written and is left out."""
    try:
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]  # one bad byte spoils one line
    except FileNotFoundError:
        return []
    except OSError:
        problems.append(f"{path.name} is not readable")
        return []
    try:
        rows = json.loads(f"[{','.join(lines)}]")  # a single call is twice as fast as one per line
    except (ValueError, RecursionError):
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
        damaged = len(lines) - len(rows)
        problems.append(f"{path.name} has {damaged} {'line that is' if damaged == 1 else 'lines that are'} not JSON")
    return [row for row in rows if isinstance(row, dict)]


def read_metrics(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl in the order of their steps; the last row of a step counts.

    problems: takes what could not be read.
    """
    rows = _rows(folder / run_folder.METRICS, problems)
    found = {row["step"]: row for row in rows if finite(row.get("step")) is not None}
    return [found[step] for step in sorted(found)]


def _curves(folder: Path, problems: list[str]) -> dict[str, np.ndarray]:
    rows = [_with_attention(row) for row in read_metrics(folder, problems)]
    columns: dict[str, np.ndarray] = {}
    for key in CURVES:
        values = [row.get(key) for row in rows]
        if not set(map(type, values)) <= {float, type(None)}:
            values = [finite(value) for value in values]
        columns[key] = np.array(values, dtype=float)  # None becomes NaN
    return columns


def _with_attention(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with :data:`ATTENTION_CURVES` derived from its ``attention/<layer>/<head>/<statistic>``."""
    if "attention/0/0/entropy" not in row:
        return row
    of_heads = [key for key in row if key.startswith("attention/")]
    for name, over in ATTENTION_CURVES.items():
        ending = name[len("attention") :]
        values = [value for key in of_heads if key.endswith(ending) and (value := finite(row[key])) is not None]
        if values:
            row[name] = over(values)
    return row
