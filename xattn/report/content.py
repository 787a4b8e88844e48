"""The page's content: what was trained, the verdicts with their figure, their basis, what is odd, and every run."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from xattn.keys import short, show
from xattn.report.answer import Answer, Comparison
from xattn.report.blocks import Block, Bullets, Heading, Page, Paragraph, Picture, Table
from xattn.report.claim import Finding
from xattn.report.cost import SAME_LOAD, cost_of, why_speeds_differ
from xattn.report.design import Factor
from xattn.report.measures import attention_blocks, probe_blocks
from xattn.report.metric import Metric
from xattn.report.noise import noise_blocks
from xattn.report.read import Run
from xattn.report.selection import CHOSEN_BY, Selection, sensitivity, split
from xattn.report.statistics import BOOTSTRAP_FROM, EXACT_TO, Effect
from xattn.report.trained import trained
from xattn.report.words import (
    difference,
    in_steps,
    number,
    p_value,
    precision,
    sentence,
    signflip_note,
    verdict,
)
from xattn.report.worth import Fitted, laws
from xattn.system.screen import counted

_ROWS = 40  # at most, of the settings that are not compared and of commands
_NOTE = (
    "Means are of the pairs alone, the same seed on both sides, averaged over the combinations of the other factors "
    "that both were run with; so their difference is the one beside them. Left out: runs with a value at the chosen "
    "settings that are in no pair, the arm's + the baseline's. The interval is a t interval, of one arm alone. p: "
    "paired t test; Holm: corrected over the factor's arms, or over all arms (lengths of training apart) where each is "
    "one change to one baseline. "
    "Detectable: the difference that is found after Holm with "
    "probability 0.8, if seeds differ as much as these did. Diverged: of the runs that ended. Sign-flip: exact up to "
    f"{EXACT_TO} seeds, from more of 9,999 random flips."
)
_FINDING_NOTE = (
    "Means over seeds with t intervals that hold at once with probability 0.95 (Bonferroni). A contrast is shown, or "
    "contradicted, where its whole interval lies beyond the threshold that the experiment stated before its first run."
)
_NOTE_BCA = f" BCa: bootstrap, from {BOOTSTRAP_FROM} seeds on."

Pictures = Mapping[str, str]  # name → caption of each figure drawn


def page_of(found: Answer, pictures: Pictures) -> Page:
    """Return the page. The names of a comparison's figures start with its :func:`prefix`."""
    judged = [run for each in found.comparisons for run in each.runs]
    blocks: list[Block] = [*trained(found.study.runs, judged or found.study.runs)]
    for i, each in enumerate(found.comparisons):
        blocks += [
            Heading(f"Verdict{where(found, i)}"),
            *_verdicts(each),
            *_picture(f"{prefix(i)}effects", pictures),
        ]
    blocks += _alone(found)
    for i, each in enumerate(found.comparisons):
        own = {
            name.removeprefix(prefix(i)): caption for name, caption in pictures.items() if name.startswith(prefix(i))
        }
        blocks += _details(each, found.selection, own, prefix(i), where(found, i))
    blocks += [*_oddities(found), *_runs(found), *_finding(found.finding)]
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
    yield Bullets(
        [
            f"{factor.key}{_with(factor)}: {' '.join([sentence(each.of(factor)), *_worths(each.of(factor))])}"
            for factor in each.design.factors
            if each.of(factor)
        ]
    )


def _worths(effects: Sequence[Effect]) -> Iterator[str]:
    """Yield a sentence for each arm with a known worth."""
    for effect in effects:
        if effect.worth is not None and effect.worth.steps is not None:
            yield f"{show(effect.arm)} is {in_steps(effect.worth)}."


def _with(factor: Factor) -> str:
    """Return a phrase naming the keys that change with the factor's."""
    return f" (and with it {', '.join(map(short, factor.also))})" if factor.also else ""


def _alone(found: Answer) -> Iterator[Block]:
    """Yield the settings that differ from every other in more than one choice."""
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


