"""Attention in float64 NumPy, written from the formula and sharing no code with the package.

The float32 RoPE tables are an argument. The relative error of their angles is up to 6e-8, which is the package's stated
accuracy and not an error of an implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Function = Callable[[F64], F64]

LEAST = -100.0
"""Lower bound to which a log decay is clipped."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call: its arrays and its meaning."""

    q: F64
    k: F64
    v: F64
    """q (B, NH, S, DHQK), k (B, NKV, S, DHQK), v (B, NKV, S, DHV)."""
    activation: str
    """softmax, sigmoid or none; another name needs ``pointwise``."""
    swish: bool
    sin: F64
    cos: F64
    """(S, pairs), as is sin. Only the first pairs of channels turn."""
    keep: Bool
    """(B, S, S)."""
    bias: F64 | None
    """(NH,), added to the logits."""
    pointwise: tuple[Function, Function] | None = None
    """The functions of another activation: logits → weights, logits → slopes."""
    sink: F64 | None = None
    """(NH,), a logit in softmax's sum without a value."""
    log_decay: F64 | None = None
    """(B, NKV, S)."""
    log_input_gate: F64 | None = None
    """(B, NKV, S)."""
    logit_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """The gradients of Σ out · g, shaped like the arrays they belong to; None if the problem has no such array."""

    q: F64
    k: F64
    v: F64
    bias: F64 | None
    sink: F64 | None
    log_decay: F64 | None
    log_input_gate: F64 | None
    logit_scale: F64
    """(B, NH, S, S). The gradient is the sum; its rounding error scales with the terms."""


