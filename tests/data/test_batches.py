"""Which sequences a training step sees, and which ones an evaluation scores."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import pytest

from xattn.data.batches import Batching, HeldOutBatches, TrainingBatches

# The token at position i says i, so that a sequence says where it stands.
TOKENS = np.arange(251)


def batches(
    tokens: np.ndarray = TOKENS, context_length: int = 7, batch_size: int = 3, seed: int = 0
) -> TrainingBatches:
    batching = Batching(context_length=context_length, batch_size=batch_size, sequences="all", seed=seed)
    return TrainingBatches([(tokens, 1.0)], batching)


def held_out_batches(tokens: np.ndarray, batch_size: int, sequences: int | Literal["all"]) -> HeldOutBatches:
    batching = Batching(context_length=7, batch_size=batch_size, sequences=sequences, seed=0)
    return HeldOutBatches([(tokens, 1.0)], batching)


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    one, other = batches(), batches()
    forward = [one(step) for step in range(60)]
    backward = [other(step) for step in reversed(range(60))]
    for a, b in zip(forward, reversed(backward), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(batches()(41).tokens, forward[41].tokens)
    assert forward[0].tokens.dtype == np.int32
    assert forward[0].tokens.shape == (3, 8)
    assert forward[0].weights.dtype == np.float32
    np.testing.assert_array_equal(forward[0].weights, np.ones((3, 7)))


@pytest.mark.parametrize("step", [0, 11, 300])
def test_a_host_reads_its_rows_of_the_batch(step: int) -> None:
    """Also where an epoch ends within the batch: 34 sequences are 11 batches and a third."""
    whole = batches()(step)
    for rows in (slice(0, 1), slice(1, 3), slice(2, 3), slice(0, 3)):
        part = batches()(step, rows)
        np.testing.assert_array_equal(part.tokens, whole.tokens[rows])
        np.testing.assert_array_equal(part.weights, whole.weights[rows])


def test_a_sequence_is_a_piece_of_the_text_and_its_successor() -> None:
    """Targets are the inputs one token on: the model never sees what it has to say."""
    seen = np.concatenate([batches()(step).tokens for step in range(60)])
    np.testing.assert_array_equal(seen[:, 1:], seen[:, :-1] + 1)


@pytest.mark.parametrize("batch_size", [1, 3, 34, 50])
def test_every_sequence_is_used_once_an_epoch(batch_size: int) -> None:
    """251 tokens are 35 sequences of 7; one is left out so that the cut may be anywhere."""
    draw = batches(batch_size=batch_size)
    starts = np.concatenate([draw(step).tokens[:, 0] for step in range(-(-3 * 34 // batch_size))])
    orders = []
    for epoch in range(3):
        of_epoch = starts[34 * epoch : 34 * (epoch + 1)]
        offset = of_epoch.min()
        assert 0 <= offset < 7
        np.testing.assert_array_equal(np.sort(of_epoch), offset + 7 * np.arange(34))
        orders.append(of_epoch - offset)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])


def test_the_cut_moves_from_epoch_to_epoch() -> None:
    draw = batches(batch_size=34)
    assert len({int(draw(step).tokens[:, 0].min()) for step in range(40)}) == 7


def test_seeds_differ() -> None:
    seen = [batches(seed=seed)(0).tokens.tobytes() for seed in (0, 1, 2, 2**32 - 1)]
    assert len(set(seen)) == 4


@pytest.mark.parametrize("length", range(8, 30))
def test_tiny_texts_fill_batches(length: int) -> None:
    draw = batches(np.arange(length), batch_size=5)
    seen = np.concatenate([draw(step).tokens for step in range(40)])
    assert seen.shape == (200, 8)
    np.testing.assert_array_equal(seen[:, 1:], seen[:, :-1] + 1)
    assert seen.max() < length
    if length > 9:
        assert len(np.unique(seen[:, 0])) > 1


@pytest.mark.parametrize("length", [8, 9, 14, 15, 16, 22, 100, 251])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_all_scores_every_token_but_the_first_once(length: int, batch_size: int) -> None:
    held_out = held_out_batches(np.arange(length), batch_size, "all")
    scored: Counter[int] = Counter()
    for batch in held_out:
        tokens, weights = batch.tokens, batch.weights
        assert batch.optional == ()
        assert tokens.shape == (batch_size, 8)
        assert weights.shape == (batch_size, 7)
        assert tokens.dtype == np.int32
        assert weights.dtype == np.float32
        assert set(np.unique(weights)) <= {0.0, 1.0}
        scored.update(tokens[:, 1:][weights > 0].tolist())
        inputs = tokens[:, :-1][weights > 0]
        np.testing.assert_array_equal(tokens[:, 1:][weights > 0], inputs + 1)
    assert scored == Counter(range(1, length))


@pytest.mark.parametrize(("asked", "got"), [(1, 1), (2, 2), (10, 10), (34, 34), (35, 35), (36, 35), (10_000, 35)])
def test_a_number_of_full_sequences_is_spread_over_the_text(asked: int, got: int) -> None:
    held_out = held_out_batches(TOKENS, 4, asked)
    starts = np.concatenate([each.tokens[each.weights.all(axis=1), 0] for each in held_out])
    assert sum(int(each.weights.sum()) for each in held_out) == 7 * got
    assert len(set(starts.tolist())) == got
    assert not (starts % 7).any()
    if got > 1:
        assert starts[0] == 0
        assert starts[-1] == 34 * 7
        gaps = np.diff(starts) // 7
        assert gaps.max() - gaps.min() <= 1


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    def scored(batch_size: int) -> list[list[int]]:
        held_out = held_out_batches(TOKENS, batch_size, 11)
        return [row.tolist() for each in held_out for row in each.tokens[each.weights.any(axis=1)]]

    assert scored(1) == scored(4) == scored(64)
