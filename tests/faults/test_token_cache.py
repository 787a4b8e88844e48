"""Killed, asked to stop, short of room and two at once while the corpus is tokenised."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from .harness import Reference, Training, differences, runs, the_run, train, until

pytestmark = pytest.mark.faults

SHARDS = "shard-bytes:4096"  # 36 kB of text are ten shards


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


def shards(tmp_path: Path) -> list[str]:
    return sorted(file.name for file in (tmp_path / "cache" / "xattn" / "tokens").rglob("*.json"))


@pytest.mark.parametrize(
    ("point", "whole"),
    [("rename:00000.bin", 0), ("rename:00003.bin", 3), ("renamed:00003.bin", 3), ("replace:00005.json", 5)],
)
def test_killed_while_the_token_cache_is_built(
    point: str, whole: int, command: list[str], cwd: Path, tmp_path: Path, env: dict[str, str], reference: Reference
) -> None:
    """What was whole stays, the next start makes the rest, and the result is that of a run that kept nothing."""
    assert train(*command, cwd=cwd, points=[SHARDS, point], env=env).wait() == -signal.SIGKILL
    assert len(shards(tmp_path)) == whole
    training = train(*command, cwd=cwd, points=[SHARDS], env=env)
    assert training.wait() == 0, training.out + training.err
    assert len(shards(tmp_path)) == 10
    assert differences(the_run(cwd), reference) == []


def test_asked_to_stop_while_tokenising_is_75_and_goes_on(
    command: list[str], cwd: Path, tmp_path: Path, env: dict[str, str], reference: Reference
) -> None:
    training = Training(*command, cwd=cwd, points=[SHARDS, "slow-shard:300"], env=env)
    until(lambda: len(shards(tmp_path)) >= 2, training)
    training.send(signal.SIGTERM)
    assert training.wait() == 75, training.out + training.err
    assert "same command" in training.err
    assert 2 <= len(shards(tmp_path)) < 10
    training = train(*command, cwd=cwd, points=[SHARDS], env=env)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []


def test_no_room_for_the_tokens_is_six_and_with_room_the_run_is_the_same(
    command: list[str], cwd: Path, env: dict[str, str], reference: Reference
) -> None:
    training = train(*command, cwd=cwd, points=[SHARDS, "limit-file-size:2000"], env=env)
    assert training.wait() == 6, training.out + training.err
    training = train(*command, cwd=cwd, points=[SHARDS], env=env)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []


def test_two_runs_tokenise_a_corpus_once(
    command: list[str], cwd: Path, tmp_path: Path, env: dict[str, str], reference: Reference
) -> None:
    first = Training(*command, cwd=cwd, points=[SHARDS, "slow-shard:100"], env=env)
    second = Training(*command, "study=other", cwd=cwd, points=[SHARDS, "slow-shard:100"], env=env)
    for training in (first, second):
        assert training.wait() == 0, training.out + training.err
    assert ("another process is tokenising" in first.out) != ("another process is tokenising" in second.out)
    assert len(shards(tmp_path)) == 10
    for study in ("default", "other"):
        assert differences(the_run(cwd, study), reference) == []
    assert len(runs(cwd)) == 1


@pytest.mark.parametrize("damage", ["bit", "short"])
def test_a_damaged_shard_is_told_and_made_again(
    damage: str, command: list[str], cwd: Path, tmp_path: Path, env: dict[str, str], reference: Reference
) -> None:
    train(*command, cwd=cwd, points=[SHARDS, "step:9"], env=env)
    (shard,) = (tmp_path / "cache").rglob("00004.bin")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content if damage == "bit" else content[:-1])
    training = train(*command, cwd=cwd, points=[SHARDS], env=env)
    assert training.wait() == 0, training.out + training.err
    assert re.search(r"rebuilding damaged token shards in \S+: 1$", training.out, re.MULTILINE), training.out
    assert differences(the_run(cwd), reference) == []
