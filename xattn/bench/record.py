"""The record of a measurement: a JSON file with its results, settings, commit, versions and machine."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xattn.runs.provenance import git_state, versions


def write_record(options: argparse.Namespace, name: str, found: Mapping[str, Any], **machine: Any) -> None:
    """Write ``<options.output>/<name>.json``: the options, commit, versions, the machine, and the results."""
    record = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "commit": dict(zip(("git_commit", "git_dirty"), git_state(), strict=True)),
        "versions": versions(),
        "machine": {"cores": os.cpu_count(), "load_average": os.getloadavg()[0], **machine},
        **found,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
