"""``xattn runs``: what is in outputs/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import xattn.config
from xattn import run_folder
from xattn.arguments import Parser
from xattn.errors import BadInput, ExitCode
from xattn.sweep.table import print_table, read_config


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="xattn runs", description="List runs, a table for each study.")
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[Path("outputs")], help="outputs/, a study or a run in it"
    )
    studies: dict[Path, dict[Path, None]] = {}
    for folder in parser.parse_args(argv).folders:
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        found = [config for depth in ("", "*/", "*/*/") for config in folder.glob(f"{depth}config.yaml")]
        for config in sorted(found):
            if run_folder.SUPERSEDED not in config.parts and not run_folder.is_of_hydra(config):
                studies.setdefault(config.parent.parent, {})[config.parent] = None
    for study, runs in studies.items():
        print(f"{study}: {len(runs)} run{'s' * (len(runs) > 1)}")
        readable = [config for run in runs if (config := read_config(run)) is not None]
        print_table(list(runs), xattn.config.varying_keys(readable))
    if not studies:
        print("no runs")
    return ExitCode.DONE
