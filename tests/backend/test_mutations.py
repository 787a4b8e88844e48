"""The contract bites: an implementation broken on purpose, by one edit of its source, fails the case beside it."""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest

from xattn.backend import dispatch

from .contract import Case, check_values

SOFTMAX, SIGMOID, NONE = (Case(activation=a) for a in ("softmax", "sigmoid", "none"))
EMPTY = Case(activation="softmax", mask="empty rows")
WINDOW = Case(activation="none", mask="window")
SEGMENTS = Case(activation="none", mask="segments")
BIASED = Case(activation="sigmoid", bias_step=0.3)
BIASED_GROUPED = Case(activation="sigmoid", bias_step=0.3, heads=6, kv_heads=2)
GROUPED = Case(activation="none", heads=6, kv_heads=2)
SWISH = Case(activation="none", pre_activation="swish")
TUNING: dict[str, dict[str, int]] = {"blockwise": {"tile": 4}, "linear": {"chunk": 3}, "reference": {}}

# (what is broken, where, the code, what it becomes, a case of the contract that notices)
MUTATIONS: list[tuple[str, str, str, str, Case]] = [
    ("scale dropped", "reference", "q, k) / math.sqrt(q.shape[-1])", "q, k)", SIGMOID),
    ("mask shifted by one", "reference", "s <= t if spec.mask", "s < t if spec.mask", NONE),
    ("bias dropped", "reference", "logits + spec.bias[None, :, None, None]", "logits", SIGMOID),
    ("another head's bias", "reference", "spec.bias[None,", "spec.bias[::-1][None,", BIASED),
    ("axes swapped", "reference", '"bhtd,bhsd->bhts", q, k', '"bhtd,bhsd->bhst", q, k', NONE),
    ("wrong key heads", "reference", "jnp.repeat(k, group, axis=1)", "jnp.tile(k, (1, group, 1, 1))", GROUPED),
    ("empty rows are means", "reference", "jnp.where(keep, jax.nn.softmax(", "jnp.where(True, jax.nn.softmax(", EMPTY),
    ("window one too wide", "reference", "t - spec.window < s", "t - spec.window <= s", WINDOW),
    ("segments ignored", "reference", "keep & (spec.segment_ids", "keep | (spec.segment_ids", SEGMENTS),
    ("softmax not rescaled", "blockwise", "sums * shrink, total", "sums, total", SOFTMAX),
    ("delta dropped", "blockwise", "(d_weights - delta)", "d_weights", SOFTMAX),
    ("sigmoid's slope wrong", "blockwise", "weights * (1 - weights)", "weights", SIGMOID),
    (
        "diagonal tiles skipped",
        "blockwise",
        "offset + tile - 1) // tile + 1, 0, count)",
        "offset + tile - 1) // tile, 0, count)",
        NONE,
    ),
    ("another head's bias", "blockwise", "spec.bias.reshape(1,", "spec.bias[::-1].reshape(1,", BIASED),
    (
        "biases grouped the other way",
        "blockwise",
        "spec.bias.reshape(1, *q.shape[1:3], 1, 1)",
        "spec.bias.reshape(1, *q.shape[2:0:-1], 1, 1).swapaxes(1, 2)",
        BIASED_GROUPED,
    ),
    ("keys not added up", "blockwise", "d_k = _add(", "d_k = _put(", NONE),
    ("window's first tile skipped", "blockwise", "offset - spec.window + 1, 0)", "offset, 0)", WINDOW),
    ("chunk sees itself twice", "linear", "before.astype", "after.astype", NONE),
    ("past forgotten", "linear", "axis=2) + state[:, :, None]", "axis=2)", NONE),
    ("keys not rotated", "linear", "cut(rotated_k)", "cut(k)", NONE),
    ("pre-activation dropped", "spec", "jax.nn.silu(x) if", "x if", SWISH),
    (
        "keys rotated the other way",
        "spec",
        "rotate(pre_activate(k, spec), sin",
        "rotate(pre_activate(k, spec), -sin",
        NONE,
    ),
]


def broken_copy(name: str, code: str, replacement: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    original = importlib.import_module(f"xattn.backend.{name}")
    source = inspect.getsource(original)
    assert source.count(code) == 1, f"{code!r} stands {source.count(code)} times in {name}.py: renew the mutation"
    copy = ModuleType(f"broken_{name}")
    monkeypatch.setitem(sys.modules, copy.__name__, copy)
    exec(compile(source.replace(code, replacement), copy.__name__, "exec"), copy.__dict__)
    return copy


@pytest.mark.parametrize(
    ("name", "code", "replacement", "case"),
    [pytest.param(*mutation, id=f"{mutation[0]}: {what}") for what, *mutation in MUTATIONS],
)
def test_a_broken_implementation_fails(
    name: str, code: str, replacement: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: Any = broken_copy(name, code, replacement, monkeypatch)
    if name == "spec":  # its users hold the name: break the reference through it
        original = importlib.import_module("xattn.backend.reference")
        monkeypatch.setattr(original, "prepare", broken.prepare)
        function = lambda *arguments: original.reference(*arguments)  # noqa: E731 (a new function: nothing is cached)
        row = replace(dispatch.row("reference"), function=function)
    else:
        function = getattr(broken, name)
        tuning = {"tuning": broken.Tuning(**TUNING[name])} if TUNING[name] else {}
        row = replace(dispatch.row(name), function=partial(function, **tuning))
    with pytest.raises(AssertionError, match=r"is off by|is not exactly 0"):
        check_values(row, case)
