"""What a person chooses about evaluation. Importing this module imports no jax."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from xattn.section import Section

ProbeName = Literal["in_context", "extrapolation", "induction", "mqar", "copying", "selective_copying", "passkey"]


class EvaluationConfig(Section):
    """The group ``evaluation``."""

    windows: PositiveInt | Literal["all"]
    """Number of windows of context_length tokens of the validation text that are scored, spread evenly over it and the
    same at every evaluation of every run; ``all`` scores every token but the first.
    """
    probes: tuple[ProbeName, ...] = Field(strict=False)
    """What is measured beside the loss. ``in_context``: loss late in a window minus loss early in it.
    ``extrapolation``: loss up to 8 · context_length. The others are the synthetic tasks of that name, in the run's own
    vocabulary. A run on a task (``data=mqar``) measures that task anyway.
    """

    @field_validator("probes")
    @classmethod
    def _each_once(cls, probes: tuple[ProbeName, ...]) -> tuple[ProbeName, ...]:
        return tuple(sorted(set(probes)))
