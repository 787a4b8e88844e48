"""What a report is made from: what was asked, and the comparisons that answer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xattn.report.claim import Finding
from xattn.report.design import Cell, Design, Factor, Group
from xattn.report.metric import Metric
from xattn.report.read import Run, Study
from xattn.report.selection import Chosen, Selection
from xattn.report.statistics import Effect


@dataclass(frozen=True)
class Comparison:
    """A group of runs that answer one question, and the answer. probes: in-context measure → its effects."""

    group: Group
    design: Design
    metric: Metric
    chosen: Mapping[Cell, Chosen]
    effects: Sequence[Effect]
    interactions: Sequence[Effect]
    probes: Mapping[str, Sequence[Effect]]

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.group.runs

    def of(self, factor: Factor) -> list[Effect]:
        """The factor's effects, an arm each."""
        return [effect for effect in self.effects if effect.factor == factor.key]


@dataclass(frozen=True)
class Answer:
    """All that the page is made from. alone: groups without a factor, where the study has several groups. finding: what
    became of the claim that the study's experiment states, where it states one."""

    study: Study
    comparisons: Sequence[Comparison]
    alone: Sequence[Comparison]
    odd: Sequence[str]
    finding: Finding | None
    selection: Selection
    command: str

    @property
    def effects(self) -> list[Effect]:
        return [effect for comparison in self.comparisons for effect in comparison.effects]


@dataclass(frozen=True)
class Question:
    """What is asked of a study.

    metric: a number of summary.json; None for the validation loss, or bits per byte where the runs' tokens differ.
    tuned: keys that were tuned for each arm, besides the learning rate. where: key → the values that runs are taken
    with. seeds: those that are taken, None for all. baselines: key → the arm that others are compared with. selection:
    None for ``heldout`` where ``sweep.half_width`` chose the number of seeds, else ``same``. two_stage: the half-width
    that is asked for and the size of the pilot; None for what the runs say.
    """

    metric: str | None = None
    selection: Selection | None = None
    tuned: Sequence[str] = ()
    where: Mapping[str, Sequence[str]] | None = None
    seeds: Sequence[str] | None = None
    baselines: Mapping[str, str] | None = None
    two_stage: tuple[float, int] | None = None
