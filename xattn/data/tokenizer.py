"""From text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class ByteTokenizer:
    """Token ids are the bytes of the text in UTF-8; any bytes at all can be encoded."""

    vocab_size = 256
    bytes_per_token = 1.0

    def encode(self, text: str | bytes) -> np.ndarray:
        """uint8 (N,), one id a byte."""
        return np.frombuffer(text.encode("utf-8") if isinstance(text, str) else text, np.uint8)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Bytes that are not UTF-8, a model's slips among them, become U+FFFD. Raises ValueError for ids over 255."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")
