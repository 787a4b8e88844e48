"""``xattn runs``: list the runs and sweeps in outputs/."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xattn.config
from xattn.config import Config
from xattn.errors import BadInput, ExitCode
from xattn.report.read import finite
from xattn.runs import run_folder
from xattn.sweep import planned
from xattn.sweep.labels import varying_keys
from xattn.sweep.table import print_table, read_config, rows_of
from xattn.system.arguments import Parser
from xattn.system.screen import counted, say

_NUMBERS = ("val_loss", "val_bpb", "step", "tokens_per_second")


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="xattn runs", description="List runs in one table per study, and sweeps with missing runs.")
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("outputs")], help="outputs/, a study or a run")
    parser.add_argument("--json", action="store_true", help="print the tables as JSON (docs/agents.md)")
    asked = parser.parse_args(argv)
    studies, swept = _studies(asked.folders), _swept(asked.folders)
    if asked.json:
        found = [_as_json(study, runs, study in swept) for study, runs in studies.items()]
        print(run_folder.to_json({"schema_version": 1, "studies": found}, indent=2, ascii_only=True))
        return ExitCode.DONE
    for study in dict.fromkeys([*studies, *swept]):
        runs = studies.get(study, [])
        say(f"{study}: {counted(len(runs), 'run')}")
        if runs:
            print_table(runs, varying_keys(_configs(runs)))
        if study in swept and (left := planned.unfinished(study)):
            _tell(study, left)
    if not studies:
        print("no runs")
    return ExitCode.DONE


def _tell(study: Path, left: Sequence[planned.Sweep]) -> None:
    """Print what is missing of each sweep and how to continue it. A running sweep continues by itself."""
    for sweep in left:
        if sweep.is_running:
            say(f"{sweep.says}; to share the work from a second terminal:", sweep.typed)
        else:
            say(f"{sweep.says}; continue with", sweep.typed)
    say("or with", shlex.join(["xattn", "resume", str(study)]))


def _studies(folders: Sequence[Path]) -> dict[Path, list[Path]]:
    """Return the runs of each study in these folders."""
    studies: dict[Path, dict[Path, None]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        found = [config for depth in ("", "*/", "*/*/") for config in folder.glob(f"{depth}config.yaml")]
        for config in sorted(found):
            if run_folder.SUPERSEDED not in config.parts and not run_folder.is_of_hydra(config):
                studies.setdefault(config.parent.parent, {})[config.parent] = None
    return {study: list(runs) for study, runs in studies.items()}


def _swept(folders: Sequence[Path]) -> list[Path]:
    """Return the studies, among these folders or directly in them, in which a sweep was started."""
    return [
        study
        for folder in folders
        for study in (folder, *sorted(path for path in folder.iterdir() if path.is_dir()))
        if planned.sweeps_of(study)
    ]


def _configs(runs: Sequence[Path]) -> list[Config]:
    return [config for run in runs if (config := read_config(run)) is not None]


def _as_json(study: Path, runs: Sequence[Path], is_swept: bool) -> dict[str, Any]:
    """Return what the table shows, with full paths and keys."""
    metric, rows = rows_of(runs, xattn.config.varying_keys(_configs(runs)))
    sweeps = planned.sweeps_of(study) if is_swept else []
    return {
        "study": str(study),
        "metric": metric,
        "runs": [
            {
                "run": str(row.run),
                "status": row.status,
                "values": row.values,
                **{name: finite(row.summary.get(name)) for name in _NUMBERS},
            }
            for row in rows
        ],
        "sweeps": [
            {"command": sweep.typed, "planned": sweep.planned, "done": sweep.done, "complete": sweep.is_complete}
            for sweep in sweeps
        ],
    }
