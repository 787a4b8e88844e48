"""Documents end to end, with a token between them, or blind to each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from xattn.data.batches import ALL_ROWS, Batching
from xattn.data.run_data import RunData, load_data
from xattn.data.tokenizer import TextTokenizer

from .configs import memmap_config, text_config

DOCUMENTS = [f"{i} times {i} is {i * i}" for i in range(200)]
BATCHING = Batching(context_length=32, batch_size=3, sequences="all", seed=0)


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return str(file)


def data_of(path: str, **values: object) -> RunData:
    return load_data(text_config(path=path, **values), BATCHING)


def scored_text(data: RunData) -> str:
    return (data.scored_bytes() or b"").decode()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("documents", ["joined", "separated", "packed"])
def test_every_byte_is_scored_and_bits_per_byte_are_over_them(documents: str, tokenizer: str, jsonl: str) -> None:
    data = data_of(jsonl, documents=documents, tokenizer=tokenizer, validation_fraction=0.25)
    assert isinstance(data.tokenizer, TextTokenizer)
    joined = "".join(DOCUMENTS)
    assert joined.endswith(scored_text(data))
    assert len(scored_text(data)) > 0.2 * len(joined)
    targets = sum(int(each.weights.sum()) for each in data.held_out)
    ends = sum(
        int((each.tokens[:, 1:][each.weights > 0] == data.tokenizer.end_of_text).sum()) for each in data.held_out
    )
    assert (ends > 0) == (documents != "joined")
    assert data.bytes_per_token() == pytest.approx(len(scored_text(data)) / targets)
    if tokenizer == "bytes":
        assert len(scored_text(data)) == targets - ends
    else:
        assert data.tokenizer.vocab_size == 300
        assert data.bytes_per_token() > 1.2


def test_only_packed_sequences_have_segments_and_they_begin_at_the_border(jsonl: str) -> None:
    for documents in ("joined", "separated"):
        data = data_of(jsonl, documents=documents)
        assert data.optional == ()
        assert data.batch(3).segment_ids is None
    data = data_of(jsonl, documents="packed")
    assert data.optional == (("segment_ids", data.held_out[0].weights.shape[1]),)
    assert isinstance(data.tokenizer, TextTokenizer)
    for batch in (data.batch(0), data.batch(7), *data.held_out):
        assert batch.segment_ids is not None
        assert batch.segment_ids.dtype == np.int32
        assert batch.segment_ids.shape == batch.weights.shape
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            for segment in set(segments.tolist()):
                inputs = tokens[:-1][segments == segment]
                assert (inputs[1:] != 256).all()
                assert segment == 0 or inputs[0] == 256
    text = data.tokenizer.decode(data.batch(0).tokens[0][data.batch(0).segment_ids[0].tolist().index(1) :])
    assert text.startswith(tuple(DOCUMENTS)) or any(document.startswith(text) for document in DOCUMENTS)


def test_packed_memmaps_take_their_border_from_the_config(tmp_path: Path) -> None:
    np.arange(600, dtype="<u2").__mod__(7).tofile(tmp_path / "ids.bin")
    config = memmap_config(path=str(tmp_path / "ids.bin"), vocab_size=7, documents="packed", end_of_text=5)
    data = load_data(config, replace(BATCHING, sequences=2))
    batch = data.batch(2, ALL_ROWS)
    np.testing.assert_array_equal(batch.segment_ids, np.cumsum(batch.tokens[:, :-1] == 5, axis=1))
    assert data.bytes_per_token() is None
    assert data.scored_bytes() is None
    assert data.tokenizer.vocab_size == 7
