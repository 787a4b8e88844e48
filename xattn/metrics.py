"""What a metric measures: tokens, text, sequences. Only numbers of the same thing are compared.

A loss is per token, so losses under two tokenizers cannot be compared; bits per byte of the same text can.
Standard library only, since the report, the sweep's table and the tuner all use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

LOSS, BITS = LOSSES = "val_loss", "val_bpb"
_OF_TOKENS = (*("data.tokenizer", "data.vocab_size", "data.tiktoken_pattern", "data.documents", "data.end_of_text"),)

Values = Mapping[str, Any]  # dotted key → value


def tokens_of(values: Values) -> tuple[Any, ...]:
    """Return a key that is equal for configs that split the same text into the same tokens."""
    tokenizer = values.get("data.tokenizer")
    has_borders = values.get("data.documents", "joined") != "joined"  # each border is a token, which is scored too
    if values.get("data.name") == "memmap" or "data.tokenizer" not in values:  # ready-made ids, or a task's own
        return tuple(values.get(f"data.{key}") for key in ("name", "path", "vocab_size"))
    if tokenizer == "bytes":  # keys of other tokenizers have no effect
        return (tokenizer, has_borders)
    if tokenizer == "bpe":  # trained on the text
        return (tokenizer, has_borders, values.get("data.vocab_size"), text_of(values))
    return (tokenizer, has_borders, values.get("data.tiktoken_pattern"), values.get("data.end_of_text"))


def text_of(values: Values) -> tuple[Any, ...]:
    """Return a key that is equal for configs that hold out the same text."""
    ours = {key: repr(value) for key, value in values.items() if key.startswith("data.") and key not in _OF_TOKENS}
    return tuple(sorted(ours.items()))


def is_per_token(metric: str) -> bool:
    """Return whether the metric depends on what a token is."""
    return metric.endswith("_loss") or metric.startswith("probe/")


def loss_metric(configs: Iterable[Values]) -> str:
    """Return the held-out loss by which these runs can be compared: val_loss, or val_bpb if their tokens differ."""
    return LOSS if len({tokens_of(values) for values in configs}) <= 1 else BITS
