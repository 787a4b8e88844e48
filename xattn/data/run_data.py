"""A run's data: from the ``data`` group to what a run trains on, what it is scored on, and what its tokens mean."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from xattn.data.batches import Batches, TrainingBatches, Windows, evaluation_windows, in_batches
from xattn.data.config import DataConfig
from xattn.data.corpus import load_corpus
from xattn.data.task_config import TaskConfig
from xattn.data.tasks import TaskBatches, check, evaluation_examples
from xattn.data.tokenizer import ByteTokenizer, IdTokenizer, TextTokenizer, Tokenizer
from xattn.errors import BadInput


@dataclass(frozen=True)
class RunData:
    """What everyone needs of the data of one run.

    batch: the training windows of each update. windows: those that every evaluation scores, in batches of one shape.
    tokenizer: a :class:`TextTokenizer` where the tokens stand for text. sha256: of all that was read to make them.
    description: for people, ``11,834,567 bytes of training text``.
    """

    batch: Batches
    windows: Sequence[Windows]
    tokenizer: Tokenizer
    sha256: str
    description: str

    @property
    def has_segments(self) -> bool:
        """Whether all windows, of training and evaluation, come with segment_ids, or none do."""
        return self.windows[0].segment_ids is not None

    def scored_bytes(self) -> bytes | None:
        """What the targets of the evaluation stand for, window after window; None where they stand for no bytes."""
        if not isinstance(self.tokenizer, TextTokenizer):
            return None
        return b"".join(self.tokenizer.to_bytes(w.tokens[:, 1:][w.weights > 0]) for w in self.windows)

    def bytes_per_token(self) -> float | None:
        """Of the scored tokens; None where they stand for no bytes."""
        scored = self.scored_bytes()
        return None if scored is None else len(scored) / sum(float(w.weights.sum()) for w in self.windows)


def load_data(
    config: DataConfig, *, context_length: int, batch_size: int, windows: int | Literal["all"], seed: int
) -> RunData:
    """Reads the data, the same way every time. Raises :class:`BadInput` for what cannot be used.

    windows: how many are scored.
    """
    if isinstance(config, TaskConfig):
        return _task_data(config, context_length, batch_size, windows, seed)
    corpus = load_corpus(config, context_length)
    return RunData(
        batch=TrainingBatches(corpus.train, context_length=context_length, batch_size=batch_size, seed=seed),
        windows=evaluation_windows(
            corpus.validation, context_length=context_length, batch_size=batch_size, windows=windows
        ),
        tokenizer=ByteTokenizer(),
        sha256=corpus.sha256,
        description=f"{len(corpus.train):,} bytes of training text",
    )


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of a run that is there already, without its data."""
    if isinstance(config, TaskConfig):
        return IdTokenizer(config.vocab_size)
    return ByteTokenizer()


def _task_data(
    config: TaskConfig, context_length: int, batch_size: int, windows: int | Literal["all"], seed: int
) -> RunData:
    if windows == "all":
        raise BadInput(f"evaluation.windows = all: data={config.name} has no end; give a number")
    check(config, context_length)
    batch = TaskBatches(config, context_length, batch_size, seed)
    scored = evaluation_examples(config, context_length=context_length, number=windows).windows
    # Nothing is read: what is hashed is what the generator makes of this config, which NumPy's version has a part in.
    made = hashlib.sha256()
    for array in (*TaskBatches(config, context_length, 1, seed=0)(0)[:2], *scored[:2]):
        made.update(array.tobytes())
    return RunData(
        batch=batch,
        windows=in_batches(scored.tokens, scored.weights, batch_size),
        tokenizer=IdTokenizer(config.vocab_size),
        sha256=made.hexdigest(),
        description=f"sequences of {config.name}, made as they are needed",
    )
