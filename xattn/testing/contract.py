"""The requirements on every implementation, as checks on one function (q, k, v, spec) → out.

The tests run them over the dispatch table and every activation; :func:`xattn.testing.check_activation` runs them on
your own activation.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xattn.backend.activations import Activation, activation
from xattn.backend.cache import Cache, init_cache
from xattn.backend.decode import decode_step, decoding_spec, of_tokens, prefill
from xattn.backend.spec import AttentionSpec
from xattn.testing import oracle
from xattn.testing.cases import BATCH, DECAYS, THETA, Case, Function, Inputs, f64, inputs, with_terms


class Bound(NamedTuple):
    """The largest error that an implementation may have, relative to the largest true value."""

    output: float
    gradients: float


# The only table of tolerances, by dtype and kind of decay.
TOLERANCE: dict[tuple[str, str], Bound] = {
    ("float32", "none"): Bound(5e-6, 5e-6),
    ("float32", "zeros"): Bound(5e-6, 5e-6),
    ("float32", "mild"): Bound(3e-5, 2e-3),
    ("float32", "resets"): Bound(3e-4, 2e-2),
    ("float32", "hard"): Bound(2e-3, 2e-2),
    # Rounding to these dtypes costs more than any decay, which is always computed in float32.
    **{("bfloat16", kind): Bound(2.5e-2, 2.5e-2) for kind in DECAYS},
    **{("float16", kind): Bound(4e-3, 4e-3) for kind in DECAYS},
}


# Up to this length a decay costs no digits, as its sums cover few tokens.
SHORT = 16


def bound_of(case: Case) -> Bound:
    """Return the tolerance of a case."""
    return TOLERANCE[case.dtype, case.decay if case.length > SHORT else "none"]


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function: Function, arrays: tuple[Any, ...], spec: AttentionSpec, g: Any) -> Any:
    """Return (out, gradients of Σ out · g with respect to the arrays, which are q, k, v and the terms)."""
    out, vjp = jax.vjp(lambda q, k, v, terms: function(q, k, v, with_terms(spec, terms)), *arrays)
    return out, vjp(g.astype(out.dtype))


@lru_cache(maxsize=32)
def truth(case: Case, row: Activation) -> tuple[oracle.F64, oracle.Gradients]:
    """Return the oracle's output and gradients, which all implementations of a case share.

    row: the case's activation. The cache needs it: a name can be registered again with another function.
    """
    x = inputs(case)
    return oracle.forward(x.problem), oracle.vjp(x.problem, f64(x.g))


def check_values(function: Function, case: Case) -> None:
    """Check that the output and all gradients equal the oracle's, are finite and keep their dtypes."""
    x = inputs(case)
    out, (d_q, d_k, d_v, d_terms) = value_and_gradients(function, (x.q, x.k, x.v, x.terms), x.spec, x.g)
    (true_out, want), bound = truth(case, activation(case.activation)), bound_of(case)
    close("out", out, true_out, case.dtype, bound.output)
    for name, gradient in (("q", d_q), ("k", d_k), ("v", d_v)):
        close(f"gradient of {name}", gradient, getattr(want, name), case.dtype, bound.gradients)
    for name in ("bias", "sink", "log_decay", "log_input_gate"):
        if x.terms[name] is not None:
            close(f"gradient of {name}", d_terms[name], getattr(want, name), "float32", bound.gradients)
    norm = max(float(np.linalg.norm(want.logit_scale)), 1e-6)
    error = abs(float(d_terms["logit_scale"]) - float(np.sum(want.logit_scale))) / norm
    assert error <= bound.gradients, f"gradient of logit_scale is off by {error:.2e} of the norm of its terms"
    assert np.isfinite(d_terms["theta"]), "the gradient of theta is not finite"
    empty = ~x.problem.keep.any(-1)
    assert not np.any(np.asarray(out).swapaxes(1, 2)[empty]), "a row that may attend to nothing is not exactly 0"


def check_theta_gradient(function: Function, case: Case) -> None:
    """Check d/dθ against a central difference of the oracle over float64 tables."""
    x = inputs(case)
    d_theta = value_and_gradients(function, (x.q, x.k, x.v, x.terms), x.spec, x.g)[1][3]["theta"]
    step = 1e-4

    def loss(theta: float) -> float:
        sin, cos = oracle.tables(case.length, case.turning, theta)
        return float(np.sum(oracle.forward(replace(x.problem, sin=sin, cos=cos)) * f64(x.g)))

    want = (loss(THETA + step) - loss(THETA - step)) / (2 * step)
    # The terms of the sum exceed the sum, so the bound is looser than for a single array, but too tight for chance.
    assert abs(float(d_theta) - want) < 1e-4 * abs(want) + 1e-6, (float(d_theta), want)


