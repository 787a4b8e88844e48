"""The cache of tokens: made once, in shards; kills, damage and company do it no harm."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from xattn.data import cache, corpus, documents
from xattn.data.cache import Content, Tokens, stored_text, stored_tokens
from xattn.data.corpus import load_corpus
from xattn.data.tokenizer import Encoded
from xattn.errors import Preempted

from .configs import text_config

ARRAYS = [np.arange(i * 10, i * 10 + 10, dtype=np.uint16) for i in range(5)]
WHOLE = np.arange(50)


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "xattn" / "tokens"


class Made:
    """Remembers which shards were asked for; fails at one, if told so."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.numbers: list[int] = []
        self._fails_at = fails_at

    def __call__(self, number: int) -> Iterator[Encoded]:
        self.numbers.append(number)
        yield Encoded(ARRAYS[number][:4], None, True)
        if number == self._fails_at:
            raise KeyboardInterrupt
        yield Encoded(ARRAYS[number][4:], None, True)


def content(make: Made, key: str = "key") -> Content:
    return Content(key, 5, make, np.dtype("<u2"), np.ones_like)


def stored(make: Made, said: list[str] | None = None, key: str = "key") -> Tokens:
    say = (said if said is not None else []).append
    return stored_tokens(content(make, key), say=say, stop=lambda: False)


def test_tokens_of_several_arrays_are_one() -> None:
    tokens = Tokens([ARRAYS[0], ARRAYS[0][:0], *ARRAYS[1:]])
    assert len(tokens) == 50
    for start in range(0, 50, 3):
        for stop in range(start, 52, 5):
            np.testing.assert_array_equal(tokens[start:stop], WHOLE[start:stop])
            assert len(tokens.part(start, stop)) == len(WHOLE[start:stop])
            np.testing.assert_array_equal(tokens.part(start, stop)[:], WHOLE[start:stop])
    assert len(tokens.part(7, 33).part(2, 9)[1:99]) == 6
    assert len(Tokens([])) == 0


def test_shards_are_made_once(cache_home: Path) -> None:
    make = Made()
    np.testing.assert_array_equal(stored(make)[:], WHOLE)
    assert make.numbers == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(stored(make)[:], WHOLE)
    assert make.numbers == [0, 1, 2, 3, 4]
    stored(make, key="another")
    assert len(make.numbers) == 10
    assert not list(cache_home.rglob("*.tmp"))


def test_what_was_interrupted_goes_on_where_it_was() -> None:
    with pytest.raises(KeyboardInterrupt):
        stored(Made(fails_at=3))
    make = Made()
    np.testing.assert_array_equal(stored(make)[:], WHOLE)
    assert make.numbers == [3, 4]


@pytest.mark.parametrize(
    "damage", ["bit", "short", "long", "gone", "empty", "no record", "torn record", "other record"]
)
def test_a_damaged_shard_is_made_again_and_no_other(damage: str, cache_home: Path) -> None:
    stored(Made())
    ids, record = cache_home / "key" / "00002.bin", cache_home / "key" / "00002.json"
    content = bytearray(ids.read_bytes())
    match damage:
        case "bit":
            content[7] ^= 4
            ids.write_bytes(content)
        case "short":
            ids.write_bytes(content[:-2])
        case "long":
            ids.write_bytes(content + b"\0\0")
        case "gone":
            ids.unlink()
        case "empty":
            ids.write_bytes(b"")
        case "no record":
            record.unlink()
        case "torn record":
            record.write_text(record.read_text()[:9])
        case "other record":
            record.write_text((cache_home / "key" / "00001.json").read_text())
    make, said = Made(), list[str]()
    np.testing.assert_array_equal(stored(make, said)[:], WHOLE)
    assert make.numbers == [2]
    assert (damage == "no record") == (said == [])
    assert all("damaged" in each for each in said)


def test_where_nothing_can_be_written_the_tokens_live_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    make = Made()
    np.testing.assert_array_equal(stored(make)[:], WHOLE)
    np.testing.assert_array_equal(stored(make)[:], WHOLE)
    assert len(make.numbers) == 10


def test_two_at_once_share_the_work() -> None:
    inside, go_on, said = threading.Event(), threading.Event(), list[str]()

    class Slow(Made):
        def __call__(self, number: int) -> Iterator[Encoded]:
            inside.set()
            go_on.wait(60)
            return super().__call__(number)

    slow, other, found = Slow(), Made(), list[Tokens]()
    first = threading.Thread(target=lambda: found.append(stored(slow)))
    first.start()
    inside.wait(60)

    def say(text: str) -> None:
        said.append(text)
        go_on.set()

    found.append(stored_tokens(content(other), say=say, stop=lambda: False))
    first.join(60)
    assert len(said) == 1
    assert "another process is tokenising" in said[0]
    assert other.numbers == []
    for tokens in found:
        np.testing.assert_array_equal(tokens[:], WHOLE)


def test_a_request_to_stop_is_heard_between_shards() -> None:
    make = Made()
    with pytest.raises(Preempted, match="same command"):
        stored_tokens(content(make), say=print, stop=lambda: len(make.numbers) == 2)
    assert make.numbers == [0, 1]


def test_a_text_is_made_once_and_again_where_it_is_damaged(cache_home: Path) -> None:
    calls: list[int] = []

    def make() -> str:
        calls.append(0)
        return "the text"

    assert [stored_text("name", make) for _ in range(3)] == ["the text"] * 3
    assert len(calls) == 1
    file = cache_home / "name.json"
    file.write_text(file.read_text().replace("the text", "the test"))
    assert stored_text("name", make) == "the text"
    assert len(calls) == 2


def test_a_corpus_is_the_same_from_cache_pieces_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {i} of the text\n" for i in range(400)))
    config = text_config(path=str(file))
    in_memory = load_corpus(config, 4)
    monkeypatch.setattr(corpus, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(corpus, "PIECE_BYTES", 1000)
    monkeypatch.setattr(documents, "PIECE_BYTES", 1000)
    shards = load_corpus(config, 4)
    assert isinstance(shards.parts[0].train, Tokens)
    assert shards.sha256 == in_memory.sha256
    for split in ("train", "validation"):
        assert getattr(shards.parts[0], split)[:].tobytes() == getattr(in_memory.parts[0], split)[:].tobytes()
    assert len(list(cache.tokens_folder().rglob("*.bin"))) > 5  # type: ignore[union-attr]


MEMORY = """
import sys
from pathlib import Path
from tests.data.configs import text_config
from xattn.data import corpus
from xattn.data.corpus import load_corpus
from xattn.data.tokenizer import Encoded
corpus.IN_MEMORY_BYTES = 0
(part,) = load_corpus(text_config(path=sys.argv[1]), 64).parts
assert len(part.train) + len(part.validation) == Path(sys.argv[1]).stat().st_size
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_a_corpus_on_disk_needs_no_memory_of_its_size(tmp_path: Path) -> None:
    """200 MB are read with the anonymous memory that 1 MB needs, and 40 MB of buffers."""
    used = []
    for name, repeats in (("small.txt", 1), ("big.txt", 200)):
        with (tmp_path / name).open("wb") as file:
            for _ in range(repeats):
                file.write(b"sixteen  letters" * 2**16)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / name)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(["", *sys.path])},
            capture_output=True,
            text=True,
            check=True,
        )
        used.append(int(done.stdout))
    assert used[1] - used[0] < 40_000
