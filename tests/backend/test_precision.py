"""What decay costs in digits, where its sums are long: the bounds are those of ``xattn.testing.contract.TOLERANCE``."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import activations, linear, precompute_freqs
from xattn.backend.arguments import checked_spec
from xattn.backend.blockwise import blockwise
from xattn.backend.dispatch import row
from xattn.backend.reference import reference
from xattn.testing import oracle
from xattn.testing.cases import DECAYS, Case, Decay, f64, inputs
from xattn.testing.contract import check_values, close, value_and_gradients

# A prime, and more than one tile or chunk of each.
LENGTH = 389
FUNCTIONS: dict[str, Any] = {
    "reference": reference,
    "blockwise": blockwise,
    "linear": linear.linear,
}

served = pytest.mark.parametrize(
    ("name", "activation"),
    [(n, a) for n in FUNCTIONS for a in activations.names() if row(n).refusal(Case(activation=a).call()) is None],
)


@served
@pytest.mark.parametrize("decay", DECAYS[1:])
def test_output_and_gradients_keep_their_digits(name: str, activation: str, decay: Decay) -> None:
    check_values(FUNCTIONS[name], Case(activation=activation, length=LENGTH, decay=decay))


@served
@pytest.mark.parametrize(("mask", "decay"), [("default", "shut"), ("borders", "shut"), ("documents", "resets")])
def test_nothing_is_nan_however_much_is_forgotten(name: str, activation: str, mask: str, decay: Decay) -> None:
    """A gradient that is 0 has no scale to judge it by: only the output is compared."""
    x = inputs(Case(activation=activation, length=LENGTH, mask=mask, decay=decay))
    out, gradients = value_and_gradients(FUNCTIONS[name], (x.q, x.k, x.v, x.terms), x.spec, x.g)
    assert all(np.all(np.isfinite(f64(gradient))) for gradient in jax.tree.leaves(gradients))
    close("out", out, oracle.forward(x.problem), "float32", 3e-4)


LONG = 32768
KINDS = ("half-life 2", "half-life 51", "half-life 1290", "half-life S", "resets", "hard")


@cache
def long_recurrence() -> tuple[Any, oracle.F64]:
    """(q, k, v and the spec of a long call whose heads decay as KINDS says, its output in float64, token by token)."""
    width = 6
    rng = np.random.default_rng(8)
    q, k, v = (jnp.asarray(rng.standard_normal((1, len(KINDS), LONG, width)), jnp.float32) for _ in range(3))
    log_decay = np.repeat(-np.log(2) / np.geomspace(2, LONG, 4)[:, None], LONG, axis=1)
    resets = np.where(rng.random(LONG) < 0.02, -100, log_decay[2])
    log_decay = np.concatenate([log_decay, [resets, -5 * rng.lognormal(size=LONG)]])[None]
    decay = jnp.asarray(log_decay, jnp.float32)
    spec = checked_spec(num_heads=len(KINDS), length=LONG, activation_function="none", log_decay=decay)
    sin, cos = (f64(table) for table in precompute_freqs(width, LONG))
    rotated_q, rotated_k = (oracle._turn(f64(x)[0], sin, cos) for x in (q, k))
    added = rotated_k[..., :, None] * f64(v)[0][..., None, :] / np.sqrt(width)
    left = np.exp(np.maximum(f64(decay)[0], -100))[..., None, None]
    state, out = np.zeros((len(KINDS), width, width)), np.empty((len(KINDS), LONG, width))
    for t in range(LONG):
        state = left[:, t] * state + added[:, t]
        out[:, t] = (rotated_q[:, t, None] @ state)[:, 0]
    return (q, k, v, spec), out


def errors(chunks: linear.Chunks, length: int = LONG) -> dict[str, float]:
    """By how much of the norm each head is off, over the first tokens."""
    (q, k, v, spec), want = long_recurrence()
    spec = replace(spec, log_decay=spec.log_decay[..., :length])
    arrays = (x[:, :, :length] for x in (q, k, v))
    got = f64(jax.jit(partial(linear.linear, chunks=chunks))(*arrays, spec))[0]
    off, norm = (np.linalg.norm(x, axis=(1, 2)) for x in (got - want[:, :length], want[:, :length]))
    return dict(zip(KINDS, (off / norm).tolist(), strict=True))


def test_a_long_state_keeps_its_digits() -> None:
    assert {kind: error for kind, error in errors(linear.Chunks.of_platform()).items() if not error <= 3e-5} == {}


def test_that_notices_where_sums_are_long() -> None:
    """Within a chunk exponents are differences of two sums: of as many tokens as the chunk has."""
    off = errors(linear.Chunks(4096), length=4096)
    assert {kind for kind, error in off.items() if error > 3e-5} >= {"resets", "hard"}, off
