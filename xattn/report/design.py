"""What a study asks, found in its runs: the factors, what was tuned for each of their arms, and the pairing by seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xattn.keys import has_effect, short
from xattn.report.read import Run, Study

SEED = "seed"
TUNED = ("optimizer.learning_rate",)

Cell = tuple[Any, ...]  # a value for each factor
Setting = tuple[Any, ...]  # a value for each tuned key


@dataclass(frozen=True)
class Factor:
    """A key that differs between the runs.

    also: keys that change with it and that the runs cannot tell apart from it (``optimizer.momentum`` where
    ``optimizer.name`` changes). baseline: conf's default where it is among the arms, else the arm with most runs.
    """

    key: str
    arms: tuple[Any, ...]
    baseline: Any
    baseline_is_default: bool
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The key without its group."""
        return short(self.key)


@dataclass(frozen=True)
class Design:
    """The crossing of a study's factors.

    runs: cell → setting of the tuned keys → seed → run. duplicates: runs whose cell, setting and seed another one has
    already; they are not judged.
    """

    factors: tuple[Factor, ...]
    tuned: tuple[str, ...]
    seeds: tuple[Any, ...]
    runs: Mapping[Cell, Mapping[Setting, Mapping[Any, Run]]]
    duplicates: tuple[Run, ...]

    def others(self, factor: Factor) -> list[tuple[Any, ...]]:
        """The combinations of the other factors' arms that were run with any arm of this one."""
        i = self.factors.index(factor)
        return list(dict.fromkeys(cell[:i] + cell[i + 1 :] for cell in self.runs))

    def cell(self, factor: Factor, arm: Any, others: tuple[Any, ...]) -> Cell:
        i = self.factors.index(factor)
        return (*others[:i], arm, *others[i:])

    def label(self, cell: Cell) -> str:
        """``sigmoid``; with more factors than one ``activation sigmoid, theta 1000``."""
        if len(self.factors) == 1:
            return show(cell[0])
        return ", ".join(f"{f.name} {show(v)}" for f, v in zip(self.factors, cell, strict=True)) or "all runs"


def find_design(study: Study, defaults: Mapping[str, Any], tuned: Sequence[str] = TUNED) -> Design:
    """Finds the keys that differ and what each is: the pairing (seed), tuned, a factor, or a companion of a factor."""
    runs = [run for run in study.runs if run.config]
    choices = [key for key in _keys(runs) if key != SEED and has_effect(key)]
    varying = [key for key in choices if len({run.config.get(key) for run in runs}) > 1]
    groups = _grouped([key for key in varying if key not in tuned], runs)
    settled = {key for leader in groups for key in tuned if key in varying and _settles([leader], key, runs)}
    free = [key for key in varying if key in tuned and key not in settled]
    if not groups:  # the tuned key is the question itself
        groups, free = dict.fromkeys(free, ()), []
    factors = tuple(
        _factor(leader, (*also, *sorted(k for k in settled if _settles([leader], k, runs))), runs, defaults)
        for leader, also in groups.items()
    )
    table: dict[Cell, dict[Setting, dict[Any, Run]]] = {}
    duplicates = []
    for run in runs:
        cell = tuple(run.config.get(factor.key) for factor in factors)
        setting = tuple(run.config.get(key) for key in free)
        by_seed = table.setdefault(cell, {}).setdefault(setting, {})
        if run.seed in by_seed:
            duplicates.append(run)
        else:
            by_seed[run.seed] = run
    ordered = sorted(table, key=lambda cell: [f.arms.index(v) for f, v in zip(factors, cell, strict=True)])
    return Design(
        factors=factors,
        tuned=tuple(free),
        seeds=tuple(in_order({run.seed for run in runs})),
        runs={cell: {setting: table[cell][setting] for setting in in_order(table[cell])} for cell in ordered},
        duplicates=tuple(duplicates),
    )


def in_order(values: Iterable[Any]) -> list[Any]:
    """Numbers by size, before words in alphabetical order."""

    def rank(value: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return tuple(rank(item) for item in value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return (0, float(value), "")
        return (1, 0.0, str(value))

    return sorted(values, key=rank)


def show(value: Any) -> str:
    """The bare value, as a person types it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(short := f"{value:g}") == value:
        return short
    return str(value)


def _keys(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.config))


def _settles(leaders: Sequence[str], key: str, runs: Sequence[Run]) -> bool:
    """Whether the leaders' values say the key's."""
    seen: dict[tuple[Any, ...], Any] = {}
    return all(
        seen.setdefault(tuple(run.config.get(leader) for leader in leaders), run.config.get(key)) == run.config.get(key)
        for run in runs
    )


def _grouped(keys: Sequence[str], runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    """Leader → the keys that the runs cannot tell apart from it.

    These are the keys that split the runs as it does, and those of its own config group that it settles: a choice of
    a file, such as ``optimizer=muon``, changes several at once.
    """
    values = {key: len({run.config.get(key) for run in runs}) for key in keys}
    # Layers of two kinds differ in several keys at once, and the pattern is what makes them differ.
    by_weight = sorted(keys, key=lambda key: (-values[key], key != "backend.every", not key.endswith(".name")))
    groups: dict[str, list[str]] = {}
    for key in by_weight:
        for leader in groups:
            same_group = leader.partition(".")[0] == key.partition(".")[0]
            if _settles([leader], key, runs) and (same_group or _settles([key], leader, runs)):
                groups[leader].append(key)
                break
        else:
            groups[key] = []
    return {key: tuple(groups[key]) for key in keys if key in groups}


def _factor(key: str, also: tuple[str, ...], runs: Sequence[Run], defaults: Mapping[str, Any]) -> Factor:
    arms = in_order({run.config.get(key) for run in runs})
    is_default = key in defaults and defaults[key] in arms
    counts = {arm: sum(run.config.get(key) == arm for run in runs) for arm in arms}
    baseline = arms[arms.index(defaults[key])] if is_default else max(arms, key=lambda arm: counts[arm])
    arms.remove(baseline)
    return Factor(key, (baseline, *arms), baseline, is_default, also)


def pairs_of(factors: Sequence[Factor]) -> Iterable[tuple[Factor, Factor]]:
    """Every two factors, once."""
    return itertools.combinations(factors, 2)
