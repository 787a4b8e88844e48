"""From text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np

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
    """A tokenizer whose ids stand for bytes of text."""

    def to_bytes(self, ids: np.ndarray) -> bytes: ...


class ByteTokenizer:
    """Token ids are the bytes of the text in UTF-8; any bytes at all can be encoded."""

    vocab_size = 256
    start = ord("\n")

    def encode(self, text: str | bytes) -> np.ndarray:
        """uint8 (N,), one id a byte."""
        return np.frombuffer(text.encode("utf-8") if isinstance(text, str) else text, np.uint8)

    def decode(self, ids: Ids) -> str:
        """Bytes that are not UTF-8, a model's slips among them, become U+FFFD. Raises ValueError for ids over 255."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def to_bytes(self, ids: np.ndarray) -> bytes:
        return ids.astype(np.uint8).tobytes()


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
