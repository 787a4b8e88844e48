"""From text to token ids and back."""

from __future__ import annotations

import codecs
import contextlib
import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from xattn.errors import BadInput

# The usual names of an end-of-text token, or of the nearest thing to it.
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

_MOST_IDS = 2**24  # as data.vocab_size

Ids = Iterable[int] | np.ndarray


class Encoded(NamedTuple):
    """A text in tokens."""

    ids: np.ndarray
    """Unsigned integers (N,)."""
    sizes: np.ndarray | None
    """uint32 (N,): bytes of the text that each token covers, together all of them. None: the tokenizer's ``sizes``."""
    gives_back: bool
    """Whether the ids decode to the text."""


class ByteTokenizer:
    """A tokenizer of UTF-8 bytes: each id is a byte, and any bytes can be encoded. 256 is the end of text, if any."""

    name = "bytes"
    is_byte_level = True
    """Whether each id's bytes are known."""
    start = ord("\n")
    """The first id of a sample without a prompt."""

    def __init__(self, *, end_of_text: bool = False):
        self.end_of_text = 256 if end_of_text else None
        self.vocab_size = 257 if end_of_text else 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return uint8 (N,), one id per byte."""
        return np.frombuffer(text.encode("utf-8") if isinstance(text, str) else text, np.uint8)

    def encode_blocks(self, texts: Sequence[bytes]) -> list[Encoded]:
        return [Encoded(np.frombuffer(text, np.uint8), None, True) for text in texts]

    def decode(self, ids: Ids) -> str:
        """Decode. Bytes that are not UTF-8, as a model may write, become U+FFFD. Raises ValueError for other ids."""
        return bytes(int(i) for i in ids if i != self.end_of_text).decode("utf-8", errors="replace")

    def to_bytes(self, ids: np.ndarray) -> bytes:
        """Return what the ids stand for; an end of text stands for no bytes."""
        return ids[ids < 256].astype(np.uint8).tobytes()

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        """Return uint32 (N,): how many bytes each id stands for by itself. Byte-level tokenizers only."""
        return (ids < 256).astype(np.uint32)

    def sha256(self) -> str:
        return hashlib.sha256(b"bytes").hexdigest()


class JsonTokenizer:
    """A tokenizer.json of Hugging Face's ``tokenizers``: byte-level BPE, or any other kind that the library supports.

    Bytes that are not UTF-8 are read as U+FFFD. ``to_bytes`` is exact for byte-level tokenizers; for others it is what
    the library decodes. Text is encoded without additions or truncation, and the name of a special token in it,
    ``</s>``, is ordinary text. Raises :class:`BadInput` if the library can't encode a text.
    """

    def __init__(
        self,
        text: str,
        *,
        end_of_text: str | None = None,
        vocab_size: int | None = None,
        name: str = "tokenizer.json",
    ):
        """Load the tokenizer; vocab_size may exceed the ids in use. Raises ValueError if the text is no tokenizer, has
        more ids than that, or has no token named end_of_text."""
        from tokenizers import Tokenizer as Loaded

        self.name = name
        with _what_the_library_raises("not a tokenizer.json"):
            self._tokenizer = Loaded.from_str(text)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # as ordinary letters, that is
        self.text = text
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        taken = max(ids.values(), default=0) + 1
        if taken > _MOST_IDS:
            raise ValueError(f"has the id {taken - 1}; ids must be below {_MOST_IDS}")
        if vocab_size is not None and vocab_size < taken:
            raise ValueError(f"has {taken} ids, more than vocab_size = {vocab_size}")
        self.vocab_size = vocab_size or taken
        if end_of_text is not None and end_of_text not in ids:
            raise ValueError(f"has no token {end_of_text!r}")
        names = _ENDS_OF_TEXT if end_of_text is None else [end_of_text]
        self.end_of_text = next((ids[each] for each in names if each in ids), None)
        self._bytes = self._byte_table(ids) if _is_byte_level(json.loads(text)) else None
        self._sizes = np.array([len(token) for token in self._bytes or ()], np.uint32)

    def without_border(self) -> JsonTokenizer:
        """Return the same tokenizer without an end of text between documents."""
        other = copy.copy(self)
        other.end_of_text = None
        return other

    @property
    def start(self) -> int:
        newline = self.encode("\n")
        return int(newline[0]) if self.end_of_text is None and len(newline) else self.end_of_text or 0

    @property
    def is_byte_level(self) -> bool:
        return self._bytes is not None

    def encode(self, text: str) -> np.ndarray:
        """Return uint32 (N,)."""
        with self._refusing():
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_blocks(self, texts: Sequence[bytes]) -> list[Encoded]:
        """Encode on all cores, in the library's own threads."""
        if self._bytes is None:
            return self._with_offsets(texts)
        with self._refusing():
            encodings = self._tokenizer.encode_batch_fast(_as_text(texts), add_special_tokens=False)
        found = [
            Encoded(np.array(each.ids, np.uint32), None, b"".join(map(self._bytes.__getitem__, each.ids)) == text)
            for each, text in zip(encodings, texts, strict=True)
        ]
        changed = [number for number, each in enumerate(found) if not each.gives_back]
        for number, each in zip(changed, self._with_offsets([texts[i] for i in changed]), strict=True):
            found[number] = each._replace(gives_back=False)
        return found

    def _with_offsets(self, texts: Sequence[bytes]) -> list[Encoded]:
        """Encode, with the sizes from the positions in the text at which the library found each token."""
        decoded = _as_text(texts)
        with self._refusing():
            encodings = self._tokenizer.encode_batch(decoded, add_special_tokens=False)
            again = self._tokenizer.decode_batch([each.ids for each in encodings])
        return [
            Encoded(np.array(each.ids, np.uint32), _sizes(text, each.offsets), back.encode() == text)
            for each, text, back in zip(encodings, texts, again, strict=True)
        ]

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            with _what_the_library_raises(self.name):
                yield
        except ValueError as error:
            raise BadInput(f"data.tokenizer: {error}") from error

    def decode(self, ids: Ids) -> str:
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"{wrong[0]}: not an id; ids are 0 to {self.vocab_size - 1}")
        if self._bytes is None:
            with self._refusing():
                return str(self._tokenizer.decode(ids))
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def to_bytes(self, ids: np.ndarray) -> bytes:
        return self.decode(ids).encode() if self._bytes is None else b"".join(self._bytes[i] for i in ids.tolist())

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        assert self.is_byte_level  # what an id of another tokenizer stands for depends on its neighbours
        return self._sizes[ids]

    def sha256(self) -> str:
        return hashlib.sha256(f"{self.end_of_text} {self.text}".encode()).hexdigest()

    def _byte_table(self, ids: dict[str, int]) -> list[bytes]:
        """Return a table, id → bytes. Added tokens stand for their own text, special ones for nothing."""
        table = [b""] * self.vocab_size
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        for token, i in ids.items():
            if all(character in byte_of for character in token):
                table[i] = bytes(byte_of[character] for character in token)
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            table[i] = b"" if added.special else added.content.encode()
        return table


