"""The contract bites: with one function broken on purpose, the case beside it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from xattn.backend import blockwise, formula, linear, reference, spec
from xattn.backend.rope import rotary_tables, rotate
from xattn.testing.contract import SUBJECTS, Case, Subject, check_decoding, check_values

SOFTMAX, SIGMOID, NONE = (Case(activation=a) for a in ("softmax", "sigmoid", "none"))
EMPTY = Case(activation="softmax", mask="empty rows")
WINDOW = Case(activation="none", mask="window")
SEGMENTS = Case(activation="none", mask="segments")
BIASED = Case(activation="sigmoid", bias_step=0.3)
BIASED_GROUPED = Case(activation="sigmoid", bias_step=0.3, heads=6, kv_heads=2)
GROUPED = Case(activation="none", heads=6, kv_heads=2)
SWISH = Case(activation="none", pre_activation="swish")
FORMULA = ("reference", "blockwise")
SUBJECT = {subject.name: subject for subject in SUBJECTS}

Broken = Callable[[Any], Callable[..., Any]]
"""The right function → the wrong one."""


def with_spec(**changes: Callable[[spec.AttentionSpec], Any]) -> Broken:
    """The function is meaning another spec, its last argument but for may_attend's mask."""

    def breaks(right: Any) -> Callable[..., Any]:
        def wrong(*arguments: Any) -> Any:
            def change(argument: Any) -> Any:
                if not isinstance(argument, spec.AttentionSpec):
                    return argument
                return replace(argument, **{name: of(argument) for name, of in changes.items()})

            return right(*map(change, arguments))

        return wrong

    return breaks


def attend_to_the_next(right: Any) -> Callable[..., Any]:
    return lambda rows, columns, *rest: right(rows._replace(positions=rows.positions - 1), columns, *rest)


def unscaled(right: Any) -> Callable[..., Any]:
    return lambda q, k: right(q, k) * q.shape[-1] ** 0.5


def keys_turned_back(right: Any) -> Callable[..., Any]:
    def wrong(q: Any, k: Any, meaning: Any, *rest: Any) -> Any:
        sin, cos = rotary_tables(jnp.arange(q.shape[-2]), q.shape[-1], meaning.theta)
        return right(q, k, meaning, *rest)[0], rotate(spec.pre_activate(k, meaning), -sin, cos)

    return wrong


def of_all_rows(right: Any) -> Callable[..., Any]:
    """Empty rows are means."""
    return lambda logits, keep, meaning: right(logits, keep | ~keep.any(-1, keepdims=True), meaning)


def not_rescaled(right: Any) -> Callable[..., Any]:
    return lambda sums, *rest: right(sums, *rest)._replace(
        weighted=sums.weighted + right(sums._replace(weighted=jnp.zeros_like(sums.weighted)), *rest).weighted
    )


def without_delta(right: Any) -> Callable[..., Any]:
    def wrong(*arguments: Any) -> Any:
        weights, pull = right(*arguments)
        return weights, lambda gradient, delta: pull(gradient, jnp.zeros_like(delta))

    return wrong


def slope_of_the_weight(right: Any) -> Callable[..., Any]:
    def wrong(*arguments: Any) -> Any:
        weights, _ = right(*arguments)
        return weights, lambda gradient, delta: gradient * weights

    return wrong


def fewer_tiles(first: int, last: int) -> Broken:
    def breaks(right: Any) -> Callable[..., Any]:
        def wrong(*arguments: Any) -> Any:
            begin, end = right(*arguments)
            return begin + first, end - last

        return wrong

    return breaks


def reversed_bias(meaning: spec.AttentionSpec) -> Any:
    return None if meaning.bias is None else meaning.bias[::-1]


def other_grouping(meaning: spec.AttentionSpec) -> Any:
    return meaning.bias.reshape(2, 3).T.reshape(-1) if meaning.bias is not None else None


