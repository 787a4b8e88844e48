"""Corpora: from the ``data`` group to token ids for training and held-out token ids, and a hash of what was read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xattn.data.batches import Ids
from xattn.data.cache import Content, Tokens, stored_tokens
from xattn.data.config import (
    DataConfig,
    HFConfig,
    MemmapConfig,
    MixtureConfig,
    PythonStdlibConfig,
    TextConfig,
    Tokenised,
)
from xattn.data.corpus_tokenizer import FORMAT, bpe, json_tokenizer, tokenizer_on_disk
from xattn.data.documents import PIECE_BYTES, Block, Chunk, Files
from xattn.data.finding import Found, find
from xattn.data.hf import HFDataset, Source
from xattn.data.memmap import open_memmaps
from xattn.data.task import Task
from xattn.data.tokenizer import ByteTokenizer, Encoded, TextTokenizer, Tokenizer
from xattn.errors import BadInput

IN_MEMORY_BYTES = 64 * 2**20  # reading a smaller corpus of bytes is faster than checking a cache of it
_BATCH_BYTES = 4 * 2**20  # tokenised in one call
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Part:
    """A training and a held-out part of a corpus."""

    train: Ids
    validation: Ids
    weight: float = 1.0
    """The part's share of the sequences."""


@dataclass(frozen=True)
class Corpus:
    """One part, or one for each source of a mixture."""

    parts: tuple[Part, ...]
    tokenizer: Tokenizer
    sha256: str
    """Hash of all bytes that were read, and of the tokenizer."""
    end_of_text: int | None
    """Id of the token between documents; None without one."""
    gives_back: bool = True
    """Whether the tokens decode to the text that was read."""
    size: int | None = None
    """Bytes of the corpus's files; None if it has no files of its own."""


def check(config: DataConfig) -> None:
    """Raise :class:`BadInput` for defects that show without reading the files through."""
    if isinstance(config, Task):
        return  # it has no files
    if isinstance(config, MemmapConfig):
        open_memmaps(config)
        json_tokenizer(config)
    elif not isinstance(config, HFConfig):
        for source, _ in _file_sources(config):
            source.look()
    if isinstance(config, Tokenised) and config.tokenizer != "bpe":
        tokenizer_on_disk(config)


def load_corpus(
    config: DataConfig,
    context_length: int,
    *,
    tokenizer: TextTokenizer | None = None,
    say: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> Corpus:
    """Read the corpus and split it, the same way every time.

    tokenizer: replaces the config's own.

    Raises :class:`BadInput` for what is missing, unreadable, or too short for one sequence of context_length tokens and
    their successors in each split. Raises :class:`Preempted` if ``stop()`` becomes true during tokenisation.
    """
    if isinstance(config, MemmapConfig):
        corpus = _mapped(config)
    else:
        assert isinstance(config, Tokenised)
        corpus = _tokenised(config, tokenizer, say, stop)
    unit = "bytes" if isinstance(corpus.tokenizer, ByteTokenizer) else "tokens"
    for part, name in zip(corpus.parts, _names(config), strict=True):
        for split, ids in (("training", part.train), ("validation", part.validation)):
            if len(ids) < context_length + 1:
                raise BadInput(
                    f"{name}: its {split} part has {len(ids)} {unit}; it needs at least backend.context_length + 1 = "
                    f"{context_length + 1}"
                )
    return corpus


def library_files() -> dict[str, Path]:
    """Return the files of ``data=python_stdlib`` by name, sorted. Raises :class:`BadInput` if there are none."""
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, Path] = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_LIBRARY]  # not looked into
        modules = [Path(folder, name) for name in names if name.endswith(".py")]
        files |= {module.relative_to(root).as_posix(): module for module in modules}
    if not files:
        raise BadInput(f"data=python_stdlib: this Python has no sources in {root}; use data=text data.path=…")
    return dict(sorted(files.items()))


