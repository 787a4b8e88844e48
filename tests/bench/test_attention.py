"""The bench measures what runs, names what does not, and leaves a table, numbers and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xattn.backend import dispatch
from xattn.bench.attention import main
from xattn.errors import BadInput

SMALL = ["--heads", "2", "--head-dim", "8", "--repeats", "2"]


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    assert main([*SMALL, *arguments, "--output", str(tmp_path)]) == 0
    return json.loads((tmp_path / "attention.json").read_text())


def test_everything_is_measured_or_named_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(tmp_path, "--lengths", "24", "--activations", "softmax", "none")
    measured = {(r["name"], r["activation"], r["length"]) for r in record["results"]}
    skipped = {(s["name"], s["activation"], s["length"]): s["reason"] for s in record["skipped"]}
    names = (*dispatch.names(), "jax.nn")
    assert measured | skipped.keys() == {(n, a, 24) for n in names for a in ("softmax", "none")}
    assert not measured & skipped.keys()
    assert "a sum of outer products" in skipped["linear", "softmax", 24]
    assert skipped["jax.nn", "none", 24] == "it supports softmax only"
    for result in record["results"]:
        assert 0 < result["lowest_seconds"] <= result["median_seconds"] <= result["highest_seconds"]
        assert result["memory_bytes"] > 0
        assert (result["ratio_to_reference"] == 1) == (result["name"] == "reference")
    printed = capsys.readouterr().out
    assert "blockwise" in printed
    assert "not run: jax.nn, none, S 24" in printed
    assert (tmp_path / "attention.png").stat().st_size > 1000


def test_the_forward_alone_in_bfloat16_with_a_window_and_a_limit(tmp_path: Path) -> None:
    options = ["--lengths", "32", "--activations", "softmax", "--passes", "forward", "--dtype", "bfloat16"]
    options += ["--window", "4", "--kv-heads", "1", "--implementations", "blockwise", "jax.nn"]
    record = run(tmp_path, *options)
    assert {r["name"] for r in record["results"]} == {"blockwise", "jax.nn"}
    assert all(r["ratio_to_reference"] is None for r in record["results"])
    record = run(tmp_path, *options, "--memory-limit", "0")
    assert record["results"] == []
    assert all("GB of memory" in s["reason"] for s in record["skipped"])


def test_a_decay_is_measured_beside_none(tmp_path: Path) -> None:
    options = ["--lengths", "32", "--activations", "none", "--implementations", "linear", "jax.nn"]
    record = run(tmp_path, *options, "--decay", "none", "input")
    assert {r["name"] for r in record["results"]} == {"linear", "linear+decay"}
    assert {s["name"]: s["reason"] for s in record["skipped"]}["jax.nn+decay"] == "it does not support decay"


def test_a_wrong_name_is_named() -> None:
    with pytest.raises(BadInput, match="--implementations: invalid choice: 'magic'"):
        main(["--implementations", "magic"])
