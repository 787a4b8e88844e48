"""Files of every format become the same documents; what cannot be read names its file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xattn.data import documents
from xattn.data.corpus import load_corpus
from xattn.data.documents import Files
from xattn.data.finding import Found
from xattn.errors import BadInput

from .configs import text_config

DOCUMENTS = [
    "one\ntwo ",
    "",
    "äöü 字 🎲",
    'with "quotes"\\ and a line\nbreak',
    "x" * 500,
    *(f"no. {i}\n" for i in range(60)),
]
JSONL = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()


def read(file: Path) -> list[str]:
    """The documents, by way of all pieces."""
    source, found = Files(Found([str(file)]), key="data.path"), list[bytes]()
    for piece in source.pieces():
        for block in source.read(piece):
            found = [*found, block.text] if block.begins else [*found[:-1], found[-1] + block.text]
    return [text.decode() for text in found]


@pytest.fixture(params=[2**25, 100, 7], ids=["whole", "pieces", "crumbs"])
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    size: int = request.param
    monkeypatch.setattr(documents, "PIECE_BYTES", size)
    monkeypatch.setattr(documents, "BLOCK_BYTES", max(size // 3, 8))
    return size


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_rows_are_documents_however_they_are_cut(name: str, piece_bytes: int, tmp_path: Path) -> None:
    file = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"text": DOCUMENTS}), file, row_group_size=3)
    else:
        file.write_bytes(gzip.compress(JSONL) if name.endswith("gz") else JSONL)
    assert read(file) == DOCUMENTS


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"line {i} of some\n" for i in range(99)),
        "no lines but words " * 99,
        "äöü字🎲" * 99,
        "x" * 999,
        "\n" * 99,
    ],
)
def test_a_text_is_one_document_cut_between_characters(text: str, piece_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]
    source = Files(Found([str(tmp_path / "a.txt")]), key="data.path")
    blocks = [block.text for piece in source.pieces() for block in source.read(piece)]
    assert all(block.decode() for block in blocks)  # none ends within a character
    if piece_bytes < 2**25:
        assert len(blocks) > 2


BAD_LINES = {
    "not JSON": b"{'text': 1}",
    "line 9: not JSON": b'{"text": "half',
    "not a JSON object": b'["text"]',
    "no field 'text'; choose one of 'txt'": b'{"txt": "a"}',
    "'text' is not a string": b'{"text": null}',
    "line 9: not JSON:": b'{"text": "\xff\xfe"}',
}


@pytest.mark.parametrize("told", BAD_LINES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_named_by_its_number(
    told: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file is read in pieces; blank lines count."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 40)
    lines = b"".join([b'{"text": "good"}\n\n' * 4, BAD_LINES[told], b"\n", b'{"text": "good"}\n' * 9])
    file = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    file.write_bytes(gzip.compress(lines) if packed else lines)
    with pytest.raises(BadInput) as error:
        read(file)
    assert told in str(error.value)
    assert f"data.path: {file}, line 9: " in str(error.value)


def test_a_missing_column_and_half_a_parquet_are_bad_input(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), file)
    for field, told in (("text", "no column 'text'; choose one of 'body', 'id'"), ("id", "instead of a string")):
        with pytest.raises(BadInput, match=told):
            load_corpus(text_config(path=str(file), field=field), 4)
    pq.write_table(pa.table({"text": ["a"] * 40 + [None] + ["b"] * 40}), file, row_group_size=25)
    with pytest.raises(
        BadInput, match=r"a\.parquet: row 40 \(the first is 0\): column 'text' holds null instead of a string"
    ):
        load_corpus(text_config(path=str(file)), 4)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadInput, match="not a complete parquet file"):
        load_corpus(text_config(path=str(file), field="body"), 4)
