"""The judge is judged: the oracle's analytic gradients against central differences of its own forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from xattn.testing import oracle
from xattn.testing.cases import Case, f64, inputs

GROUPED: dict[str, Any] = {"pre_activation": "swish", "length": 5, "heads": 6, "kv_heads": 2}
FADING: dict[str, Any] = {"decay": "mild", "input_gate": True, "logit_scale": 0.7, "rotary_fraction": 0.5}
CASES = [
    Case(activation="softmax", mask="everything", **GROUPED),
    Case(activation="sigmoid", mask="empty rows", **GROUPED),
    Case(activation="none", mask="window", **GROUPED),
    Case(activation="softmax", mask="everything", sink="learned", **GROUPED, **FADING),
    Case(activation="sigmoid", mask="arbitrary", **GROUPED, **FADING),
    Case(activation="none", mask="segments", **GROUPED, **FADING | {"decay": "resets"}),
]
ARRAYS = ("q", "k", "v", "bias", "sink", "log_decay", "log_input_gate")


def slope(problem: oracle.Problem, g: oracle.F64, name: str, way: Any, step: float = 1e-6) -> float:
    """The central difference of Σ out · g along a way of one field."""
    at = getattr(problem, name)
    ahead, behind = (np.sum(oracle.forward(replace(problem, **{name: at + sign * step * way})) * g) for sign in (1, -1))
    return float(ahead - behind) / (2 * step)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vjp_is_the_derivative_of_forward(case: Case) -> None:
    problem, g = inputs(case).problem, f64(inputs(case).g)
    gradients = oracle.vjp(problem, g)
    rng = np.random.default_rng(3)
    for name in ARRAYS:
        gradient, array = getattr(gradients, name), getattr(problem, name)
        assert (gradient is None) == (array is None), name
        for _ in range(0 if array is None else 5):
            way = rng.standard_normal(array.shape)
            np.testing.assert_allclose(slope(problem, g, name, way), np.sum(gradient * way), rtol=1e-6, atol=1e-8)
    got = np.sum(gradients.logit_scale)
    np.testing.assert_allclose(slope(problem, g, "logit_scale", 1.0), got, rtol=1e-6, atol=1e-8)


def test_a_decay_is_the_sum_between_and_no_less_than_a_hundred_a_token() -> None:
    """Written out once more, one pair at a time."""
    problem = inputs(Case(activation="none", decay="resets")).problem
    decay = problem.log_decay
    assert decay is not None
    plain, faded = oracle.weights(replace(problem, log_decay=None)), oracle.weights(problem)
    for t, s in ((0, 0), (3, 0), (12, 9), (8, 4)):
        factor = np.exp(sum(np.maximum(decay[:, :, r], -100) for r in range(s + 1, t + 1)))
        np.testing.assert_allclose(faded[:, :, t, s], factor * plain[:, :, t, s], rtol=1e-12)
    below = decay < -100
    assert below.any()
    gradient = oracle.vjp(problem, f64(inputs(Case(activation="none", decay="resets")).g)).log_decay
    assert gradient is not None
    assert not np.any(gradient[below])


def test_a_sink_takes_weight_and_an_empty_row_stays_empty() -> None:
    problem = inputs(Case(activation="softmax", mask="empty rows", sink="learned")).problem
    assert problem.sink is not None
    plain, weights = oracle.weights(replace(problem, sink=None)), oracle.weights(problem)
    some = problem.keep.any(-1)[:, None]
    np.testing.assert_allclose(plain.sum(-1), np.broadcast_to(some, plain.shape[:3]), rtol=1e-12)
    assert np.all((weights.sum(-1) < 1) & ((weights.sum(-1) > 0) == some))
    # In proportion: what a weight loses is e^z over the sum with it.
    ratio = np.where(some[..., None], weights.sum(-1, keepdims=True), 0)
    np.testing.assert_allclose(weights, plain * ratio, rtol=1e-12)
    assert np.all(oracle.weights(replace(problem, sink=problem.sink + 1)).sum(-1) <= weights.sum(-1))
