"""Data and configuration that cannot be used, through the command line: 2, five lines at most, and nothing left."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from .harness import TINY, Training, runs, summary, the_run, train

pytestmark = pytest.mark.faults


def assert_refused(training: Training, cwd: Path, *named: str) -> None:
    assert training.wait() == 2, training.out + training.err
    assert "Traceback" not in training.out + training.err
    assert 1 <= len(training.err.splitlines()) <= 5
    for name in named:
        assert name in training.err
    assert runs(cwd) == []


# 16 tokens and their successors in each split: with a tenth held out 170 bytes are just enough.
TEXT = "".join(f"{i} and {i + 1}\n" for i in range(40)).encode()

BAD_DATA: dict[str, Callable[[Path], None]] = {
    "empty": lambda file: file.write_bytes(b"") and None,
    "one byte": lambda file: file.write_bytes(b"a") and None,
    "too short by one token": lambda file: file.write_bytes(TEXT[:169]) and None,
    "half a gzip": lambda file: file.with_suffix(".gz").write_bytes(gzip.compress(TEXT)[:99]) and None,
    "not a gzip": lambda file: file.with_suffix(".gz").write_bytes(TEXT) and None,
    "an empty folder": Path.mkdir,
    "missing": lambda file: None,
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_data_that_cannot_be_used_are_two_at_a_first_start(kind: str, cwd: Path) -> None:
    BAD_DATA[kind](cwd / "text")
    name = "text.gz" if "gzip" in kind else "text"
    assert_refused(train(*TINY, "data=text", f"data.path={name}", cwd=cwd), cwd, "data.path", name)


def test_a_glob_without_a_match_is_two(cwd: Path) -> None:
    assert_refused(train(*TINY, "data=text", "data.path=nothing-*.txt", cwd=cwd), cwd, "nothing-*.txt")


JSONL = b"".join(b'{"text": "line %d"}\n' % i for i in range(99))
IDS = (np.arange(400) % 50).astype("<u2").tobytes()

# Name of the file → its content, what is typed besides its path, and what is told.
BAD_FORMATS: dict[str, tuple[str, bytes, list[str], list[str]]] = {
    "a bad JSON line": ("a.jsonl", JSONL + b'{"text": "half\n' + JSONL, [], ["a.jsonl, line 100: not JSON"]),
    "a line without the field": ("a.jsonl", JSONL, ["data.field=body"], ["line 1", "'body'", "'text'", "data.field"]),
    "half a packed jsonl": ("a.jsonl.gz", gzip.compress(JSONL)[:99], [], ["a.jsonl.gz is not a complete gzip file"]),
    "no parquet": ("a.parquet", JSONL, [], ["a.parquet is not a complete parquet file"]),
    "no tokenizer": ("a.txt", TEXT, ["data.tokenizer=nowhere.json"], ["data.tokenizer = 'nowhere.json'", "bpe"]),
    "no such tokenizer": ("a.txt", TEXT, ["data.tokenizer=a.txt"], ["data.tokenizer = 'a.txt'"]),
    "ranks without a pattern": ("a.txt", TEXT, ["data.tokenizer=a.tiktoken"], ["data.tiktoken_pattern"]),
    "too few tokens": (
        "a.txt",
        TEXT[:160],
        ["data.tokenizer=bpe", "data.vocab_size=300"],
        ["tokens; it needs at least"],
    ),
    "ids out of range": ("a.bin", IDS, ["data=memmap", "data.vocab_size=49"], ["id 49 at position 49", "0 to 48"]),
    "half an id": ("a.bin", IDS[:-1], ["data=memmap"], ["a.bin", "uint16"]),
    "no ids": ("a.bin", b"", ["data=memmap"], ["0 tokens"]),
    "no borders": ("a.bin", IDS, ["data=memmap", "data.documents=packed"], ["data.end_of_text"]),
    "no array": ("a.npy", TEXT, ["data=memmap"], ["a.npy is not an array of ids"]),
}


@pytest.mark.parametrize("kind", BAD_FORMATS)
def test_files_of_each_format_that_cannot_be_used_are_two_and_named(kind: str, cwd: Path) -> None:
    name, content, typed, told = BAD_FORMATS[kind]
    (cwd / name).write_bytes(content)
    assert_refused(train(*TINY, "data=text", f"data.path={name}", *typed, cwd=cwd), cwd, *told)


def test_a_missing_column_and_a_missing_source_are_two(cwd: Path) -> None:
    pq.write_table(pa.table({"body": ["text " * 99]}), cwd / "a.parquet")
    assert_refused(train(*TINY, "data=text", "data.path=a.parquet", cwd=cwd), cwd, "no column 'text'", "'body'")
    sources = "[{path: a.parquet, weight: 1, field: body}, {path: nowhere, weight: 1}]"
    told = train(*TINY, "data=mixture", f"data.sources={sources}", cwd=cwd)
    assert_refused(told, cwd, "data.sources[1].path = 'nowhere'")
    assert_refused(train(*TINY, "data=mixture", "data.sources=[]", cwd=cwd), cwd, "data.sources")
    assert_refused(train(*TINY, "data=hf", "data.dataset=./nothing", cwd=cwd), cwd, "data.dataset = './nothing'")


GOOD_DATA = {
    "just long enough": TEXT[:170],
    "NUL": b"\0" * 400,
    "broken UTF-8": bytes(range(256)) * 4,
    "BOM": b"\xef\xbb\xbf" + TEXT,
    "CRLF": TEXT.replace(b"\n", b"\r\n"),
    "one line of 10 MB": b"abcdefghij" * 1_000_000,
}


@pytest.mark.parametrize("kind", GOOD_DATA)
def test_odd_bytes_are_bytes(kind: str, cwd: Path) -> None:
    """A byte tokenizer takes them all; the split for evaluation may be smaller than a batch."""
    (cwd / "text").write_bytes(GOOD_DATA[kind])
    training = train(*TINY, "trainer.steps=2", "data=text", "data.path=text", cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert summary(the_run(cwd))["val_loss"] is not None


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.stepz=3", "trainer.steps"),
        ("optimizer.learning_rate=fast", "fast"),
        ("backend.activation=relu", "softmax"),
        ("optimizer.learning_rate=-1", "-1"),
        ("trainer.batch_size=0", "trainer.batch_size"),
        ("optimizer.learning_rate=nan", "nan"),
        ("optimizer.clip_norm=inf", "inf"),
        ("model.embedding_dim=36 model.num_heads=4", "embedding_dim / num_heads = 9"),
        ("model.embedding_dim=30", "30"),
        ("backend.theta=0", "backend.theta"),
        ("backend.theta=-10", "backend.theta"),
        ("backend.context_length=0", "backend.context_length"),
        ("data.path=???", "data.path"),
    ],
)
def test_a_config_that_cannot_be_used_is_two_and_named(
    override: str, named: str, command: list[str], cwd: Path
) -> None:
    """Unknown, of a wrong type or choice, negative, zero, NaN, an odd head width, heads that don't divide, missing."""
    assert_refused(train(*command, *override.split(), cwd=cwd), cwd, named)