def _mapped(config: MemmapConfig) -> Corpus:
    found = open_memmaps(config)
    digests = [each.check_ids(config.vocab_size) for each in found]
    if len(found) == 1:
        part = _split_at_end(found[0].ids, config.validation_fraction)
    else:
        part = Part(found[0].ids, found[1].ids)
    sha256 = hashlib.sha256("".join(digests).encode()).hexdigest()
    return Corpus((part,), json_tokenizer(config), sha256, config.end_of_text)


# ---- text ------------------------------------------------------------------------------------------------------------


def _tokenised(
    config: Tokenised, tokenizer: TextTokenizer | None, say: Callable[[str], None], stop: Callable[[], bool]
) -> Corpus:
    fraction = config.validation_fraction
    sources: list[tuple[Source, float]]
    if isinstance(config, PythonStdlibConfig):
        train, held_out = _split_by_file(library_files(), fraction)
        sources = [(Files(Found(files), key="data=python_stdlib"), 1.0) for files in (train, held_out)]
        to_learn = sources[:1]
    else:
        sources = [(HFDataset(config), 1.0)] if isinstance(config, HFConfig) else [*_file_sources(config)]
        to_learn = sources
    for source, name in zip((source for source, _ in sources), _names(config), strict=False):
        if isinstance(source, Files) and source.left_out:
            say(f"left out    from {name}: {source.left_out}")
    digests = [source.sha256() for source, _ in sources]
    if tokenizer is None:
        tokenizer = bpe(config, to_learn, digests) if config.tokenizer == "bpe" else tokenizer_on_disk(config)
    ids = [
        _ids(source, digest, tokenizer, say=say, stop=stop)
        for (source, _), digest in zip(sources, digests, strict=True)
    ]
    if isinstance(config, HFConfig) and config.streaming:  # its name is not its content: hash the ids instead
        digests = [
            hashlib.sha256(each[i : i + 2**22].tobytes()).hexdigest()
            for each in ids
            for i in range(0, len(each), 2**22)
        ]
    sha256 = hashlib.sha256(json.dumps([digests, tokenizer.sha256()]).encode()).hexdigest()
    gives_back = all(each.gives_back for each in ids if isinstance(each, Tokens))
    if not gives_back:
        say(f"tokenizer   {tokenizer.name} does not reproduce the text exactly; bits per byte count the original text")
    if isinstance(config, PythonStdlibConfig):
        parts = [Part(ids[0], ids[1])]
    else:
        parts = [_split_at_end(each, fraction, weight) for each, (_, weight) in zip(ids, sources, strict=True)]
    size = sum(source.size for source, _ in sources if isinstance(source, Files)) or None
    return Corpus(tuple(parts), tokenizer, sha256, tokenizer.end_of_text, gives_back, size)


def _file_sources(config: DataConfig | Tokenised) -> list[tuple[Files, float]]:
    names = _names(config)
    match config:
        case PythonStdlibConfig():
            return [(Files(Found([*map(str, library_files().values())]), key=names[0]), 1.0)]
        case TextConfig():
            return [(Files(find(config.path, names[0]), key="data.path", field=config.field), 1.0)]
    assert isinstance(config, MixtureConfig)
    return [
        (Files(find(each.path, name), key=name, field=each.field), each.weight)
        for each, name in zip(config.sources, names, strict=True)
    ]


def _names(config: DataConfig | Tokenised) -> list[str]:
    """Return how messages name each part."""
    match config:
        case PythonStdlibConfig():
            return ["data=python_stdlib"]
        case HFConfig():
            return [f"data.dataset = {config.dataset!r}"]
        case TextConfig() | MemmapConfig():
            return [f"data.path = {config.path!r}"]
    assert isinstance(config, MixtureConfig)
    return [f"data.sources[{number}].path = {each.path!r}" for number, each in enumerate(config.sources)]


