"""README.md and docs/findings.md report what the files in docs/findings/ contain, and these files agree."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import xattn.config
from xattn.report.claim import finding_of
from xattn.report.read import Run, flatten
from xattn.report.verdict import finding_as

ROOT = Path(__file__).parent.parent.parent
CLAIMS = sorted(
    folder.name
    for folder in (ROOT / "docs" / "findings").iterdir()
    if (ROOT / "conf" / "experiment" / f"finding_{folder.name}.yaml").is_file()
)


def test_the_pages_say_what_the_files_say() -> None:
    cog = [sys.executable, "-m", "cogapp", "-P", "-I", "docs", "--check", "README.md", "docs/findings.md"]
    done = subprocess.run(cog, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\ncog -rP -I docs README.md docs/findings.md writes them"


def test_the_text_of_the_figures_is_the_one_that_readme_names() -> None:
    """Figures from another Python are of another text, and need another sentence."""
    named = re.search(r"are of Python [\d.]+,.*sha256 ([0-9a-f]{12})\)", (ROOT / "README.md").read_text("utf-8"))
    assert named is not None
    for study in ("plain", "sigmoid", "switches"):
        with (ROOT / "docs" / "findings" / study / "results.csv").open(encoding="utf-8") as file:
            assert {row["data_sha256"][:12] for row in csv.DictReader(file)} == {named[1]}


def test_the_picture_is_of_the_verdict_beside_it() -> None:
    findings = ROOT / "docs" / "findings"
    made_of = hashlib.sha256((findings / "switches" / "verdict.json").read_bytes()).hexdigest()
    assert made_of in (findings / "switches.svg").read_text("utf-8")


@pytest.mark.parametrize("name", CLAIMS)
def test_a_verdict_follows_from_the_results_and_the_thresholds(name: str) -> None:
    """The thresholds in conf/, which git has from before the first run, still judge the rows as they did then."""
    with (ROOT / "docs" / "findings" / name / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    config = xattn.config.compose([f"experiment=finding_{name}"])
    assert config.finding is not None
    stated = dict(flatten(config.model_dump(mode="json", exclude={"finding"})))
    stated |= {"finding.claim": config.finding.claim, "finding.source": config.finding.source}
    stated["finding.contrasts"] = json.dumps([each.model_dump(mode="json") for each in config.finding.contrasts])
    found = finding_of([_run(row, stated) for row in rows])
    published = json.loads((ROOT / "docs" / "findings" / name / "verdict.json").read_text("utf-8"))["finding"]
    assert found is not None
    assert finding_as(found).model_dump(mode="json") == _close(published)


def _run(row: dict[str, str], stated: dict[str, Any]) -> Run:
    """Return a row of results.csv as a run that a claim can read. ``stated`` is what all its runs have in common."""
    values = {key: yaml.safe_load(value) if value else None for key, value in row.items()}
    config = {key: value for key, value in values.items() if "." in key or key == "seed"}
    return Run(
        folder=Path(row["run"]),
        config=stated | config,
        overrides=(),
        provenance={key: row[key] for key in ("started_at", "data_sha256")},
        summary=values,
        curves={},
        evaluations=(),
        status=row["status"],
        problems=(),
    )


def _close(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _close(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_close(each) for each in value]
    return pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
