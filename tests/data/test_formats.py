"""What a file is, by its suffix and its first block: unpacked, read as JSON lines, or refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xattn.data.corpus import check, load_corpus
from xattn.errors import BadInput

from .configs import mixture_config, text_config

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXT = b"".join(b"line %d of a text\n" % i for i in range(400))
TEXT_SHA256 = "f00fc77b6555a1aaf05e8353cbee53f03a66a45e4fc77cd90e41a6f1f8611591"  # as commit 968f896 has it
JSONL_SHA256 = "c9790eb3caf7f4b08451856fd1c0e6a216240c726ea2bdeb70b4cf2c74949716"
JSONL = b"".join(json.dumps({"text": f"document {i}\n"}).encode() + b"\n" for i in range(200))
DOCUMENTS = "".join(f"document {i}\n" for i in range(200)).encode()
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}


def read(path: Path, said: list[str] | None = None, **values: object) -> bytes:
    say = (said if said is not None else []).append
    config = text_config(path=str(path), **values)
    check(config)
    (part,) = load_corpus(config, 4, say=say).parts
    return part.train[:].tobytes() + part.validation[:].tobytes()


def refusal(path: Path, **values: object) -> str:
    """Told by the look before anything is read through, in one line that names key and file."""
    with pytest.raises(BadInput) as error:
        check(text_config(path=str(path), **values))
    assert "\n" not in str(error.value)
    assert "data.path" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    ("name", "content", "holds"), [("a.txt", TEXT, TEXT), ("a.jsonl", JSONL, DOCUMENTS)], ids=["text", "jsonl"]
)
def test_packed_files_are_unpacked_also_under_another_name(
    name: str, content: bytes, holds: bytes, packer: str, tmp_path: Path
) -> None:
    """.jsonl.zst was trained on as it is, packed, and exit 0."""
    packed = PACKERS[packer](content)
    for file in (tmp_path / f"{name}.{packer}", tmp_path / f"{name}.{packer.upper()}", tmp_path / name):
        file.write_bytes(packed)
        assert read(file) == holds
        file.unlink()
    file = tmp_path / f"{name}.{packer}"
    for broken in (packed[: len(packed) // 2], b"this was never packed", b"\0" * 40):
        file.write_bytes(broken)
        with pytest.raises(
            BadInput, match=f"a.*{packer} is not a complete {'zstd' if packer == 'zst' else packer[:2]}"
        ):
            read(file)


def test_two_streams_in_a_file_are_both_read(tmp_path: Path) -> None:
    for packer, pack in PACKERS.items():
        (tmp_path / f"a.{packer}").write_bytes(pack(TEXT[:1000]) + pack(TEXT[1000:]))
        assert read(tmp_path / f"a.{packer}") == TEXT


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonlines", "a.ldjson", "a.json", "A.JSONL", "a.json.gz"])
def test_json_lines_go_by_many_names(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(JSONL) if name.endswith("gz") else JSONL)
    assert read(tmp_path / name) == DOCUMENTS


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": "a"}] * 9, indent=1).encode(),
        json.dumps({"text": "a" * 99}).encode() + b"\n",
        b"{\n" + b'  "text": "a"\n' * 9 + b"}\n",
    ],
    ids=["list", "one object", "indented"],
)
def test_json_without_lines_is_text_as_it_was(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read(tmp_path / "a.json") == content


def zip_of(folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "made", "w") as opened:
        opened.writestr("a.txt", TEXT)
    return (folder / "made").read_bytes()


def tar_of(folder: Path) -> bytes:
    (folder / "inside").write_bytes(TEXT)
    with tarfile.open(folder / "made", "w") as opened:
        opened.add(folder / "inside", "a.txt")
    return (folder / "made").read_bytes()


def parquet(folder: Path) -> bytes:
    pq.write_table(pa.table({"text": ["a"] * 9}), folder / "made")
    return (folder / "made").read_bytes()


NOISE = np.random.default_rng(0)
PICTURE = b"\x89PNG\r\n\x1a\n" + NOISE.bytes(999)
REFUSED: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "zip": (zip_of, "a zip archive"),
    "tar": (tar_of, "a tar archive"),
    "tar.gz": (lambda folder: gzip.compress(tar_of(folder)), "a tar archive"),
    "twice": (lambda _: gzip.compress(zstd.compress(TEXT)), "compressed twice"),
    "lz4": (lambda _: b"\x04\x22\x4d\x18" + TEXT, "compressed with lz4"),
    "parquet": (parquet, "Parquet; name it .parquet"),
    "png": (lambda _: PICTURE, "a PNG image"),
    "jpeg": (lambda _: b"\xff\xd8\xff\xe0" + NOISE.bytes(999), "a JPEG image"),
    "pdf": (lambda _: b"%PDF-1.7\n" + TEXT, "a PDF"),
    "program": (lambda _: b"\x7fELF\2\1" + TEXT, "a program"),
    "lfs": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    "utf-16": (lambda _: TEXT.decode().encode("utf-16"), "UTF-16; convert it to UTF-8"),
    "utf-16 big": (lambda _: b"\xfe\xff" + "字和字 ".encode("utf-16-be") * 40, "UTF-16; convert it to UTF-8"),
    "utf-16 bare": (lambda _: TEXT.decode().encode("utf-16-le"), "UTF-16; convert it to UTF-8"),
    "utf-16 bare big": (lambda _: TEXT.decode().encode("utf-16-be"), "UTF-16; convert it to UTF-8"),
    "utf-32": (lambda _: TEXT.decode().encode("utf-32"), "UTF-32"),
    "utf-32 bare": (lambda _: TEXT.decode().encode("utf-32-le"), "UTF-32"),
    "noise": (lambda _: NOISE.bytes(4000), "binary: "),
    "a little noise": (lambda _: NOISE.bytes(600), "binary: "),
    "floats": (lambda _: NOISE.standard_normal(999).astype(np.float32).tobytes(), "binary: "),
    "pickle": (lambda _: b"\x80\x04\x95" + TEXT, "a pickle"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl"])
def test_what_is_no_text_is_refused_by_name(kind: str, name: str, tmp_path: Path) -> None:
    make, told = REFUSED[kind]
    content = make(tmp_path)
    (tmp_path / name).write_bytes(content)
    said = refusal(tmp_path / name)
    assert told in said
    assert str(tmp_path / name) in said
    assert told in refusal(tmp_path / "a*")


@pytest.mark.parametrize(
    "encoding", ["latin-1", "cp1251", "koi8-r", "shift-jis", "gb18030", "big5", "cp437", "utf-8-sig"]
)
def test_text_in_bytes_of_any_encoding_is_kept(encoding: str, tmp_path: Path) -> None:
    words = {"latin-1": "Größe à l'œil", "cp437": "╔══╗ größer", "cp1251": "Яяя ёлка", "koi8-r": "Съешь ещё"}
    text = words.get(encoding, "漢字，文字。").encode(encoding, errors="ignore") * 200
    (tmp_path / "a.txt").write_bytes(text)
    assert read(tmp_path / "a.txt") == text


def test_bytes_that_texts_have_by_chance_are_kept(tmp_path: Path) -> None:
    """NULs between records, colours of a terminal, control characters of ASCII in UTF-8, a few bytes of anything."""
    for text in (
        b"record\0" * 400,
        b"\x1b[31mred\x1b[0m\n" * 99,
        b"a\x01b\x02\x03" * 400,
        bytes(range(256)),
        bytes(range(256)) * 4,
        b"PK is two letters " * 40,
    ):
        (tmp_path / "a.txt").write_bytes(text)
        assert read(tmp_path / "a.txt") == text


def test_a_folder_is_read_without_what_is_no_text_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / "picture.png").write_bytes(PICTURE)
    (tmp_path / "b.zip").write_bytes(zip_of(tmp_path))
    (tmp_path / "made").unlink()
    (tmp_path / ".hidden").write_bytes(TEXT)
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone")
    said = list[str]()
    assert read(tmp_path, said) == TEXT
    (line,) = said
    for told in (
        "hidden: 1 (.hidden)",
        "duplicate names of the same files: 1",
        "files without readable text: 2 (",
        "b.zip is a zip archive",
        "broken links: 1 (nowhere.txt)",
    ):
        assert told in line, line
    sources = [{"path": str(tmp_path), "weight": 1.0}, {"path": str(tmp_path / "a.txt"), "weight": 1.0}]
    said.clear()
    load_corpus(mixture_config(sources=sources), 4, say=said.append)
    (line,) = said
    assert "data.sources[0]" in line
    said.clear()
    assert read(tmp_path / "a.txt", said) == TEXT
    assert said == []
    (tmp_path / "a.txt").unlink()
    with pytest.raises(BadInput, match="no readable text"):
        read(tmp_path)


def test_what_was_read_before_has_the_hash_it_had(tmp_path: Path) -> None:
    """Runs of earlier versions find their data unchanged; the ones that were trained on packed bytes don't."""

    def sha256_as(name: str, content: bytes) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        return load_corpus(text_config(path=str(folder / name)), 4).sha256

    assert sha256_as("a.txt", TEXT) == sha256_as("b", TEXT) == TEXT_SHA256
    assert sha256_as("a.jsonl", JSONL) == JSONL_SHA256
    assert sha256_as("a.ndjson", JSONL) != JSONL_SHA256
    packed = gzip.compress(TEXT, mtime=0)
    assert sha256_as("a.txt.gz", packed) != sha256_as("c.txt", packed)
