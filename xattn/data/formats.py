"""What a file holds, by its name and first block: text, JSON lines or Parquet, plain or compressed; or else what."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import re
import sys
import zlib
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import numpy as np

from xattn.errors import BadInput

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# look and the streams of open_unpacked raise these if a file cannot be read or is not whole; bz2 raises OSError.
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)
BLOCK = 2**14  # bytes to look at, of a file and of its unpacked content
_LONGEST_LINE = 2**26  # bytes of a .json to read in search of a line end
_PACKED_BY_NAME = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".lzma": "xz", ".zst": "zstd", ".zstd": "zstd"}
_PACKED = {
    "gzip": rb"\x1f\x8b\x08",
    "bzip2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd",
}
_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
# The first bytes of a file → what it is, for files that are neither text nor compressed text.
_SIGNATURES = {
    rb"PK(?:\x03\x04|\x05\x06)": "a zip archive",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
    rb"Rar!\x1a\x07": "a RAR archive",
    rb"[\0-\xff]{257}ustar[\0 ]": "a tar archive",
    rb"\x04\x22\x4d\x18": "compressed with lz4",
    rb"\x1f\x9d": "compressed with compress",
    rb"LZIP\x01": "compressed with lzip",
    rb"PAR1[^ -~]": "Parquet; name it .parquet",
    rb"ARROW1\0": "an Arrow file",
    rb"Obj\x01": "an Avro file",
    rb"\x93NUMPY": "a NumPy array (if of token ids, use data=memmap)",
    rb"\x89HDF\r\n": "an HDF5 file",
    rb"SQLite format 3\0": "an SQLite database",
    rb"\x80[\x02-\x05]": "a pickle",
    rb"\x89PNG\r\n": "a PNG image",
    rb"\xff\xd8\xff": "a JPEG image",
    rb"GIF8[79]a": "a GIF image",
    rb"(?:II\*\0|MM\0\*)": "a TIFF image",
    rb"RIFF[\0-\xff]{4}(?:WAVE|AVI |WEBP)": "sound, video or an image",
    rb"(?:ID3[\x02-\x04]|OggS\0|fLaC\0)": "sound",
    rb"\0\0\0.ftyp": "a video",
    rb"%PDF-": "a PDF",
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Office document",
    rb"\x7fELF": "a program",
    rb"version https://git-lfs\.github\.com/": "a Git LFS pointer whose content was not fetched",
    rb"(?:\xff\xfe\0\0|\0\0\xfe\xff)": "text in UTF-32; convert it to UTF-8",
}
_UTF_16 = "text in UTF-16; convert it to UTF-8"
_ENOUGH = 512  # bytes needed to distinguish binary from text
_SMALL = 2048  # fewer bytes than this count as noise only if they do not compress, too
# Control characters, except those in texts: NUL, bell, backspace, tab, line and page ends, DOS's end of file, escape.
_CONTROLS = bytes({*range(32), 127} - {0, 7, 8, 9, 10, 11, 12, 13, 26, 27})


class Format(NamedTuple):
    """How to read a file of ``size`` bytes."""

    packing: Literal["", "gzip", "bzip2", "xz", "zstd"]
    """What unpacks the file; empty for none."""
    content: Literal["text", "jsonl", "parquet"]
    """How its documents are found."""
    size: int
    refusal: str = ""
    """What the file is, if it cannot be read as text."""


def look(file: str) -> Format:
    """Return the format of a file. Raises one of :data:`UNREADABLE` if it can't be read or is not whole."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head, size = os.read(descriptor, BLOCK), os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    ends = ["." + suffix.lower() for suffix in os.path.basename(file).split(".")[1:]]
    packing = _packing(head)
    if ends and ends[-1] in _PACKED_BY_NAME:
        packing = packing or _PACKED_BY_NAME[ends.pop()]
    ends = [suffix for suffix in ends if suffix not in _PACKED_BY_NAME]
    kind, content = ends[-1] if ends else "", "text"
    if packing:
        with open_unpacked(file, packing) as unpacked:
            head = unpacked.read(BLOCK)
    if kind == ".parquet":
        content = "parquet"
        refusal = f"Parquet inside {packing}; unpack it" if packing else ""
    else:
        refusal = _refusal(head)
        if kind in _JSON_LINES or (kind == ".json" and head.lstrip()[:1] == b"{" and _has_lines(file, packing)):
            content = "jsonl"
    return Format(packing, content, size, refusal)  # type: ignore[arg-type]


