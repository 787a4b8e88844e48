"""How far attention without row statistics is from float64, compared with the error due to its dtype alone.

The floor is the same mathematics in the inputs' dtype with float32 accumulation: weights and dS are rounded to the
dtype before a product, and results after it. An implementation's ratio is its relative error over the floor's; 1.2 is
allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xattn.backend.proven import ALLOWED, RESULTS
from xattn.bench.kernel_bench import PASSES, Function, program


@dataclass(frozen=True)
class Accuracy:
    """Relative errors ‖x − x₆₄‖ / ‖x₆₄‖ of out, dq, dk and dv."""

    activation: str
    dtype: str
    width: int
    length: int
    errors: dict[str, float]
    floors: dict[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        return {name: self.errors[name] / self.floors[name] for name in RESULTS}

    @property
    def holds(self) -> bool:
        """Return whether all ratios are allowed; NaN is not."""
        return all(ratio <= ALLOWED for ratio in self.ratios.values())


def measure(function: Function, activation: str, dtype: str, width: int, length: int, *, causal: bool) -> Accuracy:
    """Measure one head: standard normal arrays, and sigmoid's bias −log S, for a model's smallest initial weights."""
    rng = np.random.default_rng(length)
    q, k, v, g = (jnp.asarray(rng.standard_normal((1, 1, length, width)), dtype) for _ in range(4))
    bias = jnp.full((1,), -math.log(length), jnp.float32)

    run = jax.jit(program(function, PASSES[1]))
    plain = partial(_attention, bias=-math.log(length), sigmoid=activation == "sigmoid", causal=causal)
    flat = [x[0, 0] for x in (q, k, v, g)]
    out, (d_q, d_k, d_v, _) = run(q, k, v, bias, g)
    got = [np.asarray(x[0, 0], np.float64) for x in (out, d_q, d_k, d_v)]
    floor = [np.asarray(x, np.float64) for x in jax.jit(partial(plain, dtype=dtype))(*flat)]
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in flat]
        exact = [np.asarray(x) for x in jax.jit(partial(plain, dtype="float64"))(*wide)]

    def errors(results: list[np.ndarray]) -> dict[str, float]:
        return {
            name: float(np.linalg.norm(x - y) / np.linalg.norm(y))
            for name, x, y in zip(RESULTS, results, exact, strict=True)
        }

    return Accuracy(activation, dtype, width, length, errors(got), errors(floor))


def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, *, bias: float, sigmoid: bool, causal: bool, dtype: str
) -> tuple[jax.Array, ...]:
    """Return out, dq, dk, dv (S, D), by blocks of rows: the formula in float64, the floor in any other dtype."""
    length, width = q.shape
    rows = math.gcd(length, 512)
    scale = 1 / math.sqrt(width)
    wide: Any = jnp.float64 if dtype == "float64" else jnp.float32
    product = partial(jnp.einsum, preferred_element_type=wide, precision="highest")

    def of_rows(sums: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        q_, g_ = (jax.lax.dynamic_slice_in_dim(x, start, rows) for x in (q, g))
        logits = product("td,sd->ts", q_, k) * scale
        weights = jax.nn.sigmoid(logits + bias) if sigmoid else logits
        slope = weights * (1 - weights) if sigmoid else jnp.ones_like(weights)
        keep = (start + jnp.arange(rows)[:, None] >= jnp.arange(length)[None]) | (not causal)
        d_logits = jnp.where(keep, product("td,sd->ts", g_, v) * slope, 0).astype(dtype)
        weights = jnp.where(keep, weights, 0).astype(dtype)
        d_k, d_v = sums
        d_k = d_k + product("ts,td->sd", d_logits, q_) * scale
        d_v = d_v + product("ts,td->sd", weights, g_)
        out, d_q = product("ts,sd->td", weights, v), product("ts,sd->td", d_logits, k) * scale
        return (d_k, d_v), (out.astype(dtype), d_q.astype(dtype))

    zeros = jnp.zeros(q.shape, wide)
    (d_k, d_v), (out, d_q) = jax.lax.scan(of_rows, (zeros, zeros), jnp.arange(0, length, rows))
    return out.reshape(q.shape), d_q.reshape(q.shape), d_k.astype(dtype), d_v.astype(dtype)
