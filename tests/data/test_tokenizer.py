"""Bytes are tokens."""

from __future__ import annotations

import numpy as np
import pytest

from xattn.data.tokenizer import ByteTokenizer, IdTokenizer


@pytest.mark.parametrize("text", ["", "plain", "äöü 字 🎲", "line\r\n\0end", "\ufeffmark"])
def test_text_comes_back(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(text.encode())
    assert ByteTokenizer().decode(ids) == text


def test_any_bytes_can_be_encoded_and_shown() -> None:
    every = bytes(range(256))
    assert ByteTokenizer().encode(every).tobytes() == every
    assert ByteTokenizer().decode(np.frombuffer(every, np.uint8).astype(np.int32)).startswith("\0\x01")
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert ByteTokenizer().vocab_size == 256
    assert ByteTokenizer(end_of_text=True).vocab_size == 257


@pytest.mark.parametrize("wrong", [256, -1])
def test_ids_out_of_range_are_errors(wrong: int) -> None:
    with pytest.raises(ValueError, match="256"):
        ByteTokenizer().decode([wrong])


def test_ids_are_written_in_decimal() -> None:
    tokenizer = IdTokenizer(12)
    assert tokenizer.decode(np.array([3, 0, 11])) == "3 0 11"
    assert tokenizer.encode("3 0\n 11").tolist() == [3, 0, 11]
    with pytest.raises(ValueError, match="12: not an id; ids are 0 to 11"):
        tokenizer.encode("3 12")
    with pytest.raises(ValueError, match="word"):
        tokenizer.encode("word")
