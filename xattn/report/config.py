"""The claim that a study is to show, as its YAML states it. Importing this module imports no jax."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from xattn.section import Section

_THRESHOLD = re.compile(r"(>|<|within|beyond) *([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)")


class Threshold(NamedTuple):
    """A part of the real line: ``> x``; ``< x``; ``within x``, from −x to x; ``beyond x``, all but that."""

    relation: str
    size: float

    def holds(self, low: float, high: float) -> bool:
        """Whether the whole interval lies in it."""
        if self.relation == "within":
            return -self.size < low and high < self.size
        above, below = low > self.size, high < (-self.size if self.relation == "beyond" else self.size)
        return {">": above, "<": below, "beyond": above or below}[self.relation]


def threshold(text: str) -> Threshold:
    """Raises :class:`ValueError` where the text is none."""
    if (found := _THRESHOLD.fullmatch(text)) is None:
        raise ValueError("> x, < x, within x or beyond x, x a number")
    return Threshold(found[1], float(found[2]))


def _is_threshold(text: str) -> str:
    threshold(text)
    return text


ThresholdText = Annotated[str, AfterValidator(_is_threshold)]


class Contrast(Section):
    """A number that a claim is about, a mean over seeds, and what it has to be.

    name: what the page calls it. metric: a number of summary.json.
    of: dotted key → the value that runs have with it, or a list of values. Runs that differ in other keys besides the
        seed are averaged.
    minus: the same, of runs whose number is subtracted, seed by seed; a key that it leaves out has the value in ``of``.
        null: nothing is subtracted.
    over: a key with several values in these runs. reduced: what is taken of its values: ``best``, the one with the best
        mean over seeds, or ``range``, the greatest number less the least, seed by seed.
    at_most: what a greater number counts as, and a run that diverged; null: the seed of such a run is left out.
    shown, contradicted: where the whole interval has to lie: ``> x``, ``< x``, ``within x`` (−x to x), ``beyond x``.
    """

    name: str = Field(min_length=1)
    metric: str = "val_loss"
    of: dict[str, Any] = Field(min_length=1)
    minus: dict[str, Any] | None = None
    over: str | None = None
    reduced: Literal["mean", "best", "range"] = "mean"
    at_most: float | None = None
    shown: ThresholdText
    contradicted: ThresholdText

    @property
    def keys(self) -> set[str]:
        """The dotted keys that it names."""
        return {*self.of, *(self.minus or {}), *([] if self.over is None else [self.over])}

    @model_validator(mode="after")
    def _reduces_a_key(self) -> Contrast:
        if (self.over is None) != (self.reduced == "mean"):
            raise ValueError("over and reduced belong together: a key, and the best or the range of its values")
        return self


class FindingConfig(Section):
    """The group ``finding``: a claim in one sentence, where it is from, and the contrasts that decide it.

    The claim is shown where each contrast is, and contradicted where one of them is.
    """

    claim: str = Field(min_length=1)
    source: str = Field(min_length=1)
    contrasts: tuple[Contrast, ...] = Field(min_length=1, strict=False)
