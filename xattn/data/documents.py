"""Sources of documents: what there is to read, in pieces that can be read independently, and a hash of everything."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import IO, Any, NamedTuple, cast

from xattn.data.finding import Found, sha256_of_files, some
from xattn.data.formats import UNREADABLE, Format, look, look_before, open_unpacked, unreadable
from xattn.errors import BadInput, first_line, needs_extra

PIECE_BYTES = 32 * 2**20  # approximate size of a piece; after a kill, about this much is tokenised again
PIECE_ROWS = 20_000
BLOCK_BYTES = 2**17  # a longer document is tokenised in blocks of this size, cut after a line or before a space
_PACKING_RATIO = 4


class Chunk(NamedTuple):
    """Bytes or rows from start to end of a file or a dataset."""

    file: str
    start: int
    end: int
    """−1: to the end of the file."""
    size: int
    """Approximate number of bytes."""


class Block(NamedTuple):
    """A document, or a part of one."""

    begins: bool
    """Whether a document begins with it."""
    text: bytes
    """What the file holds, normally UTF-8."""


class Files:
    """Text, JSON lines and Parquet files, one after the other. Text and JSON lines may be compressed.

    key: the config's, for messages. field: the field or column that holds the text. A file with nothing to read is
    refused; in a folder it is skipped, and :attr:`left_out` mentions it.
    """

    def __init__(self, found: Found, *, key: str, field: str = "text"):
        self._files, self._is_folder, self._left_out = found.files, found.is_folder, [*found.left_out]
        self._key, self._field = key, field

    @cached_property
    def formats(self) -> dict[str, Format]:
        """File → its format, for the files that are read."""
        found, refused = dict[str, Format](), dict[str, str]()
        for name in self._files:
            try:
                found[name] = look(name)
            except UNREADABLE as error:
                raise unreadable(error, self._key, name) from error
            if what := found[name].refusal:
                refused[name] = f"{name} is {what}"
                del found[name]
        if refused and not (self._is_folder and found):
            raise BadInput(f"{self._key}: no readable text: {some([*refused.values()])}")
        if refused:
            self._left_out.append(f"files without readable text: {len(refused)} ({some([*refused.values()])})")
        return found

    @property
    def left_out(self) -> str:
        """One line on what is present but not read; empty if everything is read."""
        return "; ".join(self._left_out) if self.formats else ""

    @property
    def size(self) -> int:
        """Bytes of the files that are read, compressed as they are."""
        return sum(kind.size for kind in self.formats.values())

    def pieces(self) -> list[Chunk]:
        return [piece for name, kind in self.formats.items() for piece in self._cut(name, kind)]

    def read(self, piece: Chunk) -> Iterator[Block]:
        """Yield the piece's documents. Raises :class:`BadInput` naming the file and line if they cannot be read."""
        kind = self.formats[piece.file]
        try:
            match kind.content:
                case "parquet":
                    yield from self._rows(piece)
                case "jsonl":
                    yield from self._lines(piece, kind.packing)
                case _:
                    yield from _blocks(piece, kind.packing)
        except UNREADABLE as error:
            raise unreadable(error, self._key, piece.file) from error

    def sha256(self) -> str:
        """Hash the content; names and time stamps don't count."""
        digests = sha256_of_files([*self.formats], self._key)
        for number, (name, kind) in enumerate(self.formats.items()):
            # Commit 968f896 read other documents from such a file, so its runs had other data.
            if (kind.packing, kind.content) != look_before(name):
                digests[number] = f"{kind.packing} {kind.content} {digests[number]}"
        return hashlib.sha256(json.dumps([self._field, digests]).encode()).hexdigest()

    def look(self) -> None:
        """Read each file up to its first document, so that a bad file is reported immediately."""
        for name, kind in self.formats.items():
            if kind.content == "jsonl" or kind.packing:
                next(self.read(Chunk(name, 0, -1, 0)), None)
            elif kind.content == "parquet":
                self._table(name)

    def _cut(self, name: str, kind: Format) -> list[Chunk]:
        size = kind.size
        if kind.content == "parquet":
            table = self._table(name)
            sizes = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
            return [Chunk(name, i, i + 1, size) for i, size in enumerate(sizes)]
        if kind.packing:
            return [Chunk(name, 0, -1, _PACKING_RATIO * size)]
        cuts: list[int] = []
        if size > PIECE_BYTES:
            with open(name, "rb") as opened:
                cuts = [_border(opened, cut, kind.content) for cut in range(PIECE_BYTES, size, PIECE_BYTES)]
        borders = sorted({0, *cuts, size})
        return [Chunk(name, a, b, b - a) for a, b in itertools.pairwise(borders)]

    def _lines(self, piece: Chunk, packing: str) -> Iterator[Block]:
        with open_unpacked(piece.file, packing) as opened:
            opened.seek(piece.start)
            at = piece.start
            for number, line in enumerate(opened):
                if piece.end >= 0 and at >= piece.end:
                    return
                if line.strip():
                    yield from document_blocks(self._text_of(line, piece.file, piece.start, number))
                at += len(line)

    def _text_of(self, line: bytes, file: str, start: int, number: int) -> str:
        reason = ""
        try:
            loaded = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error}"
        else:
            if not isinstance(loaded, dict):
                reason = "not a JSON object"
            elif self._field not in loaded:
                reason = f"no field {self._field!r}; choose one of {some_names(list(loaded))} with data.field"
            elif not isinstance(loaded[self._field], str):
                reason = f"{self._field!r} is not a string"
        if reason:
            line_number = 1 + number + _lines_before(file, start)
            raise BadInput(f"{self._key}: {file}, line {line_number}: {reason}")
        return cast(str, loaded[self._field])

    def _table(self, file: str) -> Any:
        parquet = optional("pyarrow.parquet", f"{self._key}: {file}: .parquet")
        try:
            table = parquet.ParquetFile(file)
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise BadInput(f"{self._key}: {file} is not a complete parquet file: {first_line(error)}") from error
        names = table.schema_arrow.names
        if self._field not in names:
            choices = some_names(names)
            raise BadInput(f"{self._key}: {file}: no column {self._field!r}; choose one of {choices} with data.field")
        return table

    def _rows(self, piece: Chunk) -> Iterator[Block]:
        file = piece.file
        table = self._table(file)
        row = sum(table.metadata.row_group(i).num_rows for i in range(piece.start))
        try:
            for batch in table.iter_batches(1024, row_groups=range(piece.start, piece.end), columns=[self._field]):
                for number, value in enumerate(batch.column(0).to_pylist(), row):
                    if not isinstance(value, str):
                        what = "null" if value is None else type(value).__name__
                        raise BadInput(
                            f"{self._key}: {file}: row {number} (the first is 0): column {self._field!r} holds {what} "
                            "instead of a string"
                        )
                    yield from document_blocks(value)
                row += batch.num_rows
        except (OSError, ValueError) as error:
            raise BadInput(f"{self._key}: {file} is not a complete parquet file: {first_line(error)}") from error


