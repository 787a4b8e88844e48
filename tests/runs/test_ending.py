"""What a run prints at its end: a sample if tokens are text, and meaningful baselines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import xattn.config
from xattn.data.tokenizer import ByteTokenizer, IdTokenizer, Tokenizer
from xattn.runs import ending
from xattn.runs.job import Job
from xattn.runs.record import Run
from xattn.runs.run_folder import RunFolder


@contextlib.contextmanager
def ended(folder: Path) -> Iterator[Run]:
    """A run that is to show its result, in a folder of its own."""
    run = Run(Job(xattn.config.compose(), folder), RunFolder(folder), {}, quiet=False)
    yield run
    run.display.close()
    run.folder.release()


NOTHING: Any = None


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), IdTokenizer(64)])
def test_a_sample_is_shown_where_tokens_are_text(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three hundred numbers of a task tell nobody anything, and are not drawn either. The file has what was drawn."""
    drawn = "text\x1b[2J\x00\ufffd\n"
    monkeypatch.setattr(ending, "_sample", lambda *_: drawn)
    with ended(tmp_path) as run:
        ending.show_sample(run, tokenizer, NOTHING, NOTHING)
    out, is_text = capsys.readouterr().out, isinstance(tokenizer, ByteTokenizer)
    assert out == (
        "\na sample at temperature 0.8 (· stands for a byte or character that is not printable):\ntext·[2J··\n\n\n"
        if is_text
        else ""
    )
    assert (tmp_path / "artifacts" / "sample.txt").exists() == is_text
    assert not is_text or (tmp_path / "artifacts" / "sample.txt").read_text() == drawn


@pytest.mark.parametrize(("size", "has_gzip"), [(9_999, False), (10_000, True)])
def test_gzip_is_no_baseline_of_little_text(
    size: int, has_gzip: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = b"ab" * (size // 2) + b"c" * (size % 2)
    data: Any = SimpleNamespace(tokenizer=ByteTokenizer(), scored_bytes=lambda: scored)
    with ended(tmp_path) as run:
        ending.show_result(run, data, {"val_loss": 1.0, "val_bpb": 1.5})
    out = capsys.readouterr().out
    assert f"bits/byte on the same {size:,} bytes" in out
    assert "unigrams 1.0" in out
    assert ("gzip" in out) == has_gzip
