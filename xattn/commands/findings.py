"""``xattn findings``: the claims stated by the studies in outputs/, and their outcomes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from xattn.errors import BadInput, ExitCode
from xattn.report.claim import Finding, finding_of
from xattn.report.read import read_study
from xattn.report.verdict import finding_as
from xattn.runs import run_folder
from xattn.system.arguments import Parser
from xattn.tracking.display import Screen


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="xattn findings", description="List the claims that studies state, and their verdicts.")
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[Path("outputs")], help="outputs/, or folders of studies"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON (docs/agents.md)")
    asked = parser.parse_args(argv)
    found = list(_findings(asked.folders))
    if asked.json:
        listed = [{"study": str(study), "finding": finding_as(finding).model_dump()} for study, finding in found]
        print(run_folder.to_json({"schema_version": 1, "findings": listed}, indent=2, ascii_only=True))
        return ExitCode.DONE
    if not found:
        print("no study here states a claim")
        return ExitCode.DONE
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("study", "verdict", "claim", "contrast", "mean [interval]"):
        table.add_column(column, overflow="fold")
    for study, finding in found:
        first = [study.name, finding.says, finding.stated.claim]
        for contrast in finding.contrasts:
            table.add_row(*first, contrast.contrast.name, contrast.words)
            first = ["", "", ""]
    Screen().print_table(table, folds=True)
    return ExitCode.DONE


def _findings(folders: Sequence[Path]) -> Iterator[tuple[Path, Finding]]:
    """Yield the studies that state a claim, sorted by name."""
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        runs = {config.parent for depth in ("*/", "*/*/") for config in folder.glob(f"{depth}config.yaml")}
        studies = {run.parent for run in runs if not run.name.startswith(".")}
        for study in sorted(study for study in studies if run_folder.SUPERSEDED not in study.parts):
            if (finding := finding_of(read_study(study).runs)) is not None:
                yield study, finding
