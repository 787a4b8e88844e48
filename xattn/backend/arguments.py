"""From what a person passes to arrays and an :class:`AttentionSpec` in one spelling, or to an error that names it."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, get_args

import jax
import jax.numpy as jnp

from xattn.backend.activations import Activation, activation
from xattn.backend.config import AttentionConfig, QKPreActivation
from xattn.backend.rope import Theta, checked_theta
from xattn.backend.spec import AttentionSpec

DTYPES = ("float32", "bfloat16", "float16")


def checked_pre_activation(name: str) -> QKPreActivation:
    """One of none, swish; silu is swish; anything else is a ValueError that names them."""
    for choice in get_args(QKPreActivation):
        if choice == ("swish" if name == "silu" else name):
            return choice
    choices = ", ".join((*get_args(QKPreActivation), "silu"))
    raise ValueError(f"unknown qk_pre_activation_function {name!r}; choices: {choices}")


def checked_arrays(
    queries: jax.Array, keys: jax.Array, values: jax.Array, qkv_dtype: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q (B, NH, S, DHQK), k (B, NKV, S, DHQK), v (B, NKV, S, DHV) in one dtype; three axes (B, S, ·) are one head.

    Raises:
        ValueError: axes that don't fit, an empty sequence, an odd DHQK, dtypes that differ with no qkv_dtype given, or
            a dtype that is not one of float32, bfloat16, float16.
    """
    given = f"queries {queries.shape}, keys {keys.shape}, values {values.shape}"
    if not queries.ndim == keys.ndim == values.ndim or queries.ndim not in (3, 4):
        raise ValueError(f"queries, keys and values must all have the axes (B, NH, S, D) or all (B, S, D), got {given}")
    if qkv_dtype is None and not queries.dtype == keys.dtype == values.dtype:
        dtypes = f"{queries.dtype}, {keys.dtype} and {values.dtype}"
        raise ValueError(f"queries, keys and values have the dtypes {dtypes}; make them one, or give qkv_dtype")
    dtype = jnp.dtype(queries.dtype if qkv_dtype is None else qkv_dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"attention is computed in {', '.join(DTYPES)}, not in {dtype.name}")
    q, k, v = (x.astype(dtype) if x.ndim == 4 else x.astype(dtype)[:, None] for x in (queries, keys, values))
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[2] == k.shape[2] == v.shape[2]):
        raise ValueError(f"queries, keys and values must agree in batch and sequence, got {given}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"queries and keys must have the same head width DHQK, got {given}")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"keys and values must have the same heads, a divisor of the queries', got {given}")
    if q.shape[2] == 0:
        raise ValueError(f"the sequence must not be empty, got {given}")
    if q.shape[3] < 2 or q.shape[3] % 2:
        raise ValueError(f"the head width DHQK must be even and at least 2 for RoPE, got {given}")
    return q, k, v


def checked_spec(
    *,
    num_heads: int,
    length: int,
    batch: int = 1,
    activation_function: str = "softmax",
    qk_pre_activation_function: str = "none",
    theta: Theta = 10000.0,
    attention_mask: jax.Array | None = None,
    context_length: int | None = None,
    sigmoid_bias: float | jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
) -> AttentionSpec:
    """The meaning of a call over ``length`` tokens; the arguments are those of :func:`xattn.backend.api.attention`.

    Raises:
        ValueError: an unknown choice, a number out of its range, or an array of the wrong shape or dtype.
    """
    chosen = activation(activation_function)
    for name, value in (("context_length", context_length), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None, got {value}")
    if attention_mask is not None:
        if attention_mask.shape != (length, length) or attention_mask.dtype != jnp.bool_:
            raise ValueError(
                f"attention_mask must be bool of shape (S, S) = {(length, length)}, True = attend; "
                f"got {attention_mask.dtype} of shape {attention_mask.shape}"
            )
        attention_mask = jnp.asarray(attention_mask)
    if segment_ids is not None:
        if segment_ids.shape != (batch, length) or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids must be integers of shape (B, S) = {(batch, length)}; "
                f"got {segment_ids.dtype} of shape {segment_ids.shape}"
            )
        segment_ids = jnp.asarray(segment_ids)
    n = length if context_length is None else context_length
    return AttentionSpec(
        theta=checked_theta(theta),
        bias=_checked_bias(sigmoid_bias, num_heads, n, chosen),
        mask=attention_mask,
        segment_ids=segment_ids,
        activation=chosen,
        qk_pre_activation=checked_pre_activation(qk_pre_activation_function),
        window=window,
        n=n,
    )


def config_spec(
    kind: AttentionConfig,
    *,
    num_heads: int,
    theta: Theta,
    sigmoid_bias: float | jax.Array | None,
    length: int = 1,
    batch: int = 1,
    segment_ids: jax.Array | None = None,
) -> AttentionSpec:
    """What a layer means by attention; theta and the bias are numbers of the train state, not the config's.

    sigmoid_bias: not read under an activation that takes none. length, batch: of the segment_ids.
    """
    return checked_spec(
        num_heads=num_heads,
        length=length,
        batch=batch,
        activation_function=kind.activation,
        qk_pre_activation_function=kind.qk_pre_activation,
        theta=theta,
        context_length=kind.context_length,
        sigmoid_bias=sigmoid_bias if activation(kind.activation).takes_bias else None,
        segment_ids=segment_ids,
        window=kind.window,
    )


def _checked_bias(
    sigmoid_bias: float | jax.Array | None, num_heads: int, n: int, activation: Activation
) -> jax.Array | None:
    if not activation.takes_bias:
        if sigmoid_bias is not None:
            raise ValueError(
                f"sigmoid_bias has no meaning under activation_function {activation.name!r}; leave it None"
            )
        return None
    if isinstance(sigmoid_bias, Real) and not math.isfinite(sigmoid_bias):
        raise ValueError(f"sigmoid_bias must be finite, got {sigmoid_bias}")
    bias = jnp.asarray(-math.log(n) if sigmoid_bias is None else sigmoid_bias, jnp.float32)
    if bias.shape not in ((), (num_heads,)):
        raise ValueError(f"sigmoid_bias must be a scalar or of shape (NH,) = {(num_heads,)}, got shape {bias.shape}")
    return jnp.broadcast_to(bias, (num_heads,))
