"""What the runs measured besides their loss: attention statistics and in-context measures (probes)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xattn.keys import show
from xattn.report.blocks import Block, Paragraph, Table
from xattn.report.design import Cell, Design
from xattn.report.read import Run, finite
from xattn.report.selection import Chosen
from xattn.report.statistics import Effect
from xattn.report.words import difference, number, p_value, precision

# Statistic → its column; the mass at each distance has a table of its own.
STATISTICS = {
    "effective_keys": "effective keys",
    "entropy": "entropy",
    "max_logit": "largest logit",
    "first_token": "first token",
    "weight_sum": "sum of |weights|",
    "output_norm": "output norm",
}
_MEANING = (
    "Means over heads, layers and seeds at the end of training, over the rows of one fixed set of sequences; the "
    "largest logit is a maximum instead. Shares are of magnitudes, |weight| ÷ the row's sum of |weights|, so that the "
    "three activations can be compared: under softmax they are the weights; under sigmoid a row's sum may be small, "
    "and under none weights have signs and any size; the sum of |weights| shows how much. Entropy: of the shares, in "
    "nats. Effective keys: its exponential, row by row. First token: the share of the sequence's first token. Largest "
    "logit: before sigmoid's bias; under none it is the largest weight. Output norm: of each head's output, before the"
    " projection."
)
_BY_DISTANCE = (
    "Share of a row by distance, in tokens, of the key from the query. Maps of single heads are in each run's "
    "artifacts/attention_maps.png."
)


def probes_of(runs: Sequence[Run]) -> list[str]:
    """Return the in-context measures that some finished run has, in its summary or from a later evaluation."""
    done = [run for run in runs if run.status == "done"]
    found = {key for run in done for key in run.summary if run.number(key) is not None}
    later = [row["results"] for run in done for row in run.evaluations if isinstance(row.get("results"), dict)]
    found |= {key for results in later for key, value in results.items() if finite(value) is not None}
    return sorted(key for key in found if key.startswith("probe/"))


def heads_of(chosen: Chosen) -> dict[str, np.ndarray]:
    """Return statistic → (layers, heads): the mean over the cell's runs; for a maximum, the largest."""
    maps: dict[str, list[np.ndarray]] = {}
    for run in chosen.runs.values():
        found: dict[str, dict[tuple[int, int], float]] = {}
        for key, value in _attention(run).items():
            _, layer, head, statistic = [*key.split("/", 3), "", "", ""][:4]
            if layer.isdecimal() and head.isdecimal():
                of_heads = found.setdefault(statistic, {})
                of_heads[int(layer), int(head)] = np.nan if finite(value) is None else value
        for statistic, values in found.items():
            layers, heads = (1 + max(place[i] for place in values) for i in (0, 1))
            grid = np.array([[values.get((i, j), np.nan) for j in range(heads)] for i in range(layers)])
            if not np.isnan(grid).all() and grid.shape == maps.get(statistic, [grid])[0].shape:
                maps.setdefault(statistic, []).append(grid)
    return {statistic: _over(statistic)(grids, axis=0) for statistic, grids in maps.items()}


def _attention(run: Run) -> dict[str, Any]:
    """Return the run's attention statistics at its last step, from its summary or a later evaluation."""
    found: dict[str, Any] = {}
    for row in run.evaluations:
        results, overrides = row.get("results"), row.get("overrides")
        own = isinstance(overrides, list) and not any(str(each).startswith(("data", "backend")) for each in overrides)
        if own and row.get("step") == run.summary.get("step") and isinstance(results, dict):
            found |= results
    return {key: value for key, value in (found | dict(run.summary)).items() if key.startswith("attention/")}


def attention_blocks(design: Design, chosen: Mapping[Cell, Chosen]) -> list[Block]:
    """Return two tables, the statistics and the mass at each distance; empty if no run has any."""
    rows, masses = [], []
    maps = {cell: heads_of(each) for cell, each in chosen.items()}
    distances = sorted(
        {key for found in maps.values() for key in found if re.fullmatch(r"distance_\d+", key)},
        key=lambda key: int(key.partition("_")[2]),
    )
    for cell, found in maps.items():
        if found:
            means = {name: float(_over(name)(of_heads)) for name, of_heads in found.items()}
            rows.append([design.label(cell), *(number(means.get(name)) for name in STATISTICS)])
            masses.append([design.label(cell), *(number(means.get(distance), ".3f") for distance in distances)])
    if not rows:
        return []
    ranges = [_range(d, after) for d, after in itertools.zip_longest(distances, distances[1:])]
    statistics = Table(["arm", *STATISTICS.values()], rows, words=["arm"], note=_MEANING)
    by_distance = Table(["arm", *ranges], masses, words=["arm"], note=_BY_DISTANCE)
    return [statistics, by_distance] if distances else [statistics]


def probe_blocks(design: Design, effects: Mapping[str, Sequence[Effect]]) -> list[Block]:
    """Return a table of each arm's difference in every measure, with its two means; empty if no run has any."""
    rows = []
    for metric, of_metric in effects.items():
        for factor in design.factors:
            for effect in (effect for effect in of_metric if effect.factor == factor.key):
                means = [number(mean, precision(metric)) for mean in (effect.arm_mean, effect.baseline_mean)]
                arms = f"{factor.name} {show(effect.arm)} against {show(effect.baseline)}"
                found = [difference(effect), p_value(effect.p_holm), str(effect.paired.seeds), effect.counts[0]]
                rows.append([metric.removeprefix("probe/"), arms, *means, *found])
    if not rows:
        return []
    columns = ["measure", "arm", "mean", "baseline's", "difference [95 % interval]", "Holm p", "seeds", "left out"]
    return [
        Paragraph("Validation loss can hide a loss of retrieval. At the settings that were chosen by the loss:"),
        Table(columns, rows, words=["measure", "arm"], note="Holm: over the arms of one factor in one measure."),
    ]


def _over(statistic: str) -> Callable[..., Any]:
    return np.nanmax if statistic.startswith("max") else np.nanmean


def _range(key: str, after: str | None) -> str:
    low = int(key.partition("_")[2])
    if after is None:
        return f"{low} and more"
    high = int(after.partition("_")[2]) - 1
    return str(low) if low == high else f"{low}–{high}"