def _details(each: Comparison, selection: Selection, pictures: Pictures, prefix: str, where: str) -> Iterator[Block]:
    """Yield what a comparison's verdicts rest on."""
    if each.effects:
        yield Heading(f"Statistics{where}")
        for factor in each.design.factors:
            yield from _effects(each, factor)
        yield Paragraph(_NOTE + (_NOTE_BCA if _has_bootstrap(each) else ""))
    if each.design.tuned:
        yield Paragraph(_selection(each, selection))
    yield from _worth(each, pictures, prefix, where)
    yield from noise_blocks(each, where)
    yield from _interactions(each, where)
    for title, begins in (("When arms part", "differences"), ("Learning curves", "curves")):
        if names := [name for name in pictures if name.startswith(begins)]:
            yield Heading(f"{title}{where}")
            for name in names:
                yield Picture(f"{prefix}{name}", pictures[name])
    yield from _tuning(each, pictures, prefix, where)
    yield from _cost(each, pictures, prefix, where)
    yield from _measured(each, pictures, prefix, where)


def _selection(each: Comparison, selection: Selection) -> str:
    keys = " and ".join(each.design.tuned)
    choosing, judging = split(each.design, selection)
    text = f"Each arm is judged at its own best {keys}: the one with the least mean {CHOSEN_BY}"
    if selection == "heldout":
        return (
            f"{text} over seeds {', '.join(map(show, choosing)) or 'none'}; it is judged by seeds "
            f"{', '.join(map(show, judging))}, which had no part in the choice, so that intervals keep their coverage."
        )
    return (
        f"{text} over the same runs that it is judged by. The least of several means flatters: where one arm had more "
        "or flatter settings to choose from, its loss is underestimated, and an interval can miss too often. "
        "Measured in simulated studies (python -m xattn.report.simulate): 95 % intervals hold the truth in 96.6 to "
        "98.2 % where both sides chose among five settings, in 93.2 to 94.5 % where the baseline had one. "
        "--selection heldout chooses on other seeds than it judges by."
    )


def _effects(each: Comparison, factor: Factor) -> Iterator[Block]:
    """Yield a factor's arms against its baseline, in numbers and in words."""
    effects, boot = each.of(factor), _has_bootstrap(each)
    if not effects:
        return
    form = precision(each.metric.name)
    rows = [
        [show(e.arm), number(e.arm_mean, form), number(e.baseline_mean, form), *_numbers(e, boot), *e.counts]
        for e in effects
    ]
    also = f" With it change {', '.join(factor.also)}: the runs cannot tell their effects apart." if factor.also else ""
    columns = [factor.key, f"mean {each.metric.name}", "baseline's mean", *_columns(boot), *_COUNTED]
    yield Table(
        columns,
        rows,
        words=[factor.key],
        note=f"Against {show(factor.baseline)}, each line in its own pairs.{also}",
    )
    notes = [
        note for n in sorted({effect.paired.seeds for effect in effects}) if (note := signflip_note(n)) is not None
    ]
    yield Bullets([*map(verdict, effects), *notes])


def _worth(each: Comparison, pictures: Pictures, prefix: str, where: str) -> Iterator[Block]:
    """Yield the laws that the arms' worth rests on."""
    found = laws(each)
    if not found:
        return
    yield Heading(f"Worth in steps{where}")
    yield Paragraph(
        "An arm's loss, set against the steps that the baseline would take to it by L(C) = E + a·C^(−b), C in steps, "
        "through the baseline's mean losses. Intervals are of one arm alone, over seeds; an end of one may lie outside "
        "of the lengths that were run. Net: the steps ÷ what a step costs."
    )
    rows = [
        [law.label, *(number(float(part[0]), ".4g") for part in (law.law.e, law.law.a, law.law.b)), _lengths(law)]
        for law in found
    ]
    yield Table(["baseline", "E", "a", "b", "lengths"], rows, words=["baseline", "lengths"])
    yield from _picture("worth", pictures, prefix)