def check_causal(function: Function, case: Case) -> None:
    """Check that by default out_t depends on all s ≤ t with weights float32 can hold, and on no s > t, bit for bit."""
    x = inputs(case)
    t = case.length // 2

    g = jnp.zeros_like(x.g).at[:, :, t].set(1)
    _, d_k, d_v, _ = value_and_gradients(function, (x.q, x.k, x.v, x.terms), x.spec, g)[1]
    weights = oracle.weights(x.problem)[:, :, t, : t + 1]
    for gradient in (d_k, d_v):
        assert not np.any(np.asarray(gradient)[:, :, t + 1 :]), "the output depends on a later token"
        seen = np.any(np.asarray(gradient)[:, :, : t + 1] != 0, axis=-1)
        assert np.all(seen | (weights < np.finfo(np.float32).tiny)), "the output ignores an earlier token"


def decoding(case: Case, capacity: int) -> tuple[AttentionSpec, Cache]:
    """Return the spec of a case for decoding, and an empty cache."""
    x = inputs(case)
    spec = decoding_spec(
        num_heads=case.heads,
        activation_function=case.activation,
        qk_pre_activation_function=case.pre_activation,
        theta=THETA,
        context_length=case.context_length,
        window=x.spec.window,
        sink=x.spec.sink,
        rotary_fraction=case.rotary_fraction,
        logit_scale=case.logit_scale,
    )
    cache = init_cache(
        spec,
        batch=BATCH,
        num_kv_heads=case.kv_heads,
        head_dim_qk=case.widths[0],
        head_dim_v=case.widths[1],
        capacity=capacity,
        dtype=case.dtype,
        fades=case.decay != "none" or case.input_gate,
        documents=x.spec.segment_ids is not None,
    )
    return spec, cache


def call_of(x: Inputs, spec: AttentionSpec, tokens: slice) -> tuple[tuple[jax.Array, ...], AttentionSpec]:
    """Return (q, k, v) and the spec of a decoding call with these tokens."""

    def cut(array: jax.Array | None, axis: int = 2) -> Any:
        return None if array is None else array[(slice(None),) * axis + (tokens,)]

    terms = {name: cut(x.terms[name]) for name in ("log_decay", "log_input_gate")}
    q, k, v = (cut(array) for array in (x.q, x.k, x.v))
    return (q, k, v), of_tokens(spec, k, **terms, segment_ids=cut(x.spec.segment_ids, 1))


def check_decoding(case: Case, *, prompt: int = 0) -> None:
    """Check that ``prompt`` tokens in one call, then one per call, give the parallel form's output at all positions."""
    x = inputs(case)
    spec, cache = decoding(case, case.length)
    outs = []
    if prompt:
        # Tokens after the prompt's length are padding and change nothing, although they are the true continuation.
        arrays, of_prompt = call_of(x, spec, slice(None))
        out, cache = jax.jit(prefill)(*arrays, cache, of_prompt, length=prompt)
        outs.append(out[:, :, :prompt])
    step = jax.jit(decode_step)
    for t in range(prompt, case.length):
        arrays, of_token = call_of(x, spec, slice(t, t + 1))
        out, cache = step(*arrays, cache, of_token)
        outs.append(out)
    bound = bound_of(case).output
    close("decoded out", jnp.concatenate(outs, axis=2), oracle.forward(x.problem), case.dtype, bound)
    assert int(cache.length) == case.length, "the cache has not counted its tokens"


def close(what: str, actual: jax.Array, expected: oracle.F64, dtype: str, bound: float | None = None) -> None:
    """Check that ``actual`` is finite, of this dtype, and within ``bound``; None is the bound for outputs."""
    assert actual.dtype == dtype, f"{what} is {actual.dtype}, not {dtype}"
    assert actual.shape == expected.shape, f"{what} has shape {actual.shape}, not {expected.shape}"
    got = f64(actual)
    assert np.all(np.isfinite(got)), f"{what} is not finite"
    error = np.max(np.abs(got - expected)) / max(np.max(np.abs(expected)), 1e-6)
    bound = TOLERANCE[dtype, "none"].output if bound is None else bound
    assert error <= bound, f"{what} is off by {error:.2e} of its largest value"
