"""Finds a study's questions in its runs: groups that belong together, with their factors, tuned keys and pairing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import ne
from typing import Any

from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from xattn.keys import SEED, TUNED, changes_training, short, show
from xattn.report.read import Run, finite

STEPS = "trainer.steps"
MLP_DIM, PARAMETERS = "model.mlp_dim", "model.parameters"

Cell = tuple[Any, ...]  # a value for each factor
Setting = tuple[Any, ...]  # a value for each tuned key


@dataclass(frozen=True)
class Factor:
    """A key that differs between the runs."""

    key: str
    arms: tuple[Any, ...]
    baseline: Any
    """the requested one; else conf's default if it is among the arms; else the arm with most runs"""
    baseline_is_given: bool
    """whether it was requested or is conf's default"""
    also: tuple[str, ...] = ()
    """keys that change with it and cannot be separated from it (``optimizer.momentum`` with ``optimizer.name``)"""

    @property
    def name(self) -> str:
        """Return the key without its group."""
        return short(self.key)


@dataclass(frozen=True)
class Design:
    """The crossing of a group's factors."""

    factors: tuple[Factor, ...]
    tuned: tuple[str, ...]
    seeds: tuple[Any, ...]
    runs: Mapping[Cell, Mapping[Setting, Mapping[Any, Run]]]
    """cell → setting of the tuned keys → seed → run"""
    repeated: tuple[Run, ...]
    """runs of the same training as another run, which is the one that counts"""

    @cached_property
    def hub(self) -> Cell | None:
        """Return the cell of all baselines if every other cell differs from it in one factor alone; else None.

        Also None with a single factor. The number of steps has no baseline of its own: the hub decides which it is.
        """
        if len(self.factors) < 2 or len(self.runs) != 1 + sum(len(factor.arms) - 1 for factor in self.factors):
            return None
        for hub in self.runs:
            given = [(factor, value) for factor, value in zip(self.factors, hub, strict=True) if factor.key != STEPS]
            if all(value == factor.baseline for factor, value in given if factor.baseline_is_given) and all(
                sum(map(ne, cell, hub)) <= 1 for cell in self.runs
            ):
                return hub
        return None

    @property
    def families(self) -> list[tuple[Factor, ...]]:
        """Return the groups of factors that Holm corrects together.

        Normally each factor is a family of its own, since it asks a question of its own. Where every arm is one change
        to one baseline (:attr:`hub`), the question is which of them helps: all form one family, except the number of
        steps.
        """
        others = tuple(factor for factor in self.factors if factor.key != STEPS)
        if len(others) < 2 or self.hub is None:
            return [(factor,) for factor in self.factors]
        return [others, *((factor,) for factor in self.factors if factor.key == STEPS)]

    def label(self, cell: Cell) -> str:
        """Return ``sigmoid``; with several factors ``activation sigmoid, theta 1000``, or what differs from the hub."""
        if len(self.factors) == 1:
            return show(cell[0])
        if cell == self.hub:
            return "the baseline"
        shown = [i for i in range(len(cell)) if self.hub is None or cell[i] != self.hub[i]]
        return ", ".join(f"{self.factors[i].name} {show(cell[i])}" for i in shown) or "all runs"


@dataclass(frozen=True)
class Group:
    """Runs that answer one question."""

    runs: tuple[Run, ...]
    where: Mapping[str, Any] = field(default_factory=dict)
    """keys with a single value in this group and another value elsewhere in the study"""

    @property
    def label(self) -> str:
        """Return ``context_length 128, steps 200``."""
        return ", ".join(f"{short(key)} {show(value)}" for key, value in self.where.items())


def groups_of(runs: Sequence[Run], tuned: Sequence[str] = TUNED) -> list[Group]:
    """Split the runs into groups that each answer one question, the largest first.

    Two runs belong together if they differ in at most one choice, apart from the seed and tuned keys. A choice is a key
    with the keys that it brings along (:func:`_grouped`). A chain of such pairs connects a group. A key therefore
    becomes a factor only where runs differ in it alone.
    """
    known = [run for run in runs if run.config]
    choices = [(leader, *also) for leader, also in _grouped(_varying(known, tuned), known).items()]
    cells = [tuple(tuple(_value(run, key) for key in keys) for keys in choices) for run in known]
    members: dict[int, list[Run]] = {}
    for run, number in zip(known, _connected(cells), strict=True):
        members.setdefault(number, []).append(run)
    groups = sorted(members.values(), key=len, reverse=True)
    keys = [key for choice in choices for key in choice]
    if len(groups) == 1:
        return [Group(tuple(known))]
    return [Group(tuple(group), _where(group, keys)) for group in groups]


