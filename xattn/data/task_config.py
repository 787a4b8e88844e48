"""What a person chooses about the synthetic tasks. Importing this module imports no jax.

A sequence has backend.context_length inputs; its definition, source and known result stand with each task in
:mod:`xattn.data.tasks`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from xattn.section import Section

VocabSize = Annotated[int, Field(ge=8, le=2**24)]


class MQARConfig(Section):
    """``data=mqar``: multi-query associative recall."""

    name: Literal["mqar"]
    vocab_size: VocabSize
    """Number of different tokens; the lower half are keys, the upper half values."""
    num_pairs: PositiveInt
    """Keys with their values, each asked for once; at most context_length / 4."""
    filler: Literal["random", "zeros"] = "random"
    """What stands between the queries."""


class InductionConfig(Section):
    """``data=induction``: random tokens, repeated with a period that is drawn for each sequence."""

    name: Literal["induction"]
    vocab_size: VocabSize
    """Number of different tokens."""


class CopyingConfig(Section):
    """``data=copying``: random tokens, a separator, and the same tokens again."""

    name: Literal["copying"]
    vocab_size: VocabSize
    """Number of different tokens."""


class SelectiveCopyingConfig(Section):
    """``data=selective_copying``: tokens among noise, a separator, and the tokens without the noise."""

    name: Literal["selective_copying"]
    vocab_size: VocabSize
    """Number of different tokens."""
    num_tokens: PositiveInt
    """Tokens to copy; at most context_length / 2."""


class PasskeyConfig(Section):
    """``data=passkey``: a key somewhere in repetitive filler, asked for at the end."""

    name: Literal["passkey"]
    vocab_size: VocabSize
    """Number of different tokens."""
    key_length: PositiveInt
    """Tokens of the key; at most context_length / 2 − 1."""


TaskConfig = MQARConfig | InductionConfig | CopyingConfig | SelectiveCopyingConfig | PasskeyConfig
