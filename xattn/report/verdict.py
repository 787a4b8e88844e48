"""The report for programs: ``verdict.json``, which ``xattn report --json`` also prints.

:class:`Verdict` is the schema. docs/verdict.schema.json holds it as JSON Schema; regenerate that file with
``python -m xattn.report.verdict > docs/verdict.schema.json``.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from xattn.keys import show
from xattn.report import claim, statistics, words
from xattn.report.answer import Answer, Comparison
from xattn.report.claim import Says
from xattn.report.selection import Selection
from xattn.report.words import Outcome

# A folder's name may contain bytes that are not text; they are written as escapes.
Text = Annotated[str, BeforeValidator(lambda text: text.encode("utf-8", "backslashreplace").decode())]
Number = float | None  # null if unknown or not finite


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, from_attributes=True)


class Range(_Part):
    """A number and its 95 % interval."""

    value: Number
    low: Number
    high: Number


class Worth(_Part):
    """What an arm is worth in baseline steps. Above 1, the baseline needs more steps to reach the arm's loss."""

    steps: Range | None
    """baseline steps that reach the arm's loss, as a multiple of the arm's own steps"""
    step_cost: Range | None
    """seconds per step, as a multiple of the baseline's; null if the speeds may not be compared"""
    net: Range | None
    """steps / step_cost"""
    why_not: Text
    """why a number is missing; empty if none is"""


class TwoStage(_Part):
    """Stein's interval, used where ``sweep.half_width`` chose the number of seeds. The verdict rests on it."""

    pilot: int
    """the number of pilot pairs; their spread decided how many more were run"""
    spread: Number
    """standard deviation of the pilot's differences"""
    comparisons: int
    """the number of intervals that hold simultaneously with probability 0.95"""
    pairs: int
    """the number of pairs of runs available"""
    ci_low: Number
    ci_high: Number
    half_widths: list[float]
    """the requested half-widths, in order; more than one if the study was extended"""
    needed: int
    """the pairs that the last of half_widths requires; the study is complete once pairs reaches this number"""


class Factor(_Part):
    """A key that differs between the compared runs."""

    comparison: int
    """number of the comparison that the factor belongs to, from 1"""
    where: dict[Text, Text]
    """what distinguishes the comparison from the study's others: key → value, as --where takes them"""
    metric: Text
    """the metric that judges the comparison's arms"""
    key: Text
    also: list[Text]
    """keys that change with it, so their effects cannot be separated"""
    baseline: Text
    """the arm that the others are compared with"""
    arms: list[Text]
    """the baseline comes first"""


class Effect(_Part):
    """An arm against its factor's baseline, paired by seed."""

    comparison: int
    """number of the comparison, from 1"""
    where: dict[Text, Text]
    """what distinguishes the comparison from the study's others: key → value, as --where takes them"""
    factor: Text
    arm: Text
    """as it is typed in --better FACTOR=ARM"""
    baseline: Text
    metric: Text
    seeds: int
    """pairs of runs: one for each seed that both arms have"""
    difference: Number
    """mean over seeds of arm − baseline"""
    ci_low: Number
    """95 % t interval, for this arm alone"""
    ci_high: Number
    p: Number
    """from the paired t test"""
    p_holm: Number
    """p after Holm's correction over the factor's arms; where every arm is a single change to one baseline, over all
    arms except training lengths"""
    verdict: Outcome
    """better, worse: shown, in a metric that has a direction. higher, lower: shown, but the metric has no direction, or
    the side with the better values diverged in a larger share of its runs. undecided: not shown. nothing: no
    interval"""
    sentence: Text
    """the verdict in words"""
    detectable: Number
    """the difference that such a study detects four times in five"""
    two_stage: TwoStage | None
    worth: Worth | None
    p_signflip: Number
    """from the sign-flip permutation test"""
    spread: Number
    """standard deviation of the differences over seeds"""
    arm_mean: Number
    """mean over the paired runs"""
    baseline_mean: Number
    left_out: int
    """runs of the arm that have a value at the chosen settings but belong to no pair"""
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
    """why existing values are not comparable; empty if they are"""


class Contrast(_Part):
    """A number that a claim is about: a mean over seeds. The intervals of one claim hold simultaneously."""

    name: Text
    metric: Text
    seeds: int
    mean: Number
    ci_low: Number
    ci_high: Number
    shown: Text
    """where the interval must lie: > x, < x, within x (from -x to x) or beyond x"""
    contradicted: Text
    verdict: Says
    why_not: Text
    """why there is no number; empty if there is one"""


class Finding(_Part):
    """The claim stated by the study's experiment, and its outcome."""

    claim: Text
    source: Text
    verdict: Says
    contrasts: list[Contrast]
    otherwise: int
    """runs of the study that state another claim or none"""


class Verdict(_Part):
    """What a study shows."""

    schema_version: Literal[1]
    """increased when a field changes its meaning or is removed; new fields leave it unchanged"""
    study: Text
    """name of the study's folder"""
    command: Text
    """the command that wrote this"""
    selection: Selection
    """same: tuned keys were chosen on the runs that are judged; heldout: they were chosen on other seeds"""
    metrics: list[Text]
    """the metrics that judge the arms; more than one only if comparisons differ in theirs"""
    factors: list[Factor]
    """empty if only the seed differs"""
    effects: list[Effect]
    probes: list[Effect]
    """effects on in-context measures, at the settings chosen by validation loss"""
    counts: dict[Text, int]
    """status → number of runs with it"""
    not_compared: int
    """settings that differ from every other in more than one choice"""
    warnings: list[Text]
    """what is missing or odd, one sentence each"""
    finding: Finding | None


def verdict_of(found: Answer) -> Verdict:
    """Return the answer as an object for programs."""
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
    """Return the outcome of a claim as an object for programs."""
    return Finding(
        claim=found.stated.claim,
        source=found.stated.source,
        verdict=found.says,
        contrasts=[_contrast(each) for each in found.contrasts],
        otherwise=found.otherwise,
    )


def _contrast(found: claim.Decided) -> Contrast:
    known = vars(found.contrast) | vars(found) | {"verdict": found.says}
    return Contrast.model_validate({name: known[name] for name in Contrast.model_fields})


def effect_of(number: int, comparison: Comparison, effect: statistics.Effect) -> Effect:
    """Return one effect of the comparison with this number as an object for programs."""
    known = vars(effect) | vars(effect.paired)
    same = {name: known[name] for name in Effect.model_fields if name in known}
    own = {
        "comparison": number,
        "where": _where(comparison),
        "arm": show(effect.arm),
        "baseline": show(effect.baseline),
        "verdict": words.outcome(effect),
        "sentence": words.verdict(effect),
        "two_stage": effect.stage,
    }
    return Effect.model_validate(same | own)


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


if __name__ == "__main__":
    print(json.dumps(Verdict.model_json_schema(), indent=2, ensure_ascii=False))
