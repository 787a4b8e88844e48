"""What a model has to beat: two ways to spend bits on the very bytes that it is scored on."""

from __future__ import annotations

import gzip

import numpy as np

MIN_GZIP_BYTES = 10_000  # below that gzip's number is of its header and tables as much as of the text


def unigram_bits_per_byte(text: bytes) -> float:
    """Entropy of the text's own byte frequencies: −Σ p log₂ p. No code that ignores context can do better on it."""
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    p = counts[counts > 0] / len(text)
    return float(-(p * np.log2(p)).sum())


def gzip_bits_per_byte(text: bytes) -> float:
    """Size of the text under gzip −9, header included, over its own, in bits per byte."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)
