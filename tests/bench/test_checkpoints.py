"""``xattn bench checkpoints`` saves what it says it saves, and counts what that cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xattn.bench.checkpoints import main
from xattn.errors import BadInput

TINY = [
    *("model.num_layers=1", "model.num_heads=2", "model.embedding_dim=8", "model.mlp_dim=8"),
    *("backend.context_length=8", "trainer.batch_size=2"),
]


def test_pairs_of_stretches_and_every_save_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--steps", "6", "--every", "2", "--repeats", "2", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "checkpoints.json").read_text())
    assert len(record["pairs"]) == 2
    assert len(record["blocking_seconds"]) == len(record["seconds"]) == 2 * 3
    assert all(
        0 < blocking < whole for blocking, whole in zip(record["blocking_seconds"], record["seconds"], strict=True)
    )
    assert all(pair["with"] > 0 and pair["without"] > 0 for pair in record["pairs"])
    assert "a save:" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--every", "0"], ["--every", "7", "--steps", "6"], ["--repeats", "0"]])
def test_a_pace_without_a_save_is_refused(wrong: list[str]) -> None:
    with pytest.raises(BadInput, match="--every from 1 to --steps"):
        main([*TINY, *wrong])
