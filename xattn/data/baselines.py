"""What a model has to beat: two simple ways to spend bits on the same bytes that it is scored on."""

from __future__ import annotations

import gzip

import numpy as np

MIN_GZIP_BYTES = 10_000  # below this, gzip's header and tables count as much as the text


def unigram_bits_per_byte(text: bytes) -> float:
    """Return the entropy −Σ p log₂ p of the text's byte frequencies. No code that ignores context does better on it."""
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    p = counts[counts > 0] / len(text)
    return float(-(p * np.log2(p)).sum())


def gzip_bits_per_byte(text: bytes) -> float:
    """Return the text's size under gzip −9, header included, in bits per byte of the text."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)
