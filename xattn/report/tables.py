"""The report as files for other programs: results.csv, effects.csv, and table.tex for a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from xattn.keys import SEED, has_effect, show
from xattn.report.answer import Comparison
from xattn.report.measures import probes_of
from xattn.report.metric import metric_for
from xattn.report.read import Run
from xattn.report.size import unfair
from xattn.report.words import difference, number, p_value, precision

EFFECT_COLUMNS = (
    *("factor", "arm", "baseline", "metric", "seeds", "difference", "ci_low", "ci_high", "p", "p_holm", "p_signflip"),
    *("arm_mean", "baseline_mean", "left_out", "baseline_left_out", "where", "comparison"),
)
_SUMMARY = (
    *("step", "val_loss", "val_bpb", "best_val_loss", "train_loss", "tokens_per_second", "compile_seconds"),
    *("wall_seconds", "peak_memory_bytes", "num_params", "flops_per_step", "packed_with", "implementation"),
)
_PROVENANCE = ("device_kind", "device_count", "git_commit", "git_dirty", "source_sha256", "data_sha256", "started_at")

Table = tuple[Sequence[str], list[list[Any]]]  # columns, rows


def effects_table(comparisons: Sequence[Comparison]) -> Table:
    """Return a row per comparison of two arms; a cell is None if its value is unknown."""
    rows = []
    for i, each in enumerate(comparisons, 1):
        where = " ".join(f"{key}={show(value)}" for key, value in each.group.where.items())
        for effect in (*each.effects, *chain.from_iterable(each.probes.values())):
            known = vars(effect) | vars(effect.paired)
            known |= {"arm": show(effect.arm), "baseline": show(effect.baseline), "where": where, "comparison": i}
            rows.append([known[column] for column in EFFECT_COLUMNS])
    return EFFECT_COLUMNS, rows


def results_table(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> Table:
    """Return a row per run: the keys that differ, its results, and its provenance. comparison is the number of the
    run's comparison, from 1; judged is whether the run's value enters it."""
    judged = {
        chosen.runs[seed].folder for each in comparisons for chosen in each.chosen.values() for seed in chosen.values
    }
    number_of = {run.folder: i for i, each in enumerate(comparisons, 1) for run in each.runs}
    keys = dict.fromkeys(key for run in runs for key in run.config if has_effect(key))
    varying = [key for key in keys if key != SEED and len({run.config.get(key) for run in runs}) > 1]
    more = sorted({each.metric.name for each in comparisons} - {*_SUMMARY})
    measured = [metric_for(runs, name) for name in probes_of(runs) if name not in more]
    rows = [
        {
            "run": run.name,
            "status": run.status,
            "judged": run.folder in judged,
            **{key: run.config.get(key) for key in (*varying, SEED)},
            **{key: run.summary.get(key) for key in (*_SUMMARY, *more)},
            **{metric.name: metric.value(run) for metric in measured},
            **{key: run.provenance.get(key) for key in _PROVENANCE},
            "command": run.command,
            "comparison": number_of.get(run.folder),
        }
        for run in runs
    ]
    return [*rows[0]], [[*row.values()] for row in rows]


def table_tex(comparisons: Sequence[Comparison], made_by: str) -> str:
    """Return a booktabs table: each arm's mean and its baseline's over their pairs, the difference, and how many runs
    are unpaired or diverged. Below it stand the arms that are larger or smaller than their baseline."""
    several = len(comparisons) > 1
    metrics = {each.metric.name for each in comparisons}
    named = _tex(metrics.pop()) if len(metrics) == 1 else "mean"
    lines = [
        f"% {made_by}",
        "% needs \\usepackage{booktabs}; means are over the pairs of the difference",
        "\\begin{tabular}{llrrrrrrr}",
        "\\toprule",
        f"factor & arm & {named} & baseline's & difference [95\\,\\%] & $p$ (Holm) & seeds & left out & diverged \\\\",
    ]
    for i, each in enumerate(comparisons, 1):
        if several:
            where = f"{i}. {each.metric.name}: {each.group.label}".removesuffix(": ")
            lines += ["\\midrule", f"\\multicolumn{{9}}{{l}}{{{_tex(where)}}} \\\\"]
        for factor in each.design.factors:
            lines.append("\\midrule")
            first = f"{factor.key}, against {show(factor.baseline)}"
            for effect in each.of(factor):
                form = precision(effect.metric)
                cells = [_tex(first), _tex(show(effect.arm))]
                cells += [_math(number(mean, form)) for mean in (effect.arm_mean, effect.baseline_mean)]
                cells += [_math(difference(effect)), _math(p_value(effect.p_holm)), str(effect.paired.seeds)]
                cells += effect.counts
                lines.append(" & ".join(cells) + " \\\\")
                first = ""
        for sentence in unfair(each):
            lines += ["\\midrule", f"\\multicolumn{{9}}{{p{{\\linewidth}}}}{{\\footnotesize {_tex(sentence)}}} \\\\"]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def to_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return the table as CSV, with empty cells for None and bools spelled as in YAML."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([show(value) if isinstance(value, bool) else value for value in row] for row in rows)
    return text.getvalue()


_TEX = {
    **{character: f"\\{character}" for character in "_%&#${}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "×": "$\\times$",
    "−": "$-$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "\\textquotedbl{}",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _math(text: str) -> str:
    return "--" if text == "–" else f"${text.replace('−', '-').replace(',', '{,}')}$"
