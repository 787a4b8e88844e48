"""What a synthetic task is: sequences in which some tokens can be inferred from earlier ones.

Each task is a corpus (``data=mqar``), whose examples never repeat and are a pure function of (seed, step). It is also a
probe of a model trained on something else (``evaluation.probes=[induction]``). Letters: n sequences, S inputs of each
(context_length), V vocabulary. A sequence has S + 1 tokens; weights, (n, S), are 1 at inputs that ask for an answer.
The answer is the next token, except in MQAR, where answers are not in the sequence.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Self

import numpy as np
from pydantic import Field

from xattn.data.batches import ALL_ROWS, Batch
from xattn.errors import BadInput
from xattn.section import Section, kind_name

# The second word of a generator's seed: training and evaluation never share an example's randomness.
TRAINING, EVALUATION = 0, 1
PROBES_OF_TEXT = ("in_context", "extrapolation")  # the values of ``evaluation.probes`` that are not tasks
VocabSize = Annotated[int, Field(ge=8, le=2**24)]


class Examples(NamedTuple):
    """Sequences of a task."""

    tokens: np.ndarray
    """int32 (n, S + 1)."""
    distance: np.ndarray
    """int32 (n, S): distance from the next token back to the answer; 0 if nothing is asked for."""
    most: int
    """Number of answers per sequence, or an upper bound; the same for all sequences of a run."""
    answers: np.ndarray | None = None
    """int32 (n, S), as in :class:`Batch`."""

    @property
    def batch(self) -> Batch:
        asked = self.distance > 0
        places = np.sort(np.argsort(~asked, axis=1, kind="stable")[:, : self.most], axis=1).astype(np.int32)
        return Batch(self.tokens, asked.astype(np.float32), answers=self.answers, places=places)


class Task(Section):
    """A task and its numbers: the group ``data`` of a run that is trained on it.

    A subclass has a ``name`` of type ``Literal[…]``, its numbers as fields, and :meth:`examples`.
    """

    name: str
    vocab_size: VocabSize
    """Number of different tokens."""

    @abstractmethod
    def examples(self, generator: np.random.Generator, number: int, length: int) -> Examples:
        """Return ``number`` sequences of ``length`` inputs, for a length that :meth:`refusal` accepts."""

    def refusal(self, length: int) -> str | None:
        """Return why no sequence has this length, starting with the key to change; None if some do."""
        return None

    @classmethod
    def as_probe(cls, vocab_size: int, length: int) -> Self:
        """Return the task with the vocabulary and length of a model that was trained on something else."""
        return cls(name=kind_name(cls), vocab_size=vocab_size)

    def check(self, length: int) -> None:
        """Raise :class:`BadInput` if there are no sequences of this length."""
        if (refusal := self.refusal(length)) is not None:
            raise BadInput(refusal)


@dataclass(frozen=True)
class TaskBatches:
    """The training batches of a task: ``batch(step)`` depends on (task, context_length, batch_size, seed, step)."""

    task: Task
    context_length: int
    batch_size: int
    seed: int

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Batch:
        generator = np.random.default_rng([self.seed, TRAINING, step])
        return self.task.examples(generator, self.batch_size, self.context_length).batch.rows(rows)


def evaluation_examples(task: Task, *, context_length: int, number: int) -> Examples:
    """Return the sequences that every evaluation of every run scores."""
    return task.examples(np.random.default_rng([0, EVALUATION]), number, context_length)


def measures(distance: np.ndarray, losses: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Return a model's scores on examples, from distance, losses and correct, all (n, S).

    loss and accuracy: means over all answers. exact: the share of sequences with every answer right.
    accuracy_to_position_x: over answers to inputs in one quarter of the sequence, which ends at x.
    accuracy_to_distance_x: over distances in (x / 2, x]. A part without answers is left out.
    """
    asked = distance > 0
    found = {
        "loss": _mean(losses, asked),
        "accuracy": _mean(correct, asked),
        "exact": float((correct | ~asked).all(axis=1).mean()),
    }
    length = distance.shape[1]
    places = np.broadcast_to(np.arange(length), distance.shape)
    for quarter in range(4):
        start, end = quarter * length // 4, (quarter + 1) * length // 4
        part = asked & (places >= start) & (places < end)
        if part.any():
            found[f"accuracy_to_position_{end}"] = _mean(correct, part)
    reach = 1
    while reach < 2 * length:
        part = asked & (distance > reach // 2) & (distance <= reach)
        if part.any():
            found[f"accuracy_to_distance_{reach}"] = _mean(correct, part)
        reach *= 2
    return found


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    return float(values[where].mean(dtype=np.float64))
