"""The report as files for other programs: results.csv, effects.csv, and table.tex for a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from xattn.report.design import Cell, Design, show
from xattn.report.read import Run
from xattn.report.selection import Chosen
from xattn.report.statistics import Effect
from xattn.report.words import difference, number, p_value, precision

EFFECT_COLUMNS = (
    *("factor", "arm", "baseline", "metric", "seeds", "difference", "ci_low", "ci_high", "p", "p_holm", "p_signflip"),
)
_SUMMARY = (
    *("step", "val_loss", "val_bpb", "best_val_loss", "train_loss", "tokens_per_second", "compile_seconds"),
    *("wall_seconds", "peak_memory_bytes", "num_params", "flops_per_step", "packed_with", "implementation"),
)
_PROVENANCE = ("device_kind", "device_count", "git_commit", "git_dirty", "source_sha256", "data_sha256", "started_at")


def effects_csv(effects: Sequence[Effect]) -> str:
    """A row a comparison; a cell is empty where nothing can be said."""
    rows = []
    for effect in effects:
        found = effect.paired
        rows.append(
            [
                *(effect.factor, show(effect.arm), show(effect.baseline), effect.metric, found.seeds),
                *(found.difference, found.ci_low, found.ci_high, found.p, effect.p_holm, found.p_signflip),
            ]
        )
    return _csv(EFFECT_COLUMNS, rows)


def results_csv(runs: Sequence[Run], varying: Sequence[str], chosen: Mapping[Cell, Chosen], metric: str) -> str:
    """A row a run: the keys that differ, what the run found, what it was made with."""
    judged = judged_folders(chosen)
    more = [metric] if metric not in _SUMMARY else []
    probes = sorted({key for run in runs for key in run.summary if key.startswith("probe/")} - {metric})
    columns = ["run", "status", "judged", *varying, *_SUMMARY, *more, *probes, *_PROVENANCE, "command"]
    rows = []
    for run in runs:
        summary = [run.summary.get(key) for key in (*_SUMMARY, *more, *probes)]
        provenance = [run.provenance.get(key) for key in _PROVENANCE]
        configured = [run.config.get(key) for key in varying]
        is_judged = run.folder in judged
        rows.append([run.name, run.status, is_judged, *configured, *summary, *provenance, run.command])
    return _csv(columns, rows)


def table_tex(
    design: Design, effects: Sequence[Effect], chosen: Mapping[Cell, Chosen], metric: str, made_by: str
) -> str:
    """A booktabs table: each arm's mean, its difference to the baseline, and how many of its runs diverged."""
    lines = [
        f"% {made_by}",
        "% needs \\usepackage{booktabs}",
        "\\begin{tabular}{llrrrrr}",
        "\\toprule",
        f"factor & arm & {_tex(metric)} & difference [95\\,\\%] & $p$ (Holm) & seeds & diverged \\\\",
    ]
    for factor in design.factors:
        lines.append("\\midrule")
        of_arm = {effect.arm: effect for effect in effects if effect.factor == factor.key}
        for arm in factor.arms:
            i = design.factors.index(factor)
            mean = number(arm_mean(design, chosen, i, arm), precision(metric))
            cells = [_tex(factor.key) if arm == factor.baseline else "", _tex(show(arm)), _math(mean)]
            if arm in of_arm:
                effect = of_arm[arm]
                cells += [_math(difference(effect)), _math(p_value(effect.p_holm)), str(effect.paired.seeds)]
            else:
                cells += ["baseline", "", ""]
            theirs = [each for cell, each in chosen.items() if cell[i] == arm]
            cells.append(f"{sum(len(each.diverged) for each in theirs)} of {sum(each.ended for each in theirs)}")
            lines.append(" & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def arm_mean(design: Design, chosen: Mapping[Cell, Chosen], i: int, arm: Any) -> float | None:
    """Mean of the metric over the arm's cells, each the mean over its seeds that are done."""
    cells = [list(each.values.values()) for cell, each in chosen.items() if cell[i] == arm and each.values]
    return sum(sum(values) / len(values) for values in cells) / len(cells) if cells else None


def judged_folders(chosen: Mapping[Cell, Chosen]) -> Collection[Any]:
    return {run.folder for each in chosen.values() for run in each.runs.values()}


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """None is an empty cell; a truth value is spelled as in YAML."""
    return str(value).lower() if isinstance(value, bool) else value


def _tex(text: str) -> str:
    return "".join({"_": "\\_", "%": "\\%", "&": "\\&", "#": "\\#", "×": "$\\times$"}.get(c, c) for c in text)


def _math(text: str) -> str:
    return "--" if text == "–" else f"${text.replace('−', '-')}$"