KEYS = [
    *("backend.activation", "backend.theta", "backend.context_length", "backend.window", "backend.sigmoid_bias"),
    *("backend.implementation", "model.num_heads", "model.num_kv_heads", "model.embedding_dim", "model.dropout"),
    *("optimizer.learning_rate", "optimizer.clip_norm", "optimizer", "schedule", "schedule.warmup_fraction"),
    *("trainer.steps", "trainer.nonfinite", "trainer.checkpoint_minutes", "evaluation.sequences", "seed", "study"),
    *("resume", "data.validation_fraction", "data.path", "tracking.wandb.mode", "nothing", "model.nothing"),
]
VALUES = [
    *("-1", "0", "nan", "-inf", "1e400", "null", "true", "???", "''", "x", "[1", "[1,2]", "{a: 1}", "${seed}", "${no}"),
    *("../up", "a b", "ü", "%", "$", "é=é", "1,2", "999999999999999999999", "\\", "~", "'", '"'),
]


TYPED = st.tuples(st.sampled_from(["", "+", "++", "~"]), st.sampled_from(KEYS), st.sampled_from(VALUES))


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "+", "++", "~"]), st.sampled_from(KEYS), st.sampled_from(VALUES)),
        min_size=1,
        max_size=3,
    )
)
def test_whatever_a_person_types_is_a_run_or_a_short_message(
    command: list[str], tmp_path_factory: pytest.TempPathFactory, typed: list[tuple[str, str, str]]
) -> None:
    """Twenty made by hypothesis; and what they leave never blocks the run that was meant."""
    (cwd := tmp_path_factory.mktemp("typed") / "work").mkdir()
    training = train(*command, *(f"{sign}{key}={value}" for sign, key, value in typed), cwd=cwd)
    code = training.wait()
    assert "Traceback" not in training.out + training.err
    if code == 2:
        assert 1 <= len(training.err.splitlines()) <= 5, training.err
        assert runs(cwd) == []
    else:
        assert code in (0, 3), training.out + training.err
