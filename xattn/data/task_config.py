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
    """``data=mqar``: multi-query associative recall.

    num_pairs: keys with their values, each asked for once; at most context_length / 4. vocab_size: the lower half are
    keys, the upper half values. filler: what stands between the queries, ``random`` tokens or ``zeros``.
    """

    name: Literal["mqar"]
    vocab_size: VocabSize
    num_pairs: PositiveInt
    filler: Literal["random", "zeros"] = "random"


class InductionConfig(Section):
    """``data=induction``: random tokens, repeated with a period that is drawn for each sequence."""

    name: Literal["induction"]
    vocab_size: VocabSize


class CopyingConfig(Section):
    """``data=copying``: random tokens, a separator, and the same tokens again."""

    name: Literal["copying"]
    vocab_size: VocabSize


class SelectiveCopyingConfig(Section):
    """``data=selective_copying``: num_tokens tokens among noise, a separator, and the tokens without the noise."""

    name: Literal["selective_copying"]
    vocab_size: VocabSize
    num_tokens: PositiveInt


class PasskeyConfig(Section):
    """``data=passkey``: key_length random tokens somewhere in repetitive filler, asked for at the end."""

    name: Literal["passkey"]
    vocab_size: VocabSize
    key_length: PositiveInt


TaskConfig = MQARConfig | InductionConfig | CopyingConfig | SelectiveCopyingConfig | PasskeyConfig
