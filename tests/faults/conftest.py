"""One reference, made once: every run of these tests is this one, however it was treated."""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import TINY, Reference, the_run, train


@pytest.fixture(scope="session")
def command(text_file: Path) -> list[str]:
    """The overrides of the tiny run."""
    return [*TINY, "data=text", f"data.path={text_file}"]


@pytest.fixture(scope="session")
def untouched(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that nobody may change."""
    cwd = tmp_path_factory.mktemp("untouched")
    training = train(*command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    return the_run(cwd)


@pytest.fixture(scope="session")
def reference(untouched: Path) -> Reference:
    return Reference.of(untouched)


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """The folder that a training process is started in."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder
