"""Decides whether a study shows the claim that its experiment stated before the first run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from pydantic import ValidationError
from scipy import special

from xattn.errors import BadInput
from xattn.keys import changes_training, show
from xattn.report.config import Contrast, FindingConfig, threshold
from xattn.report.metric import Metric, metric_for
from xattn.report.read import Run
from xattn.report.statistics import LEVEL
from xattn.report.words import better_is, number, precision
from xattn.system.screen import counted

Says = Literal["shown", "contradicted", "undecided"]


@dataclass(frozen=True)
class Decided:
    """A contrast's mean over seeds with a t interval; None with fewer than two seeds.

    The intervals of a claim's contrasts hold simultaneously with probability 0.95 (Bonferroni).
    """

    contrast: Contrast
    seeds: int = 0
    mean: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    why_not: str = ""
    """why there is no number"""

    @property
    def words(self) -> str:
        """Return ``+0.0123 [+0.0100, +0.0146]``, or why there is no number."""
        if self.mean is None:
            return self.why_not
        form = f"+{precision(self.contrast.metric)}"
        return f"{number(self.mean, form)} [{number(self.ci_low, form)}, {number(self.ci_high, form)}]"

    @property
    def says(self) -> Says:
        if self.ci_low is None or self.ci_high is None:
            return "undecided"
        if threshold(self.contrast.shown).holds(self.ci_low, self.ci_high):
            return "shown"
        is_contradicted = threshold(self.contrast.contradicted).holds(self.ci_low, self.ci_high)
        return "contradicted" if is_contradicted else "undecided"


@dataclass(frozen=True)
class Finding:
    """A claim and its outcome."""

    stated: FindingConfig
    contrasts: tuple[Decided, ...]
    otherwise: int
    """runs of the study that state another claim or none"""

    @property
    def says(self) -> Says:
        found = {contrast.says for contrast in self.contrasts}
        return "contradicted" if "contradicted" in found else "undecided" if "undecided" in found else "shown"

    @property
    def sentence(self) -> str:
        """Return the claim, its outcome, and the contrasts that decide it."""
        claim = self.stated.claim.rstrip(".")
        parts = "; ".join(f"{each.contrast.name} {each.words}: {each.says}" for each in self.contrasts)
        sentence = f"“{claim}” ({self.stated.source}) is {self.says}: {parts}."
        if not self.otherwise:
            return sentence
        return f"{sentence} {counted(self.otherwise, 'run')} of the study stated another claim, or none."


def finding_of(runs: Sequence[Run]) -> Finding | None:
    """Return the outcome of the claim that the first of the runs stated; None if no run states a readable one."""
    claims = [_stated(run) for run in sorted(runs, key=lambda run: str(run.provenance.get("started_at", "~")))]
    stated = next((claim for claim in claims if claim is not None), None)
    if stated is None:
        return None
    level = 1 - (1 - LEVEL) / len(stated.contrasts)
    decided = tuple(_decided(contrast, runs, level) for contrast in stated.contrasts)
    return Finding(stated, decided, sum(claim != stated for claim in claims))


def _stated(run: Run) -> FindingConfig | None:
    values = {key.partition(".")[2]: value for key, value in run.config.items() if key.startswith("finding.")}
    try:
        return FindingConfig.model_validate(values | {"contrasts": json.loads(values["contrasts"])})
    except (BadInput, KeyError, TypeError, ValueError, ValidationError):
        return None


def _decided(contrast: Contrast, runs: Sequence[Run], level: float) -> Decided:
    sides = [contrast.of] if contrast.minus is None else [contrast.of, contrast.of | contrast.minus]
    chosen = [[run for run in runs if _has(run, side)] for side in sides]
    for side, found in zip(sides, chosen, strict=True):
        if not any(run.status in ("done", "diverged") for run in found):
            wanted = ", ".join(f"{key}={show(value)}" for key, value in side.items())
            return Decided(contrast, why_not=f"no run is done that has {wanted}")
    every = [run for found in chosen for run in found]
    metric = metric_for(every, contrast.metric)
    if contrast.minus is not None and (why_not := _differ(metric, every)):
        return Decided(contrast, why_not=why_not)
    first, *others = (_by_seed(found, contrast, metric) for found in chosen)
    values = (first - others[0] if others else first).dropna()
    if len(values) < 2:
        return Decided(contrast, len(values), why_not=f"{counted(len(values), 'seed')} with all runs of this contrast")
    mean = float(values.mean())
    half = float(special.stdtrit(len(values) - 1, (1 + level) / 2) * values.sem())
    return Decided(contrast, len(values), mean, mean - half, mean + half)


def _differ(metric: Metric, runs: Sequence[Run]) -> str | None:
    """Return why two of the runs' numbers are not comparable; None if all are."""
    units = [found[1] for run in runs if (found := metric.of(run)) is not None]
    return next((why for unit in units if (why := metric.why_not(units[0], unit)) is not None), None)


def _by_seed(runs: Sequence[Run], contrast: Contrast, metric: Metric) -> pd.Series:
    """Return the number of one side of the contrast for each seed that has all of that side's runs."""
    keys = sorted({key for run in runs for key in run.config if changes_training(key, run.config)} - {"seed"})
    varying = [key for key in keys if len({show(run.config.get(key)) for run in runs}) > 1 and key != contrast.over]
    rows = [
        {
            "seed": show(run.seed),
            "cell": " ".join(show(run.config.get(key)) for key in varying),
            "value": show(run.config.get(contrast.over or "")),
            "number": _number(run, contrast, metric),
        }
        for run in runs
    ]
    listed = pd.DataFrame(rows).drop_duplicates(["seed", "cell", "value"], keep="last")
    table = listed.set_index(["seed", "cell", "value"])["number"].astype(float).unstack(["cell", "value"]).dropna()
    cells = table.T.groupby(level="cell")
    if contrast.reduced == "range":
        of_cells = cells.max() - cells.min()
    elif contrast.reduced == "best" and len(table):
        goodness = table.mean() * (better_is(metric.name) or -1)
        of_cells = table[goodness.groupby(level="cell").idxmax()].T
    else:
        of_cells = cells.mean()
    return of_cells.mean()


def _number(run: Run, contrast: Contrast, metric: Metric) -> float | None:
    found, most = metric.value(run), contrast.at_most
    if most is None or (found is None and run.status != "diverged"):
        return found
    return most if found is None else min(found, most)


def _has(run: Run, side: Mapping[str, Any]) -> bool:
    for key, wanted in side.items():
        ours, values = run.config.get(key), wanted if isinstance(wanted, list) else [wanted]
        if ours not in values and show(ours) not in map(show, values):
            return False
    return True
