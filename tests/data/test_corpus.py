"""Corpora: the standard library's own source, and files of one's own."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from xattn.data import corpus as corpora
from xattn.data.config import DataConfig
from xattn.data.corpus import Corpus, Part, library_files, load_corpus
from xattn.errors import BadInput

from .configs import stdlib_config, text_config


def text(path: Path | str, context_length: int = 4, validation_fraction: float = 0.1) -> Part:
    return part_of(text_config(path=str(path), validation_fraction=validation_fraction), context_length)


def sha256_of(path: Path) -> str:
    return load_corpus(text_config(path=str(path)), 4).sha256


def part_of(config: DataConfig, context_length: int = 4) -> Part:
    (part,) = load_corpus(config, context_length).parts
    return part


def whole(part: Part) -> bytes:
    return part.train[:].tobytes() + part.validation[:].tobytes()


# ---- the standard library --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(stdlib_config(validation_fraction=0.1), 128)


@pytest.fixture(scope="module")
def stdlib(corpus: Corpus) -> Part:
    return corpus.parts[0]


def test_the_standard_library_is_the_same_every_time(corpus: Corpus) -> None:
    again = load_corpus(stdlib_config(validation_fraction=0.1), 16)
    assert again.sha256 == corpus.sha256
    assert whole(again.parts[0]) == whole(corpus.parts[0])


def test_the_standard_library_is_split_ninety_to_ten(stdlib: Part) -> None:
    size = len(stdlib.train) + len(stdlib.validation)
    assert size > 5_000_000
    assert stdlib.train[:1].dtype == stdlib.validation[:1].dtype == np.uint8
    assert 0.1 <= len(stdlib.validation) / size < 0.13
    more = part_of(stdlib_config(validation_fraction=0.4), 128)
    assert 0.4 <= len(more.validation) / size < 0.43


def test_the_standard_library_is_split_by_file(stdlib: Part) -> None:
    """No file is on both sides, none is lost, and no file is cut; its tests are not in it."""
    files = library_files()
    assert "argparse.py" in files
    assert not [name for name in files if {"test", "tests", "site-packages"} & set(name.split("/"))]
    train, validation = stdlib.train[:].tobytes(), stdlib.validation[:].tobytes()
    sources = [file.read_bytes() for file in files.values()]
    assert all(source in train or source in validation for source in sources)
    assert sum(map(len, sources)) == len(train) + len(validation)


# ---- text ------------------------------------------------------------------------------------------------------------

ANY = [
    b"plain text, and more of it than one window\n" * 3,
    bytes(range(256)),
    b"\0" * 100,
    b"\xff\xfe broken \xc3\x28 utf-8 \xa0\xa1" * 4,
    b"\xef\xbb\xbfwith a byte order mark" * 3,
    b"one\r\ntwo\rthree\n" * 9,
    "Zeilen mit Umlauten äöü, 字, 🎲\n".encode() * 4,
    b"x" * 1_000_000,
]


@pytest.mark.parametrize("content", ANY, ids=lambda content: repr(content[:12]))
def test_any_bytes_are_kept_as_they_are(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    corpus = text(file)
    assert whole(corpus) == content
    assert len(corpus.validation) == len(content) // 10


def test_the_end_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(200)))
    corpus = text(tmp_path / "file", validation_fraction=0.25)
    assert corpus.train[:].tolist() == list(range(150))
    assert corpus.validation[:].tolist() == list(range(150, 200))


def test_a_folder_a_glob_and_gzip_are_joined_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b c").mkdir()
    parts = {"a.txt": b"first " * 9, "b c/ü.txt": b"second " * 9, "z.txt": b"third " * 9}
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    joined = b"".join(parts.values())
    assert whole(text(tmp_path)) == joined
    assert whole(text(tmp_path / "**" / "*.txt")) == joined
    assert whole(text(tmp_path / "*.txt")) == parts["a.txt"] + parts["z.txt"]
    before = sha256_of(tmp_path)
    (tmp_path / ".hidden").write_bytes(b"not this")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_bytes(b"nor this")
    assert whole(text(tmp_path)) == joined
    assert sha256_of(tmp_path) == before

    with gzip.open(tmp_path / "a.txt.gz", "wb") as packed:
        packed.write(b"packed " * 9)
    (tmp_path / "a.txt").unlink()
    assert whole(text(tmp_path)) == b"packed " * 9 + parts["b c/ü.txt"] + parts["z.txt"]
    assert whole(text(tmp_path / "a.txt.gz")) == b"packed " * 9


def test_a_name_with_the_characters_of_a_glob_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_bytes(b"this one " * 9)
    (tmp_path / "a1.txt").write_bytes(b"not that " * 9)
    assert whole(text(tmp_path / "a[1].txt")) == b"this one " * 9


def test_the_time_stamp_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc" * 50)
    before = sha256_of(file)
    os.utime(file, (1, 1))
    assert sha256_of(file) == before
    assert sha256_of(file.rename(tmp_path / "moved")) == before
    (tmp_path / "moved").write_bytes(b"abc" * 49 + b"abd")
    assert sha256_of(tmp_path / "moved") != before


def test_just_long_enough_and_one_token_too_short(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(50))
    assert len(text(file, context_length=4).validation) == 5
    file.write_bytes(bytes(49))
    with pytest.raises(BadInput, match=r"validation part has 4 bytes.*context_length \+ 1 = 5") as error:
        text(file, context_length=4)
    assert str(file) in str(error.value)
    file.write_bytes(bytes(20))
    with pytest.raises(BadInput, match=r"training part has 10 bytes.*context_length \+ 1 = 11"):
        text(file, context_length=10, validation_fraction=0.5)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("*.nothing", None, "no such file or folder, and no file matches"),
        ("empty.txt", b"", "0 bytes"),
        ("byte.txt", b"a", "1 bytes"),
        ("half.gz", gzip.compress(bytes(range(256)) * 40)[:150], "half.gz is not a complete gzip file"),
        ("text.gz", b"this was never packed", "text.gz is not a complete gzip file"),
        ("flipped.gz", gzip.compress(b"abcdefgh" * 99)[:-8] + b"\0" * 8, "flipped.gz is not a complete gzip file"),
        ("empty.gz", b"", "0 bytes"),
        ("file.txt/below", None, "no such file or folder"),
        ("x" * 5000, None, "no such file or folder"),
        ("nul\0nul", None, "no such file or folder"),
    ],
    ids=["missing", "glob", "empty", "byte", "half", "text", "flipped", "empty_gz", "below", "long", "nul"],
)
def test_what_cannot_be_read_is_bad_input_that_names_it(
    name: str, content: bytes | None, told: str, tmp_path: Path
) -> None:
    (tmp_path / "file.txt").write_bytes(b"some other file " * 20)
    path = f"{tmp_path}/{name}"
    if content is not None:
        Path(path).write_bytes(content)
    with pytest.raises(BadInput) as error:
        text(path)
    assert told in str(error.value)
    assert "data.path" in str(error.value)
    assert name[:20].split("\0")[0] in str(error.value)


def test_folders_without_files_and_unknown_homes_are_bad_input(tmp_path: Path) -> None:
    (tmp_path / "folder" / "below").mkdir(parents=True)
    with pytest.raises(BadInput, match="folder has no files"):
        text(tmp_path / "folder")
    with pytest.raises(BadInput, match=r"data\.path"):
        text("~no_such_user_here/file.txt")


def test_a_python_without_sources_is_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(BadInput, match=r"data=python_stdlib.*data=text"):
        load_corpus(stdlib_config(validation_fraction=0.1), 8)