def _connected(cells: Sequence[Cell]) -> Sequence[int]:
    """Return the number of each cell's component; cells that differ in at most one place are connected."""
    first: dict[tuple[int, Cell], int] = {}
    edges = [
        (number, first.setdefault((i, cell[:i] + cell[i + 1 :]), number))
        for number, cell in enumerate(cells)
        for i in range(len(cell))
    ]
    if not edges:
        return [0] * len(cells)
    rows, columns = zip(*edges, strict=True)
    graph = coo_array(([1] * len(edges), (rows, columns)), shape=(len(cells), len(cells)))
    numbers: list[int] = connected_components(graph, directed=False)[1].tolist()
    return numbers


def _where(group: Sequence[Run], keys: Sequence[str]) -> dict[str, Any]:
    """Return the keys that have a single value in this group and another value in some other run of the study."""
    values = {key: {_value(run, key) for run in group} for key in keys}
    return {key: found.pop() for key, found in values.items() if len(found) == 1}


def find_design(
    runs: Sequence[Run],
    defaults: Mapping[str, Any],
    tuned: Sequence[str] = TUNED,
    baselines: Mapping[str, Any] | None = None,
) -> Design:
    """Find the keys that differ, and the role of each: pairing (seed), tuned key, factor, or companion of a factor.

    defaults, baselines: key → the arm that the others are compared with; ``baselines`` takes precedence.
    """
    free = [key for key in tuned if len({_value(run, key) for run in runs}) > 1]
    groups = {
        leader: (*also, *sorted(key for key in free if _settles(leader, key, runs)))
        for leader, also in _grouped(_varying(runs, tuned), runs).items()
    }
    free = [key for key in free if not any(key in also for also in groups.values())]
    if not groups:  # then the tuned key is itself the question
        groups, free = dict.fromkeys(free, ()), []
    factors = tuple(_factor(leader, also, runs, defaults, baselines or {}) for leader, also in groups.items())
    table: dict[Cell, dict[Setting, dict[Any, Run]]] = {}
    repeated = []
    for run in sorted(runs, key=lambda run: run.status != "done"):  # a finished run takes precedence
        cell = tuple(_value(run, factor.key) for factor in factors)
        setting = tuple(_value(run, key) for key in free)
        by_seed = table.setdefault(cell, {}).setdefault(setting, {})
        if run.seed in by_seed:
            repeated.append(run)
            by_seed[run.seed] = _pooled(by_seed[run.seed], run)
        else:
            by_seed[run.seed] = run
    # If every cell is one change to a hub, the hub's values become the baselines, except where another was requested.
    if (hub := Design(factors, tuple(free), (), table, ()).hub) is not None:
        asked = baselines or {}
        factors = tuple(
            factor
            if factor.key in asked
            else replace(factor, baseline=value, arms=_first(value, _as_typed(factor.key, in_order(factor.arms), runs)))
            for factor, value in zip(factors, hub, strict=True)
        )
    places = [{arm: i for i, arm in enumerate(factor.arms)} for factor in factors]
    ordered = sorted(table, key=lambda cell: [place[value] for place, value in zip(places, cell, strict=True)])
    return Design(
        factors=factors,
        tuned=tuple(free),
        seeds=tuple(in_order({run.seed for run in runs})),
        runs={cell: {setting: table[cell][setting] for setting in in_order(table[cell])} for cell in ordered},
        repeated=tuple(repeated),
    )


def _first(value: Any, arms: Sequence[Any]) -> tuple[Any, ...]:
    return (value, *(arm for arm in arms if arm != value))


def _pooled(run: Run, repeated: Run) -> Run:
    """Return the run with the measurements of another run of the same training, which has the same parameters."""
    same_data = run.provenance.get("data_sha256") == repeated.provenance.get("data_sha256")
    if repeated.status != "done" or run.status != "done" or not same_data:
        return run
    sequences = repeated.config.get("evaluation.sequences")
    overrides = [] if sequences is None else [f"evaluation.sequences={sequences}"]
    own = {"step": repeated.summary.get("step"), "overrides": overrides, "results": dict(repeated.summary)}
    return replace(run, evaluations=(*repeated.evaluations, own, *run.evaluations))


