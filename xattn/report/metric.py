"""The number that a comparison is about, and what each run's number is a number of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xattn.metrics import BITS, LOSS, is_per_token, loss_metric, text_of, tokens_of
from xattn.report.read import Run, finite

_OF_TEXT = ("val_loss", "best_val_loss", "train_loss", "val_bpb")


class Unit(NamedTuple):
    """What a run's number is of. changed: what ``xattn evaluate`` changed in the model, such as backend.theta."""

    tokens: tuple[Any, ...]
    text: tuple[Any, ...]
    data_sha256: str | None
    windows: str | None
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A number of a run, over given windows of the held-out text.

    name: as in summary.json. windows, changed: as in :class:`Unit`; a run that was not evaluated so when it was
    trained has the number from its evaluations.jsonl, if it is there.
    """

    name: str
    windows: str | None = None
    changed: tuple[str, ...] = ()

    def of(self, run: Run) -> tuple[float, Unit | None] | None:
        """The number at the end of a run that is done, with what it is of; None where there is none.

        The unit is None for a metric of no text, such as num_params.
        """
        if not is_of_text(self.name):
            value = run.result(self.name)
            return None if value is None else (value, None)
        for unit, value in _measured(run, self.name):
            if (unit.windows, unit.changed) == (self.windows, self.changed):
                return value, unit
        return None

    def value(self, run: Run) -> float | None:
        found = self.of(run)
        return None if found is None else found[0]

    def why_not(self, ours: Unit | None, theirs: Unit | None) -> str | None:
        """Why two numbers are not comparable; None where they are.

        data_sha256 is of text and tokens at once: where it is equal the text is the same, whatever the config calls it;
        where it is not, and the config is the same, the text is another one.
        """
        if ours is None or theirs is None:
            return None
        if (ours.windows, ours.changed) != (theirs.windows, theirs.changed):
            return "they are over different windows"
        known = None not in (ours.data_sha256, theirs.data_sha256)
        same_data = known and ours.data_sha256 == theirs.data_sha256
        if ours.text != theirs.text and not same_data:
            return "they are of different texts"
        if ours.tokens == theirs.tokens and known and not same_data:
            return "the data differ (data_sha256)"
        if ours.tokens != theirs.tokens and is_per_token(self.name):
            return "it is per token, and their tokens differ"
        return None


def is_of_text(metric: str) -> bool:
    return metric in _OF_TEXT or metric.startswith("probe/")


def metric_for(runs: Sequence[Run], metric: str | None) -> Metric:
    """The metric asked for, else val_loss, or val_bpb where the runs' tokens differ; over the windows that most runs
    were evaluated on."""
    done = [run for run in runs if run.status == "done"]
    if metric is None:
        metric = loss_metric(run.config for run in done)
        if metric == BITS and all(run.result(BITS) is None for run in done):
            metric = LOSS
    counts: Counter[tuple[str | None, tuple[str, ...]]] = Counter()
    for run in done:
        counts.update(list(dict.fromkeys((unit.windows, unit.changed) for unit, _ in _measured(run, metric))))
    windows, changed = counts.most_common(1)[0][0] if counts else (None, ())
    return Metric(metric, windows, changed)


def _measured(run: Run, metric: str) -> list[tuple[Unit, float]]:
    """The run's own result first, then what was evaluated later, the last of equal evaluations."""
    if run.status != "done":
        return []
    found: dict[Unit, float] = {}
    if (value := run.number(metric)) is not None:
        found[unit_of(run)] = value
    later: dict[Unit, float] = {}
    for row in run.evaluations:
        overrides, results = row.get("overrides"), row.get("results")
        if row.get("step") == run.summary.get("step") and isinstance(overrides, list) and isinstance(results, dict):
            value = finite(results.get(metric))
            if value is not None:
                later[unit_of(run, [str(override) for override in overrides])] = value
    return list((found | {unit: value for unit, value in later.items() if unit not in found}).items())


def unit_of(run: Run, overrides: Sequence[str] = ()) -> Unit:
    """What an evaluation of the run is of, its own or a later one with these overrides."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        values[key] = value
    windows = values.pop("evaluation.windows", run.config.get("evaluation.windows"))
    windows = None if windows is None else str(windows)
    data = tuple(sorted((key, value) for key, value in values.items() if key.partition(".")[0] == "data"))
    changed = tuple(sorted(f"{key}={value}" for key, value in values.items() if key.startswith("backend.")))
    sha256 = run.provenance.get("data_sha256")
    if data:  # another text, in the run's own tokens
        return Unit(tokens_of(run.config), data, None, windows, changed)
    return Unit(tokens_of(run.config), text_of(run.config), sha256, windows, changed)


def spans(runs: Sequence[Run], metric: Metric) -> str | None:
    """A sentence where the runs' windows do not cover the same text, though all are of the same number."""
    if metric.windows in ("all", None) or not is_of_text(metric.name):
        return None
    lengths = {run.config.get("backend.context_length") for run in runs}
    tokens = {tokens_of(run.config) for run in runs}
    if len(lengths) < 2 and len(tokens) < 2:
        return None
    return (
        f"{metric.windows} windows are not the same text for all runs, since their length or their tokens differ: each "
        "is its own sample of the held-out text. evaluation.windows=all scores the same text for all; xattn evaluate "
        "STUDY evaluation.windows=all --save does so for runs that are done."
    )