# (what is broken, where, the function, what breaks it, the implementations that it breaks, a case that notices)
MUTATIONS: list[tuple[str, Any, str, Broken, tuple[str, ...], Case]] = [
    ("scale dropped", formula, "scores", unscaled, FORMULA, SIGMOID),
    ("mask shifted by one", formula, "may_attend", attend_to_the_next, FORMULA, NONE),
    ("bias dropped", formula, "logits", lambda right: lambda scores, meaning: scores, FORMULA, SIGMOID),
    ("another head's bias", formula, "logits", with_spec(bias=reversed_bias), FORMULA, BIASED),
    ("biases grouped the other way", formula, "logits", with_spec(bias=other_grouping), FORMULA, BIASED_GROUPED),
    ("axes swapped", formula, "scores", lambda r: lambda q, k: r(q, k).swapaxes(-1, -2), FORMULA, NONE),
    ("window one too wide", formula, "may_attend", with_spec(window=lambda s: s.window + 1), FORMULA, WINDOW),
    (
        "segments ignored",
        formula,
        "may_attend",
        lambda right: lambda rows, *rest: right(rows._replace(segments=None), *rest),
        FORMULA,
        SEGMENTS,
    ),
    ("empty rows are means", formula, "weights", of_all_rows, ("reference",), EMPTY),
    (
        "wrong key heads",
        reference.jnp,
        "repeat",
        lambda r: lambda x, n, axis: jnp.tile(x, (1, n, 1, 1)),
        ("reference",),
        GROUPED,
    ),
    (
        "wrong query heads",
        formula,
        "grouped",
        lambda right: lambda x, heads: x.reshape(x.shape[0], -1, heads, *x.shape[2:]).swapaxes(1, 2),
        ("blockwise",),
        GROUPED,
    ),
    ("softmax not rescaled", formula, "add_columns", not_rescaled, ("blockwise",), SOFTMAX),
    ("delta dropped", formula, "weights_again", without_delta, ("blockwise",), SOFTMAX),
    ("sigmoid's slope wrong", formula, "weights_again", slope_of_the_weight, ("blockwise",), SIGMOID),
    ("diagonal tiles skipped", blockwise, "_tiles_of_keys", fewer_tiles(0, 1), ("blockwise",), NONE),
    ("window's first tile skipped", blockwise, "_tiles_of_keys", fewer_tiles(1, 0), ("blockwise",), WINDOW),
    ("keys not added up", blockwise, "_add", lambda right: blockwise._put, ("blockwise",), NONE),
    ("chunk sees itself twice", linear, "_states", lambda r: lambda *a: (r(*a)[1], r(*a)[1]), ("linear",), NONE),
    ("past forgotten", linear, "_states", lambda r: lambda s, own: r(jnp.zeros_like(s), own), ("linear",), NONE),
    ("keys not rotated", linear, "prepare", lambda r: lambda q, k, *rest: (r(q, k, *rest)[0], k), ("linear",), NONE),
    (
        "pre-activation dropped",
        spec,
        "pre_activate",
        lambda right: lambda x, meaning: x,
        ("reference", "blockwise", "linear"),
        SWISH,
    ),
    ("keys turned the other way", reference, "prepare", keys_turned_back, ("reference",), NONE),
    ("keys turned the other way", blockwise, "prepare", keys_turned_back, ("blockwise",), NONE),
]


@pytest.fixture(autouse=True)
def _nothing_cached() -> Iterator[None]:
    """What jax has traced of a function knows nothing of what is put in its place."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("module", "name", "breaks", "subject", "case"),
    [
        pytest.param(module, name, breaks, SUBJECT[subject], case, id=f"{subject}: {what}")
        for what, module, name, breaks, subjects, case in MUTATIONS
        for subject in subjects
    ],
)
def test_a_broken_function_is_noticed(
    module: Any, name: str, breaks: Broken, subject: Subject, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, breaks(getattr(module, name)))
    with pytest.raises(AssertionError, match=r"is off by|is not exactly 0"):
        check_values(partial(subject.function), case)


@pytest.mark.parametrize(
    ("name", "breaks", "case"),
    [
        ("scores", unscaled, SIGMOID),
        ("logits", lambda right: lambda scores, meaning: scores, SIGMOID),
        ("may_attend", with_spec(window=lambda s: s.window + 1), WINDOW),
        ("may_attend", lambda right: lambda r, c, *rest: right(r, c._replace(exist=None), *rest), SOFTMAX),
    ],
)
def test_decoding_asks_the_same_formula(name: str, breaks: Broken, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formula, name, breaks(getattr(formula, name)))
    with pytest.raises(AssertionError, match="is off by"):
        check_decoding(replace(case, context_length=5))