class IdTokenizer:
    """A tokenizer for data that are not text: it writes a sequence as its ids in decimal, separated by spaces."""

    start = 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        """Return uint32 (N,). Raises ValueError for a word that is not an id below vocab_size."""
        ids = [int(word) for word in text.split()]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"{wrong[0]}: not an id; ids are 0 to {self.vocab_size - 1}")
        return np.array(ids, np.uint32)

    def decode(self, ids: Ids) -> str:
        return " ".join(str(int(i)) for i in ids)


TextTokenizer = ByteTokenizer | JsonTokenizer
"""A tokenizer whose ids stand for bytes of text."""
Tokenizer = TextTokenizer | IdTokenizer


@contextlib.contextmanager
def _what_the_library_raises(subject: str) -> Iterator[None]:
    """Raise it as ValueError: plain Exceptions, and Rust's panics, which are not Exceptions and can't be imported."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{subject}: {reason}") from error


def _is_byte_level(loaded: dict[str, Any]) -> bool:
    """Return whether tokens use GPT-2's characters for bytes. The decoder decides, or without one the pre-tokenizer."""
    decoder, before = loaded.get("decoder"), loaded.get("pre_tokenizer") or {}
    steps = [before, *before.get("pretokenizers", ())] if decoder is None else [decoder, *decoder.get("decoders", ())]
    return any(each.get("type") == "ByteLevel" for each in steps)


def _as_text(texts: Sequence[bytes]) -> list[str]:
    return [text.decode("utf-8", errors="replace") for text in texts]


def _mark_broken(error: UnicodeError) -> tuple[str, int]:
    """Handle a decoding error: U+DC01 to U+DC04, which UTF-8 never has, record how many bytes U+FFFD stands for."""
    assert isinstance(error, UnicodeDecodeError)
    return chr(0xDC00 + error.end - error.start), error.end


codecs.register_error("xattn.mark_broken", _mark_broken)


def _sizes(text: bytes, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return uint32 (N,): the bytes of the text from the end of the previous token to the end of this one.

    Text that the tokenizer drops, such as spaces or unknown characters, counts with the next token, or with the last
    one at the end. A character of several tokens counts with its first. offsets: in characters; a broken one is U+FFFD.
    """
    if not offsets:
        return np.zeros(0, np.uint32)
    marked = text.decode("utf-8", errors="xattn.mark_broken").encode("utf-32-le", errors="surrogatepass")
    points = np.frombuffer(marked, "<u4")
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    widths = np.where((points > 0xDC00) & (points < 0xDC05), points - 0xDC00, widths)
    borders = np.concatenate([[0], np.cumsum(widths)])
    ends = borders[np.maximum.accumulate(np.array(offsets)[:, 1])]
    ends[-1] = len(text)
    return np.diff(ends, prepend=0).astype(np.uint32)


def byte_characters() -> list[str]:
    """Return GPT-2's character for each byte: printable bytes map to themselves, the others to code points from 256."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
