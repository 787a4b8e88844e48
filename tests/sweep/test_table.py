"""``xattn runs --json``: the content of the tables, for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xattn.errors import ExitCode
from xattn.sweep import runs


def test_programs_get_every_row_of_the_table(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diverged = sorted(outputs.iterdir())[0] / "summary.json"
    diverged.write_text(json.dumps(json.loads(diverged.read_text()) | {"val_loss": float("nan"), "step": "no number"}))
    assert runs.main([]) == ExitCode.DONE
    printed = capsys.readouterr().out
    assert runs.main(["--json"]) == ExitCode.DONE
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    (study,) = found["studies"]
    assert (found["schema_version"], study["study"], study["metric"]) == (1, "outputs/golden", "val_loss")
    rows = study["runs"]
    assert [Path(row["run"]).name for row in rows] == [line.split()[-1] for line in printed.splitlines()[2:]]
    keys = {"run", "status", "values", "val_loss", "val_bpb", "step", "tokens_per_second"}
    assert all(row.keys() == keys and row["values"].keys() == rows[0]["values"].keys() for row in rows)
    assert (rows[-1]["run"], rows[-1]["val_loss"], rows[-1]["step"]) == (
        str(diverged.parent.relative_to(outputs.parents[1])),
        None,
        None,
    )


def test_where_there_is_no_run_the_object_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main([str(tmp_path), "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out) == {"schema_version": 1, "studies": []}
