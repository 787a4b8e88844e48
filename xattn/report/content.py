"""The page's content: what was trained, the verdicts with their figure, their basis, what is odd, and every run."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Collection, Iterator

import numpy as np

from xattn.keys import short, show
from xattn.report.answer import Answer, Comparison
from xattn.report.blocks import Block, Bullets, Heading, Page, Paragraph, Table
from xattn.report.claim import Finding
from xattn.report.details import Pictures, details, pictures_of
from xattn.report.metric import Metric
from xattn.report.read import Run
from xattn.report.selection import CHOSEN_BY
from xattn.report.trained import trained
from xattn.report.words import (
    in_steps,
    number,
    precision,
    sentence,
)
from xattn.system.screen import counted

_ROWS = 40  # at most, of the settings that are not compared and of commands
_FINDING_NOTE = (
    "Means over seeds with t intervals that hold together with probability 0.95 (Bonferroni). A contrast is shown, or "
    "contradicted, where its whole interval lies beyond the threshold that the experiment stated before its first run."
)


def page_of(found: Answer, pictures: Pictures) -> Page:
    """Return the page. The names of a comparison's figures start with its :func:`prefix`."""
    judged = [run for each in found.comparisons for run in each.runs]
    blocks: list[Block] = [*trained(found.study.runs, judged or found.study.runs)]
    for i, each in enumerate(found.comparisons):
        blocks += [
            Heading(f"Verdict{where(found, i)}"),
            *_verdicts(each),
            *pictures_of(f"{prefix(i)}effects", pictures),
        ]
    blocks += _alone(found)
    for i, each in enumerate(found.comparisons):
        own = {
            name.removeprefix(prefix(i)): caption for name, caption in pictures.items() if name.startswith(prefix(i))
        }
        blocks += details(each, found.selection, own, prefix(i), where(found, i))
    blocks.append(Heading("What is missing or odd"))
    blocks.append(Bullets(found.odd) if found.odd else Paragraph("Nothing was found."))
    blocks += [*_runs(found), *_finding(found.finding)]
    return Page(f"Study {found.study.folder.resolve().name}", blocks)


def prefix(i: int) -> str:
    """Return the start of the i-th comparison's figure names."""
    return f"{i + 1}-" if i else ""


def where(found: Answer, i: int) -> str:
    """Return, for a heading, a comparison's number and what distinguishes it; empty if it is the only one."""
    if len(found.comparisons) == 1:
        return ""
    label = found.comparisons[i].group.label
    return f" {i + 1}{f': {label}' if label else ''}"


def _verdicts(each: Comparison) -> Iterator[Block]:
    if not each.effects:
        yield Paragraph("Nothing differs between the runs but the seed. There is nothing to compare.")
        return
    verdicts = []
    for factor in each.design.factors:
        if effects := each.of(factor):
            also = f" (and with it {', '.join(map(short, factor.also))})" if factor.also else ""
            known = [(e.arm, e.worth) for e in effects if e.worth is not None and e.worth.steps is not None]
            worths = [f"{show(arm)} is {in_steps(worth)}." for arm, worth in known]
            verdicts.append(f"{factor.key}{also}: {' '.join([sentence(effects), *worths])}")
    yield Bullets(verdicts)


def _alone(found: Answer) -> Iterator[Block]:
    if not found.alone:
        return
    yield Heading("Not compared")
    yield Paragraph(
        "Apart from the seed, each of these differs from every other run in more than one choice, so a difference "
        "could not be attributed to one of them."
    )
    means = []
    for each in found.alone:
        values = [value for chosen in each.chosen.values() for value in chosen.values.values()]
        means.append((float(np.mean(values)) if values else np.inf, len(values), each))
    rows = []
    for mean, seeds, each in sorted(means, key=lambda entry: entry[:2])[:_ROWS]:
        form = precision(each.metric.name)
        value = f"{each.metric.name} {number(mean, form)}" if np.isfinite(mean) else "–"
        rows.append([each.group.label, str(len(each.runs)), value, str(seeds)])
    more = len(found.alone) - len(rows)
    note = f"And {counted(more, 'more such setting')}; results.csv has every run." if more else ""
    yield Table(["setting", "runs", "mean", "seeds"], rows, words=["setting"], note=note)


def _runs(found: Answer) -> Iterator[Block]:
    """Yield every run with the words of its command that the others do not share."""
    runs = found.study.runs
    yield Heading("Every run")
    begun = Counter(run.provenance["command"] for run in runs if run.provenance.get("command"))
    if begun:
        rows = [[str(count), command] for command, count in begun.most_common(_ROWS)]
        yield Table(["runs", "begun by"], rows, code=["begun by"])
    shared = [word for word in runs[0].overrides if all(word in run.overrides for run in runs)]
    ((program, _),) = Counter(run.program for run in runs).most_common(1)
    yield Paragraph("The command of one run, to which each run adds its own words:")
    yield Table(["command"], [[f"{program} {shlex.join(shared)}".strip() + " …"]], code=["command"])
    metrics = {run.folder: each.metric for each in (*found.comparisons, *found.alone) for run in each.runs}
    names = {metric.name for metric in metrics.values()} or {CHOSEN_BY}
    rows = []
    for run in runs:
        commit = (run.provenance.get("git_commit") or "none")[:10]
        dirty = " (dirty)" if run.provenance.get("git_dirty") else ""
        own = shlex.join(word for word in run.overrides if word not in shared)
        words = own if run.program == program else f"{run.program} … {own}"
        rows.append([run.name, words, run.status, _result(run, metrics.get(run.folder), names), commit + dirty])
    columns = ["folder", "its own words", "status", *(names if len(names) == 1 else ["result"]), "commit"]
    yield Table(columns, rows, words=["folder"], code=["its own words"], folders="folder")
    later = [
        [run.name, show(each.get("step")), *(json.dumps(each.get(key)) for key in ("overrides", "results"))]
        for run in runs
        for each in run.evaluations
    ]
    if later:
        yield Paragraph("Evaluated later (evaluations.jsonl):")
        yield Table(["run", "step", "overrides", "results"], later, code=["overrides", "results"], folders="run")
    yield Paragraph(f"Made by: {found.command}")


def _finding(found: Finding | None) -> Iterator[Block]:
    if found is None:
        return
    yield Heading("Finding")
    yield Paragraph(f"{found.stated.claim} ({found.stated.source})")
    rows = [
        [each.contrast.name, each.words, str(each.seeds), each.contrast.shown, each.contrast.contradicted, each.says]
        for each in found.contrasts
    ]
    columns = ["contrast", "mean [interval]", "seeds", "shown if", "contradicted if", "verdict"]
    yield Table(columns, rows, words=["contrast", "shown if", "contradicted if", "verdict"], note=_FINDING_NOTE)
    yield Paragraph(found.sentence)


def _result(run: Run, metric: Metric | None, names: Collection[str]) -> str:
    """Return the run's value of its metric, with the metric's name if runs are judged by several."""
    value = None if metric is None else metric.value(run)
    if metric is None or value is None:
        return "–"
    return f"{metric.name} " * (len(names) > 1) + number(value, precision(metric.name))
