"""The contract bites: with one function broken on purpose, the case beside it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from xattn.backend import blockwise, decay, decode, formula, linear, reference, spec
from xattn.backend.activations import activation
from xattn.backend.rope import rotary_tables, rotate
from xattn.testing import cases
from xattn.testing.cases import SUBJECTS, Subject
from xattn.testing.contract import bound_of, check_decoding, check_values, close, truth

# Eleven tokens are three tiles of four, or four chunks of three; the last of each is not whole.
Case = partial(cases.Case, length=11)
SOFTMAX, SIGMOID, NONE = (Case(activation=a) for a in ("softmax", "sigmoid", "none"))
EMPTY = Case(activation="softmax", mask="empty rows")
WINDOW = Case(activation="none", mask="window")
SEGMENTS = Case(activation="none", mask="segments")
BIASED = Case(activation="sigmoid", bias_step=0.3)
BIASED_GROUPED = Case(activation="sigmoid", bias_step=0.3, heads=6, kv_heads=2)
GROUPED = Case(activation="none", heads=6, kv_heads=2)
SWISH = Case(activation="none", pre_activation="swish")
DECAYED, GATED = Case(activation="none", decay="mild"), Case(activation="none", input_gate=True)
DECAYED_SOFTMAX = Case(activation="softmax", decay="mild", heads=6, kv_heads=2)
DECAYED_MASK = Case(activation="softmax", decay="mild", mask="arbitrary")
SINK = Case(activation="softmax", sink="learned")
DOCUMENTS = Case(activation="none", mask="documents")
SCALED, PARTIAL = Case(activation="none", logit_scale=0.7), Case(activation="none", rotary_fraction=0.5)
PREPARING = (reference, blockwise, linear)
FORMULA = ("reference", "blockwise")
ALL = (*FORMULA, "linear")
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


# ---- the terms


def not_beyond_the_tile(right: Any) -> Callable[..., Any]:
    def wrong(tiles: Any, i: Any, j: Any) -> Any:
        return jnp.where(i == j, right(tiles, i, j), 0)

    return wrong


def also_of_keys(right: Any) -> Callable[..., Any]:
    def wrong(q: Any, k: Any, meaning: Any, *rest: Any) -> Any:
        rotated_q, rotated_k = right(q, k, meaning, *rest)
        return rotated_q, rotated_k * meaning.logit_scale

    return wrong


def frequencies_of_all_channels(right: Any) -> Callable[..., Any]:
    def wrong(positions: Any, width: int, meaning: Any) -> Any:
        pairs = right(positions, width, meaning)[0].shape[-1]
        return tuple(table[..., :pairs] for table in right(positions, width, replace(meaning, rotary_fraction=1.0)))

    return wrong


def without(*names: str) -> Broken:
    """Some of what belongs to a chunk's tokens is not there."""
    return lambda right: lambda *given: right(*given[:-1], given[-1]._replace(**dict.fromkeys(names)))


def added_under_none(right: Any) -> Callable[..., Any]:
    return lambda scores, meaning, terms=None: (
        right(scores, meaning) + (0 if terms is None else formula._of_terms(terms, scores))
    )


