"""A run's data: from the ``data`` group to what a run trains on, what it is scored on, and what its tokens mean."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np

from xattn.data.batches import (
    Batches,
    EvaluationWindows,
    MixtureBatches,
    TrainingBatches,
    Windows,
    in_batches,
    shares,
    window_starts,
)
from xattn.data.cache import Tokens
from xattn.data.config import DataConfig, MemmapConfig, Tokenised, has_segments
from xattn.data.corpus import Corpus, load_corpus
from xattn.data.task import Task, TaskBatches, evaluation_examples
from xattn.data.tokenizer import ByteTokenizer, IdTokenizer, JsonTokenizer, TextTokenizer, Tokenizer
from xattn.errors import BadInput, IntegrityError
from xattn.runs import run_folder


@dataclass(frozen=True)
class RunData:
    """What everyone needs of the data of one run.

    batch: the training windows of each update. windows: those that every evaluation scores, in batches of one shape.
    tokenizer: a :class:`TextTokenizer` where the tokens stand for text. sha256: of all that was read to make them.
    description: for people, ``11,834,567 bytes of training text``. scored_size: bytes of the text that the scored
    tokens were made from; None: that was not read here, and counts as what they decode to. gives_back: whether tokens
    decode to it. corpus_size: bytes of the corpus's files; None where no files of text were read.
    """

    batch: Batches
    windows: Sequence[Windows]
    tokenizer: Tokenizer
    sha256: str
    description: str
    scored_size: int | None = None
    gives_back: bool = True
    corpus_size: int | None = None

    @cached_property
    def optional(self) -> tuple[tuple[str, int], ...]:
        """The optional arrays that all windows come with, of training and evaluation, and their widths."""
        return self.windows[0].optional

    @property
    def tokenizer_json(self) -> str | None:
        """What the run's folder keeps of the tokenizer; None for one that the config alone says."""
        return self.tokenizer.text if isinstance(self.tokenizer, JsonTokenizer) else None

    def check_tokenizer(self, folder: Path) -> None:
        """Raises :class:`IntegrityError` where the run in that folder does not keep this tokenizer."""
        if (here := self.tokenizer_json) is None:
            return
        file = folder / run_folder.TOKENIZER
        if not file.is_file() or file.read_bytes() != here.encode():
            raise IntegrityError(f"{file}: is not the tokenizer that this run began with; begin anew with resume=never")

    def scored_bytes(self) -> bytes | None:
        """The text that the scored tokens were made from, window after window; None where they don't give it back."""
        if not isinstance(self.tokenizer, TextTokenizer) or not (self.gives_back or self.tokenizer.is_byte_level):
            return None
        found = b"".join(self.tokenizer.to_bytes(w.targets[w.weights > 0]) for w in self.windows)
        return found if self.scored_size in (None, len(found)) else None

    def bytes_per_token(self) -> float | None:
        """Of the scored tokens; None where they stand for no bytes."""
        size = len(self.scored_bytes() or b"") if self.scored_size is None else self.scored_size
        return size / sum(int((windows.weights > 0).sum()) for windows in self.windows) or None


