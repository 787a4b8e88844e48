"""``xattn compare``: runs side by side, on the screen and in wandb's offline files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xattn.commands import compare
from xattn.config import compose, save
from xattn.errors import BadInput, ExitCode
from xattn.report.compare import comparison
from xattn.report.read import read_run

from .folders import Writer


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    writer = Writer(tmp_path / "outputs" / "study")
    return [writer.run({"backend.activation": a, "seed": 0}, x, name=a) for a, x in (("softmax", 2.0), ("none", 2.1))]


def test_what_differs_and_what_was_measured_is_set_side_by_side(runs: list[Path]) -> None:
    columns, rows = comparison([read_run(run) for run in runs])
    assert columns == ["", "softmax", "none"]
    assert rows[:4] == [
        ["backend.activation", "softmax", "none"],
        ["status", "done", "done"],
        ["val_loss", "2.0000", "2.1000"],
        ["  − the first's", "", "+0.1000"],
    ]
    assert not any("seed" in row[0] for row in rows)


def test_where_a_run_was_tracked_and_spread_is_passed_over(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "study")
    same = {"study": "a", "trainer.checkpoint_every": 5, "tracking.level": 1, "resume": "auto"}
    other = {"study": "b", "trainer.checkpoint_every": 9, "tracking.level": 2, "resume": "never"}
    found = [read_run(writer.run(keys, name=keys["study"])) for keys in (same, other)]  # type: ignore[arg-type]
    assert comparison(found)[1][0][0] == "status"


def test_it_is_printed(runs: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert compare.main([str(run) for run in runs]) == ExitCode.DONE
    assert ["val_loss", "2.0000", "2.1000"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    with pytest.raises(BadInput, match="not a run folder"):
        compare.main([str(tmp_path)])


def test_nothing_is_cut_where_it_is_piped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both scripts and people need the full key to know what a number is."""
    writer = Writer(tmp_path / "outputs" / "study")
    names = [f"a-name-of-a-run-that-is-as-long-as-those-we-make-{i}" for i in range(5)]
    key = "optimizer.a_key_that_is_long_enough_to_be_cut_off_somewhere"
    folders = [writer.run({key: i}, 2.0, name=name) for i, name in enumerate(names)]
    assert compare.main([str(folder) for folder in folders]) == ExitCode.DONE
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [names, [key, "0", "1", "2", "3", "4"]]


def test_wandb_gets_the_same_table(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (runs[0] / "config.yaml").write_text(save(compose(["tracking.wandb.mode=auto"])))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert compare.main([*(str(run) for run in runs), "--wandb"]) == ExitCode.DONE
    (file,) = runs[0].parent.glob("report/wandb/offline-run-*/files/media/table/comparison*.json")
    columns, rows = comparison([read_run(run) for run in runs])
    assert json.loads(file.read_text()) | {"columns": columns, "data": rows} == json.loads(file.read_text())
    (runs[0] / "config.yaml").write_text(save(compose(["tracking.wandb.mode=disabled"])))
    with pytest.raises(BadInput, match="disabled"):
        compare.main([str(runs[0]), "--wandb"])


def test_a_studys_whole_folder_is_compared_in_the_order_typed(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """``outputs/x/*`` also matches the report's folder and files, but a run named report is a run."""
    study = runs[0].parent
    (study / "report").mkdir()
    (study / "multirun.yaml").touch()
    typed = [str(study / name) for name in ("softmax", "report", "none", "multirun.yaml")]
    assert compare.main(typed) == ExitCode.DONE
    assert capsys.readouterr().out.split()[:2] == ["softmax", "none"]
    with pytest.raises(BadInput, match="no run found"):
        compare.main([str(study / "report")])
    runs[1].rename(study / "report2")
    (study / "report").rmdir()
    (study / "report2").rename(study / "report")
    assert compare.main(typed[:2]) == ExitCode.DONE
    assert capsys.readouterr().out.split()[:2] == ["softmax", "report"]


def test_losses_of_other_tokens_or_texts_are_not_subtracted(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "study")
    keys = [{"data.tokenizer": "bytes"}, {"data.tokenizer": "bpe"}, {"data.tokenizer": "bpe", "data.path": "b"}]
    found = [
        read_run(
            writer.run(each, 2.0 + i, name=str(i), summary={"val_bpb": 2.0 - i / 2}, provenance={"data_sha256": str(i)})
        )
        for i, each in enumerate(keys)
    ]
    rows = comparison(found)[1]
    place = next(i for i, row in enumerate(rows) if row[0] == "  − the first's")
    assert rows[place - 1][0] == "val_bpb"
    assert rows[place][1:] == ["", "−0.5000", "–"]


def test_programs_get_the_same_as_an_object(
    runs: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare.main([*map(str, runs), "--json"]) == ExitCode.DONE
    found = json.loads(capsys.readouterr().out)
    first, second = found["runs"]
    assert (found["schema_version"], found["metric"]) == (1, "val_loss")
    assert first.keys() == {"run", "status", "values", "measured", "difference"}
    assert (first["run"], first["status"], first["difference"]) == (str(runs[0]), "done", None)
    assert second["values"] == {"backend.activation": "none"}
    assert (second["measured"]["val_loss"], second["measured"]["wall_seconds"]) == (2.1, None)
    assert second["difference"] == pytest.approx(0.1)
    with pytest.raises(BadInput, match="--json: not allowed with"):
        compare.main([str(runs[0]), "--wandb", "--json"])
