"""Whether a comparison's arms match their baseline in size and compute, and what would make them match."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xattn.keys import show
from xattn.report.answer import Comparison
from xattn.report.design import MLP_DIM, PARAMETERS, Factor
from xattn.report.read import Run, finite
from xattn.report.words import number

SAME_SIZE, SAME_FLOPS = 0.01, 0.02  # relative differences that are ignored
_FLOPS_PER_WEIGHT = 6  # and per token, in training


@dataclass(frozen=True)
class Size:
    """The size of a run's model."""

    parameters: float
    flops: float | None
    """per training token; None if unknown"""
    smallest: float
    """the parameters if mlp_dim were 1; 0 if unknown"""
    asked: float | None
    """its ``model.parameters``"""


def size_of(run: Run) -> Size | None:
    """Return the size; None if the run's summary does not contain it."""
    parameters, flops, tokens = run.number("num_params"), run.number("flops_per_step"), run.tokens_per_step
    if not parameters:
        return None
    matrices = 3 if run.config.get("model.mlp") == "swiglu" else 2
    keys = ("model.num_layers", "model.embedding_dim", MLP_DIM)
    layers, width, hidden = (finite(run.config.get(key)) or 0 for key in keys)
    return Size(
        parameters=parameters,
        flops=flops / tokens if flops and tokens else None,
        smallest=parameters - layers * matrices * width * (hidden - 1) if layers and width and hidden else 0,
        asked=finite(run.config.get(PARAMETERS)),
    )


@dataclass(frozen=True)
class Pair:
    """An arm and its baseline at the same values of the other factors."""

    arm: str
    ours: Size
    theirs: Size

    @property
    def is_larger_or_smaller(self) -> bool:
        return abs(self.ours.parameters / self.theirs.parameters - 1) > SAME_SIZE

    @property
    def missing_flops(self) -> float:
        """Return the baseline's FLOPs per token minus the arm's; 0 if they are about equal or unknown."""
        if self.ours.flops is None or self.theirs.flops is None:
            return 0.0
        missing = self.theirs.flops - self.ours.flops
        return missing if abs(missing) > SAME_FLOPS * self.theirs.flops else 0.0

    def in_words(self) -> str:
        """Return ``input: 932,000 parameters against 900,224 (+3.5 %)``; empty if the difference is negligible."""
        parts = []
        if self.is_larger_or_smaller:
            parts.append(_against("parameters", self.ours.parameters, self.theirs.parameters))
        if self.missing_flops:
            parts.append(_against("FLOPs per token", self.ours.flops or 0.0, self.theirs.flops or 0.0))
        return f"{self.arm}: {' and '.join(parts)}" if parts else ""


def unfair(comparison: Comparison) -> list[str]:
    """Return a sentence for each factor with an arm that has over 1 % more or fewer parameters than its baseline, or
    over 2 % more or fewer FLOPs per token. It names the key that makes them equal."""
    said = []
    for i, factor in enumerate(comparison.design.factors):
        pairs = list(_pairs(comparison, i, factor))
        if texts := list(dict.fromkeys(text for pair in pairs if (text := pair.in_words()))):
            sentence = f"Different sizes between the arms of {factor.key}: {'; '.join(texts)}."
            said.append(f"{sentence} {_what_helps(factor, pairs)}".rstrip())
    return said


def _pairs(comparison: Comparison, i: int, factor: Factor) -> Iterator[Pair]:
    sizes = {
        cell: next((size for run in each.runs.values() if (size := size_of(run)) is not None), None)
        for cell, each in comparison.chosen.items()
    }
    for cell, ours in sizes.items():
        theirs = sizes.get((*cell[:i], factor.baseline, *cell[i + 1 :]))
        if cell[i] != factor.baseline and ours is not None and theirs is not None:
            yield Pair(show(cell[i]), ours, theirs)


def _what_helps(factor: Factor, pairs: list[Pair]) -> str:
    if factor.key in (MLP_DIM, PARAMETERS):
        return f"That is what {factor.key} sets."
    unequal = [pair for pair in pairs if pair.is_larger_or_smaller]
    if not unequal:
        wanted = {pair.arm: _as_much(pair) for pair in pairs if pair.missing_flops}
        settings = [f"{PARAMETERS}={size:.0f} for {arm}" for arm, size in wanted.items() if size is not None]
        return f"{' and '.join(settings)}: mlp_dim is then chosen for about as many FLOPs." if settings else ""
    sizes = [size for pair in pairs for size in (pair.ours, pair.theirs)]
    if unequal[0].theirs.asked is not None and len({size.asked for size in sizes}) == 1:
        return f"All were given {PARAMETERS}={unequal[0].theirs.asked:.0f}."
    parameters = unequal[0].theirs.asked or unequal[0].theirs.parameters
    if any(size.smallest > parameters for size in sizes):
        parameters = max(size.parameters for size in sizes)
    return f"{PARAMETERS}={parameters:.0f} for all: mlp_dim is then chosen for about as many parameters in each."


def _as_much(pair: Pair) -> float | None:
    """Return the number of parameters at which the arm computes as much as its baseline; None if that is too few."""
    wanted = pair.ours.parameters + pair.missing_flops / _FLOPS_PER_WEIGHT
    return wanted if wanted >= pair.ours.smallest else None


def _against(thing: str, ours: float, theirs: float) -> str:
    return f"{ours:,.0f} {thing} against {theirs:,.0f} ({number(100 * (ours / theirs - 1), '+.1f')} %)"
