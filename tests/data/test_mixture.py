"""Mixtures: each source is drawn from by its weight, and goes through its own epochs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from xattn.config import compose
from xattn.data.batches import Batching, TrainingBatches, shares
from xattn.data.run_data import load_data
from xattn.errors import BadInput

from .configs import mixture_config

BATCHING = Batching(context_length=8, batch_size=4, sequences=12, seed=0)
# The token says whose it is, and where.
SOURCES = [np.arange(71), 1000 + np.arange(701), 2000 + np.arange(36)]


def mixture(weights: list[float], batch_size: int = 8, seed: int = 0) -> TrainingBatches:
    sources = list(zip(SOURCES, weights, strict=True))
    batching = Batching(context_length=7, batch_size=batch_size, sequences="all", seed=seed)
    return TrainingBatches(sources, batching)


def test_shares_are_whole_and_nearest() -> None:
    assert shares([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert shares([0.5, 0.25, 0.25], 8).tolist() == [4, 2, 2]
    assert shares([3], 7).tolist() == [7]
    assert shares([1e-9, 1], 1000).tolist() == [0, 1000]


def test_each_source_has_its_share_of_a_thousand_and_sequences_stay_within_a_source() -> None:
    draw = mixture([5, 3, 2])
    for thousand in range(3):
        tokens = np.concatenate([draw(step).tokens for step in range(125 * thousand, 125 * (thousand + 1))])
        np.testing.assert_array_equal(tokens[:, 1:], tokens[:, :-1] + 1)
        assert Counter((tokens[:, 0] // 1000).tolist()) == {0: 500, 1: 300, 2: 200}


def test_each_source_is_gone_through_in_its_own_epochs() -> None:
    """701 tokens are 99 sequences an epoch: none comes twice before all came once, whatever the others do."""
    draw = mixture([1, 1, 1], batch_size=10)
    starts = [start for step in range(200) for start in draw(step).tokens[:, 0].tolist() if start // 1000 == 1]
    assert len(starts) > 500
    for epoch in range(5):
        of_epoch = starts[99 * epoch : 99 * (epoch + 1)]
        assert len(set(of_epoch)) == 99
        assert np.diff(sorted(of_epoch)).tolist() == [7] * 98


def test_a_batch_is_a_function_of_seed_and_step_alone_and_hosts_read_their_rows() -> None:
    draw, other = mixture([5, 3, 2]), mixture([5, 3, 2])
    forward = [draw(step).tokens for step in range(300)]
    for step in reversed(range(300)):
        np.testing.assert_array_equal(other(step).tokens, forward[step])
    np.testing.assert_array_equal(mixture([5, 3, 2])(124, slice(2, 7)).tokens, forward[124][2:7])
    assert not np.array_equal(mixture([5, 3, 2], seed=1)(0).tokens, forward[0])


def test_a_source_of_a_tiny_weight_is_drawn_from_all_the_same() -> None:
    tokens = np.concatenate([mixture([1e-6, 1, 1e-6])(step).tokens for step in range(126)])
    assert Counter((tokens[:, 0] // 1000).tolist())[0] >= 1


def test_every_source_is_evaluated_by_its_weight(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 2000)
    (tmp_path / "b.jsonl").write_bytes(b'{"body": "' + b"b" * 3000 + b'"}\n')
    config = mixture_config(
        sources=[
            {"path": str(tmp_path / "a.txt"), "weight": 3.0},
            {"path": str(tmp_path / "b.jsonl"), "weight": 1.0, "field": "body"},
        ]
    )
    data = load_data(config, BATCHING)
    assert data.scored_bytes() == b"a" * 72 + b"b" * 24
    every = load_data(config, replace(BATCHING, sequences="all"))
    assert every.scored_bytes() == b"a" * 199 + b"b" * 299
    drawn = np.concatenate([data.batch(step).tokens for step in range(250)])
    assert Counter(drawn[:, 0].tolist()) == {ord("a"): 750, ord("b"): 250}
    bpe = config.model_copy(update={"tokenizer": "bpe", "vocab_size": 257})  # too few for a merge
    assert load_data(bpe, BATCHING).scored_bytes() == data.scored_bytes()


def test_a_bad_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 2000)
    sources = [{"path": str(tmp_path / "a.txt"), "weight": 3.0}, {"path": "nowhere", "weight": 1.0}]
    with pytest.raises(BadInput, match=r"data\.sources\[1\]\.path = 'nowhere': no such file"):
        load_data(mixture_config(sources=sources), BATCHING)
    (tmp_path / "short.txt").write_bytes(b"a" * 50)
    sources[1]["path"] = str(tmp_path / "short.txt")
    with pytest.raises(BadInput, match=r"data\.sources\[1\]\.path = .*short.txt': its validation part has 5 bytes"):
        load_data(mixture_config(sources=sources), BATCHING)


def test_a_weight_of_none_is_told_in_one_line() -> None:
    """A second line said that there was no source: the list was counted without the bad one."""
    with pytest.raises(BadInput) as error:
        compose(["data=mixture", "data.sources=[{path: a.txt, weight: 0}]"])
    assert str(error.value) == "data.sources[0].weight = 0: must be greater than 0"
    with pytest.raises(BadInput, match=r"^data\.sources = \[\]: must be a list of 1 to 1000 sources.*\]$"):
        compose(["data=mixture", "data.sources=[]"])
