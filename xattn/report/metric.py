"""The number that a comparison is about, and what each run's number measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xattn.keys import renamed
from xattn.metrics import BITS, LOSS, is_per_token, loss_metric, text_of, tokens_of
from xattn.report.read import Run, finite

_OF_TEXT = ("val_loss", "best_val_loss", "train_loss", "val_bpb")


class Unit(NamedTuple):
    """What a run's number measures."""

    tokens: tuple[Any, ...]
    text: tuple[Any, ...]
    data_sha256: str | None
    sequences: str | None
    given: tuple[str, ...] = ()
    """further overrides of ``xattn evaluate``, such as backend.theta or data.path"""


@dataclass(frozen=True)
class Metric:
    """A number of a run, over given sequences of the held-out text.

    sequences, given: as in :class:`Unit`. A run that training did not evaluate in this way has the number from its
    evaluations.jsonl, if it is there.
    """

    name: str
    sequences: str | None = None
    given: tuple[str, ...] = ()

    def of(self, run: Run) -> tuple[float, Unit | None] | None:
        """Return the number at the end of a finished run, with its unit; None if there is no number.

        The unit is None for a metric that is not measured on text, such as num_params.
        """
        if not is_of_text(self.name):
            value = run.result(self.name)
            return None if value is None else (value, None)
        for unit, value in _measured(run, self.name):
            if (unit.sequences, unit.given) == (self.sequences, self.given):
                return value, unit
        return None

    def value(self, run: Run) -> float | None:
        found = self.of(run)
        return None if found is None else found[0]

    def why_not(self, ours: Unit | None, theirs: Unit | None) -> str | None:
        """Return why two numbers are not comparable; None if they are.

        data_sha256 covers both text and tokens. If it is equal, the text is the same, whatever the config calls it. If
        it differs under the same config, the text differs.
        """
        if ours is None or theirs is None:
            return None
        if (ours.sequences, ours.given) != (theirs.sequences, theirs.given) and self.name != "train_loss":
            return "they are over different sequences"
        known = None not in (ours.data_sha256, theirs.data_sha256)
        same_data = known and ours.data_sha256 == theirs.data_sha256
        if ours.text != theirs.text and not same_data:
            return "they are of different texts"
        if ours.tokens == theirs.tokens and known and not same_data:
            return "the data differ (data_sha256)"
        if ours.tokens != theirs.tokens and is_per_token(self.name):
            return "they are per token, and their tokens differ"
        return None


def is_of_text(metric: str) -> bool:
    return metric in _OF_TEXT or metric.startswith("probe/")


def metric_for(runs: Sequence[Run], metric: str | None) -> Metric:
    """Return the requested metric; else val_loss, or val_bpb if the runs' tokens differ. Its sequences are those
    that most runs were evaluated on; in a tie, the whole text."""
    done = [run for run in runs if run.status == "done"]
    if metric is None:
        metric = loss_metric(run.config for run in done)
        if metric == BITS and all(run.result(BITS) is None for run in done):
            metric = LOSS
    counts: Counter[tuple[str | None, tuple[str, ...]]] = Counter()
    for run in done:
        counts.update(list(dict.fromkeys((unit.sequences, unit.given) for unit, _ in _measured(run, metric))))
    sequences, given = max(counts, key=lambda how: (counts[how], not how[1], how[0] == "all"), default=(None, ()))
    return Metric(metric, sequences, given)


def are_comparable(runs: Sequence[Run], metric: str) -> bool:
    """Return whether the runs' own logged values of the metric measure the same thing.

    A different ``data_sha256`` under the same config is accepted: a curve is a mean over seeds, wherever they were run.
    """
    units = [unit_of(run)._replace(data_sha256=None) for run in runs]
    return all(Metric(metric).why_not(units[0], unit) is None for unit in units[1:])


def _measured(run: Run, metric: str) -> list[tuple[Unit, float]]:
    """Return the run's own result first, then later evaluations; the last of equal ones counts."""
    if run.status != "done":
        return []
    found: dict[Unit, float] = {}
    if (value := run.number(metric)) is not None:
        found[unit_of(run)] = value
    for row in reversed(run.evaluations):
        overrides, results = row.get("overrides"), row.get("results")
        if row.get("step") != run.summary.get("step") or not isinstance(overrides, list):
            continue
        if isinstance(results, dict) and (value := finite(results.get(metric))) is not None:
            found.setdefault(unit_of(run, [str(override) for override in overrides]), value)
    return list(found.items())


def unit_of(run: Run, overrides: Sequence[str] = ()) -> Unit:
    """Return what an evaluation of the run measures: its own, or a later one with these overrides."""
    values = dict(renamed(override).lstrip("+~").partition("=")[::2] for override in overrides)
    sequences = values.pop("evaluation.sequences", run.config.get("evaluation.sequences"))
    given = tuple(sorted(f"{key}={value}" for key, value in values.items() if key.startswith(("backend", "data"))))
    is_other_text = any(each.startswith("data") for each in given)  # read in the run's own tokens
    return Unit(
        tokens=tokens_of(run.config),
        text=() if is_other_text else text_of(run.config),
        data_sha256=None if is_other_text else run.provenance.get("data_sha256"),
        sequences=None if sequences is None else str(sequences),
        given=given,
    )


def spans(runs: Sequence[Run], metric: Metric) -> str | None:
    """Return a sentence if the runs' sequences are equal in number but do not cover the same text."""
    if metric.sequences in ("all", None) or not is_of_text(metric.name):
        return None
    lengths = {run.config.get("backend.context_length") for run in runs}
    tokens = {tokens_of(run.config) for run in runs}
    if len(lengths) < 2 and len(tokens) < 2:
        return None
    return (
        f"{metric.sequences} sequences are not the same text for all runs, since their length or their tokens differ: "
        "each is its own sample of the held-out text. evaluation.sequences=all scores the same text for all; xattn "
        "evaluate STUDY evaluation.sequences=all --save does so for runs that are done."
    )
