"""From text to token ids and back."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np

# Under these names an end of text, or the nearest thing to it, is known.
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

Ids = Iterable[int] | np.ndarray


class Tokenizer(Protocol):
    """vocab_size: ids are below it. start: the id that a sample begins with where there is no prompt."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def start(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """Unsigned integers (N,)."""

    def decode(self, ids: Ids) -> str: ...


@runtime_checkable
class TextTokenizer(Tokenizer, Protocol):
    """A tokenizer whose ids stand for bytes of text.

    end_of_text: the id that stands before each document, or None. name: for people.
    """

    @property
    def end_of_text(self) -> int | None: ...

    @property
    def name(self) -> str: ...

    def to_bytes(self, ids: np.ndarray) -> bytes:
        """What the ids stand for; an end of text stands for no bytes."""
        ...

    def encode_blocks(self, texts: list[bytes]) -> list[np.ndarray]:
        """The ids of each, unsigned integers (N,)."""
        ...

    def sha256(self) -> str: ...


class ByteTokenizer:
    """Token ids are the bytes of the text in UTF-8; any bytes at all can be encoded. 256 is the end of text, if any."""

    name = "bytes"
    start = ord("\n")

    def __init__(self, *, end_of_text: bool = False):
        self.end_of_text = 256 if end_of_text else None
        self.vocab_size = 257 if end_of_text else 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """uint8 (N,), one id a byte."""
        return np.frombuffer(text.encode("utf-8") if isinstance(text, str) else text, np.uint8)

    def encode_blocks(self, texts: list[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, ids: Ids) -> str:
        """Bytes that are not UTF-8, a model's slips among them, become U+FFFD. Raises ValueError for other ids."""
        return bytes(int(i) for i in ids if i != self.end_of_text).decode("utf-8", errors="replace")

    def to_bytes(self, ids: np.ndarray) -> bytes:
        return ids[ids < 256].astype(np.uint8).tobytes()

    def sha256(self) -> str:
        return hashlib.sha256(b"bytes").hexdigest()


class JsonTokenizer:
    """A tokenizer.json of Hugging Face's ``tokenizers``: byte-level BPE, or any other that it knows.

    Text that is not UTF-8 is read with U+FFFD in the place of what is broken. ``to_bytes`` is exact for byte-level
    tokenizers; for the others it is what the library decodes. Nothing is added to a text and nothing is cut off, and
    the name of a special token in it, ``</s>``, is text.
    """

    def __init__(
        self,
        text: str,
        *,
        end_of_text: str | None = None,
        vocab_size: int | None = None,
        name: str = "tokenizer.json",
    ):
        """vocab_size: where it is to be more than the ids that are taken. Raises ValueError where the text is no
        tokenizer, has more ids than that, or no token of the name end_of_text."""
        from tokenizers import Tokenizer as Loaded

        self.name = name
        try:
            self._tokenizer = Loaded.from_str(text)
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"not a tokenizer.json: {str(error).splitlines()[0]}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # that is: as the letters that they are
        self.text = text
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        taken = max(ids.values(), default=0) + 1
        if vocab_size is not None and vocab_size < taken:
            raise ValueError(f"has {taken} ids, more than vocab_size = {vocab_size}")
        self.vocab_size = vocab_size or taken
        if end_of_text is not None and end_of_text not in ids:
            raise ValueError(f"has no token {end_of_text!r}")
        names = _ENDS_OF_TEXT if end_of_text is None else [end_of_text]
        self.end_of_text = next((ids[each] for each in names if each in ids), None)
        self._bytes = self._byte_table(ids) if _is_byte_level(json.loads(text)) else None

    def without_border(self) -> JsonTokenizer:
        """The same, and no end of text stands between documents."""
        other = copy.copy(self)
        other.end_of_text = None
        return other

    @property
    def start(self) -> int:
        newline = self.encode("\n")
        return int(newline[0]) if self.end_of_text is None and len(newline) else self.end_of_text or 0

    def encode(self, text: str) -> np.ndarray:
        """uint32 (N,)."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_blocks(self, texts: list[bytes]) -> list[np.ndarray]:
        """On all cores: the library's own threads."""
        decoded = [text.decode("utf-8", errors="replace") for text in texts]
        encoded = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(each.ids, np.uint32) for each in encoded]

    def decode(self, ids: Ids) -> str:
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"{wrong[0]}: not an id; they are 0 to {self.vocab_size - 1}")
        if self._bytes is None:
            return str(self._tokenizer.decode(ids))
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def to_bytes(self, ids: np.ndarray) -> bytes:
        return self.decode(ids).encode() if self._bytes is None else b"".join(self._bytes[i] for i in ids.tolist())

    def sha256(self) -> str:
        return hashlib.sha256(f"{self.end_of_text} {self.text}".encode()).hexdigest()

    def _byte_table(self, ids: dict[str, int]) -> list[bytes]:
        """Id → bytes. Added tokens are text as they are, special ones stand for none."""
        table = [b""] * self.vocab_size
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        for token, i in ids.items():
            if all(character in byte_of for character in token):
                table[i] = bytes(byte_of[character] for character in token)
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            table[i] = b"" if added.special else added.content.encode()
        return table


class IdTokenizer:
    """For data that are no text: the text of a sequence is its ids in decimal, with spaces between them."""

    start = 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        """uint32 (N,). Raises ValueError for a word that is no id below vocab_size."""
        ids = [int(word) for word in text.split()]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"{wrong[0]}: not an id; they are 0 to {self.vocab_size - 1}")
        return np.array(ids, np.uint32)

    def decode(self, ids: Ids) -> str:
        return " ".join(str(int(i)) for i in ids)


def _is_byte_level(loaded: dict[str, Any]) -> bool:
    """Whether the decoder, or one of a sequence of decoders, is GPT-2's map of characters to bytes."""
    decoder = loaded.get("decoder") or {}
    return any(each.get("type") == "ByteLevel" for each in (decoder, *decoder.get("decoders", ())))


def byte_characters() -> list[str]:
    """GPT-2's character for each byte: printable ones stand for themselves, the others for the code points from 256."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
