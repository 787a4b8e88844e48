"""``xattn bench sweep`` counts what it names, and its packs are real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from xattn.bench import sweep
from xattn.bench.sweep import main
from xattn.config import compose
from xattn.errors import BadInput, XattnError

TINY = [
    *("model.num_layers=1", "model.num_heads=2", "model.embedding_dim=8", "model.mlp_dim=8"),
    *("backend.context_length=8", "trainer.batch_size=2"),
]


@pytest.mark.slow
def test_packs_are_compared_with_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--packs", "1", "3", "--steps", "2", "--repeats", "2", "--output", str(tmp_path)]
    assert main([*TINY, *arguments]) == 0
    record = json.loads((tmp_path / "packs.json").read_text())
    alone, packed = record["packs"]
    assert (alone["runs"], alone["times_one"], packed["runs"]) == (1, 1, 3)
    assert packed["times_one"] == pytest.approx(3 * alone["median_seconds"] / packed["median_seconds"])
    assert packed["memory_bytes"] > 2 * alone["memory_bytes"]
    assert "× one run's" in capsys.readouterr().out
    with pytest.raises(BadInput, match="contain 1, the one"):
        main([*TINY, "--packs", "4"])


def test_one_command_is_compared_with_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the processes: which are started, with which caches, and what the ratios are."""
    started: list[tuple[list[str], bool, bool]] = []

    def seconds(overrides: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> float:
        empty, off = environment["XDG_CACHE_HOME"] in caches, "JAX_ENABLE_COMPILATION_CACHE" in environment
        caches.add(environment["XDG_CACHE_HOME"])
        started.append((list(overrides), not empty, off))
        if overrides[0] == "-m":
            return 3 + len(started) % 2
        compose(overrides)
        return 10 if off else 5

    caches: set[str] = set()
    monkeypatch.setattr(sweep, "_seconds", seconds)
    assert main(["model=small", "--seeds", "1", "--every", "3", "--output", str(tmp_path)]) == 0
    assert [(overrides[0] == "-m", fresh, off) for overrides, fresh, off in started] == [
        (True, True, False),
        *[(False, False, True), (False, False, False)] * 4,
        (True, True, False),
    ]
    assert all("model=small" in overrides for overrides, _, _ in started)
    assert len({tuple(overrides) for overrides, _, _ in started}) == 5
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert (record["runs"], record["sweep_seconds"]) == (12, 3.5)
    assert record["ratios"] == {"without a cache": 3.5 / 120, "with a warm cache": 3.5 / 60}


def test_a_process_that_fails_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(XattnError, match=r"exited with 2.* model\.num_layers = 0"):
        main(["model.num_layers=0", "--output", str(tmp_path)])
