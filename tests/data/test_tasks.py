"""Synthetic tasks: every answer can be known from the sequence, by the rule of its task, at the distance it states."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from xattn import keys
from xattn.config import compose, run_hash
from xattn.data import task, tasks
from xattn.data.task import Examples, Task, TaskBatches
from xattn.errors import BadInput

MQAR = tasks.MQAR(name="mqar", vocab_size=32, num_pairs=5)
INDUCTION = tasks.Induction(name="induction", vocab_size=50)
COPYING = tasks.Copying(name="copying", vocab_size=9)
SELECTIVE = tasks.SelectiveCopying(name="selective_copying", vocab_size=10, num_tokens=6)
PASSKEY = tasks.Passkey(name="passkey", vocab_size=14, key_length=3)
ALL = [MQAR, INDUCTION, COPYING, SELECTIVE, PASSKEY]
LENGTH, NUMBER = 26, 40


def made(config: Task, length: int = LENGTH) -> Examples:
    return config.examples(np.random.default_rng(1), NUMBER, length)


@pytest.mark.parametrize("length", [26, 27])
@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
def test_an_answer_stands_at_its_distance_before(config: Task, length: int) -> None:
    if config.name == "mqar" and length % 2:
        return
    examples = made(config, length)
    tokens, distance = examples.tokens, examples.distance
    assert tokens.shape == (NUMBER, length + 1)
    assert tokens.dtype == distance.dtype == np.int32
    assert tokens.min() >= 0
    assert tokens.max() < config.vocab_size
    rows, places = np.nonzero(distance)
    sources = places + 1 - distance[rows, places]
    assert (sources >= 0).all()
    batch = examples.batch
    assert batch.targets.shape == batch.weights.shape == (NUMBER, length)
    assert batch.targets.dtype == np.int32
    np.testing.assert_array_equal(batch.targets[rows, places], tokens[rows, sources])
    np.testing.assert_array_equal(batch.weights, distance > 0)
    assert batch.places is not None
    assert batch.places.shape == (NUMBER, examples.most)
    assert (np.diff(batch.places) > 0).all()
    at_places = np.take_along_axis(batch.weights, batch.places, axis=1)
    assert (at_places.sum(axis=1) == batch.weights.sum(axis=1)).all()  # no answer is elsewhere
    assert at_places.all(axis=1).any()  # and no fewer places would do
    assert len({row.tobytes() for row in tokens}) == NUMBER


def test_mqar_asks_each_key_once_and_only_keys_that_were_given() -> None:
    """And what follows in the sequence is not the answer, but a token like all the others; keys that are not the
    sequence's own are among them."""
    tokens, distance, _, answers = made(MQAR)
    assert answers is not None
    fillers, given_away = set(), 0
    for row, asked, answer in zip(tokens, distance, answers, strict=True):
        pairs = dict(zip(row[0:10:2].tolist(), row[1:10:2].tolist(), strict=True))
        assert len(pairs) == len(set(pairs.values())) == 5
        assert all(0 < key < 16 <= value for key, value in pairs.items())
        queries = np.flatnonzero(asked)
        questions = {int(row[place]): int(answer[place]) for place in queries}
        assert questions == pairs
        assert min(queries) >= 10
        filler = set(np.delete(row[10:], queries - 10).tolist())
        assert filler.isdisjoint(pairs)  # or it would not be clear which value is asked for
        fillers |= filler
        given_away += int((row[queries + 1] == answer[queries]).sum())
    assert fillers == set(range(32))
    assert given_away < 0.15 * 5 * NUMBER  # one in 27 by chance


def test_mqar_with_zeros_is_pairs_and_queries_alone() -> None:
    """As the runs of Zoology's figure have it; queries, answers and what is asked for are those of the other filler."""
    zeros = made(MQAR.model_copy(update={"filler": "zeros"}))
    random = made(MQAR)
    np.testing.assert_array_equal(zeros.distance, random.distance)
    np.testing.assert_array_equal(zeros.answers, random.answers)  # type: ignore[arg-type]
    places = np.pad(zeros.distance > 0, ((0, 0), (0, 1)))
    places[:, :10] = True
    np.testing.assert_array_equal(zeros.tokens[places], random.tokens[places])
    assert (zeros.tokens[places] > 0).all()
    assert not zeros.tokens[~places].any()


def test_mqar_names_and_reads_older_runs_as_before() -> None:
    """Only the new filler has a name of its own, and the key is of this choice of data alone."""
    config = compose(["data=mqar", "evaluation.probes=[]"])
    assert config.data.filler == "random"  # type: ignore[union-attr]
    assert run_hash(config) == "98b79fd3f2"  # as the commit before this key has it
    assert run_hash(compose(["data=mqar", "evaluation.probes=[]", "data.filler=zeros"])) != run_hash(config)
    assert keys.up_to_date({"data": {"name": "mqar"}})["data"]["filler"] == "random"
    assert keys.up_to_date({"data": {"name": "text"}})["data"] == {"name": "text"}


