"""The noise floor: how far runs of one config differ by seed, how much of that remains in pairs, and how much depends
on which sequences of text were scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special

from xattn.keys import show
from xattn.metrics import LOSSES
from xattn.report.answer import Comparison
from xattn.report.blocks import Block, Heading, Paragraph, Table
from xattn.report.design import Factor
from xattn.report.law import RESAMPLES
from xattn.report.read import Run
from xattn.report.selection import Chosen
from xattn.report.statistics import LEVEL, Effect, Matched, matched
from xattn.report.words import number, precision
from xattn.runs import run_folder

_TEXT = (
    "How far runs of one config differ by their seed alone (standard deviations), and what is left of that in paired "
    "differences. A difference has to stand out from the latter, divided by the root of the number of seeds. The "
    "interval of a standard deviation assumes normal differences (χ²). All runs score the same sequences of text. "
    "Others would give another difference, and no number of seeds shows that; it is measured by drawing the sequences "
    "again with replacement (bootstrap, 95 %)."
)


@dataclass(frozen=True)
class Noise:
    """The noise of an arm and its baseline, over the seeds of their pairs."""

    arm: float
    """standard deviation between seeds, as for the baseline"""
    baseline: float
    spread: float
    """standard deviation of the paired differences; low and high are its 95 % interval"""
    low: float
    high: float
    correlation: float | None
    """between the two sides; None if one has no spread"""
    seeds_half: float
    """half the width of the mean difference's t interval"""
    sequences: int
    sequences_half: float | None
    """half the width of its 95 % interval over other sequences of the same text; None without comparable losses"""


def noise_of(each: Comparison, factor: Factor, effect: Effect) -> Noise | None:
    """Return the noise; None with fewer than three pairs, or if all pairs differ by the same amount."""
    found, n = effect.paired, effect.paired.seeds
    if n < 3 or found.spread is None or found.ci_low is None or found.ci_high is None:
        return None
    pairs = matched(each.design, each.chosen, factor, effect.arm, each.metric)
    ours, theirs = pairs.means
    tail = (1 - LEVEL) / 2
    low, high = (found.spread * ((n - 1) / float(special.chdtri(n - 1, p))) ** 0.5 for p in (tail, 1 - tail))
    varies = ours.std() > 0 and theirs.std() > 0
    sequences, sequences_half = _of_sequences(each, pairs)
    return Noise(
        arm=float(ours.std(ddof=1)),
        baseline=float(theirs.std(ddof=1)),
        spread=found.spread,
        low=low,
        high=high,
        correlation=float(np.corrcoef(ours, theirs)[0, 1]) if varies else None,
        seeds_half=(found.ci_high - found.ci_low) / 2,
        sequences=sequences,
        sequences_half=sequences_half,
    )


def _of_sequences(each: Comparison, pairs: Matched) -> tuple[int, float | None]:
    """Return how many sequences were scored, and how much the mean difference depends on which they are."""
    if each.metric.name not in LOSSES or each.metric.given:
        return 0, None
    sums = [_sums(each, side, seed) for seed in pairs.seeds for sides in pairs.cells for side in sides]
    known = [of_run for of_run in sums if of_run is not None]
    if len(known) < len(sums) or any(not np.array_equal(of_run[:, 1], known[0][:, 1]) for of_run in known):
        return 0, None
    losses, tokens = np.stack(known)[..., 0], known[0][:, 1]
    if len(tokens) < 2:
        return 0, None
    count, mean = len(tokens), np.mean(losses[::2] - losses[1::2], axis=0)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    low, high = np.quantile((drawn @ mean) / (drawn @ tokens), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return count, float(high - low) / 2


def _sums(each: Comparison, side: Chosen, seed: object) -> np.ndarray | None:
    """Return (sequences, 2): the metric summed over each sequence, and its tokens. None if the judged value was not
    measured over these sequences."""
    run = side.runs[seed]
    found = sequence_losses(run)
    if found is None:
        return None
    per_token, value = found[:, 0].sum() / found[:, 1].sum(), side.values[seed]
    own = run.number("val_loss")
    if own is None or abs(per_token - own) > 1e-4 * own or value != run.number(each.metric.name):
        return None
    return np.stack([found[:, 0] * value / per_token, found[:, 1]], axis=1)


def sequence_losses(run: Run) -> np.ndarray | None:
    """Return (sequences, 2), float64: nats and scored tokens of each, at the run's end; None if it keeps none."""
    try:
        found = np.load(run.folder / run_folder.ARTIFACTS / run_folder.SEQUENCE_LOSSES, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_table = found.ndim == 2 and found.shape[1] == 2 and found.dtype.kind == "f"
    return found.astype(float) if is_table and np.isfinite(found).all() and (found[:, 1] > 0).all() else None


def noise_blocks(each: Comparison, where: str) -> Iterator[Block]:
    """Yield a table of the comparison's noise, and what it means."""
    form, rows = precision(each.metric.name), []
    for factor in each.design.factors:
        for effect in each.of(factor):
            if (found := noise_of(each, factor, effect)) is None:
                continue
            rows.append(
                [
                    f"{factor.name} {show(effect.arm)}",
                    *(number(value, form) for value in (found.baseline, found.arm, found.spread)),
                    f"{number(found.low, form)} to {number(found.high, form)}",
                    number(found.correlation, ".2f"),
                    str(effect.paired.seeds),
                    f"±{number(found.seeds_half, form)}",
                    "–" if found.sequences_half is None else f"±{number(found.sequences_half, form)}",
                    str(found.sequences or "–"),
                ]
            )
    if not rows:
        return
    columns = ["arm", "sd baseline", "sd arm", "sd of the difference", "95 % interval", "correlation", "seeds"]
    yield Heading(f"Noise floor{where}")
    yield Paragraph(_TEXT)
    yield Table([*columns, "by seeds", "by sequences", "sequences"], rows, words=["arm"])