def in_order(values: Iterable[Any]) -> list[Any]:
    """Return the values in order: numbers by size, then words alphabetically."""

    def rank(value: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return tuple(rank(item) for item in value)
        if (size := finite(value)) is not None:
            return (0, float(size), "")
        return (1, 0.0, str(value))

    return sorted(values, key=rank)


def _value(run: Run, key: str) -> Any:
    """Return the run's value of a key; None for an mlp_dim that ``model.parameters`` derived from the other keys."""
    is_chosen = key == MLP_DIM and run.config.get(PARAMETERS) is not None
    return None if is_chosen else run.config.get(key)


def _varying(runs: Sequence[Run], tuned: Sequence[str]) -> list[str]:
    """Return the keys that change the training and have more than one value, except the seed and tuned keys."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [
        key
        for key in keys
        if key not in (SEED, *tuned)
        and any(changes_training(key, run.config) for run in runs)
        and len({_value(run, key) for run in runs}) > 1
    ]


def _settles(leader: str, key: str, runs: Sequence[Run]) -> bool:
    """Return whether the leader's value determines the key's."""
    seen: dict[Any, Any] = {}
    return all(seen.setdefault(_value(run, leader), _value(run, key)) == _value(run, key) for run in runs)


def _grouped(keys: Sequence[str], runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """Return leader → the keys of its config group that it brings along, because its value determines theirs.

    A choice with dependent keys does so: ``optimizer=muon`` (``optimizer.name``) has a momentum, a layer pattern has a
    second kind, a tokenizer has its vocabulary, and a number of parameters replaces an mlp_dim. So does a file named on
    the command line, such as ``model=small``, except ``trainer=debug``, which sets both a length and a pace. Keys that
    a user changed side by side are separate choices.
    """
    typed = {word.lstrip("+").partition("=")[0] for run in runs for word in run.overrides} - {"trainer"}
    values = {key: len({_value(run, key) for run in runs}) for key in keys}
    by_weight = sorted(
        keys, key=lambda key: (-values[key], key not in ("backend.every", PARAMETERS), not _has_others(key))
    )
    groups: dict[str, list[str]] = {}
    for key in by_weight:
        group = key.partition(".")[0]
        for leader in groups:
            brings = _has_others(leader) or _has_others(key) or group in typed or {leader, key} == {MLP_DIM, PARAMETERS}
            if leader.partition(".")[0] == group and brings and _settles(leader, key, runs):
                groups[leader].append(key)
                break
        else:
            groups[key] = []
    return {key: tuple(groups[key]) for key in keys if key in groups}


def _has_others(key: str) -> bool:
    """Return whether some of the key's values have dependent keys in its group."""
    return key.endswith(".name") or key in ("backend.every", "data.tokenizer")


def _factor(
    key: str, also: tuple[str, ...], runs: Sequence[Run], defaults: Mapping[str, Any], baselines: Mapping[str, Any]
) -> Factor:
    arms = _as_typed(key, in_order({_value(run, key) for run in runs}), runs)
    asked = [  # a companion key also selects the arm with its value
        _value(run, key)
        for companion in (key, *also)
        for run in runs
        if companion in baselines and _value(run, companion) == baselines[companion]
    ]
    default = defaults.get(key)  # a key that conf lacks reads as None
    given = [*asked, *([default] if defaults and default in arms else [])]
    counts = Counter(_value(run, key) for run in runs)
    baseline = arms[arms.index(given[0])] if given else max(arms, key=lambda arm: counts[arm])
    return Factor(key, _first(baseline, arms), baseline, bool(given), also)


def _as_typed(key: str, arms: list[Any], runs: Sequence[Run]) -> list[Any]:
    """Return words in the order of a sweep's command line (``backend.activation=softmax,sigmoid``)."""
    for command in dict.fromkeys(str(run.provenance.get("command", "")) for run in runs):
        for word in command.replace("'", "").split():
            name, _, values = word.partition("=")
            typed = values.split(",")
            if name in (key, key.partition(".")[0]) and {show(arm) for arm in arms} <= set(typed):
                return sorted(arms, key=lambda arm: typed.index(show(arm)))
    return arms
