"""Which loss can compare runs: val_loss only if a token is the same thing in all of them."""

from __future__ import annotations

import pytest

from xattn.config import compose, hashed_values
from xattn.metrics import loss_metric

TEXT = ["data=text", "data.path=a.txt"]
BPE = [*TEXT, "data.tokenizer=bpe"]


@pytest.mark.parametrize(
    ("one", "other", "metric"),
    [
        (TEXT, [*TEXT, "backend=none", "seed=3"], "val_loss"),
        (TEXT, ["data=python_stdlib"], "val_loss"),
        (TEXT, [*TEXT, "data.vocab_size=500"], "val_loss"),  # which bytes have no use for
        (TEXT, BPE, "val_bpb"),
        (BPE, BPE, "val_loss"),
        (BPE, [*BPE, "data.vocab_size=500"], "val_bpb"),
        (BPE, [*BPE, "data.path=b.txt"], "val_bpb"),  # another text makes another vocabulary
        ([*TEXT, "data.tokenizer=a.json"], [*TEXT, "data.tokenizer=b.json"], "val_bpb"),
        ([*TEXT, "data.tokenizer=a.json"], [*TEXT, "data.tokenizer=a.json", "data.path=b.txt"], "val_loss"),
        (TEXT, [*TEXT, "data.documents=separated"], "val_bpb"),  # tokens between documents are scored too
        (["data=mqar"], ["data=copying"], "val_bpb"),
        (["data=mqar"], ["data=mqar", "data.num_pairs=3"], "val_loss"),
    ],
)  # fmt: skip
def test_losses_per_token_are_compared_where_tokens_are_the_same(one: list[str], other: list[str], metric: str) -> None:
    assert loss_metric(hashed_values(compose(typed)) for typed in (one, other)) == metric


def test_no_run_is_no_difference() -> None:
    assert loss_metric([]) == "val_loss"
