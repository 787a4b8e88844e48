"""The size of a run's vocabulary, without reading its data."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from xattn.data.config import DataConfig, Tokenised
from xattn.data.corpus import tokenizer_on_disk
from xattn.data.tokenizer import ByteTokenizer


def vocab_size(config: DataConfig) -> int:
    """Return the vocabulary size of a model trained on this data, without reading the data.

    It is exact if the config has it (bytes, memmap, tasks), and for a tokenizer's file, which is read. For ``bpe`` it
    is the requested ``data.vocab_size``: the real one is smaller if the text has too few pairs to merge. Raises
    :class:`BadInput` if the tokenizer's file cannot be used.
    """
    if not isinstance(config, Tokenised) or config.tokenizer == "bpe":
        return config.vocab_size
    if config.tokenizer == "bytes":
        return ByteTokenizer(end_of_text=config.documents != "joined").vocab_size
    file = Path(os.path.expanduser(config.tokenizer))
    stat = file.stat() if file.is_file() else None
    return _of_file(config, *((stat.st_size, stat.st_mtime_ns) if stat else ()))


@lru_cache(maxsize=32)
def _of_file(config: Tokenised, *changed: int) -> int:
    """Return the size from a tokenizer's file, cached while its size and time stay: a sweep asks once for each run."""
    return tokenizer_on_disk(config).vocab_size
