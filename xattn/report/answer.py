"""What a report is made from: the question, and the comparisons that answer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xattn.report.claim import Finding
from xattn.report.design import Cell, Design, Factor, Group
from xattn.report.metric import Metric
from xattn.report.read import Run, Study
from xattn.report.selection import Chosen, Selection
from xattn.report.statistics import Effect


@dataclass(frozen=True)
class Comparison:
    """A group of runs that answer one question, and the answer."""

    group: Group
    design: Design
    metric: Metric
    chosen: Mapping[Cell, Chosen]
    effects: Sequence[Effect]
    interactions: Sequence[Effect]
    probes: Mapping[str, Sequence[Effect]]
    """in-context measure → its effects"""

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.group.runs

    def of(self, factor: Factor) -> list[Effect]:
        """Return the factor's effects, one for each arm."""
        return [effect for effect in self.effects if effect.factor == factor.key]


@dataclass(frozen=True)
class Answer:
    """Everything that the page is made from."""

    study: Study
    comparisons: Sequence[Comparison]
    alone: Sequence[Comparison]
    """groups without a factor, if the study has several groups"""
    odd: Sequence[str]
    finding: Finding | None
    """the outcome of the claim that the study's experiment states, if it states one"""
    selection: Selection
    command: str

    @property
    def effects(self) -> list[Effect]:
        return [effect for comparison in self.comparisons for effect in comparison.effects]


@dataclass(frozen=True)
class Question:
    """What is asked of a study."""

    metric: str | None = None
    """a number of summary.json; None for validation loss, or bits per byte if the runs' tokens differ"""
    selection: Selection | None = None
    """None for ``heldout`` with `two_stage` or where ``sweep.half_width`` chose the number of seeds, else ``same``"""
    tuned: Sequence[str] = ()
    """keys tuned for each arm, besides the learning rate"""
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """key → the values that select runs"""
    seeds: Sequence[str] | None = None
    """the seeds that select runs; None for all"""
    baselines: Mapping[str, str] = field(default_factory=dict)
    """key → the arm that the others are compared with"""
    two_stage: tuple[float, int] | None = None
    """the requested half-width and the size of the pilot; None for what the runs say"""
