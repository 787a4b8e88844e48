"""What a model has to beat, on values known without a computer."""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np
import pytest

from xattn.data.baselines import gzip_bits_per_byte, unigram_bits_per_byte
from xattn.data.batches import Batching, HeldOutBatches, TrainingBatches
from xattn.data.run_data import RunData
from xattn.data.tokenizer import ByteTokenizer


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        (b"a" * 9, 0.0),
        (b"ab" * 8, 1.0),
        (b"abcd" * 3, 2.0),
        (bytes(range(256)), 8.0),
        (b"aaab", 2 - 0.75 * np.log2(3)),
        (b"aabc" * 5, 1.5),
    ],
)
def test_unigram_entropy_of_known_texts(text: bytes, bits: float) -> None:
    assert unigram_bits_per_byte(text) == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize("text", [b"a" * 1000, b"abc" * 333, bytes(range(256)) * 3, b"x"])
def test_gzip_is_deflate_with_a_header_of_eighteen_bytes(text: bytes) -> None:
    """zlib's own header and checksum are 6 bytes, gzip's 18."""
    assert gzip_bits_per_byte(text) * len(text) / 8 == len(zlib.compress(text, 9)) - 6 + 18


def test_the_baselines_see_the_very_bytes_that_are_scored() -> None:
    text = bytes(range(100))
    tokens = np.frombuffer(text, np.uint8)

    def scored(sequences: int | Literal["all"]) -> bytes | None:
        batching = Batching(context_length=7, batch_size=4, sequences=sequences, seed=0)
        chosen = HeldOutBatches([(tokens, 1.0)], batching)
        batch = TrainingBatches([(tokens, 1.0)], batching)
        return RunData(batch, chosen, ByteTokenizer(), "", "").scored_bytes()

    assert scored("all") == text[1:]
    assert scored(2) == text[1:8] + text[92:99]
