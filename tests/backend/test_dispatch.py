"""The table: auto takes the first row with no reason against it and keeps the reasons; a name serves or says why."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from xattn.backend import activations, dispatch
from xattn.backend.activations import activation
from xattn.backend.dispatch import Call, Choice, choose

CALL = Call(
    activation=activation("softmax"),
    dtype="float32",
    batch=1,
    num_heads=4,
    num_kv_heads=4,
    sequence=256,
    head_dim_qk=64,
    head_dim_v=64,
    platform="cpu",
)
EVERYTHING = replace(
    CALL,
    window=3,
    has_mask=True,
    has_segment_ids=True,
    has_decay=True,
    has_input_gate=True,
    has_sink=True,
    platform="tpu",
    sequence=1,
)


def _row(name: str, unsupported: Any = None, unfavourable: Any = None) -> dispatch.Implementation:
    return dispatch.Implementation(name, lambda _: unsupported, lambda _: unfavourable, vmaps=True)


def test_auto_takes_the_first_that_serves_and_keeps_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (_row("a", "windows"), _row("b", None, "slow here"), _row("c"), _row("d"))
    monkeypatch.setattr(dispatch, "TABLE", table)
    choice = choose(CALL)
    assert choice == Choice("c", {"a": "does not support windows", "b": "slow here"})
    assert json.loads(json.dumps(asdict(choice))) == asdict(choice)


def test_a_name_is_taken_even_where_auto_would_not_or_is_an_error_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "TABLE", (_row("a", "windows"), _row("b", None, "slow here"), _row("c")))
    assert choose(CALL, "b") == Choice("b", {})
    with pytest.raises(ValueError, match="'a' does not support windows"):
        choose(CALL, "a")
    with pytest.raises(ValueError, match="'z'; choices: auto, a, b, c"):
        choose(CALL, "z")


@pytest.mark.parametrize("name", activations.names())
def test_the_last_row_serves_every_call(name: str) -> None:
    last = dispatch.TABLE[-1]
    for call in (CALL, EVERYTHING):
        assert last.refusal(replace(call, activation=activation(name))) is None
        assert last.unfavourable(replace(call, activation=activation(name))) is None


TERMS = ("has_decay", "has_input_gate", "has_sink")


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("name", ["cudnn", "hopper"])
def test_kernels_of_gpus_refuse_the_terms_and_say_why(name: str, term: str) -> None:
    chosen = activation("softmax" if name == "cudnn" else "sigmoid")
    able = replace(CALL, activation=chosen, dtype="bfloat16", platform="cuda", compute_capability="9.0", sequence=4096)
    assert dispatch.row(name).refusal(able) is None
    reason = "a sink: its kernels" if term == "has_sink" else "a decay or an input gate: its kernels"
    assert str(dispatch.row(name).refusal(replace(able, **{term: True}))).startswith(reason)
    choice = choose(replace(able, **{term: True}))
    assert choice.name == "blockwise"
    assert reason in choice.passed_over[name]


def test_linear_refuses_a_window_and_a_mask_and_nothing_else_of_none() -> None:
    given = ("window", "has_mask", "has_segment_ids", "has_decay", "has_input_gate")
    for values in itertools.product((False, True), repeat=len(given)):
        asked: dict[str, Any] = dict(zip(given, values, strict=True))
        call = replace(CALL, activation=activation("none"), **asked | {"window": 7 if asked["window"] else None})
        refused = dispatch.row("linear").refusal(call)
        assert (refused is None) == (not asked["window"] and not asked["has_mask"]), asked
        assert choose(call).name == ("linear" if refused is None else "reference")


def test_names_are_unique_and_auto_is_none_of_them() -> None:
    assert len(set(dispatch.names())) == len(dispatch.TABLE) + 1