def look_before(file: str) -> tuple[str, str]:
    """Return packing and content of a file as commit 968f896 determined them, from the name alone."""
    name = file.removesuffix(".gz")
    content = next((kind for kind in ("jsonl", "parquet") if name.endswith(f".{kind}")), "text")
    return "" if name == file else "gzip", content


def open_unpacked(file: str, packing: str) -> IO[bytes]:
    """Open the file's content as a stream."""
    opened: Any
    match packing:
        case "gzip":
            opened = gzip.GzipFile(file)
        case "bzip2":
            opened = bz2.BZ2File(file)
        case "xz":
            opened = lzma.LZMAFile(file)  # noqa: SIM115
        case "zstd":
            # Large corpora are packed by `zstd --long=31`, which needs more memory than the default allows.
            opened = zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})
        case _:
            opened = Path(file).open("rb")  # noqa: SIM115
    return cast("IO[bytes]", opened)


def unreadable(error: BaseException, key: str, file: str) -> BadInput:
    """Return the error for the user who gave the file under this config key, after it raised one of UNREADABLE."""
    if isinstance(error, OSError) and error.errno is not None:
        return BadInput(f"{key}: {file} cannot be read: {error.strerror}")
    with open(file, "rb") as opened:
        packing = _packing(opened.read(16)) or _PACKED_BY_NAME.get(os.path.splitext(file)[1].lower(), "")
    return BadInput(f"{key}: {file} is not a complete {packing} file: {error}")


def _packing(head: bytes) -> str:
    return next((kind for kind, magic in _PACKED.items() if re.match(magic, head)), "")


def _refusal(head: bytes) -> str:
    """Return what the file is if not text, by its first bytes. Any encoding with bytes for letters counts as text."""
    if known := [what for signature, what in _SIGNATURES.items() if re.match(signature, head)]:
        return known[0]
    if packing := _packing(head):
        return f"compressed twice, with {packing} inside"
    if wide := _wide(head):
        return wide
    controls = len(head) - len(head.translate(None, _CONTROLS))
    # Noise, compressed or encrypted bytes have 8 % of control characters; text in Latin-1, KOI8 or Big5 has none.
    is_odd = len(head) >= _ENOUGH and controls > 0.03 * len(head) and not _is(head, "utf-8")
    if is_odd and (len(head) >= _SMALL or len(zlib.compress(head)) > 0.8 * len(head)):
        return f"binary: {controls} of its first {len(head)} bytes are control characters"
    return ""


def _wide(head: bytes) -> str:
    """Return what it is if a letter takes two or four bytes, judged by the byte order mark or the zeros' positions."""
    letters = sum(head.count(byte) for byte in range(32, 127)) if head[:2] in (b"\xff\xfe", b"\xfe\xff") else len(head)
    if letters < 0.75 * len(head):  # otherwise it is Latin-1 that begins with these letters
        return _UTF_16 if _is(head, "utf-16") else ""
    if len(head) < 16 or head.count(0) < len(head) / 8:
        return ""
    columns = np.frombuffer(head[: len(head) // 4 * 4], np.uint8).reshape(-1, 4)
    zeros = (columns == 0).mean(axis=0)
    if zeros.min() < 0.05 and np.sort(zeros)[1] > 0.9:
        return "text in UTF-32, or an array of numbers"
    for high in (0, 1):
        if zeros[[high, high + 2]].min() > 0.4 and zeros[[1 - high, 3 - high]].max() < 0.05:
            return f"{_UTF_16} (or an array of numbers, for data=memmap)"
    return ""


def _is(head: bytes, encoding: str) -> bool:
    """Return whether it is in this encoding. A character that is cut off at the end counts as whole."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _has_lines(file: str, packing: str) -> bool:
    """Return whether the first line is a complete JSON object, and another object begins on the next."""
    with open_unpacked(file, packing) as opened:
        lines = iter(lambda: opened.readline(_LONGEST_LINE), b"")
        first, second = ([line for _, line in zip(range(2), filter(bytes.strip, lines), strict=False)] + [b""] * 2)[:2]
    try:
        return isinstance(json.loads(first), dict) and second.lstrip()[:1] == b"{"
    except (ValueError, RecursionError):
        return False
