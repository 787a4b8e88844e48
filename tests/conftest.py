"""Nothing reaches for the network or writes into the home folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_SCRATCH = tempfile.TemporaryDirectory(prefix="xattn-tests-")
os.environ |= {
    "WANDB_MODE": "offline",
    "XDG_CACHE_HOME": f"{_SCRATCH.name}/cache",
    "WANDB_CONFIG_DIR": f"{_SCRATCH.name}/wandb/config",
    "WANDB_CACHE_DIR": f"{_SCRATCH.name}/wandb/cache",
    "WANDB_DATA_DIR": f"{_SCRATCH.name}/wandb/data",
    "NETRC": f"{_SCRATCH.name}/netrc",
}
os.environ.pop("WANDB_API_KEY", None)
os.environ.pop("WANDB_RUN_ID", None)


@pytest.fixture
def optimised() -> Iterator[None]:
    """Programs are compiled as those of a run are, where a folder's tests compile with little optimisation."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 kB of text with something to learn in it: numbered lines of arithmetic."""
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"line {i}: {i} + {i * 7 % 13} = {i + i * 7 % 13}\n" for i in range(1500)))
    return path


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study of the golden runs below the current folder, with their text: each of 4 steps, with 4 windows."""
    golden = Path(__file__).resolve().parent / "golden" / "runs"
    shutil.copy(golden / "text.txt", tmp_path)
    for config in golden.glob("*/config.yaml"):
        shutil.copytree(config.parent, tmp_path / "outputs" / "golden" / config.parent.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs" / "golden"
