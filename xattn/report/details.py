"""What a comparison's verdicts rest on: statistics, choice of settings, worth, interactions, tuning and cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from xattn.keys import show
from xattn.report.answer import Comparison
from xattn.report.blocks import Block, Bullets, Heading, Paragraph, Picture, Table
from xattn.report.cost import SAME_LOAD, mean, stability_of, why_speeds_differ
from xattn.report.design import Factor
from xattn.report.measures import attention_blocks, probe_blocks
from xattn.report.noise import noise_blocks
from xattn.report.selection import CHOSEN_BY, Selection, sensitivity, split
from xattn.report.statistics import BOOTSTRAP_FROM, EXACT_TO, Effect
from xattn.report.words import (
    difference,
    number,
    p_value,
    precision,
    signflip_note,
    verdict,
)
from xattn.report.worth import laws

Pictures = Mapping[str, str]  # name → caption of each figure drawn
_NOTE = (
    "Means are over pairs alone (the same seed on both sides), averaged over the combinations of the other factors "
    "that both were run with; so their difference is the one beside them. Left out: runs with a value at the chosen "
    "settings that are in no pair, the arm's + the baseline's. The interval is a t interval for one arm alone. p: "
    "paired t test. Holm p: corrected over the factor's arms, or over all arms (except lengths of training) where each "
    "is one change to one baseline. Detectable: the difference that is detected after Holm with probability 0.8, if "
    "seeds vary as much as these did. Diverged: of the runs that ended. Sign-flip p: exact up to "
    f"{EXACT_TO} seeds, and from 9,999 random flips with more."
)
# Column → the number in summary.json, its unit and its format.
_COSTS = {
    "tokens/s": ("tokens_per_second", 1, ",.0f"),
    "compile s": ("compile_seconds", 1, ".1f"),
    "peak MiB": ("peak_memory_bytes", 2**20, ",.1f"),
    "parameters": ("num_params", 1, ",.0f"),
    "GFLOP per step": ("flops_per_step", 1e9, ",.2f"),
}
_NOTE_BCA = f" BCa: bootstrap, with {BOOTSTRAP_FROM} seeds or more."


def details(each: Comparison, selection: Selection, pictures: Pictures, prefix: str, where: str) -> Iterator[Block]:
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
        if drawn := [*pictures_of(begins, pictures, prefix)]:
            yield Heading(f"{title}{where}")
            yield from drawn
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
    effects, boot = each.of(factor), _has_bootstrap(each)
    if not effects:
        return
    form = precision(each.metric.name)
    rows = [
        [show(e.arm), number(e.arm_mean, form), number(e.baseline_mean, form), *_numbers(e, boot), *e.counts]
        for e in effects
    ]
    also = (
        f" It changes together with {', '.join(factor.also)}: the runs cannot tell their effects apart."
        if factor.also
        else ""
    )
    columns = [factor.key, f"mean {each.metric.name}", "baseline's mean", *_columns(boot), "left out", "diverged"]
    yield Table(
        columns,
        rows,
        words=[factor.key],
        note=f"Against {show(factor.baseline)}; each row uses its own pairs.{also}",
    )
    notes = [
        note for n in sorted({effect.paired.seeds for effect in effects}) if (note := signflip_note(n)) is not None
    ]
    yield Bullets([*map(verdict, effects), *notes])


def _worth(comparison: Comparison, pictures: Pictures, prefix: str, where: str) -> Iterator[Block]:
    found = laws(comparison)
    if not found:
        return
    yield Heading(f"Worth in steps{where}")
    yield Paragraph(
        "The steps in which the baseline would reach an arm's loss by L(C) = E + a·C^(−b), C in steps, fitted through "
        "the baseline's mean losses. Intervals are for one arm alone, over seeds; their ends may lie outside the "
        "lengths that were run. Net: the steps ÷ the cost of a step."
    )
    rows = []
    for each in found:
        constants = [number(float(part[0])) for part in (each.law.e, each.law.a, each.law.b)]
        rows.append([each.label, *constants, ", ".join(f"{steps:,}" for steps in each.steps)])
    yield Table(["baseline", "E", "a", "b", "lengths"], rows, words=["baseline", "lengths"])
    yield from pictures_of("worth", pictures, prefix)


def _interactions(each: Comparison, where: str) -> Iterator[Block]:
    if not each.interactions:
        return
    boot, form = _has_bootstrap(each), f"+{precision(each.metric.name)}"
    yield Heading(f"Interactions{where}")
    yield Paragraph(
        "How much more an arm of one factor changes the metric under an arm of the other than under the other's "
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
    rows = []
    for cell, at in each.chosen.items():
        values = list(at.values.values())
        form = precision(each.metric.name)
        spread = number(float(np.std(values, ddof=1)), form) if len(values) > 1 else "–"
        mean = number(float(np.mean(values)), form) if values else "–"
        rows.append([each.design.label(cell), mean, spread, str(len(values)), str(len(at.diverged))])
    columns = ["combination", f"mean {each.metric.name}", "sd over seeds", "seeds", "diverged"]
    note = "Each is over all seeds it is judged by; the differences above use the seeds that all corners have."
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
    yield from pictures_of("tuning", pictures, prefix)


def _cost(each: Comparison, pictures: Pictures, prefix: str, where: str) -> Iterator[Block]:
    if not each.chosen:
        return
    yield Heading(f"Cost{where}")
    why_not = why_speeds_differ(each.chosen.values())
    columns = {name: how for name, how in _COSTS.items() if why_not is None or name != "tokens/s"}
    costs, steadiness = [], []
    for cell, at in each.chosen.items():
        every = [run for runs in each.design.runs[cell].values() for run in runs.values()]
        ended = [run for run in at.runs.values() if run.status in ("done", "diverged")]
        costs.append([each.design.label(cell)])
        for key, unit, form in columns.values():
            # Settings share programs, and any of the cell's runs may have compiled.
            found = mean(run.number(key) for run in (every if key == "compile_seconds" else ended))
            costs[-1].append(number(None if found is None else found / unit, form))
        spikes, norm, largest = stability_of(ended)
        numbers = [number(spikes, ".2g"), number(norm, ".3g"), number(largest, ".3g")]
        steadiness.append([each.design.label(cell), f"{len(at.diverged)} of {at.ended}", *numbers])
    note = (
        "Speeds are of training alone, with one kind and number of devices and one pack size. The machine's load was "
        f"not recorded, but the runs of one arm agree within {SAME_LOAD - 1:.0%}."
        if why_not is None
        else f"Speeds are not compared: {why_not}. They are in results.csv."
    )
    yield Table(["arm", *columns], costs, words=["arm"], note=note)
    yield Heading(f"Training stability{where}")
    yield Table(
        ["arm", "diverged", "loss spikes per run", "median grad norm", "largest grad norm"],
        steadiness,
        words=["arm"],
        note="A spike: a logged training loss more than 6 robust standard deviations above the median of 20 before.",
    )
    yield from pictures_of("stability", pictures, prefix)


def _measured(each: Comparison, pictures: Pictures, prefix: str, where: str) -> Iterator[Block]:
    attention = attention_blocks(each.design, each.chosen)
    if attention:
        yield Heading(f"Attention{where}")
        yield from attention
        yield from pictures_of("attention-heads", pictures, prefix)
    probes = probe_blocks(each.design, each.probes)
    if probes:
        yield Heading(f"In-context measures{where}")
        yield from probes


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


def _has_bootstrap(each: Comparison) -> bool:
    return any(effect.paired.bootstrap for effect in each.effects)


def pictures_of(begins: str, pictures: Pictures, prefix: str = "") -> Iterator[Block]:
    for name, caption in pictures.items():
        if name.startswith(begins):
            yield Picture(f"{prefix}{name}", caption)
