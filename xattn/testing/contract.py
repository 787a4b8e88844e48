"""What every implementation must be, as checks on one function (q, k, v, spec) → out.

The tests run them over the dispatch table and every activation; :func:`xattn.testing.check_activation` runs them on an
activation of your own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xattn.backend import blockwise, linear, precompute_freqs, reference, ring
from xattn.backend.activations import Activation, QKPreActivation, activation
from xattn.backend.arguments import checked_spec
from xattn.backend.decode import Cache, decode_step, decoding_spec, init_cache, prefill
from xattn.backend.dispatch import Call, row
from xattn.backend.spec import AttentionSpec
from xattn.testing import oracle

Function = Callable[[jax.Array, jax.Array, jax.Array, AttentionSpec], jax.Array]

# The largest error, over the largest true value, that an implementation may have: the one table of tolerances.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2.5e-2, "float16": 4e-3}

# Distinct, so that swapped axes show, and primes where they can be (head widths are even, heads come in groups).
BATCH, HEADS, LENGTH, WIDTH_QK, WIDTH_V = 2, 3, 13, 10, 7
THETA = 100.0

# What the oracle states by itself; of any other activation it asks the function.
OWN_FORMULAS = ("softmax", "sigmoid", "none")

MASKS = ("default", "causal", "arbitrary", "empty rows", "window", "segments", "everything")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A point of the grid over which the checks run."""

    activation: str
    pre_activation: QKPreActivation = "none"
    mask: str = "default"
    dtype: str = "float32"
    heads: int = HEADS
    kv_heads: int = HEADS
    length: int = LENGTH
    context_length: int | None = None
    bias_step: float = 0.0
    """By how much sigmoid's bias grows from head to head, from −log n."""
    width: int | None = None
    """DHQK and DHV, for an implementation that takes few; None is WIDTH_QK and WIDTH_V."""
    platform: str = "cpu"

    @property
    def widths(self) -> tuple[int, int]:
        """(DHQK, DHV)."""
        return (WIDTH_QK, WIDTH_V) if self.width is None else (self.width, self.width)

    def call(self) -> Call:
        """The case as the table sees it, without making an array."""
        return Call(
            activation=activation(self.activation),
            dtype=self.dtype,
            batch=BATCH,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            sequence=self.length,
            head_dim_qk=self.widths[0],
            head_dim_v=self.widths[1],
            window={"window": 4, "everything": 6}.get(self.mask),
            has_mask=self.mask in ("causal", "arbitrary", "empty rows", "everything"),
            has_segment_ids=self.mask in ("segments", "everything"),
            platform=self.platform,
            compute_capability="9.0",
        )

    def __str__(self) -> str:
        swish = "+swish" if self.pre_activation == "swish" else ""
        kv = f"-{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else ""
        bias = "-biases" if self.bias_step else ""
        return f"{self.activation}{swish}-{self.mask}-{self.dtype}-S{self.length}{kv}{bias}"


@dataclass(frozen=True)
class Subject:
    """An implementation, its work cut into pieces so small that LENGTH needs several and is no multiple of them."""

    name: str
    implementation: str
    function: Function

    def serves(self, case: Case) -> bool:
        return row(self.implementation).refusal(case.call()) is None


SUBJECTS = (
    Subject("reference", "reference", reference.reference),
    Subject("blockwise", "blockwise", partial(blockwise.blockwise, tuning=blockwise.Tuning(tile=4))),
    # Without a mesh that splits the sequence it is blockwise.
    Subject("ring", "ring", partial(ring.ring, tuning=blockwise.Tuning(tile=4))),
    Subject("linear", "linear", partial(linear.linear, tuning=linear.Tuning(chunk=3))),
    Subject("linear2x2", "linear", partial(linear.linear, tuning=linear.Tuning(2, concurrent=2))),
)


@dataclass(frozen=True)
class Inputs:
    """A case's arrays, as the implementation and as the oracle take them."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    spec: AttentionSpec
    problem: oracle.Problem


def inputs(case: Case) -> Inputs:
    """Deterministic arrays, rounded to the case's dtype before either side sees them."""
    return _inputs(case, activation(case.activation))


