"""``xattn bench start`` times whole starts, and says why where a run does not come to its first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xattn.bench.start import main
from xattn.errors import XattnError

TINY = [
    *("model.num_layers=1", "model.num_heads=2", "model.embedding_dim=8", "model.mlp_dim=8"),
    *("backend.context_length=8", "trainer.batch_size=2", "evaluation.sequences=2"),
]


@pytest.mark.slow
def test_a_cold_start_and_a_warm_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--repeats", "1", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "start.json").read_text())
    assert record["cold_seconds"] > 0.5  # jax alone takes longer to import
    assert len(record["warm_seconds"]) == 1
    assert "first step    cold" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_ends_before_its_first_step_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(XattnError, match=r"model\.num_layers = 0"):
        main(["model.num_layers=0", "--output", str(tmp_path)])
