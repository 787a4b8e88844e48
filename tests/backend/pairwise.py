"""Covering arrays: few rows that hold every pair of values of two factors, since most faults need no more than two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]
Pair = frozenset[tuple[str, Any]]


def pairs(row: Mapping[str, Any]) -> set[Pair]:
    """The pairs (factor, value), (factor, value) that a row holds."""
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def allowed_pairs(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool]) -> list[Pair]:
    """All that a row may hold, in the order of the factors and of their values."""
    return [
        frozenset(pair)
        for a, b in combinations(factors, 2)
        for pair in product(*([(name, value) for value in factors[name]] for name in (a, b)))
        if allowed(dict(pair))
    ]


def covering(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool], given: Iterable[Row] = ()
) -> list[Row]:
    """Rows that, with the given ones, hold every allowed pair: greedy, and the same rows for the same arguments.

    A row begins with a pair that is missing; then each factor takes the value that adds most missing pairs.

    Args:
        factors: their values.
        allowed: says whether a row, perhaps without some factors yet, may occur. Every row that may occur must have an
            allowed value for each factor that is still absent.
        given: rows that there are already.
    """
    held = set().union(*map(pairs, given))
    missing = [pair for pair in allowed_pairs(factors, allowed) if pair not in held]
    rows = []
    while missing:
        row = dict(missing[0])
        for name in sorted(factors.keys() - row.keys(), key=list(factors).index):
            choices = [row | {name: value} for value in factors[name] if allowed(row | {name: value})]
            row = max(choices, key=lambda choice: sum(pair <= choice.items() for pair in missing))
        rows.append({name: row[name] for name in factors})
        missing = [pair for pair in missing if not pair <= row.items()]
    return rows
