"""metrics.jsonl: each step once, also across crashes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from xattn.tracking.tracker import MetricsFile, brief, read_rows, sync_rows


def read(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_row_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, after=0)
    rows = [{"step": 1, "train_loss": 5.25}, {"step": 2, "train_loss": math.nan, "val_loss": math.inf}]
    for row in rows:
        metrics.log(row)
        assert read(path)[-1]["step"] == row["step"]
    metrics.close()
    assert read(path) == [{"step": 1, "train_loss": 5.25}, {"step": 2, "train_loss": None, "val_loss": None}]
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize(("after", "kept"), [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])])
@pytest.mark.parametrize("torn", ["", '{"step": 4', '{"step": 4, "a": "', '{"step": 4}'])
def test_rows_beyond_the_step_that_a_run_goes_on_from_are_dropped(
    after: int, kept: list[int], torn: str, tmp_path: Path
) -> None:
    """And so is a last line that was cut short, even where it looks whole."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)) + torn)
    metrics = MetricsFile(path, after=after)
    metrics.log({"step": after + 1})
    metrics.close()
    assert [row["step"] for row in read(path)] == [*kept, after + 1]


def test_rewinding_drops_rows_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, after=0)
    for step in (1, 2, 3):
        metrics.log({"step": step, "try": 1})
    metrics.rewind(1)
    metrics.log({"step": 2, "try": 2})
    metrics.close()
    assert read(path) == [{"step": 1, "try": 1}, {"step": 2, "try": 2}]


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 50,
        b"",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b'{"step": 2, "train_lo',
        b'{"step": 2, "train_lo{"step": 2}',
        b'{"step": "2"}',
        b'{"step": 2.0}',
        b'{"step": true}',
        b'{"step": null}',
        b'{"step": -2}',
        b'{"train_loss": 2.0}',
        b'{"step": 2, "train_loss": "2.0"}',
        b'{"step": 2, "train_loss": [2.0]}',
        b"[2]",
        b"2",
        b"null",
        b"[" * 100_000,
        b'{"step": ' + b"2" * 5000 + b"}",
    ],
)
def test_a_line_that_is_no_row_is_damage_and_hides_no_other(line: bytes, tmp_path: Path) -> None:
    """Also while it stands at the end, or alone."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    rows = read_rows(path)
    assert list(rows.lines) == [1, 3]
    assert rows.damaged == (2,)
    path.write_bytes(line + b"\n")
    assert read_rows(path).damaged == (1,)
    path.write_bytes(line)
    assert not read_rows(path).damaged  # it is being written


def test_of_rows_of_one_step_the_last_counts_and_order_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written = '{"step": 3}\n{"step": 1, "try": 1}\n{"step": 2}\n{"step": 1, "try": 2}\n'
    path.write_text(written)
    said: list[str] = []
    MetricsFile(path, after=2, say=said.append).close()
    assert read(path) == [{"step": 1, "try": 2}, {"step": 2}]
    (line,) = said
    (kept,) = tmp_path.glob("metrics.jsonl.damaged-*")
    assert kept.read_text() == written
    assert kept.name in line
    assert "lines: 2;" in line


def test_a_whole_file_is_kept_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "train')
    said: list[str] = []
    MetricsFile(path, after=2, say=said.append).close()
    assert [row["step"] for row in read(path)] == [1, 2]
    assert not said
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_file_and_an_empty_file_have_no_rows(tmp_path: Path) -> None:
    assert not read_rows(tmp_path / "metrics.jsonl").lines
    (tmp_path / "metrics.jsonl").touch()
    assert not read_rows(tmp_path / "metrics.jsonl").lines


def test_rows_are_on_the_disk_when_they_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's content and its name: a file that was just made is lost with its folder's entry."""
    synced: list[Path] = []
    monkeypatch.setattr("xattn.tracking.tracker.fsync", synced.append)
    sync_rows(tmp_path / "metrics.jsonl")
    assert synced == [tmp_path / "metrics.jsonl", tmp_path]


@pytest.mark.parametrize(
    ("numbers", "text"), [([2], "2"), (range(1, 7), "1, 2, 3, 4, 5, 6"), (range(9), "0, 1, 2, 3, 4 and 4 more")]
)
def test_many_numbers_are_told_in_brief(numbers: list[int], text: str) -> None:
    assert brief(numbers) == text
