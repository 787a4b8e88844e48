"""What the page says, in its order: question, verdicts, effects, curves, cost, stability, what is odd, every run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xattn.report.blocks import Block, Bullets, Heading, Page, Paragraph, Picture, Table
from xattn.report.cost import SAME_LOAD, cost_of, why_speeds_differ
from xattn.report.design import Cell, Design, show
from xattn.report.measures import attention_blocks, probe_blocks
from xattn.report.read import Study
from xattn.report.selection import CHOSEN_BY, Chosen, Selection, sensitivity, split
from xattn.report.statistics import BOOTSTRAP_FROM, EXACT_TO, Effect
from xattn.report.tables import arm_mean
from xattn.report.words import difference, number, p_value, precision, signflip_note, verdict


@dataclass(frozen=True)
class Findings:
    """All that the page is made from. probes: in-context measure → its effects; probes_chosen: and its values."""

    study: Study
    design: Design
    chosen: Mapping[Cell, Chosen]
    effects: Sequence[Effect]
    interactions: Sequence[Effect]
    probes: Mapping[str, Sequence[Effect]]
    probes_chosen: Mapping[str, Mapping[Cell, Chosen]]
    odd: Sequence[str]
    metric: str
    selection: Selection
    command: str


def page_of(found: Findings, pictures: Mapping[str, str]) -> Page:
    """pictures: figure name → caption, of the figures that there are."""
    blocks = [
        *_question(found),
        *_verdicts(found),
        *_effects(found, pictures),
        *_tuning(found, pictures),
        *_learning(pictures),
        *_cost(found, pictures),
        *_measured(found, pictures),
        *_oddities(found),
        *_runs(found),
    ]
    return Page(f"Study {found.study.folder.name}", blocks)


def _question(found: Findings) -> Iterator[Block]:
    design, runs = found.design, found.study.runs
    for factor in design.factors:
        arms = ", ".join(show(arm) for arm in factor.arms)
        also = (
            f" (with it change {', '.join(factor.also)}: the runs cannot tell their effects apart)"
            if factor.also
            else ""
        )
        yield Paragraph(
            f"What does {factor.key} do to {found.metric}? Arms: {arms}; baseline {show(factor.baseline)}{also}."
        )
    if not design.factors:
        yield Paragraph("Nothing differs between the runs but the seed.")
    counts = {status: sum(run.status == status for run in runs) for status in dict.fromkeys(run.status for run in runs)}
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    seeds = ", ".join(show(seed) for seed in design.seeds)
    yield Paragraph(
        f"{len(runs)} runs ({states}), seeds {seeds}, paired: one seed means one initialisation and data order."
    )
    if design.tuned:
        yield Paragraph(_selection(found))


def _selection(found: Findings) -> str:
    keys = " and ".join(found.design.tuned)
    choosing, judging = split(found.design.seeds, found.selection, tuned=True)
    text = f"Each arm is judged at its own best {keys}: the one with the least mean {CHOSEN_BY}"
    if found.selection == "heldout":
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


def _verdicts(found: Findings) -> Iterator[Block]:
    yield Heading("Verdict")
    if not found.effects:
        yield Paragraph("There is nothing to compare.")
    for factor in found.design.factors:
        verdicts = [verdict(effect) for effect in found.effects if effect.factor == factor.key]
        if verdicts:
            yield Paragraph(f"{factor.key}:")
            yield Bullets(verdicts)
    seeds = {effect.paired.seeds for effect in found.effects}
    notes = [note for n in sorted(seeds) if (note := signflip_note(n)) is not None]
    if notes:
        yield Bullets(notes)


def _effects(found: Findings, pictures: Mapping[str, str]) -> Iterator[Block]:
    if not found.effects:
        return
    yield Heading("Effects")
    boot = any(effect.paired.bootstrap for effect in found.effects)
    for i, factor in enumerate(found.design.factors):
        rows = [["baseline " + show(factor.baseline), _mean(found, i, factor.baseline), *[""] * (7 + boot)]]
        for effect in (effect for effect in found.effects if effect.factor == factor.key):
            rows.append([show(effect.arm), _mean(found, i, effect.arm), *_numbers(effect, boot)])
        last = factor == found.design.factors[-1]
        columns = [factor.key, f"mean {found.metric}", *_columns(boot)]
        yield Table(columns, rows, words=[factor.key], note=_note(boot) if last else "")
    yield from _picture("effects", pictures)
    if found.interactions:
        yield Heading("Interactions")
        yield Paragraph(
            "How much more an arm of the one factor changes the metric under an arm of the other than under that one's "
            "baseline: (a, b) − (a₀, b) − (a, b₀) + (a₀, b₀). Zero where the two effects add up."
        )
        rows = [
            [effect.factor, " × ".join(map(show, effect.arm)), *_numbers(effect, boot)[:-1]]
            for effect in found.interactions
        ]
        yield Table(["factors", "arms", *_columns(boot)[:-1]], rows, words=["factors", "arms"])
        yield _cells(found)


def _cells(found: Findings) -> Table:
    """Every combination's own mean and spread."""
    rows = []
    for cell, each in found.chosen.items():
        values = list(each.values.values())
        form = precision(found.metric)
        spread = number(float(np.std(values, ddof=1)), form) if len(values) > 1 else "–"
        mean = number(float(np.mean(values)), form) if values else "–"
        rows.append([found.design.label(cell), mean, spread, str(len(values)), str(len(each.diverged))])
    columns = ["combination", f"mean {found.metric}", "sd over seeds", "seeds", "diverged"]
    return Table(columns, rows, words=["combination"])


