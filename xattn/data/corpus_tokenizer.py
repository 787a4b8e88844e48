"""The tokenizer of a corpus: bytes, a file, or BPE trained on the corpus itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from xattn.data.bpe import from_tiktoken, train_bpe
from xattn.data.cache import stored_text
from xattn.data.config import DataConfig, MemmapConfig, PythonStdlibConfig, Tokenised
from xattn.data.hf import Source
from xattn.data.tokenizer import ByteTokenizer, IdTokenizer, JsonTokenizer, TextTokenizer, Tokenizer
from xattn.errors import BadInput

BPE_BYTES = 100 * 10**6  # BPE is trained on this much of the training text, from its beginning
FORMAT = 3  # of the cache's content; raise it when the same bytes give other ids or another record


def tokenizer_on_disk(config: Tokenised) -> TextTokenizer:
    """Return the config's tokenizer, which is not ``bpe``. Raises :class:`BadInput` if its file cannot be used."""
    if config.tokenizer == "bytes":
        return ByteTokenizer(end_of_text=config.documents != "joined")
    path = Path(os.path.expanduser(config.tokenizer))
    given = f"data.tokenizer = {config.tokenizer!r}"
    try:
        content = path.read_bytes()
        if path.suffix == ".tiktoken":
            assert config.tiktoken_pattern is not None
            digest = hashlib.sha256(content).hexdigest()[:24]
            key = f"tiktoken-{FORMAT}-{config.tiktoken_pattern}-{digest}"
            text = stored_text(key, lambda: from_tiktoken(content, str(config.tiktoken_pattern)))
        else:
            text = content.decode("utf-8")
        return _with_border(JsonTokenizer(text, end_of_text=config.end_of_text, name=path.name), config)
    except OSError as error:
        raise BadInput(
            f"{given}: {error.strerror}; allowed: bytes, bpe, the path of a tokenizer.json or a .tiktoken file"
        ) from error
    except ValueError as error:
        raise BadInput(f"{given}: {error}") from error


def vocab_size(config: DataConfig) -> int:
    """Return the vocabulary size of a model trained on this data, without reading the data.

    It is exact if the config has it (bytes, memmap, tasks), and for a tokenizer's file, which is read. For ``bpe`` it
    is the requested ``data.vocab_size``: the real one is smaller if the text has too few pairs to merge. Raises
    :class:`BadInput` if the tokenizer's file cannot be used.
    """
    if not isinstance(config, Tokenised) or config.tokenizer == "bpe":
        return config.vocab_size
    file = Path(os.path.expanduser(config.tokenizer))
    stat = file.stat() if file.is_file() else None
    return _vocab_size_on_disk(config, *((stat.st_size, stat.st_mtime_ns) if stat else ()))


@lru_cache(maxsize=32)
def _vocab_size_on_disk(config: Tokenised, *changed: int) -> int:
    """Return the size, cached while the tokenizer's file keeps its size and time: a sweep asks once for each run."""
    return tokenizer_on_disk(config).vocab_size


def bpe(config: Tokenised, sources: Sequence[tuple[Source, float]], digests: Sequence[str]) -> TextTokenizer:
    all_of_it = isinstance(config, PythonStdlibConfig)  # its held-out part is in other files
    weights = sum(weight for _, weight in sources)

    def trained_on(source: Source, most: float) -> float:
        """Return the bytes of the source's text before its held-out part, at most ``most``."""
        share, counted = 1.0 if all_of_it else 1 - config.validation_fraction, 0
        for block in itertools.chain.from_iterable(map(source.read, source.pieces())):
            counted += len(block.text)
            if counted * share >= most:
                return most
        return counted * share

    def texts() -> Iterator[str]:
        for source, weight in sources:
            left = trained_on(source, BPE_BYTES * weight / weights)
            for block in itertools.chain.from_iterable(map(source.read, source.pieces())):
                if left <= 0:
                    break
                yield block.text[: int(left)].decode("utf-8", errors="replace")
                left -= len(block.text)

    version = importlib.metadata.version("tokenizers")
    named = [FORMAT, [*digests], [w for _, w in sources], config.vocab_size, config.validation_fraction, BPE_BYTES]
    key = hashlib.sha256(json.dumps([*named, version]).encode()).hexdigest()[:32]
    text = stored_text(f"bpe-{key}", lambda: train_bpe(texts(), config.vocab_size))
    return _with_border(JsonTokenizer(text, name=f"bpe of {config.vocab_size:,}"), config)


def _with_border(tokenizer: JsonTokenizer, config: Tokenised) -> JsonTokenizer:
    if config.documents == "joined":
        return tokenizer.without_border()
    if tokenizer.end_of_text is None:
        raise BadInput(
            f"data.documents = {config.documents!r}: {tokenizer.name} has no end-of-text token with a usual name; "
            "name one with data.end_of_text, or use data.documents=joined"
        )
    return tokenizer


def json_tokenizer(config: MemmapConfig) -> Tokenizer:
    if config.tokenizer is None:
        return IdTokenizer(config.vocab_size)
    path = Path(os.path.expanduser(config.tokenizer))
    try:
        return JsonTokenizer(path.read_text("utf-8"), vocab_size=config.vocab_size, name=path.name)
    except OSError as error:
        raise BadInput(f"data.tokenizer = {config.tokenizer!r}: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"data.tokenizer = {config.tokenizer!r}: {error}") from error