def _lengths(law: Fitted) -> str:
    return ", ".join(f"{steps:,}" for steps in law.steps)


def _interactions(each: Comparison, where: str) -> Iterator[Block]:
    if not each.interactions:
        return
    boot, form = _has_bootstrap(each), f"+{precision(each.metric.name)}"
    yield Heading(f"Interactions{where}")
    yield Paragraph(
        "How much more an arm of the one factor changes the metric under an arm of the other than under that one's "
        "baseline: (a, b) − (a₀, b) minus (a, b₀) − (a₀, b₀). Zero where the two effects add up."
    )
    rows = [
        [
            *(e.factor, " × ".join(map(show, e.arm))),
            *(number(e.arm_mean, form), number(e.baseline_mean, form), *_numbers(e, boot)),
        ]
        for e in each.interactions
    ]
    columns = ["factors", "arms", "under the arm", "under its baseline", *_columns(boot)]
    yield Table(columns, rows, words=["factors", "arms"])
    yield _cells(each)


def _cells(each: Comparison) -> Table:
    """Return a table of every combination's mean and spread."""
    rows = []
    for cell, at in each.chosen.items():
        values = list(at.values.values())
        form = precision(each.metric.name)
        spread = number(float(np.std(values, ddof=1)), form) if len(values) > 1 else "–"
        mean = number(float(np.mean(values)), form) if values else "–"
        rows.append([each.design.label(cell), mean, spread, str(len(values)), str(len(at.diverged))])
    columns = ["combination", f"mean {each.metric.name}", "sd over seeds", "seeds", "diverged"]
    note = "Each over all seeds that it is judged by; differences above are of the seeds that all corners have."
    return Table(columns, rows, words=["combination"], note=note)


def _tuning(comparison: Comparison, pictures: Pictures, prefix: str, where: str) -> Iterator[Block]:
    design = comparison.design
    if not design.tuned:
        return
    yield Heading(f"Tuning of {' and '.join(design.tuned)}{where}")
    rows = []
    for cell, each in comparison.chosen.items():
        rows.append(
            [
                design.label(cell),
                ", ".join(map(show, each.setting)) + (" (edge)" if each.at_edge else ""),
                number(each.best.mean(each.shared), ".4f"),
                str(len(each.candidates)),
                str(sum(bool(candidate.diverged) for candidate in each.candidates)),
                number(sensitivity(each, design.runs[cell]), ".4f"),
            ]
        )
    yield Table(
        ["arm", "chosen", f"{CHOSEN_BY} there", "tried", "with diverged seeds", "sensitivity"],
        rows,
        words=["arm"],
        note="Sensitivity: the mean over the grid of min(loss, first logged loss) − best loss (Wortsman et al. 2023); "
        "comparable between arms with the same grid.",
    )
    for name in pictures:
        if name.startswith("tuning"):
            yield Picture(f"{prefix}{name}", pictures[name])