@cache
def _inputs(case: Case, row: Activation) -> Inputs:
    rng = np.random.default_rng(20240904)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((BATCH, heads, case.length, width)), case.dtype)
        for heads, width in (
            (case.heads, case.widths[0]),
            (case.kv_heads, case.widths[0]),
            (case.kv_heads, case.widths[1]),
            (case.heads, case.widths[1]),
        )
    )
    restrictions = _restrictions(case.mask, case.length, rng)
    bias = -np.log(case.context_length or case.length) + case.bias_step * np.arange(case.heads)
    spec = checked_spec(
        batch=BATCH,
        num_heads=case.heads,
        length=case.length,
        activation_function=case.activation,
        qk_pre_activation_function=case.pre_activation,
        theta=THETA,
        context_length=case.context_length,
        sigmoid_bias=jnp.asarray(bias, jnp.float32) if case.bias_step and row.takes_bias else None,
        attention_mask=restrictions.get("mask"),
        segment_ids=restrictions.get("segments"),
        window=restrictions.get("window"),
    )
    sin, cos = precompute_freqs(case.widths[0], case.length, THETA)
    problem = oracle.Problem(
        q=_f64(q),
        k=_f64(k),
        v=_f64(v),
        activation=case.activation,
        swish=case.pre_activation == "swish",
        sin=_f64(sin),
        cos=_f64(cos),
        keep=oracle.keep_of(BATCH, case.length, **restrictions),
        bias=bias if row.takes_bias else None,
        pointwise=None if row.name in OWN_FORMULAS or row.is_normalised else _in_float64(row, spec.n),
    )
    return Inputs(q, k, v, g, spec, problem)


def _in_float64(row: Activation, n: int) -> tuple[oracle.Function, oracle.Function]:
    """An activation that the oracle has no formula of, and its slope, by its own function in float64."""

    def of(function: Any) -> oracle.Function:
        def run(logits: oracle.F64) -> oracle.F64:
            with jax.enable_x64(True):
                return np.asarray(function(jnp.asarray(logits, jnp.float64)))

        return run

    weight = partial(row.__call__, n=n)
    return of(weight), of(lambda logits: jax.vjp(weight, logits)[1](jnp.ones_like(logits))[0])