def _ids(
    source: Source, digest: str, tokenizer: TextTokenizer, *, say: Callable[[str], None], stop: Callable[[], bool]
) -> Ids:
    pieces = source.pieces()
    dtype = np.dtype(np.uint8 if tokenizer.vocab_size <= 2**8 else "<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    if isinstance(tokenizer, ByteTokenizer) and 0 < sum(piece.size for piece in pieces) < IN_MEMORY_BYTES:
        encoded = _encode(source, pieces, tokenizer)
        return np.concatenate([np.zeros(0, dtype), *(each.ids.astype(dtype, copy=False) for each in encoded)])
    shards = _grouped(pieces)
    version = importlib.metadata.version("tokenizers")
    files = {file: number for number, file in enumerate(dict.fromkeys(piece.file for piece in pieces))}
    cuts = [[(files[piece.file], piece.start, piece.end) for piece in shard] for shard in shards]  # numbers, not names
    key = json.dumps([FORMAT, version, digest, tokenizer.sha256(), tokenizer.end_of_text, cuts])
    content = Content(
        key=hashlib.sha256(key.encode()).hexdigest()[:32],
        shards=len(shards),
        encode=lambda number: _encode(source, shards[number], tokenizer),
        dtype=dtype,
        sizes_of=tokenizer.sizes,
    )
    return stored_tokens(content, say=say, stop=stop)


def _grouped(pieces: Sequence[Chunk]) -> list[list[Chunk]]:
    """Group consecutive pieces into shards of about PIECE_BYTES."""
    groups: list[list[Chunk]] = []
    size = 0
    for piece in pieces:
        if not groups or size + piece.size > PIECE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    return groups


def _encode(source: Source, pieces: Sequence[Chunk], tokenizer: TextTokenizer) -> Iterator[Encoded]:
    batch: list[Block] = []
    size = left = 0
    for piece in pieces:
        for block in source.read(piece):
            batch.append(block)
            size += len(block.text)
            if size >= _BATCH_BYTES:
                encoded, left = _encode_batch(batch, tokenizer, left)
                yield encoded
                batch, size = [], 0
    yield _encode_batch(batch, tokenizer, left)[0]


def _encode_batch(batch: Sequence[Block], tokenizer: TextTokenizer, left: int) -> tuple[Encoded, int]:
    """Encode the batch, with an end of text before each document.

    left: bytes of earlier blocks that have no token; they count with the first token of this batch. Bytes at its own
    end that have no token are returned.
    """
    border = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], np.uint32)
    by_itself = tokenizer.is_byte_level and not tokenizer.sizes(border).any()
    nothing = Encoded(border, None if by_itself else np.zeros(len(border), np.uint32), True)
    found = list[Encoded]()
    in_tokens = tokenizer.encode_blocks([block.text for block in batch])
    for block, encoded in zip(batch, in_tokens, strict=True):
        if block.begins and len(border):
            found.append(nothing)
        if not len(encoded.ids):  # its bytes count with the next token
            left += len(block.text)
        elif left:
            sizes = tokenizer.sizes(encoded.ids) if encoded.sizes is None else encoded.sizes
            sizes[0] += left
            encoded, left = encoded._replace(sizes=sizes), 0
        found.append(encoded)
    whole = Encoded(
        np.concatenate([np.zeros(0, np.uint8), *(each.ids for each in found)]),
        None,
        gives_back=all(each.gives_back for each in found),
    )
    if any(each.sizes is not None for each in found):
        every = [tokenizer.sizes(each.ids) if each.sizes is None else each.sizes for each in found]
        whole = whole._replace(sizes=np.concatenate(every))
    return whole, left


# ---- files and splits ------------------------------------------------------------------------------------------------


def _split_by_file(files: dict[str, Path], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Hold out files, ordered by the hashes of their names, until they reach that fraction of the bytes."""
    sizes = {name: file.stat().st_size for name, file in files.items()}
    held_out, wanted = set[str](), validation_fraction * sum(sizes.values())
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if wanted <= 0:
            break
        held_out.add(name)
        wanted -= sizes[name]
    train = [str(file) for name, file in files.items() if name not in held_out]
    return train, [str(file) for name, file in files.items() if name in held_out]


def _split_at_end(ids: Ids, validation_fraction: float, weight: float = 1.0) -> Part:
    border = len(ids) - int(len(ids) * validation_fraction)
    if isinstance(ids, Tokens):
        return Part(ids.part(0, border), ids.part(border, len(ids)), weight)
    return Part(ids[:border], ids[border:], weight)
