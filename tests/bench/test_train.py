"""``xattn bench train`` measures what it names, and runs a peer beside it that keeps nanoGPT's interface."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from xattn.bench.peer import Peer
from xattn.bench.train import main
from xattn.config import compose
from xattn.errors import BadInput
from xattn.training.programs import programs

TINY = [
    *("model.num_layers=1", "model.num_heads=2", "model.embedding_dim=8", "model.mlp_dim=8"),
    *("backend.context_length=8", "trainer.batch_size=2"),
]


def bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    assert main([*TINY, "--steps", "2", "--repeats", "2", "--output", str(tmp_path), *arguments]) == 0
    record: dict[str, Any] = json.loads((tmp_path / "train.json").read_text())
    return record


def test_each_model_and_activation_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = bench(tmp_path, "--activations", "softmax", "none", "--vocab-size", "31")
    assert [result["activation"] for result in record["results"]] == ["softmax", "none"]
    compiled, _ = programs(compose([*TINY, "backend.activation=softmax"]), 31)
    for result in record["results"]:
        assert 0 < result["lowest_seconds"] <= result["median_seconds"] <= result["highest_seconds"]
        assert result["tokens_per_second"] == pytest.approx(16 / result["median_seconds"])
        peak = record["machine"]["peak_flops_per_second"]
        assert result["mfu"] == pytest.approx(result["flops_per_step"] / result["median_seconds"] / peak)
        assert result["compile_seconds"] > 0
        assert result["ratio_to_peer"] is None
    assert record["results"][0]["flops_per_step"] == compiled.flops_per_step
    assert record["results"][0]["memory_bytes"] == compiled.peak_memory_bytes
    assert set(record["commit"]) == {"git_commit", "git_dirty"}
    assert record["versions"]["jax"]
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "softmax" in printed
    assert "…" not in printed  # it fits on 80 columns


def test_a_folder_without_the_peers_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"it has no model\.py"):
        Peer(tmp_path, sys.executable, {})


def test_a_peer_that_does_not_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise SystemExit('no torch in this test')\n")
    peer = Peer(tmp_path, sys.executable, {})
    with pytest.raises(BadInput, match="does not run there"):
        peer.steps(1)
    peer.close()