def _tuning(found: Findings, pictures: Mapping[str, str]) -> Iterator[Block]:
    design = found.design
    if not design.tuned:
        return
    yield Heading(f"Tuning of {' and '.join(design.tuned)}")
    rows = []
    for cell, each in found.chosen.items():
        best = next(candidate for candidate in each.candidates if candidate.setting == each.setting)
        rows.append(
            [
                design.label(cell),
                ", ".join(map(show, each.setting)) + (" (edge)" if each.at_edge else ""),
                number(best.mean, ".4f"),
                str(len(each.candidates)),
                str(sum(bool(candidate.diverged) for candidate in each.candidates)),
                number(sensitivity(each.candidates, design.runs[cell]), ".4f"),
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
            yield from _picture(name, pictures)


def _learning(pictures: Mapping[str, str]) -> Iterator[Block]:
    names = [name for name in pictures if name.startswith("curves")]
    if names:
        yield Heading("Learning curves")
    for name in names:
        yield from _picture(name, pictures)


def _cost(found: Findings, pictures: Mapping[str, str]) -> Iterator[Block]:
    costs = {
        cell: cost_of(each, [run for runs in found.design.runs[cell].values() for run in runs.values()])
        for cell, each in found.chosen.items()
    }
    if not costs:
        return
    yield Heading("Cost")
    why_not = why_speeds_differ(found.chosen.values())
    label = found.design.label
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
    yield Heading("Training stability")
    rows = []
    for cell, cost in costs.items():
        diverged = f"{len(found.chosen[cell].diverged)} of {found.chosen[cell].ended}"
        norms = [number(cost.grad_norm, ".3g"), number(cost.max_grad_norm, ".3g")]
        rows.append([label(cell), diverged, number(cost.spikes, ".2g"), *norms])
    yield Table(
        ["arm", "diverged", "loss spikes a run", "median grad norm", "largest grad norm"],
        rows,
        words=["arm"],
        note="A spike: a logged training loss more than 6 robust standard deviations above the median of 20 before.",
    )
    yield from _picture("stability", pictures)


def _measured(found: Findings, pictures: Mapping[str, str]) -> Iterator[Block]:
    attention = attention_blocks(found.design, found.chosen)
    if attention:
        yield Heading("Attention")
        yield from attention
        yield from _picture("attention-heads", pictures)
    probes = probe_blocks(found.design, found.probes_chosen, found.probes)
    if probes:
        yield Heading("In-context measures")
        yield from probes


def _oddities(found: Findings) -> Iterator[Block]:
    yield Heading("What is missing or odd")
    yield Bullets(found.odd) if found.odd else Paragraph("Nothing was found.")


def _runs(found: Findings) -> Iterator[Block]:
    yield Heading("Every run")
    commands = Counter(str(run.provenance["command"]) for run in found.study.runs if run.provenance.get("command"))
    if commands:
        yield Table(["runs", "begun by"], [[str(n), command] for command, n in commands.items()], code=["begun by"])
    varying = [*(factor.key for factor in found.design.factors), *found.design.tuned, "seed"]
    rows = []
    for run in found.study.runs:
        commit = str(run.provenance.get("git_commit") or "none")[:10]
        dirty = {True: " (dirty)", False: "", None: ""}[run.provenance.get("git_dirty")]
        values = ", ".join(f"{key.rpartition('.')[2]}={show(run.config.get(key))}" for key in varying)
        result = number(run.number(found.metric), precision(found.metric))
        rows.append([run.name, values, run.status, result, commit + dirty, run.command])
    words = ["folder", "differs in"]
    columns = ["folder", "differs in", "status", found.metric, "commit", "command"]
    yield Table(columns, rows, words=words, code=["command"], folders="folder")
    later = [
        [run.name, show(each.get("step")), *(json.dumps(each.get(key)) for key in ("overrides", "results"))]
        for run in found.study.runs
        for each in run.evaluations
    ]
    if later:
        yield Paragraph("Evaluated later (evaluations.jsonl):")
        yield Table(["run", "step", "overrides", "results"], later, code=["overrides", "results"], folders="run")
    yield Paragraph(f"Made by: {found.command}")


def _columns(boot: bool) -> list[str]:
    names = ["difference [95 % interval]", "p", "Holm p", "sign-flip p", "detectable", "seeds"]
    return [*names, *(["BCa interval"] if boot else []), "diverged"]


def _numbers(effect: Effect, boot: bool) -> list[str]:
    found = effect.paired
    cells = [difference(effect), p_value(found.p), p_value(effect.p_holm), p_value(found.p_signflip)]
    cells += [number(effect.detectable, ".2g"), str(found.seeds)]
    if boot:
        low, high = found.bootstrap or (None, None)
        cells.append(f"[{number(low, '+.4f')}, {number(high, '+.4f')}]")
    return [*cells, f"{effect.diverged} of {effect.ended}"]


def _note(boot: bool) -> str:
    text = (
        "Difference: arm − baseline, paired by seed and averaged over the other factors (the combinations that both "
        "were run with; a mean is of all that its arm was run with), with t interval, of one arm alone. p: paired t "
        "test; Holm: corrected over the factor's arms. Detectable: the difference that is found after Holm with "
        "probability 0.8, if seeds differ as much as these did. Diverged: of the runs that ended. Sign-flip: exact up "
        f"to {EXACT_TO} seeds, from more of 9,999 random flips."
    )
    return f"{text} BCa: bootstrap, from {BOOTSTRAP_FROM} seeds on." if boot else text


def _mean(found: Findings, i: int, arm: object) -> str:
    return number(arm_mean(found.design, found.chosen, i, arm), precision(found.metric))


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _picture(name: str, pictures: Mapping[str, str]) -> Iterator[Block]:
    if name in pictures:
        yield Picture(name, pictures[name])
