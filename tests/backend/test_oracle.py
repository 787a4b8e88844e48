"""The judge is judged: the oracle's analytic gradients against central differences of its own forward."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from xattn.testing import oracle
from xattn.testing.contract import Case, inputs

CASES = [
    Case(activation="softmax", pre_activation="swish", mask="everything", length=5, heads=6, kv_heads=2),
    Case(activation="sigmoid", pre_activation="swish", mask="empty rows", length=5, heads=6, kv_heads=2),
    Case(activation="none", pre_activation="swish", mask="window", length=5, heads=6, kv_heads=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vjp_is_the_derivative_of_forward(case: Case) -> None:
    problem, g = inputs(case).problem, np.asarray(inputs(case).g).astype(np.float64)
    rng = np.random.default_rng(3)
    step = 1e-6
    for name, gradient in zip(("q", "k", "v", "bias"), oracle.vjp(problem, g), strict=True):
        if name == "bias" and case.activation != "sigmoid":
            continue
        for _ in range(5):
            at = getattr(problem, name)
            way = rng.standard_normal(at.shape)
            ahead, behind = (
                np.sum(oracle.forward(replace(problem, **{name: at + sign * step * way})) * g) for sign in (1, -1)
            )
            np.testing.assert_allclose((ahead - behind) / (2 * step), np.sum(gradient * way), rtol=1e-6, atol=1e-8)