def _restrictions(mask: str, length: int, rng: np.random.Generator) -> dict[str, Any]:
    arbitrary = rng.random((length, length)) < 0.6
    empty = arbitrary & (np.arange(length) % 3 != 1)[:, None]
    # Segments that return, and of which one ends within any block: the id decides, not the border.
    segments = np.stack([(np.arange(length) // 5) % 2, np.arange(length) // 7]).astype(np.int32)
    return {
        "default": {},
        "causal": {"mask": np.tri(length, dtype=bool)},
        "arbitrary": {"mask": arbitrary},
        "empty rows": {"mask": empty},
        "window": {"window": 4},
        "segments": {"segments": segments},
        "everything": {"mask": empty, "window": 6, "segments": segments},
    }[mask]


def _f64(x: jax.Array) -> oracle.F64:
    return np.asarray(x).astype(np.float64)


@partial(jax.jit, static_argnums=0)
def _run(function: Function, q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, g: jax.Array) -> Any:
    """(out, gradients of Σ out · g with respect to q, k, v, theta and the bias)."""

    def of_arrays(*arrays: Any) -> jax.Array:
        q, k, v, theta, bias = arrays
        return function(q, k, v, replace(spec, theta=theta, bias=bias))

    out, vjp = jax.vjp(of_arrays, q, k, v, spec.theta, spec.bias)
    return out, vjp(g.astype(out.dtype))


def check_values(function: Function, case: Case) -> None:
    """Output and all gradients equal the oracle's, are finite and keep their dtypes."""
    x = inputs(case)
    out, (d_q, d_k, d_v, d_theta, d_bias) = _run(function, x.q, x.k, x.v, x.spec, x.g)
    g = _f64(x.g)
    want_q, want_k, want_v, want_bias = oracle.vjp(x.problem, g)
    close("out", out, oracle.forward(x.problem), case.dtype)
    close("gradient of q", d_q, want_q, case.dtype)
    close("gradient of k", d_k, want_k, case.dtype)
    close("gradient of v", d_v, want_v, case.dtype)
    if x.spec.bias is not None:
        close("gradient of the bias", d_bias, want_bias, case.dtype, "float32")
    assert np.isfinite(d_theta), "the gradient of theta is not finite"
    empty = ~x.problem.keep.any(-1)
    assert not np.any(np.asarray(out).swapaxes(1, 2)[empty]), "a row that may attend to nothing is not exactly 0"


def check_theta_gradient(function: Function, case: Case) -> None:
    """d/dθ against a central difference of the oracle over float64 tables."""
    x = inputs(case)
    d_theta = _run(function, x.q, x.k, x.v, x.spec, x.g)[1][3]
    step = 1e-4

    def loss(theta: float) -> float:
        sin, cos = oracle.tables(case.length, case.widths[0], theta)
        return float(np.sum(oracle.forward(replace(x.problem, sin=sin, cos=cos)) * _f64(x.g)))

    want = (loss(THETA + step) - loss(THETA - step)) / (2 * step)
    # The terms of the sum are larger than the sum: a looser bound than for a single array, and still no chance hit.
    assert abs(float(d_theta) - want) < 1e-4 * abs(want) + 1e-6, (float(d_theta), want)


def check_causal(function: Function, case: Case) -> None:
    """By default the output at t depends on every s ≤ t whose weight is not 0, and on no s > t, bit for bit."""
    x = inputs(case)
    t = case.length // 2

    def at(k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(function(x.q, k, v, x.spec)[:, :, t])

    weights = oracle.weights(x.problem)[:, :, t, : t + 1]
    for gradient in jax.jit(jax.grad(at, argnums=(0, 1)))(x.k, x.v):
        assert not np.any(np.asarray(gradient)[:, :, t + 1 :]), "the output depends on a later token"
        seen = np.any(np.asarray(gradient)[:, :, : t + 1] != 0, axis=-1)
        assert np.all(seen | (weights == 0)), "the output ignores an earlier token"


def decoding(case: Case, capacity: int) -> tuple[AttentionSpec, Cache]:
    """A case as decoding takes it: its spec, and a cache that has seen nothing."""
    spec = decoding_spec(
        num_heads=case.heads,
        activation_function=case.activation,
        qk_pre_activation_function=case.pre_activation,
        theta=THETA,
        context_length=case.context_length,
        window=case.call().window,
    )
    cache = init_cache(
        spec,
        batch=BATCH,
        num_kv_heads=case.kv_heads,
        head_dim_qk=case.widths[0],
        head_dim_v=case.widths[1],
        capacity=capacity,
        dtype=case.dtype,
    )
    return spec, cache


def check_decoding(case: Case, *, prompt: int = 0) -> None:
    """A prompt of so many tokens and then token by token: the output at every position is the parallel form's."""
    x = inputs(case)
    spec, cache = decoding(case, case.length)
    outs = []
    if prompt:
        # What follows the prompt's length is its padding, here the true continuation, and changes nothing.
        out, cache = jax.jit(prefill)(x.q, x.k, x.v, cache, spec, length=prompt)
        outs.append(out[:, :, :prompt])
    step = jax.jit(decode_step)
    for t in range(prompt, case.length):
        out, cache = step(*(array[:, :, t : t + 1] for array in (x.q, x.k, x.v)), cache, spec)
        outs.append(out)
    close("decoded out", jnp.concatenate(outs, axis=2), oracle.forward(x.problem), case.dtype)
    assert int(cache.length) == case.length, "the cache has not counted its tokens"


def close(what: str, actual: jax.Array, expected: oracle.F64, dtype: str, kept: str | None = None) -> None:
    """actual is finite, of dtype ``kept`` (``dtype`` by default), and within the tolerance of ``dtype``."""
    assert actual.dtype == (kept or dtype), f"{what} is {actual.dtype}, not {kept or dtype}"
    assert actual.shape == expected.shape, f"{what} has shape {actual.shape}, not {expected.shape}"
    got = _f64(actual)
    assert np.all(np.isfinite(got)), f"{what} is not finite"
    error = np.max(np.abs(got - expected)) / max(np.max(np.abs(expected)), 1e-6)
    assert error <= TOLERANCE[dtype], f"{what} is off by {error:.2e} of its largest value"
