"""Attention in float64 NumPy, written from the formula and sharing no code with the package.

The float32 RoPE tables are an argument: their angles are off by up to 6e-8 of themselves, which is the package's stated
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


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call: (B, NH, S, DHQK), (B, NKV, S, DHQK), (B, NKV, S, DHV) and what it means."""

    q: F64
    k: F64
    v: F64
    activation: str
    """softmax, sigmoid or none; another name needs ``pointwise``."""
    swish: bool
    sin: F64
    cos: F64
    keep: Bool
    """(B, S, S)."""
    bias: F64 | None
    """(NH,), added to the logits."""
    pointwise: tuple[Function, Function] | None = None
    """Of another activation: logits → weights, logits → slopes."""
    extra_logit: float | None = None
    """In softmax's sum, without a value."""


def tables(length: int, width: int, theta: float) -> tuple[F64, F64]:
    """sin and cos of t · theta^(−2i/width), in float64."""
    angles = np.array([[t * theta ** (-2 * i / width) for i in range(width // 2)] for t in range(length)])
    return np.sin(angles), np.cos(angles)


def keep_of(
    batch: int, length: int, *, mask: Bool | None = None, window: int | None = None, segments: F64 | None = None
) -> Bool:
    """(the given mask, or causal) ∧ (t − window < s ≤ t) ∧ equal segments, element by element."""
    keep = np.zeros((batch, length, length), bool)
    for b in range(batch):
        for t in range(length):
            for s in range(length):
                allowed = s <= t if mask is None else bool(mask[t, s])
                if window is not None:
                    allowed = allowed and t - window < s <= t
                if segments is not None:
                    allowed = allowed and segments[b, t] == segments[b, s]
                keep[b, t, s] = allowed
    return keep


def _sigmoid(x: F64) -> F64:
    return 0.5 * (1 + np.tanh(x / 2))


def _turn(x: F64, sin: F64, cos: F64) -> F64:
    """A pair (2i, 2i + 1) is a complex number, and rotation a product."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = turned.real, turned.imag
    return out


def _weights(p: Problem) -> tuple[F64, F64, F64, F64, F64]:
    """(rotated q, rotated k of every query head, v of every query head, logits, weights)."""
    group = p.q.shape[1] // p.k.shape[1]
    source = [h // group for h in range(p.q.shape[1])]
    q, k = (_turn(x * _sigmoid(x) if p.swish else x, p.sin, p.cos) for x in (p.q, p.k[:, source]))
    logits = np.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[-1])
    if p.bias is not None:
        logits = logits + p.bias[:, None, None]
    keep = p.keep[:, None]
    if p.pointwise is not None:
        weights = np.where(keep, p.pointwise[0](logits), 0)
    elif p.activation == "sigmoid":
        weights = np.where(keep, _sigmoid(logits), 0)
    elif p.activation == "none":
        weights = np.where(keep, logits, 0)
    else:
        extra = -np.inf if p.extra_logit is None else p.extra_logit
        top = np.maximum(np.max(np.where(keep, logits, -np.inf), axis=-1, keepdims=True), extra)
        top = np.where(np.isfinite(top), top, 0)
        weights = np.where(keep, np.exp(logits - top), 0)
        total = weights.sum(-1, keepdims=True) + np.exp(extra - top)
        weights = weights / np.where(total == 0, 1, total)
    return q, k, p.v[:, source], logits, weights


def weights(p: Problem) -> F64:
    """(B, NH, S, S)."""
    return _weights(p)[-1]


def forward(p: Problem) -> F64:
    """(B, NH, S, DHV)."""
    _, _, v, _, weights = _weights(p)
    return np.einsum("bhts,bhsd->bhtd", weights, v)


def vjp(p: Problem, g: F64) -> tuple[F64, F64, F64, F64]:
    """The gradients of Σ out · g with respect to q, k, v and the bias."""
    q, k, v, logits, weights = _weights(p)
    d_weights = np.einsum("bhtd,bhsd->bhts", g, v)
    if p.pointwise is not None:
        d_logits = np.where(p.keep[:, None], d_weights * p.pointwise[1](logits), 0)
    elif p.activation == "sigmoid":
        d_logits = d_weights * weights * (1 - weights)
    elif p.activation == "none":
        d_logits = np.where(p.keep[:, None], d_weights, 0)
    else:
        d_logits = weights * (d_weights - np.sum(weights * d_weights, axis=-1, keepdims=True))
    scale = 1 / math.sqrt(q.shape[-1])
    d_q = _unprepare(p, p.q, np.einsum("bhts,bhsd->bhtd", d_logits, k) * scale)
    d_k = _unprepare(p, p.k, _ungroup(np.einsum("bhts,bhtd->bhsd", d_logits, q) * scale, p.k.shape[1]))
    d_v = _ungroup(np.einsum("bhts,bhtd->bhsd", weights, g), p.v.shape[1])
    return d_q, d_k, d_v, d_logits.sum((0, 2, 3))


def _ungroup(x: F64, heads: int) -> F64:
    return x.reshape(x.shape[0], heads, -1, *x.shape[2:]).sum(2)


def _unprepare(p: Problem, x: F64, d: F64) -> F64:
    d = _turn(d, -p.sin, p.cos)
    s = _sigmoid(x)
    return d * (s + x * s * (1 - s)) if p.swish else d