def tables(length: int, width: int, theta: float) -> tuple[F64, F64]:
    """Return sin and cos of t · theta^(−2i/width) in float64; ``width`` is the number of channels that turn."""
    angles = np.array([[t * theta ** (-2 * i / width) for i in range(width // 2)] for t in range(length)])
    return np.sin(angles), np.cos(angles)


def keep_of(
    batch: int,
    length: int,
    *,
    mask: Bool | None = None,
    window: int | None = None,
    segments: F64 | None = None,
    causal: bool = False,
) -> Bool:
    """Return (given mask, or causal) ∧ (t − window < s ≤ t) ∧ equal segments.

    ``causal`` excludes keys after the query, whatever the mask.
    """
    t, s = np.arange(length)[:, None], np.arange(length)
    keep = s <= t if mask is None else mask
    if window is not None:
        keep = keep & (t - window < s) & (s <= t)
    if causal:
        keep = keep & (s <= t)
    of_rows = np.broadcast_to(keep, (batch, length, length))
    return of_rows if segments is None else of_rows & (segments[:, :, None] == segments[:, None, :])


def _sigmoid(x: F64) -> F64:
    return 0.5 * (1 + np.tanh(x / 2))


def _turn(x: F64, sin: F64, cos: F64) -> F64:
    """Rotate each pair (2i, 2i + 1) as a complex number, by a product."""
    turning = 2 * sin.shape[-1]
    turned = (x[..., 0:turning:2] + 1j * x[..., 1:turning:2]) * (cos + 1j * sin)
    out = x.copy()
    out[..., 0:turning:2], out[..., 1:turning:2] = turned.real, turned.imag
    return out


def _terms(p: Problem, source: list[int]) -> F64 | float:
    """Return E_ts = Σ_{s<r≤t} ℓ_r + log i_s for every query head, with 0 in place of the sum for s ≥ t."""
    terms: F64 | float = 0.0
    if p.log_decay is not None:
        decay = np.maximum(p.log_decay, LEAST)[:, source]
        terms = np.zeros((*decay.shape, decay.shape[-1]))
        for t in range(1, decay.shape[-1]):
            terms[..., t, :t] = terms[..., t - 1, :t] + decay[..., t, None]
    return terms if p.log_input_gate is None else terms + p.log_input_gate[:, source, None, :]


@dataclass(frozen=True)
class _Attended:
    """Intermediate results, with keys and values repeated for each query head."""

    q: F64
    k: F64
    """Rotated."""
    v: F64
    scores: F64
    """g · q kᵀ / √DHQK."""
    terms: F64 | float
    logits: F64
    weights: F64
    sink: F64 | None
    """(B, NH, S), the weight that the sink takes."""


def _attended(p: Problem) -> _Attended:
    group = p.q.shape[1] // p.k.shape[1]
    source = [h // group for h in range(p.q.shape[1])]
    q, k = (_turn(x * _sigmoid(x) if p.swish else x, p.sin, p.cos) for x in (p.q, p.k[:, source]))
    scores = p.logit_scale * np.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[-1])
    terms = _terms(p, source)
    bias = 0.0 if p.bias is None else p.bias[:, None, None]
    logits = scores * np.exp(terms) if p.activation == "none" else scores + bias + terms
    keep, taken = p.keep[:, None], None
    if p.pointwise is not None:
        weights = np.where(keep, p.pointwise[0](logits), 0)
    elif p.activation == "sigmoid":
        weights = np.where(keep, _sigmoid(logits), 0)
    elif p.activation == "none":
        weights = np.where(keep, logits, 0)
    else:
        sink = np.full(p.q.shape[1], -np.inf) if p.sink is None else p.sink
        top = np.max(np.where(keep, logits, -np.inf), axis=-1, keepdims=True)
        top = np.maximum(top, sink[:, None, None])
        top = np.where(np.isfinite(top), top, 0)
        weights = np.where(keep, np.exp(np.where(keep, logits - top, -np.inf)), 0)
        of_sink = np.exp(sink[:, None, None] - top)
        total = weights.sum(-1, keepdims=True) + of_sink
        total = np.where(total == 0, 1, total)
        weights, taken = weights / total, (of_sink / total)[..., 0]
    return _Attended(q, k, p.v[:, source], scores, terms, logits, weights, taken)


def weights(p: Problem) -> F64:
    """Return the weights (B, NH, S, S)."""
    return _attended(p).weights


def forward(p: Problem) -> F64:
    """Return the output (B, NH, S, DHV)."""
    x = _attended(p)
    return np.einsum("bhts,bhsd->bhtd", x.weights, x.v)


def vjp(p: Problem, g: F64) -> Gradients:
    """Return the gradients of Σ out · g."""
    x = _attended(p)
    d_weights = np.einsum("bhtd,bhsd->bhts", g, x.v)
    d_sink = None
    if p.pointwise is not None:
        d_logits = np.where(p.keep[:, None], d_weights * p.pointwise[1](x.logits), 0)
    elif p.activation == "sigmoid":
        d_logits = d_weights * x.weights * (1 - x.weights)
    elif p.activation == "none":
        d_logits = np.where(p.keep[:, None], d_weights, 0)
    else:
        delta = np.sum(x.weights * d_weights, axis=-1)
        d_logits = x.weights * (d_weights - delta[..., None])
        d_sink = None if p.sink is None or x.sink is None else -np.sum(x.sink * delta, axis=(0, 2))
    # Under none a weight is A e^E; the others are functions of A + b + E.
    d_terms = d_logits * x.logits if p.activation == "none" else d_logits
    d_scores = d_logits * np.exp(x.terms) if p.activation == "none" else d_logits
    scale = p.logit_scale / math.sqrt(x.q.shape[-1])
    kv_heads = p.k.shape[1]
    return Gradients(
        q=_unprepare(p, p.q, np.einsum("bhts,bhsd->bhtd", d_scores, x.k) * scale),
        k=_unprepare(p, p.k, _ungroup(np.einsum("bhts,bhtd->bhsd", d_scores, x.q) * scale, kv_heads)),
        v=_ungroup(np.einsum("bhts,bhtd->bhsd", x.weights, g), kv_heads),
        bias=None if p.bias is None else d_logits.sum((0, 2, 3)),
        sink=d_sink,
        log_decay=None if p.log_decay is None else _of_decay(p.log_decay, _ungroup(d_terms, kv_heads)),
        log_input_gate=None if p.log_input_gate is None else _ungroup(d_terms, kv_heads).sum(2),
        logit_scale=d_scores * x.scores / p.logit_scale,
    )


def _of_decay(log_decay: F64, d_terms: F64) -> F64:
    """Sum the gradient of E_ts over s < r ≤ t, for each r; the result is 0 where ℓ_r is clipped to LEAST."""
    d = [d_terms[:, :, r:, :r].sum((2, 3)) for r in range(log_decay.shape[-1])]
    return np.where(log_decay < LEAST, 0, np.stack(d, axis=-1))


def _ungroup(x: F64, heads: int) -> F64:
    return x.reshape(x.shape[0], heads, -1, *x.shape[2:]).sum(2)


def _unprepare(p: Problem, x: F64, d: F64) -> F64:
    d = _turn(d, -p.sin, p.cos)
    s = _sigmoid(x)
    return d * (s + x * s * (1 - s)) if p.swish else d