def test_mqar_prefers_near_queries() -> None:
    """The power law of the gaps: the first place is a query far more often than the last; each as p would have it."""
    one = tasks.MQAR(name="mqar", vocab_size=32, num_pairs=1)
    distance = one.examples(np.random.default_rng(0), 4000, 34).distance
    frequencies = (distance > 0).mean(axis=0)[2::2]
    expected = np.arange(1, 17) ** -0.99
    expected /= expected.sum()
    assert (np.abs(frequencies - expected) < 5 * np.sqrt(expected / 4000)).all()


def test_induction_repeats_with_periods_of_its_own() -> None:
    tokens, distance, _, _ = made(INDUCTION)
    periods = distance.max(axis=1)
    assert len(set(periods.tolist())) > 4
    assert (periods >= LENGTH // 4).all()
    assert (periods <= LENGTH // 2).all()
    for row, asked, period in zip(tokens, distance, periods, strict=True):
        assert len(set(row[:period].tolist())) == period
        np.testing.assert_array_equal(row, np.resize(row[:period], LENGTH + 1))
        assert set(asked[period:].tolist()) == {period}
        assert not asked[:period].any()


def test_copying_repeats_and_selective_copying_leaves_out_the_noise() -> None:
    for row, asked in zip(*made(COPYING)[:2], strict=True):
        assert row[13] == 0
        np.testing.assert_array_equal(row[:13], row[14:])
        assert asked.astype(bool).sum() == 13
    for row, asked in zip(*made(SELECTIVE)[:2], strict=True):
        context = row[: LENGTH - 6]
        assert row[LENGTH - 6] == 1
        np.testing.assert_array_equal(context[context > 0], row[LENGTH - 5 :])
        assert asked.astype(bool).sum() == 6


def test_a_passkey_is_where_its_marker_is() -> None:
    depths = set()
    for row, asked in zip(*made(PASSKEY)[:2], strict=True):
        first, second = np.flatnonzero(row == 0)
        assert second == LENGTH - 3
        np.testing.assert_array_equal(row[first + 1 : first + 4], row[second + 1 :])
        assert (row[first + 1 : first + 4] >= 4).all()
        assert asked.astype(bool).sum() == 3
        depths.add(int(first))
    assert len(depths) > 8
    assert min(depths) < 5
    assert max(depths) > 12


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
def test_batches_depend_on_seed_and_step_alone(config: Task) -> None:
    batch = TaskBatches(config, LENGTH, 8, seed=3)
    later = batch(7)
    for a, b in zip(TaskBatches(config, LENGTH, 8, seed=3)(7), later, strict=True):
        assert (a is b is None) or (a == b).all()
    for part, whole in zip(batch(7, slice(2, 5)), later, strict=True):
        assert (part is whole is None) or (part == whole[2:5]).all()
    held_out = task.evaluation_examples(config, context_length=LENGTH, number=8).tokens
    others = [batch(6).tokens, TaskBatches(config, LENGTH, 8, seed=4)(7).tokens, held_out]
    assert all((other != later.tokens).any() for other in others)
    first = TaskBatches(config, LENGTH, 8, seed=0)(0)  # NumPy's seeds [0, 0] and [0, 0, 0] are the same
    for trained_on in (later, first):
        assert {row.tobytes() for row in held_out}.isdisjoint(row.tobytes() for row in trained_on.tokens)


def test_distinct_draws_every_order() -> None:
    drawn = tasks._distinct(np.random.default_rng(0), 6000, 2, 4)
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 12
    assert all(abs(count - 500) < 120 for count in counts.values())


def test_measures() -> None:
    """By hand: two sequences of four places, three answers, of which the far one is wrong."""
    distance = np.array([[0, 1, 0, 3], [0, 2, 0, 0]])
    losses = np.array([[9.0, 1.0, 9.0, 4.0], [9.0, 1.0, 9.0, 9.0]])
    correct = np.array([[False, True, True, False], [False, True, False, True]])
    assert task.measures(distance, losses, correct) == {
        "loss": 2.0,
        "accuracy": pytest.approx(2 / 3),
        "exact": 0.5,
        "accuracy_to_position_2": 1.0,
        "accuracy_to_position_4": 0.0,
        "accuracy_to_distance_1": 1.0,
        "accuracy_to_distance_2": 1.0,
        "accuracy_to_distance_4": 0.0,
    }


@pytest.mark.parametrize(
    ("config", "length", "told"),
    [
        (MQAR, 18, "data.num_pairs = 5: must be at most a quarter of backend.context_length = 18"),
        (MQAR, 25, "which must be even"),
        (MQAR.model_copy(update={"vocab_size": 10}), 26, "at most data.vocab_size / 2 − 1 = 4"),
        (SELECTIVE, 11, "data.num_tokens = 6: must be at most half"),
        (PASSKEY, 7, "data.key_length = 3"),
        (COPYING, 3, "needs at least 4"),
    ],
)
def test_what_does_not_fit_is_refused(config: Task, length: int, told: str) -> None:
    with pytest.raises(BadInput, match=told.replace(".", r"\.")):
        config.check(length)
    config.check(26) if "vocab_size / 2" not in told else None
