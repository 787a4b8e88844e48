"""The report for programs: ``verdict.json``, which ``xattn report --json`` prints too.

:class:`Verdict` is the schema. docs/verdict.schema.json is the same as JSON Schema; it is renewed by
``python -m xattn.report.verdict > docs/verdict.schema.json``.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from xattn.keys import show
from xattn.report import claim, statistics, two_stage, words, worth
from xattn.report.answer import Answer, Comparison
from xattn.report.claim import Says
from xattn.report.selection import Selection
from xattn.report.words import Outcome

# A folder's name may hold bytes that are no text; they are written as escapes.
Text = Annotated[str, BeforeValidator(lambda text: text.encode("utf-8", "backslashreplace").decode())]
Number = float | None  # null where it is not known, or not finite


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Range(_Part):
    """A number and its 95 % interval."""

    value: Number
    low: Number
    high: Number


class Worth(_Part):
    """What an arm is worth in steps of the baseline. Above 1 more steps would be needed without it."""

    steps: Range | None
    """the baseline's steps that reach the arm's loss, as a multiple of the arm's"""
    step_cost: Range | None
    """a step's seconds, as a multiple of the baseline's; null where speeds may not be compared"""
    net: Range | None
    """steps / step_cost"""
    why_not: Text
    """why there is no number; empty where all are there"""


class TwoStage(_Part):
    """Stein's interval, where ``sweep.half_width`` chose the number of seeds. The verdict rests on it."""

    pilot: int
    """the first pairs, whose spread decided how many more were made"""
    spread: Number
    """standard deviation of the pilot's differences"""
    comparisons: int
    """how many intervals hold at once with probability 0.95"""
    pairs: int
    """pairs of runs that there are"""
    ci_low: Number
    ci_high: Number
    half_widths: list[float]
    """those asked for, in order: more than one where the study was extended"""
    needed: int
    """pairs that the last of half_widths takes; the study is complete where pairs is at least this"""


class Factor(_Part):
    """A key that differs between runs that are compared."""

    comparison: int
    """number of the comparison it is a factor of, from 1"""
    where: dict[Text, Text]
    """what sets the comparison apart from the study's others: key → value, as --where takes them"""
    metric: Text
    """what the comparison's arms are judged by"""
    key: Text
    also: list[Text]
    """keys that change with it, so that their effects cannot be told apart"""
    baseline: Text
    """the arm that the others are compared with"""
    arms: list[Text]
    """the baseline first"""


class Effect(_Part):
    """An arm against its factor's baseline, paired by seed."""

    comparison: int
    """number of the comparison, from 1"""
    where: dict[Text, Text]
    """what sets the comparison apart from the study's others: key → value, as --where takes them"""
    factor: Text
    arm: Text
    """as it is typed: --better FACTOR=ARM"""
    baseline: Text
    metric: Text
    seeds: int
    """pairs of runs, one for each seed that both arms have"""
    difference: Number
    """mean over seeds of arm − baseline"""
    ci_low: Number
    """95 % t interval of this arm alone"""
    ci_high: Number
    p: Number
    """of the paired t test"""
    p_holm: Number
    """after Holm's correction over the factor's arms; over all arms (lengths of training apart) where each is one
    change to one baseline"""
    verdict: Outcome
    """better, worse: shown, in a metric that has a direction. higher, lower: shown, but the metric has no direction, or
    a larger share of the side with the better values diverged. undecided: not shown. nothing: there is no interval"""
    sentence: Text
    """the verdict in words"""
    detectable: Number
    """the difference that such a study finds four times in five"""
    two_stage: TwoStage | None
    worth: Worth | None
    p_signflip: Number
    """of the sign-flip permutation test"""
    spread: Number
    """standard deviation of the differences over seeds"""
    arm_mean: Number
    """mean of the pairs"""
    baseline_mean: Number
    left_out: int
    """runs of the arm with a value at the chosen settings that are in no pair"""
    baseline_left_out: int
    diverged: int
    """runs of the arm that diverged"""
    ended: int
    """runs of the arm that are done or diverged"""
    baseline_diverged: int
    baseline_ended: int
    cells: int
    """combinations of the other factors' arms that the difference is averaged over"""
    cells_left_out: int
    """combinations with too few pairs"""
    why_not: Text
    """why values that are there are not comparable; empty where they are"""


class Contrast(_Part):
    """A number that a claim is about, a mean over seeds, with an interval; those of a claim hold at once."""

    name: Text
    metric: Text
    seeds: int
    mean: Number
    ci_low: Number
    ci_high: Number
    shown: Text
    """where the interval has to lie: > x, < x, within x (from -x to x) or beyond x"""
    contradicted: Text
    verdict: Says
    why_not: Text
    """why there is no number; empty where there is"""


class Finding(_Part):
    """The claim that the study's experiment states, and what became of it."""

    claim: Text
    source: Text
    verdict: Says
    contrasts: list[Contrast]
    otherwise: int
    """runs of the study that state another claim, or none"""


