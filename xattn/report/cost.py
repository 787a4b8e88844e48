"""What the arms cost besides their loss, and how smoothly they trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from xattn.report.read import Run
from xattn.report.selection import Chosen

BEFORE = 20  # preceding logged rows that a spike is judged by
SPIKE = 6.0  # robust standard deviations
SAME_LOAD = 1.25  # highest ratio of the fastest to the slowest run of one program


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def stability_of(runs: Sequence[Run]) -> tuple[float | None, float | None, float | None]:
    """Return loss spikes per run, the runs' mean of the median gradient norm over logged steps, and the largest norm.

    None if no run has the number.
    """
    losses = [run.curves["train_loss"] for run in runs if run.curves["train_loss"].size]
    norms = [run.curves["grad_norm"][~np.isnan(run.curves["grad_norm"])] for run in runs]
    norms = [norm for norm in norms if norm.size]
    largest = max((float(norm.max()) for norm in norms), default=None)
    return mean(map(loss_spikes, losses)), mean(float(np.median(norm)) for norm in norms), largest


def loss_spikes(losses: np.ndarray) -> int:
    """Count the logged training losses that stand out. Neighbouring ones are one spike.

    Such a loss lies more than 6 robust standard deviations above the median of the 20 logged before it. The deviation
    is 1.4826 × the median absolute deviation of those 20 from their median, and at least a thousandth of the median.
    """
    known = losses[~np.isnan(losses)]
    if known.size <= BEFORE:
        return 0
    before = np.lib.stride_tricks.sliding_window_view(known, BEFORE)[:-1]
    median = np.median(before, axis=1)
    spread = 1.4826 * np.median(np.abs(before - median[:, None]), axis=1)
    high = known[BEFORE:] > median + SPIKE * np.maximum(spread, 1e-3 * np.abs(median))
    return int(high[:1].sum() + (high[1:] & ~high[:-1]).sum())


def circumstances(run: Run) -> dict[str, object]:
    """Return what must be equal for two speeds to be compared.

    A CPU's ``device_kind`` does not distinguish processors, so its host is included.
    """
    kind = run.provenance.get("device_kind")
    return {
        "device_kind": kind,
        "device_count": run.provenance.get("device_count"),
        "packed_with": run.summary.get("packed_with"),
        "host": run.provenance.get("host") if kind == "cpu" else None,
    }


def is_speed(metric: str) -> bool:
    """Return whether the metric is a speed of the machine: tokens_per_second, wall_seconds, compile_seconds."""
    return metric.endswith(("_per_second", "_seconds"))


def why_speeds_differ(cells: Iterable[Chosen]) -> str | None:
    """Return what besides the arms may explain their speeds; None if circumstances, and apparently loads, are equal.

    No file records how busy a machine was. But the runs of a cell are one program, so their speeds should agree: if the
    fastest is more than a quarter faster than the slowest, something else was running.
    """
    by_cell = [[run for run in chosen.runs.values() if run.status == "done"] for chosen in cells]
    found = [circumstances(run) for runs in by_cell for run in runs]
    if differing := [name for name in (found or [{}])[0] if len({each[name] for each in found}) > 1]:
        return f"the runs differ in {' and '.join(differing)}"
    speeds = [[s for run in runs if (s := run.number("tokens_per_second"))] for runs in by_cell]
    if all(max(of_cell) <= SAME_LOAD * min(of_cell) for of_cell in speeds if of_cell):
        return None
    return f"runs of one arm differ in speed by more than {SAME_LOAD - 1:.0%}, so the machine's load was not equal"