def _border(opened: IO[bytes], nominal: int, kind: str) -> int:
    """Return where to cut a file near ``nominal``: after a line, or if text has none, before a space or a character."""
    opened.seek(nominal)
    near = opened.readline() if kind == "jsonl" else opened.read(2**16)
    after_line = near.find(b"\n") + 1
    if kind == "jsonl" or after_line:
        return nominal + (after_line or len(near))
    return nominal + _character_border(near, max(near.find(b" "), 0))


def _character_border(text: bytes, at: int) -> int:
    """Return the first index at or after ``at`` that is not inside a UTF-8 character."""
    end = min(at + 3, len(text))
    return next((i for i in range(at, end) if text[i] & 0xC0 != 0x80), end)


def _blocks(piece: Chunk, packing: str) -> Iterator[Block]:
    with open_unpacked(piece.file, packing) as opened:
        opened.seek(piece.start)
        left = piece.end - piece.start if piece.end >= 0 else None
        kept, begins = b"", piece.start == 0
        while read := opened.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)):
            left = None if left is None else left - len(read)
            text = kept + read
            cut = _cut_in(text)
            yield Block(begins, text[:cut])
            kept, begins = text[cut:], False
        if kept:
            yield Block(begins, kept)


def _cut_in(text: bytes) -> int:
    """Return where to cut off the last line, word or character, which may continue in the next block."""
    if line := text.rfind(b"\n", 1) + 1:
        return line
    if (space := text.rfind(b" ", 1)) > 0:
        return space
    last = range(len(text) - 1, max(len(text) - 5, 0), -1)  # a character has at most four bytes
    return next((i for i in last if text[i] & 0xC0 != 0x80), len(text))


def document_blocks(text: str) -> Iterator[Block]:
    encoded, start = text.encode("utf-8", errors="replace"), 0
    while len(encoded) - start > BLOCK_BYTES:
        end = start + _cut_in(encoded[start : start + BLOCK_BYTES])
        yield Block(start == 0, encoded[start:end])
        start = end
    yield Block(start == 0, encoded[start:])


def _lines_before(file: str, end: int) -> int:
    count = 0
    with open(file, "rb") as opened:
        while (left := end - opened.tell()) > 0:
            count += opened.read(min(left, BLOCK_BYTES)).count(b"\n")
    return count


def optional(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise needs_extra(what, "hf", error) from error


def some_names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "")
