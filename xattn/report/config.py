"""The claim that a study tests, as its YAML states it. Importing this module imports no jax."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, field_validator, model_validator

from xattn.keys import renamed, under_new_names
from xattn.section import Section

_THRESHOLD = re.compile(r"(>|<|within|beyond) *([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)")


class Threshold(NamedTuple):
    """A part of the real line: ``> x``; ``< x``; ``within x``, from −x to x; ``beyond x``, outside that range."""

    relation: str
    size: float

    def holds(self, low: float, high: float) -> bool:
        """Return whether the whole interval lies in it."""
        if self.relation == "within":
            return -self.size < low and high < self.size
        above, below = low > self.size, high < (-self.size if self.relation == "beyond" else self.size)
        return {">": above, "<": below, "beyond": above or below}[self.relation]


def threshold(text: str) -> Threshold:
    """Parse a threshold. Raises :class:`ValueError` if the text is not one."""
    if (found := _THRESHOLD.fullmatch(text)) is None:
        raise ValueError("> x, < x, within x or beyond x, x a number")
    return Threshold(found[1], float(found[2]))


def _is_threshold(text: str) -> str:
    threshold(text)
    return text


ThresholdText = Annotated[str, AfterValidator(_is_threshold)]


class Contrast(Section):
    """A number that a claim is about, a mean over seeds, and where its interval must lie."""

    name: str = Field(min_length=1)
    """What the page calls it."""
    metric: str = "val_loss"
    """A number of summary.json."""
    of: dict[str, Any] = Field(min_length=1)
    """Dotted key → its runs' value, or a list of values. Runs that differ in other keys than the seed are averaged."""
    minus: dict[str, Any] | None = None
    """The runs to subtract, seed by seed; an omitted key has its value in ``of``. null subtracts nothing."""
    over: str | None = None
    """A key with several values in these runs; null if there is none."""
    reduced: Literal["mean", "best", "range"] = "mean"
    """How the values of ``over`` become one number: ``best`` takes the value with the best mean over seeds, ``range``
    the greatest number minus the least, seed by seed; ``mean`` requires over = null."""
    at_most: float | None = None
    """Greater numbers and diverged runs count as this number; null leaves out the seed of a diverged run."""
    shown: ThresholdText
    """Where the whole interval must lie to show the claim: ``> x``, ``< x``, ``within x`` (−x to x) or ``beyond x``."""
    contradicted: ThresholdText
    """Where the whole interval must lie to contradict the claim, in the same words."""

    @field_validator("of", "minus", mode="before")
    @classmethod
    def _under_new_names(cls, runs: Any) -> Any:
        return under_new_names(runs) if isinstance(runs, Mapping) else runs

    @field_validator("over", mode="before")
    @classmethod
    def _under_new_name(cls, key: Any) -> Any:
        return renamed(key) if isinstance(key, str) else key

    @property
    def keys(self) -> set[str]:
        """Return the dotted keys that it names."""
        return {*self.of, *(self.minus or {}), *([] if self.over is None else [self.over])}

    @model_validator(mode="after")
    def _reduces_a_key(self) -> Contrast:
        if (self.over is None) != (self.reduced == "mean"):
            raise ValueError("over and reduced go together: a key, and the best or the range of its values")
        return self


class FindingConfig(Section):
    """The group ``finding``: a claim that is shown if each contrast is, and contradicted if one of them is."""

    claim: str = Field(min_length=1)
    """The claim, in one sentence."""
    source: str = Field(min_length=1)
    """Where it was published."""
    contrasts: tuple[Contrast, ...] = Field(min_length=1, strict=False)
    """What decides it."""
