"""What is missing or odd in a study, in sentences."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from xattn.keys import short, show
from xattn.metrics import BITS, LOSS, loss_metric
from xattn.report.answer import Comparison
from xattn.report.design import Cell, Design, Factor
from xattn.report.metric import spans
from xattn.report.read import Run, Study
from xattn.report.selection import Chosen, Selection, split
from xattn.report.size import unfair
from xattn.report.statistics import Effect, matched
from xattn.report.two_stage import asked_half_widths
from xattn.system.screen import counted

_AT_MOST = 8  # names in a sentence
_LETTERS = 16  # of a hash


def what_is_odd(study: Study, comparisons: Sequence[Comparison], selection: Selection) -> list[str]:
    """Return a sentence for each thing that a reader should know before believing a difference."""
    said = _folders(study)
    for i, each in enumerate(comparisons, 1):
        of_one = [
            *_too_few(each.design, selection),
            *_metric(each),
            *_repeated(each.design),
            *_missing(each),
            *_edges(each.design, each.chosen),
            *_budgets(each),
            *unfair(each),
            *_left_out(each.effects),
            *_baselines(each.design.factors),
        ]
        where = f"Comparison {i}: " if len(comparisons) > 1 else ""
        said += [f"{where}{sentence}" for sentence in of_one]
    return [*said, *_unequal(study.runs)]


def _folders(study: Study) -> list[str]:
    said = []
    if study.foreign:
        said.append(f"Skipped, since these are not runs: {_list(study.foreign)}.")
    states = {
        "running": "still running, and not judged",
        "killed": "killed or left without an end, and not judged",
        "preempted": "stopped before the end, and not judged",
        "failed": "failed, and not judged",
        "pruned": "stopped early by the tuner, and not judged",
        "not begun": "without a summary.json, and not judged",
    }
    others = {run.status for run in study.runs} - {*states, "done", "diverged"}
    states |= {status: f"with the unknown status {status!r}, and not judged" for status in sorted(others)}
    for status, words in states.items():
        names = [run.name for run in study.runs if run.status == status]
        if names:
            said.append(f"{counted(len(names), 'run')} {words}: {_list(names)}.")
    for run in study.runs:
        said += [f"{run.name}: {problem}." for problem in run.problems]
    return said


def _metric(comparison: Comparison) -> list[str]:
    """Return what the numbers measure, if that differs between runs or is not what was expected."""
    metric, runs = comparison.metric, comparison.runs
    said = []
    if metric.name == BITS and loss_metric(run.config for run in runs) == BITS:
        said.append(f"{LOSS} is per token, and the runs' tokens differ; they are compared by {BITS}.")
    done = [run for run in runs if run.status == "done"]
    without = [run for run in done if metric.of(run) is None]
    elsewhere = [run.name for run in without if run.number(metric.name) is not None]
    if elsewhere:
        said.append(
            f"Evaluated on other sequences than evaluation.sequences={metric.sequences}, and not judged: "
            f"{_list(elsewhere)}. xattn evaluate RUN evaluation.sequences={metric.sequences} --save adds what is "
            "missing."
        )
    if bare := [run.name for run in without if run.name not in elsewhere]:
        said.append(f"Done, without a finite {metric.name}, and not judged: {_list(bare)}.")
    if apart := spans(done, metric):
        said.append(apart)
    return said


def _repeated(design: Design) -> list[str]:
    if not design.repeated:
        return []
    names = [run.name for run in design.repeated]
    return [f"Skipped, since another run had the same training: {_list(names)}."]


def _too_few(design: Design, selection: Selection) -> list[str]:
    judging = split(design, selection)[1]
    if len(judging) > 1 or not design.factors:
        return []
    said = f"Too few seeds for an interval: {len(judging)} to judge by"
    return [f"{said}; held-out selection needs three." if len(design.seeds) > len(judging) else f"{said}."]


def _missing(each: Comparison) -> list[str]:
    """Return what was not run. Where ``sweep.half_width`` chose the seeds, only those before an arm's last count."""
    said, design = [], each.design
    on_demand = bool(asked_half_widths(each.runs))
    for cell, settings in design.runs.items():
        for setting, runs in settings.items():
            due = design.seeds
            if on_demand:
                due = due[: max(i for i, seed in enumerate(due) if seed in runs) + 1]
            seeds = [show(seed) for seed in due if seed not in runs]
            if seeds:
                where = ", ".join(f"{short(k)} {show(v)}" for k, v in zip(design.tuned, setting, strict=True))
                where = f"{design.label(cell)}{' at ' + where if where else ''}"
                said.append(f"Missing seeds: {where} has no run with seed {_list(seeds)}.")
    if len(said) > _AT_MOST:
        said = [*said[:_AT_MOST], f"… and {len(said) - _AT_MOST} more settings with missing seeds."]
    wanted = math.prod(len(factor.arms) for factor in design.factors)
    is_one_at_a_time = design.hub is not None and wanted > len(design.runs) + 1
    if wanted > len(design.runs) and not is_one_at_a_time:
        crossing = itertools.product(*(factor.arms for factor in design.factors))
        absent = itertools.islice((cell for cell in crossing if cell not in design.runs), _AT_MOST)
        names = [design.label(cell) for cell in absent]
        had = len(design.runs)
        said.append(
            f"The factors are not fully crossed: {had:,} of {wanted:,} combinations were run; missing: "
            f"{_list(names, of=wanted - had)}."
        )
    return said