def load_data(
    config: DataConfig,
    *,
    context_length: int,
    batch_size: int,
    windows: int | Literal["all"],
    seed: int,
    tokenizer: TextTokenizer | None = None,
    say: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> RunData:
    """Reads the data, the same way every time. Raises :class:`BadInput` for what cannot be used, and
    :class:`Preempted` where ``stop()`` says so while they are tokenised.

    windows: how many are scored. tokenizer: what text is read by, in the place of the config's own.
    """
    if isinstance(config, Task):
        return _task_data(config, context_length, batch_size, windows, seed)
    corpus = load_corpus(config, context_length, tokenizer=tokenizer, say=say, stop=stop)
    parts, weights = corpus.parts, [part.weight for part in corpus.parts]
    packed_at = None
    if has_segments(config):
        packed_at = corpus.end_of_text
    sizes: _Sizes = {"context_length": context_length, "batch_size": batch_size, "packed_at": packed_at}
    batches = [TrainingBatches(part.train, seed=seed, **sizes) for part in parts]
    counts = ["all" for _ in parts] if windows == "all" else np.maximum(shares(weights, windows), 1).tolist()
    scored = [
        (part.validation, window_starts(part.validation, context_length, count))
        for part, count in zip(parts, counts, strict=True)
    ]
    size = sum(len(part.train) for part in parts)
    if isinstance(corpus.tokenizer, ByteTokenizer):
        description = f"{size:,} bytes of training text"
    else:
        description = f"{size:,} tokens to train on, of {corpus.tokenizer.vocab_size:,} kinds"
    held_out = EvaluationWindows(scored, **sizes)
    return RunData(
        batch=batches[0] if len(parts) == 1 else MixtureBatches(batches, weights, batch_size=batch_size, seed=seed),
        windows=held_out,
        tokenizer=corpus.tokenizer,
        sha256=corpus.sha256,
        description=description,
        scored_size=None if isinstance(config, MemmapConfig) else _scored_size(held_out, corpus),
        gives_back=corpus.gives_back,
        corpus_size=corpus.size,
    )


def _scored_size(windows: EvaluationWindows, corpus: Corpus) -> int:
    """How many bytes of text the targets of the windows were made from."""
    size, tokenizer = 0, corpus.tokenizer
    assert isinstance(tokenizer, TextTokenizer)
    for ids, part in windows.targets():
        sizes = ids.sizes(part, tokenizer.sizes) if isinstance(ids, Tokens) else tokenizer.sizes(ids[part])
        size += int(sizes.sum())
    return size


class _Sizes(TypedDict):
    context_length: int
    batch_size: int
    packed_at: int | None


def load_tokenizer(config: DataConfig, folder: Path) -> Tokenizer:
    """The tokenizer of a run that is there already, from its folder: its source may be gone.

    Raises :class:`IntegrityError` where the folder lacks it.
    """
    if isinstance(config, Task) or (isinstance(config, MemmapConfig) and config.tokenizer is None):
        return IdTokenizer(config.vocab_size)
    if not isinstance(config, MemmapConfig) and config.tokenizer == "bytes":
        return ByteTokenizer(end_of_text=config.documents != "joined")
    file = folder / run_folder.TOKENIZER
    try:
        text = file.read_text("utf-8")
        if isinstance(config, MemmapConfig):
            return JsonTokenizer(text, vocab_size=config.vocab_size)
        tokenizer = JsonTokenizer(text, end_of_text=config.end_of_text)
        return tokenizer.without_border() if config.documents == "joined" else tokenizer
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{file}: the run's tokenizer cannot be read: {error}") from error


def as_documents(tokenizer: TextTokenizer, config: Tokenised) -> TextTokenizer:
    """The same tokens, with an end of text between documents where ``data.documents`` of another corpus asks for it.

    Raises :class:`BadInput` where the tokenizer has none.
    """
    joined = config.documents == "joined"
    if isinstance(tokenizer, ByteTokenizer):
        return ByteTokenizer(end_of_text=not joined)
    assert isinstance(tokenizer, JsonTokenizer)
    if joined:
        return tokenizer.without_border()
    try:
        tokenizer = JsonTokenizer(tokenizer.text, end_of_text=config.end_of_text, vocab_size=tokenizer.vocab_size)
    except ValueError as error:
        raise BadInput(f"data.end_of_text: the run's tokenizer {error}") from error
    if tokenizer.end_of_text is None:
        raise BadInput(f"data.documents = {config.documents}: the run's tokenizer has no end of text; allowed: joined")
    return tokenizer


def _task_data(config: Task, context_length: int, batch_size: int, windows: int | Literal["all"], seed: int) -> RunData:
    if windows == "all":
        raise BadInput(f"evaluation.windows = all: data={config.name} has no end; give a number")
    config.check(context_length)
    batch = TaskBatches(config, context_length, batch_size, seed)
    scored = evaluation_examples(config, context_length=context_length, number=windows).windows
    # Nothing is read: what is hashed is what the generator makes of this config, which NumPy's version has a part in.
    made = hashlib.sha256()
    for array in (*TaskBatches(config, context_length, 1, seed=0)(0), *scored):
        made.update(b"" if array is None else array.tobytes())
    return RunData(
        batch=batch,
        windows=in_batches(scored, batch_size),
        tokenizer=IdTokenizer(config.vocab_size),
        sha256=made.hexdigest(),
        description=f"sequences of {config.name}, made as they are needed",
    )
