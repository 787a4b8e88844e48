"""``xattn runs``: what is in outputs/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xattn.config
from xattn import run_folder
from xattn.arguments import Parser
from xattn.errors import BadInput, ExitCode
from xattn.report.read import finite
from xattn.sweep.table import print_table, read_config, rows_of

_NUMBERS = ("val_loss", "val_bpb", "step", "tokens_per_second")


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="xattn runs", description="List runs, a table for each study.")
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[Path("outputs")], help="outputs/, a study or a run in it"
    )
    parser.add_argument("--json", action="store_true", help="print the tables as one object (docs/agents.md)")
    asked = parser.parse_args(argv)
    studies = _studies(asked.folders)
    if asked.json:
        found = [_as_json(study, runs) for study, runs in studies.items()]
        print(run_folder.to_json({"schema_version": 1, "studies": found}, indent=2, ascii_only=True))
        return ExitCode.DONE
    for study, runs in studies.items():
        print(f"{study}: {len(runs)} run{'s' * (len(runs) > 1)}")
        print_table(runs, _varying_keys(runs))
    if not studies:
        print("no runs")
    return ExitCode.DONE


def _studies(folders: Sequence[Path]) -> dict[Path, list[Path]]:
    """Study → its runs, of all that is in these folders."""
    studies: dict[Path, dict[Path, None]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        found = [config for depth in ("", "*/", "*/*/") for config in folder.glob(f"{depth}config.yaml")]
        for config in sorted(found):
            if run_folder.SUPERSEDED not in config.parts and not run_folder.is_of_hydra(config):
                studies.setdefault(config.parent.parent, {})[config.parent] = None
    return {study: list(runs) for study, runs in studies.items()}


def _varying_keys(runs: Sequence[Path]) -> list[str]:
    return xattn.config.varying_keys([config for run in runs if (config := read_config(run)) is not None])


def _as_json(study: Path, runs: Sequence[Path]) -> dict[str, Any]:
    """What the table shows, with whole paths and keys."""
    metric, rows = rows_of(runs, _varying_keys(runs))
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
    }