class Verdict(_Part):
    """What a study says."""

    schema_version: Literal[1]
    """raised where a field changes its meaning or goes; new fields leave it as it is"""
    study: Text
    """the name of its folder"""
    command: Text
    """what wrote this"""
    selection: Selection
    """whether what was tuned was chosen on the runs that are judged (same), or on other seeds (heldout)"""
    metrics: list[Text]
    """what arms are judged by; more than one only where comparisons differ in it"""
    factors: list[Factor]
    """empty where nothing differs but the seed"""
    effects: list[Effect]
    probes: list[Effect]
    """the same of in-context measures, at the settings that the metric chose"""
    counts: dict[Text, int]
    """status → how many runs have it"""
    not_compared: int
    """settings that differ from every other in more than one choice"""
    warnings: list[Text]
    """what is missing or odd, a sentence each"""
    finding: Finding | None


def verdict_of(found: Answer) -> Verdict:
    """The findings as an object for programs."""
    numbered = list(enumerate(found.comparisons, 1))
    return Verdict(
        schema_version=1,
        study=found.study.folder.resolve().name,
        command=found.command,
        selection=found.selection,
        metrics=list(dict.fromkeys(each.metric.name for each in found.comparisons)),
        factors=[factor for i, each in numbered for factor in _factors(i, each)],
        effects=[effect_of(i, each, effect) for i, each in numbered for effect in each.effects],
        probes=[
            effect_of(i, each, effect) for i, each in numbered for effect in chain.from_iterable(each.probes.values())
        ],
        counts=dict(sorted(Counter(run.status for run in found.study.runs).items())),
        not_compared=len(found.alone),
        warnings=list(found.odd),
        finding=None if found.finding is None else finding_as(found.finding),
    )


def finding_as(found: claim.Finding) -> Finding:
    """What became of a claim, as an object for programs."""
    contrasts = [
        Contrast(
            name=each.contrast.name,
            metric=each.contrast.metric,
            seeds=each.seeds,
            mean=each.mean,
            ci_low=each.low,
            ci_high=each.high,
            shown=each.contrast.shown,
            contradicted=each.contrast.contradicted,
            verdict=each.says,
            why_not=each.why_not,
        )
        for each in found.contrasts
    ]
    return Finding(
        claim=found.stated.claim,
        source=found.stated.source,
        verdict=found.says,
        contrasts=contrasts,
        otherwise=found.otherwise,
    )


def effect_of(number: int, comparison: Comparison, effect: statistics.Effect) -> Effect:
    """One effect of the comparison that has this number."""
    paired = effect.paired
    return Effect(
        comparison=number,
        where=_where(comparison),
        factor=effect.factor,
        arm=show(effect.arm),
        baseline=show(effect.baseline),
        metric=effect.metric,
        seeds=paired.seeds,
        difference=paired.difference,
        ci_low=paired.ci_low,
        ci_high=paired.ci_high,
        p=paired.p,
        p_holm=effect.p_holm,
        verdict=words.outcome(effect),
        sentence=words.verdict(effect),
        detectable=effect.detectable,
        two_stage=None if effect.stage is None else _stage(effect.stage),
        worth=None if effect.worth is None else _worth(effect.worth),
        p_signflip=paired.p_signflip,
        spread=paired.spread,
        arm_mean=effect.arm_mean,
        baseline_mean=effect.baseline_mean,
        left_out=effect.left_out,
        baseline_left_out=effect.baseline_left_out,
        diverged=effect.diverged,
        ended=effect.ended,
        baseline_diverged=effect.baseline_diverged,
        baseline_ended=effect.baseline_ended,
        cells=effect.cells,
        cells_left_out=effect.cells_left_out,
        why_not=effect.why_not,
    )


def _factors(number: int, comparison: Comparison) -> list[Factor]:
    return [
        Factor(
            comparison=number,
            where=_where(comparison),
            metric=comparison.metric.name,
            key=factor.key,
            also=list(factor.also),
            baseline=show(factor.baseline),
            arms=[show(arm) for arm in factor.arms],
        )
        for factor in comparison.design.factors
    ]


def _where(comparison: Comparison) -> dict[str, str]:
    return {key: show(value) for key, value in comparison.group.where.items()}


def _stage(stage: two_stage.TwoStage) -> TwoStage:
    return TwoStage(
        pilot=stage.pilot,
        spread=stage.spread,
        comparisons=stage.comparisons,
        pairs=stage.pairs,
        ci_low=stage.ci_low,
        ci_high=stage.ci_high,
        half_widths=list(stage.half_widths),
        needed=stage.needed,
    )


def _worth(found: worth.Worth) -> Worth:
    steps, step_cost, net = (
        None if each is None else Range(value=each.value, low=each.low, high=each.high)
        for each in (found.steps, found.step_cost, found.net)
    )
    return Worth(steps=steps, step_cost=step_cost, net=net, why_not=found.why_not)


if __name__ == "__main__":
    print(json.dumps(Verdict.model_json_schema(), indent=2, ensure_ascii=False))
