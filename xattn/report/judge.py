"""Splits a study's runs into groups that each answer one question, and judges each group."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from xattn.errors import BadInput, did_you_mean
from xattn.keys import TUNED, show
from xattn.report.answer import Answer, Comparison, Question
from xattn.report.checks import what_is_odd
from xattn.report.claim import finding_of
from xattn.report.cost import is_speed, why_speeds_differ
from xattn.report.defaults import conf_defaults
from xattn.report.design import Design, Group, find_design, groups_of
from xattn.report.measures import probes_of
from xattn.report.metric import metric_for
from xattn.report.read import Run, Study, finite
from xattn.report.selection import Selection, choose, with_metric
from xattn.report.statistics import interactions, main_effects
from xattn.report.two_stage import asked_half_widths, with_stages
from xattn.report.worth import with_worth


def judge(study: Study, question: Question, *, command: str = "") -> Answer:
    """Group the study's runs and judge each group.

    Raises :class:`BadInput` if the question asks for something that the study lacks, or for a speed where speeds are
    not comparable.
    """
    study = replace(study, runs=tuple(_asked_for(study.runs, question)))
    _check_metric(study.runs, question.metric)
    for key in question.tuned:
        check_key(key, study.runs, "--tuned")
    tuned = (*TUNED, *question.tuned)
    baselines = {}
    for key, arm in question.baselines.items():
        check_key(key, study.runs, "--baseline")
        baselines[key] = value_typed(study.runs, key, arm)
    defaults = conf_defaults()
    selection = question.selection or ("heldout" if question.two_stage or asked_half_widths(study.runs) else "same")
    judged = [
        _compared(group, find_design(group.runs, defaults, tuned, baselines), question.metric, selection)
        for group in groups_of(study.runs, tuned)
    ]
    comparisons = [each for each in judged if each.design.factors or len(judged) == 1]
    comparisons = [with_worth(each) for each in with_stages(comparisons, question.two_stage)]
    factors = {
        key: None for each in comparisons for factor in each.design.factors for key in (factor.key, *factor.also)
    }
    for key in baselines.keys() - factors.keys():
        raise BadInput(f"{key}: is not a factor here; {there_are(factors)}")
    return Answer(
        study=study,
        comparisons=comparisons,
        alone=[each for each in judged if not each.design.factors and len(judged) > 1],
        odd=what_is_odd(study, comparisons, selection),
        finding=finding_of(study.runs),
        selection=selection,
        command=command,
    )


def _compared(group: Group, design: Design, asked: str | None, selection: Selection) -> Comparison:
    metric = metric_for(group.runs, asked)
    chosen = choose(design, metric, selection)
    if design.factors and is_speed(metric.name) and (why_not := why_speeds_differ(chosen.values())) is not None:
        raise BadInput(f"--metric {metric.name}: no verdict on speeds, because {why_not}; they are in results.csv")
    of_probes = {name: metric_for(group.runs, name) for name in probes_of(group.runs) if name != metric.name}
    return Comparison(
        group=group,
        design=design,
        metric=metric,
        chosen=chosen,
        effects=main_effects(design, chosen, metric),
        interactions=interactions(design, chosen, metric),
        probes={name: main_effects(design, with_metric(chosen, probe), probe) for name, probe in of_probes.items()},
    )


def _asked_for(runs: Sequence[Run], question: Question) -> Iterator[Run]:
    """Yield the runs that --where and --seeds select."""
    for key, values in question.where.items():
        check_key(key, runs, "--where")
        there = list(dict.fromkeys(show(run.config.get(key)) for run in runs))
        for value in values:
            if not any(is_typed(run.config.get(key), value) for run in runs):
                raise BadInput(f"--where {key}={value}: no run has it; the values are {', '.join(there[:12])}")
        runs = [run for run in runs if any(is_typed(run.config.get(key), value) for value in values)]
        if not runs:
            raise BadInput(f"--where {key}={','.join(values)}: no run has this and the other values")
    if question.seeds is not None:
        there = list(dict.fromkeys(show(run.seed) for run in runs))
        for seed in question.seeds:
            if seed not in there:
                raise BadInput(f"--seeds {seed}: no run has it; the seeds are {', '.join(there[:12])}")
        runs = [run for run in runs if show(run.seed) in question.seeds]
    yield from runs


def value_typed(runs: Sequence[Run], key: str, typed: str) -> Any:
    """Return the key's value that was typed. Raises :class:`BadInput` if no run has it."""
    values = dict.fromkeys(run.config.get(key) for run in runs)
    for value in values:
        if is_typed(value, typed):
            return value
    raise BadInput(f"{key}={typed}: no run has it; the values are {', '.join(map(show, [*values][:12]))}")


def is_typed(value: Any, typed: str) -> bool:
    """Return whether the value is what was typed; 3e-3 also matches 0.003."""
    size = finite(value)
    try:
        return show(value) == typed or (size is not None and size == float(typed))
    except ValueError:
        return False


def check_key(key: str, runs: Sequence[Run], option: str) -> None:
    keys = sorted({known for run in runs for known in run.config})
    if keys and key not in keys:
        hint = did_you_mean(key, keys) or "; a key is, for example, backend.theta"
        raise BadInput(f"{option} {key}: no run's config has it{hint}")


def _check_metric(runs: Sequence[Run], metric: str | None) -> None:
    done = [run for run in runs if run.status == "done"]
    if metric is None or not done or any(metric_for([run], metric).of(run) for run in done):
        return
    known = sorted({key for run in done for key in run.summary if run.number(key) is not None})
    hint = did_you_mean(metric, known) or f"; the numbers are {', '.join(known[:12])}"
    raise BadInput(f"--metric {metric}: no run's summary.json has such a number{hint}")


def there_are(factors: Collection[str]) -> str:
    return f"the factors are {', '.join(factors)}" if factors else "nothing differs between the runs that are compared"
