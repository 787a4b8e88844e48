"""What the arms cost beside their loss, and how smoothly they trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from xattn.report.read import Run
from xattn.report.selection import Chosen

WINDOW = 20  # logged rows before a row, that a spike is judged by
SPIKE = 6.0  # robust standard deviations
SAME_LOAD = 1.25  # the fastest run of one program over the slowest


@dataclass(frozen=True)
class Cost:
    """Means over a cell's finished runs at its chosen setting; None where no run says it.

    compile_seconds is of the cell's runs that compiled. spikes: mean number of loss spikes a run. grad_norm,
    max_grad_norm: the median over the logged steps, and the largest of all.
    """

    tokens_per_second: float | None
    compile_seconds: float | None
    peak_memory_bytes: float | None
    num_params: float | None
    flops_per_step: float | None
    spikes: float | None
    grad_norm: float | None
    max_grad_norm: float | None


def cost_of(chosen: Chosen, compiled: Iterable[Run]) -> Cost:
    """compiled: all runs of the cell. Settings share programs, and the run that compiled may be of another setting."""
    runs = [run for run in chosen.runs.values() if run.status in ("done", "diverged")]
    norms = [run.curves["grad_norm"][~np.isnan(run.curves["grad_norm"])] for run in runs]
    norms = [norm for norm in norms if norm.size]
    return Cost(
        tokens_per_second=_mean(run.number("tokens_per_second") for run in runs),
        compile_seconds=_mean(run.number("compile_seconds") for run in compiled),
        peak_memory_bytes=_mean(run.number("peak_memory_bytes") for run in runs),
        num_params=_mean(run.number("num_params") for run in runs),
        flops_per_step=_mean(run.number("flops_per_step") for run in runs),
        spikes=_mean(float(loss_spikes(run.curves["train_loss"])) for run in runs if run.curves["train_loss"].size),
        grad_norm=_mean(float(np.median(norm)) for norm in norms),
        max_grad_norm=max((float(norm.max()) for norm in norms), default=None),
    )


def loss_spikes(losses: np.ndarray) -> int:
    """How many logged training losses stand out: more than 6 robust standard deviations above the median of the 20
    logged before them, the deviation being 1.4826 × the median absolute deviation of those 20 from their median, and at
    least a thousandth of the median. Neighbouring ones are one spike."""
    known = losses[~np.isnan(losses)]
    if known.size <= WINDOW:
        return 0
    before = np.lib.stride_tricks.sliding_window_view(known, WINDOW)[:-1]
    median = np.median(before, axis=1)
    spread = 1.4826 * np.median(np.abs(before - median[:, None]), axis=1)
    high = known[WINDOW:] > median + SPIKE * np.maximum(spread, 1e-3 * np.abs(median))
    return int(high[:1].sum() + (high[1:] & ~high[:-1]).sum())


def circumstances(run: Run) -> dict[str, object]:
    """What has to be equal for two speeds to be set side by side.

    A CPU's ``device_kind`` does not tell one processor from another, so its host is among them.
    """
    kind = run.provenance.get("device_kind")
    return {
        "device_kind": kind,
        "device_count": run.provenance.get("device_count"),
        "packed_with": run.summary.get("packed_with"),
        "host": run.provenance.get("host") if kind == "cpu" else None,
    }


def is_speed(metric: str) -> bool:
    """Whether it says how fast the machine was: tokens_per_second, wall_seconds, compile_seconds."""
    return metric.endswith(("_per_second", "_seconds"))


def why_speeds_differ(cells: Iterable[Chosen]) -> str | None:
    """What besides the arms may be behind their speeds; None where all runs were made under the same circumstances, and
    nothing says that the load was not the same.

    How busy a machine was stands in no file. But the runs of a cell are one program, so their speeds should agree:
    where the fastest is more than a quarter faster than the slowest, something else was running.
    """
    by_cell = [[run for run in chosen.runs.values() if run.status == "done"] for chosen in cells]
    found = [circumstances(run) for runs in by_cell for run in runs]
    if differing := [name for name in (found or [{}])[0] if len({each[name] for each in found}) > 1]:
        return f"the runs differ in {' and '.join(differing)}"
    speeds = [[s for run in runs if (s := run.number("tokens_per_second"))] for runs in by_cell]
    if all(max(of_cell) <= SAME_LOAD * min(of_cell) for of_cell in speeds if of_cell):
        return None
    return f"runs of one arm differ in speed by more than {SAME_LOAD - 1:.0%}, so that the load was not equal"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