# (what is broken, where, the function, what breaks it, the implementations that it breaks, a case that notices)
MUTATIONS: list[tuple[str, Any, str, Broken, tuple[str, ...], cases.Case]] = [
    ("scale dropped", formula, "scores", unscaled, FORMULA, SIGMOID),
    ("mask shifted by one", formula, "may_attend", attend_to_the_next, FORMULA, NONE),
    ("bias dropped", formula, "logits", with_spec(bias=lambda s: None), FORMULA, SIGMOID),
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
    ("past forgotten", linear, "_states", lambda r: lambda s, *own: r(0 * s, *own), ("linear",), NONE),
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
    ("decay of s itself too", decay, "exclusive_to_end", lambda right: decay.to_end, ALL, DECAYED),
    ("decay of t left out", decay, "sums", lambda r: lambda x, rows: r(x, rows - 1), ("reference",), DECAYED_SOFTMAX),
    ("decay dropped", formula, "terms", lambda right: lambda *_: None, ("reference",), DECAYED_SOFTMAX),
    ("decay ends with the tile", decay.Stretches, "tile", not_beyond_the_tile, ("blockwise",), DECAYED_SOFTMAX),
    (
        "decay of the tiles between dropped",
        decay,
        "stretches",
        lambda right: lambda *given: right(*given)._replace(between=0 * right(*given).between),
        ("blockwise",),
        DECAYED,
    ),
    (
        "another key head's decay",
        formula,
        "_of_terms",
        lambda right: lambda terms, logits: right(terms[:, ::-1], logits),
        FORMULA,
        DECAYED_SOFTMAX,
    ),
    ("decay added under none", formula, "logits", added_under_none, FORMULA, DECAYED),
    (
        "decay's gradient one token off",
        decay,
        "gradient",
        lambda r: lambda a, b: r(a, b) - a + b,
        ("blockwise",),
        DECAYED,
    ),
    (
        "gradient of scores undecayed",
        formula,
        "gradients_of_logits",
        lambda right: lambda gradient, *rest: (gradient, right(gradient, *rest)[1]),
        ("blockwise",),
        DECAYED,
    ),
    (
        "a later key under a mask with decay",
        formula,
        "may_attend",
        with_spec(log_decay=lambda s: None),
        FORMULA,
        DECAYED_MASK,
    ),
    ("sink dropped", formula, "weights", with_spec(sink=lambda s: None), ("reference",), SINK),
    ("sink dropped", formula, "with_sink", lambda right: lambda results, meaning: results, ("blockwise",), SINK),
    (
        "sink forgotten in the backward's weights",
        formula,
        "with_sink",
        lambda right: lambda results, meaning: (right(results, meaning)[0], results[1]),
        ("blockwise",),
        SINK,
    ),
    ("sink without gradient", formula, "gradient_of_sink", lambda r: lambda *x: 0 * r(*x), ("blockwise",), SINK),
    ("another head's sink", formula, "weights", with_spec(sink=lambda s: s.sink[::-1]), ("reference",), SINK),
    ("another head's sink", formula, "with_sink", with_spec(sink=lambda s: s.sink[::-1]), ("blockwise",), SINK),
    ("gate not on the carry", linear, "_left_of", without("log_input_gate"), ("linear",), GATED),
    ("gate not within the chunk", linear, "_weighted", without("log_input_gate"), ("linear",), GATED),
    ("decay not on what is added", linear, "_left_of", without("log_decay"), ("linear",), DECAYED),
    ("decay not within the chunk", linear, "_weighted", without("log_decay"), ("linear",), DECAYED),
    ("carry does not decay", linear, "_states", lambda r: lambda s, own, kept: r(s, own, None), ("linear",), DECAYED),
    (
        "carry decays a token late",
        linear,
        "_from_before",
        lambda right: lambda of: (right(of)[0] / jnp.exp(of.log_decay), right(of)[1]),
        ("linear",),
        DECAYED,
    ),
    ("border leaks through the carry", linear, "_from_before", without("runs"), ("linear",), DOCUMENTS),
    ("border leaks within the chunk", linear, "_weighted", without("runs"), ("linear",), DOCUMENTS),
    ("border leaks into what is added", linear, "_left_of", without("runs"), ("linear",), DOCUMENTS),
    *(
        ("scale of keys too", module, "prepare", also_of_keys, (module.__name__.split(".")[-1],), SCALED)
        for module in PREPARING
    ),
    ("all channels turn", spec, "spec_tables", with_spec(rotary_fraction=lambda s: 1.0), ALL, PARTIAL),
    ("frequencies of all channels", spec, "spec_tables", frequencies_of_all_channels, ALL, PARTIAL),
]


@pytest.fixture(autouse=True)
def _nothing_cached() -> Iterator[None]:
    """What jax has traced of a function knows nothing of what is put in its place; so operation after operation."""
    with jax.disable_jit():
        yield


def check_output_then_all(subject: Subject, case: cases.Case) -> None:
    """Most of what is broken shows in the output, which takes a fraction of the gradients' time."""
    x = cases.inputs(case)
    out = subject.function(x.q, x.k, x.v, x.spec)
    close("out", out, truth(case, activation(case.activation))[0], case.dtype, bound_of(case).output)
    check_values(partial(subject.function), case)


@pytest.mark.parametrize(
    ("module", "name", "breaks", "subject", "case"),
    [
        pytest.param(module, name, breaks, SUBJECT[subject], case, id=f"{subject}: {what}")
        for what, module, name, breaks, subjects, case in MUTATIONS
        for subject in subjects
    ],
)
def test_a_broken_function_is_noticed(
    module: Any, name: str, breaks: Broken, subject: Subject, case: cases.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, breaks(getattr(module, name)))
    with pytest.raises(AssertionError, match=r"is off by|is not exactly 0"):
        check_output_then_all(subject, case)


def falls_by_nothing(right: Any) -> Callable[..., Any]:
    return lambda *given: (0 * right(*given)[0], right(*given)[1])


SEGMENTED = Case(activation="softmax", mask="documents")
FADING = Case(activation="softmax", decay="mild", input_gate=True)


@pytest.mark.parametrize(
    ("module", "name", "breaks", "case", "prompt"),
    [
        (formula, "scores", unscaled, SIGMOID, 0),
        (formula, "logits", with_spec(bias=lambda s: None), SIGMOID, 0),
        (formula, "may_attend", with_spec(window=lambda s: s.window + 1), WINDOW, 0),
        (formula, "may_attend", lambda right: lambda r, c, *rest: right(r, c._replace(exist=None), *rest), SOFTMAX, 0),
        (formula, "weights", with_spec(sink=lambda s: None), SINK, 0),
        (decode, "_own_terms", falls_by_nothing, FADING, 0),
        (decode, "_until", lambda right: lambda meaning, length: meaning, DECAYED, 7),
        (formula, "may_attend", lambda r: lambda rows, *rest: r(rows._replace(segments=None), *rest), SEGMENTED, 0),
        (decode, "_state_with", lambda r: lambda k, v, c, s: r(k, v, replace(c, segment=None), s), DOCUMENTS, 0),
    ],
)
def test_decoding_that_is_broken_is_noticed(
    module: Any, name: str, breaks: Broken, case: cases.Case, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, breaks(getattr(module, name)))
    with pytest.raises(AssertionError, match="is off by"):
        check_decoding(replace(case, context_length=5), prompt=prompt)
