"""No room: exit 6 with the path and the bytes; with room again the same command ends as if nothing had happened."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import xattn.config

from .harness import (
    PATIENCE,
    Reference,
    Training,
    committed_and_unsound,
    differences,
    runs,
    start,
    steps,
    the_run,
    train,
)

pytestmark = pytest.mark.faults


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def small_disk(cwd: Path) -> Iterator[Callable[..., None]]:
    """Makes a folder (the working folder unless told) a small file system of its own; called again it changes it."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounted: list[Path] = []

    def disk(options: str, where: Path = cwd) -> None:
        where.mkdir(exist_ok=True)
        if where in mounted:
            mount("-o", f"remount,{options}", str(where))
        else:
            mount("-t", "tmpfs", "-o", options, "tmpfs", str(where))
            mounted.append(where)

    yield disk
    for where in mounted:
        subprocess.run(["umount", "--lazy", str(where)], check=True, capture_output=True)


def assert_told(training: Training, where: Path | str) -> None:
    """Exit 6, and at most five lines with the path and how many bytes."""
    assert training.wait() == 6, training.out + training.err
    assert str(where) in training.err
    assert re.search(r"\d+ bytes", training.err), training.err
    assert "Traceback" not in training.err
    assert 1 <= len(training.err.splitlines()) <= 5


@pytest.mark.parametrize("kilobytes", [4, 24, 300, 900])
def test_a_full_disk_is_six_and_with_room_the_run_goes_on(
    kilobytes: int, small_disk: Callable[..., None], command: list[str], cwd: Path, reference: Reference
) -> None:
    """Full at the lock or the config, at a log line, in the first checkpoint, in a later one; twice."""
    small_disk(f"size={kilobytes}k")
    for _ in range(2):
        assert_told(train(*command, cwd=cwd), cwd)
        for run in runs(cwd):
            assert committed_and_unsound(run) == []
    before = steps(the_run(cwd)) if runs(cwd) else []
    small_disk("size=50m")
    training = train(*command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert not before or f"resumed     from step {before[-1]}" in training.out
    assert differences(the_run(cwd), reference) == []


@pytest.mark.parametrize("limit", ["700", "20000"], ids=["config", "checkpoint"])
def test_a_file_that_may_not_grow_is_six(limit: str, command: list[str], cwd: Path, reference: Reference) -> None:
    """RLIMIT_FSIZE: the write that crosses it is cut short."""
    assert_told(train(*command, cwd=cwd, points=[f"limit-file-size:{limit}"]), cwd)
    training = train(*command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []


@pytest.mark.parametrize("screen", ["in a pipe", "in a file"])
def test_a_log_line_that_is_cut_short_is_six(screen: str, command: list[str], cwd: Path, reference: Reference) -> None:
    """Half of a row in metrics.jsonl, or on the screen where that is a file on the full disk."""
    if screen == "in a pipe":
        with start(*command, cwd=cwd, points=["limit-file-size:900:9"]) as process:
            _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 6, err
        assert str(cwd) in err
    else:
        assert train(*command, cwd=cwd, points=["limit-file-size:900:9"]).wait() == 6
    training = train(*command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []


@pytest.mark.parametrize("name", ["log.txt", "config.yaml.tmp"])
def test_a_device_that_is_always_full_is_six(name: str, command: list[str], cwd: Path, reference: Reference) -> None:
    folder = cwd / "outputs" / "default" / xattn.config.run_name(xattn.config.compose(command))
    folder.mkdir(parents=True)
    (folder / name).symlink_to("/dev/full")
    assert_told(train(*command, cwd=cwd), folder)
    if folder.exists():
        (folder / name).unlink(missing_ok=True)
    training = train(*command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert differences(folder, reference) == []


def test_a_full_cache_costs_time_and_nothing_else(
    small_disk: Callable[..., None], command: list[str], cwd: Path, reference: Reference, tmp_path: Path
) -> None:
    small_disk("size=8k", tmp_path / "cache")
    training = train(*command, cwd=cwd, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []


def test_a_read_only_folder_is_six_and_a_run_in_it_is_unharmed(
    small_disk: Callable[..., None], command: list[str], cwd: Path, reference: Reference
) -> None:
    """As root chmod proves nothing: the file system itself is read-only, at a first start and at a resume."""
    small_disk("size=50m")
    small_disk("ro")
    assert_told(train(*command, cwd=cwd), "outputs")
    small_disk("rw")
    train(*command, cwd=cwd, points=["step:15"])
    small_disk("ro")
    assert_told(train(*command, cwd=cwd), cwd)
    small_disk("rw")
    training = train(*command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []


def test_a_file_where_a_folder_should_be_is_two(command: list[str], cwd: Path) -> None:
    (cwd / "outputs").write_text("mine")
    training = train(*command, cwd=cwd)
    assert training.wait() == 2
    assert "outputs" in training.err
    assert len(training.err.splitlines()) <= 5
    assert (cwd / "outputs").read_text() == "mine"