def _cost(each: Comparison, pictures: Pictures, prefix: str, where: str) -> Iterator[Block]:
    costs = {
        cell: cost_of(at, [run for runs in each.design.runs[cell].values() for run in runs.values()])
        for cell, at in each.chosen.items()
    }
    if not costs:
        return
    yield Heading(f"Cost{where}")
    why_not = why_speeds_differ(each.chosen.values())
    label = each.design.label
    rows = [
        [
            label(cell),
            *([number(cost.tokens_per_second, ",.0f")] if why_not is None else []),
            number(cost.compile_seconds, ".1f"),
            number(_scaled(cost.peak_memory_bytes, 2**20), ",.1f"),
            number(cost.num_params, ",.0f"),
            number(_scaled(cost.flops_per_step, 1e9), ",.2f"),
        ]
        for cell, cost in costs.items()
    ]
    speed = ["tokens/s"] if why_not is None else []
    note = (
        "Speeds of training alone, on one kind and number of devices and one pack size. How busy the machine was is "
        f"not on record; but the runs of one arm agree within {SAME_LOAD - 1:.0%}."
        if why_not is None
        else f"Speeds are not set side by side: {why_not}. They stand in results.csv."
    )
    yield Table(["arm", *speed, "compile s", "peak MiB", "parameters", "GFLOP a step"], rows, words=["arm"], note=note)
    yield Heading(f"Training stability{where}")
    rows = []
    for cell, cost in costs.items():
        diverged = f"{len(each.chosen[cell].diverged)} of {each.chosen[cell].ended}"
        norms = [number(cost.grad_norm, ".3g"), number(cost.max_grad_norm, ".3g")]
        rows.append([label(cell), diverged, number(cost.spikes, ".2g"), *norms])
    yield Table(
        ["arm", "diverged", "loss spikes a run", "median grad norm", "largest grad norm"],
        rows,
        words=["arm"],
        note="A spike: a logged training loss more than 6 robust standard deviations above the median of 20 before.",
    )
    yield from _picture("stability", pictures, prefix)


def _measured(each: Comparison, pictures: Pictures, prefix: str, where: str) -> Iterator[Block]:
    attention = attention_blocks(each.design, each.chosen)
    if attention:
        yield Heading(f"Attention{where}")
        yield from attention
        yield from _picture("attention-heads", pictures, prefix)
    probes = probe_blocks(each.design, each.probes)
    if probes:
        yield Heading(f"In-context measures{where}")
        yield from probes


def _oddities(found: Answer) -> Iterator[Block]:
    yield Heading("What is missing or odd")
    yield Bullets(found.odd) if found.odd else Paragraph("Nothing was found.")


def _runs(found: Answer) -> Iterator[Block]:
    """Yield every run with the words of its command that the others do not share."""
    runs = found.study.runs
    yield Heading("Every run")
    begun = Counter(run.provenance["command"] for run in runs if run.provenance.get("command"))
    if begun:
        rows = [[str(count), command] for command, count in begun.most_common(_ROWS)]
        yield Table(["runs", "begun by"], rows, code=["begun by"])
    programs = Counter(run.program for run in runs)
    shared = [word for word in runs[0].overrides if all(word in run.overrides for run in runs)]
    (program, _) = programs.most_common(1)[0]
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
    columns = ["contrast", "mean [interval]", "seeds", "shown if", "contradicted if", "it is"]
    yield Table(columns, rows, words=["contrast", "shown if", "contradicted if", "it is"], note=_FINDING_NOTE)
    yield Paragraph(found.sentence)


def _columns(boot: bool) -> list[str]:
    names = ["difference [95 % interval]", "p", "Holm p", "sign-flip p", "detectable", "seeds"]
    return [*names, *(["BCa interval"] if boot else [])]


def _numbers(effect: Effect, boot: bool) -> list[str]:
    found = effect.paired
    cells = [difference(effect), p_value(found.p), p_value(effect.p_holm), p_value(found.p_signflip)]
    cells += [number(effect.detectable, ".2g"), str(found.seeds)]
    if boot:
        form = f"+{precision(effect.metric)}"
        ends = [number(end, form) for end in found.bootstrap or ()]
        cells.append(f"[{', '.join(ends)}]" if ends else "–")
    return cells


_COUNTED = ("left out", "diverged")


def _result(run: Run, metric: Metric | None, names: Collection[str]) -> str:
    """Return the run's value of its metric, with the metric's name if runs are judged by several."""
    value = None if metric is None else metric.value(run)
    if metric is None or value is None:
        return "–"
    return f"{metric.name} " * (len(names) > 1) + number(value, precision(metric.name))


def _has_bootstrap(each: Comparison) -> bool:
    return any(effect.paired.bootstrap for effect in each.effects)


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _picture(name: str, pictures: Pictures, prefix: str = "") -> Iterator[Block]:
    if name in pictures:
        yield Picture(f"{prefix}{name}", pictures[name])
