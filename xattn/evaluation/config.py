"""What a person chooses about evaluation. Importing this module imports no jax."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from xattn.section import Section


class EvaluationConfig(Section):
    """The group ``evaluation``.

    windows: how many windows of context_length tokens of the validation text are scored, spread evenly over it and
        the same at every evaluation of every run; ``all`` scores every token but the first.
    """

    windows: PositiveInt | Literal["all"]