def _edges(design: Design, chosen: Mapping[Cell, Chosen]) -> list[str]:
    said = []
    for each in chosen.values():
        for key in each.at_edge:
            value = show(each.setting[design.tuned.index(key)])
            said.append(
                f"Edge of the grid: the best {key} of {design.label(each.cell)} is {value}, the last one tried on "
                "that side; a better one may lie beyond."
            )
    return said


def _unequal(runs: Sequence[Run]) -> list[str]:
    """Return what should be the same for all runs but is not."""
    ended = [run for run in runs if run.status in ("done", "diverged")]
    things: list[tuple[str, Callable[[Run], object]]] = [
        ("data (data_sha256)", lambda run: run.provenance.get("data_sha256")),
        ("source versions (source_sha256)", lambda run: run.provenance.get("source_sha256")),
        ("commits", lambda run: run.provenance.get("git_commit")),
        ("device kinds", lambda run: run.provenance.get("device_kind")),
        ("numbers of devices", lambda run: run.provenance.get("device_count")),
        ("attention implementations", lambda run: run.summary.get("implementation")),
    ]
    said = []
    for name, value in things:
        counts = Counter(show(value(run)) for run in ended)
        if len(counts) > 1:
            parts = ", ".join(f"{_brief(text)} ({counted(n, 'run')})" for text, n in counts.most_common(_AT_MOST))
            said.append(f"Different {name}: {parts}.")
    versions = [dict(run.provenance.get("versions") or {}) for run in ended]
    for package in sorted({package for each in versions for package in each}):
        found = sorted({show(each.get(package)) for each in versions})
        if len(found) > 1:
            said.append(f"Different versions of {package}: {', '.join(found)}.")
    dirty = [run.name for run in ended if run.provenance.get("git_dirty")]
    if dirty:
        said.append(f"Source with uncommitted changes (git_dirty): {counted(len(dirty), 'run')}.")
    return said


def _budgets(comparison: Comparison) -> list[str]:
    """Return where arms differ in budget: the training tokens of their pairs, and the settings to choose from."""
    said = []
    design = comparison.design
    for i, factor in enumerate(design.factors):
        differ = f"Different budgets between the arms of {factor.key}, in"
        unequal = []
        for arm in factor.arms[1:]:
            pairs = matched(design, comparison.chosen, factor, arm, comparison.metric)
            sides = ((a.runs[seed], b.runs[seed]) for a, b in pairs.cells for seed in pairs.seeds)
            tokens = {(ours.tokens_seen, theirs.tokens_seen) for ours, theirs in sides}
            if both := sorted((pair for pair in tokens if pair[0] != pair[1]), key=str):
                unequal.append(f"{show(arm)}: {' or '.join(f'{a or 0:,} against {b or 0:,}' for a, b in both)}")
        if unequal:
            said.append(f"{differ} training tokens: {'; '.join(unequal)}.")
        tried: dict[str, set[int]] = {}
        for cell, settings in design.runs.items():
            tried.setdefault(show(cell[i]), set()).add(len(settings))
        if len({frozenset(values) for values in tried.values()}) > 1:
            parts = (f"{arm}: {' or '.join(f'{n:,}' for n in sorted(values))}" for arm, values in tried.items())
            said.append(f"{differ} tuning settings tried: {'; '.join(parts)}.")
    return said


def _left_out(effects: Sequence[Effect]) -> list[str]:
    said = []
    for effect in effects:
        if effect.diverged or effect.baseline_diverged:
            said.append(
                f"Diverged: {effect.diverged} of {effect.ended} runs of {effect.factor} = {show(effect.arm)} and "
                f"{effect.baseline_diverged} of {effect.baseline_ended} of {show(effect.baseline)} that ended, at the "
                "chosen settings. A diverged run is worse than any loss; it has no difference, so the mean covers "
                "only pairs that ended and flatters the side that diverged more."
            )
        if effect.cells_left_out:
            said.append(
                f"{effect.factor} = {show(effect.arm)}: {counted(effect.cells_left_out, 'combination')} of the other "
                f"factors {'has' if effect.cells_left_out == 1 else 'have'} too few comparable pairs of runs, and "
                f"{'is' if effect.cells_left_out == 1 else 'are'} not in its mean."
            )
        if effect.why_not:
            said.append(
                f"{effect.factor} = {show(effect.arm)} against {show(effect.baseline)}: some values of {effect.metric} "
                f"are not comparable: {effect.why_not}."
            )
    return said


def _baselines(factors: Sequence[Factor]) -> list[str]:
    return [
        f"The default of {factor.key} is not among its arms; the baseline is {show(factor.baseline)}."
        for factor in factors
        if not factor.baseline_is_given
    ]


def _brief(text: str) -> str:
    """Return the beginning of a digest; any other text unchanged."""
    return text[:_LETTERS] if re.fullmatch("[0-9a-f]{40,}", text) else text


def _list(names: Sequence[str], of: int | None = None) -> str:
    """Return at most eight of the names, and how many more there are; of: their total number."""
    shown = names[:_AT_MOST]
    more = (len(names) if of is None else of) - len(shown)
    return ", ".join(shown) + (f", and {more:,} more" if more > 0 else "")
