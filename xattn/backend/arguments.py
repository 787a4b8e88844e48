"""Checks that turn the arguments of a call into arrays and an :class:`AttentionSpec`, or report which one is wrong."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Float32, Int

from xattn.backend.activations import Activation, QKPreActivation, activation
from xattn.backend.decay import LEAST
from xattn.backend.rope import Theta, checked_scalar
from xattn.backend.spec import AttentionSpec

DTYPES = ("float32", "bfloat16", "float16")
Bias = float | Float[Array, ""] | Float[Array, " NH"] | None
Sink = Bias


def checked_pre_activation(name: str) -> QKPreActivation:
    """Return none or swish; silu is an alias for swish. Raise ValueError, listing the choices, for anything else."""
    for choice in get_args(QKPreActivation):
        if choice == ("swish" if name == "silu" else name):
            return choice
    choices = ", ".join((*get_args(QKPreActivation), "silu"))
    raise ValueError(f"unknown qk_pre_activation_function {name!r}; choices: {choices}")


def checked_arrays(
    queries: Float[Array, "B *NH S DHQK"],
    keys: Float[Array, "B *NKV S DHQK"],
    values: Float[Array, "B *NKV S DHV"],
    qkv_dtype: Any = None,
) -> tuple[Float[Array, "B NH S DHQK"], Float[Array, "B NKV S DHQK"], Float[Array, "B NKV S DHV"]]:
    """Return queries, keys and values with four axes and in one dtype. Three axes mean a single head.

    Raises:
        ValueError: the axes don't fit, the sequence is empty, DHQK is odd, the dtypes differ and no qkv_dtype is given,
            or the dtype is not float32, bfloat16 or float16.
    """
    given = f"queries {queries.shape}, keys {keys.shape}, values {values.shape}"
    if not queries.ndim == keys.ndim == values.ndim or queries.ndim not in (3, 4):
        raise ValueError(f"queries, keys and values must all have the axes (B, NH, S, D) or all (B, S, D), got {given}")
    if qkv_dtype is None and not queries.dtype == keys.dtype == values.dtype:
        dtypes = f"{queries.dtype}, {keys.dtype} and {values.dtype}"
        raise ValueError(f"queries, keys and values must share one dtype, got {dtypes}; cast them, or give qkv_dtype")
    dtype = jnp.dtype(queries.dtype if qkv_dtype is None else qkv_dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"attention supports the dtypes {', '.join(DTYPES)}, got {dtype.name}")
    q, k, v = (x.astype(dtype) if x.ndim == 4 else x.astype(dtype)[:, None] for x in (queries, keys, values))
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[2] == k.shape[2] == v.shape[2]):
        raise ValueError(f"queries, keys and values must agree in batch and sequence, got {given}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"queries and keys must have the same head width DHQK, got {given}")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"keys and values must have the same number of heads, which divides the queries', got {given}")
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
    attention_mask: Bool[Array, "S S"] | None = None,
    context_length: int | None = None,
    sigmoid_bias: Bias = None,
    segment_ids: Int[Array, "B S"] | None = None,
    window: int | None = None,
    num_kv_heads: int | None = None,
    log_decay: Float[Array, "B *NKV S"] | None = None,
    log_input_gate: Float[Array, "B *NKV S"] | None = None,
    rotary_fraction: float = 1.0,
    logit_scale: float | Float[Array, ""] = 1.0,
    sink: Sink = None,
    segments_are_runs: bool = False,
) -> AttentionSpec:
    """Return the spec of a call over ``length`` tokens; arguments and errors as in :func:`xattn.backend.api.attention`.

    ``num_kv_heads`` is NKV; None means num_heads. ``segments_are_runs`` promises that each segment is contiguous:
    no id comes back after a different one.
    """
    chosen = activation(activation_function)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for name, value in (("context_length", context_length), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None, got {value}")
    mask = f"attention_mask must be bool, True = attend, of shape (S, S) = {(length, length)}"
    segments = f"segment_ids must be integers of shape (B, S) = {(batch, length)}"
    n = length if context_length is None else context_length
    if isinstance(rotary_fraction, Array) or not 0 <= rotary_fraction <= 1:
        raise ValueError(f"rotary_fraction must be a number from 0 to 1, got {rotary_fraction}")
    decay = _checked_log("log_decay", log_decay, (batch, kv_heads, length))
    return AttentionSpec(
        theta=checked_scalar("theta", theta),
        logit_scale=checked_scalar("logit_scale", logit_scale),
        bias=_checked_bias(sigmoid_bias, num_heads, n, chosen),
        sink=_checked_sink(sink, num_heads, chosen),
        log_decay=None if decay is None else jnp.maximum(decay, LEAST),
        log_input_gate=_checked_log("log_input_gate", log_input_gate, (batch, kv_heads, length)),
        rotary_fraction=float(rotary_fraction),
        segments_are_runs=segments_are_runs,
        mask=_checked_array(attention_mask, (length, length), jnp.bool_, mask),
        segment_ids=_checked_array(segment_ids, (batch, length), jnp.integer, segments),
        activation=chosen,
        qk_pre_activation=checked_pre_activation(qk_pre_activation_function),
        window=window,
        n=n,
    )


def _checked_array(array: Array | None, shape: tuple[int, int], kind: Any, rule: str) -> Array | None:
    if array is None:
        return None
    if array.shape != shape or not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{rule}; got {array.dtype} of shape {array.shape}")
    return jnp.asarray(array)


def _checked_log(name: str, array: Array | None, shape: tuple[int, int, int]) -> Float32[Array, "B NKV S"] | None:
    """Return a log_decay or log_input_gate in float32. Check its values unless the array is traced."""
    if array is None:
        return None
    array = jnp.asarray(array)
    allowed = (shape, shape[::2]) if shape[1] == 1 else (shape,)
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.shape not in allowed:
        raise ValueError(
            f"{name} must be floating, of shape (B, NKV, S) = {shape}; got {array.dtype} of shape {array.shape}"
        )
    if not isinstance(array, Tracer):
        with jax.ensure_compile_time_eval():  # concrete arrays occur under jit too
            if name == "log_decay" and not jnp.all(array <= 0):
                most = jnp.max(array)
                raise ValueError(f"log_decay must be at most 0 and not NaN, since a decay cannot amplify; got {most}")
            if name == "log_input_gate" and not jnp.all(jnp.isfinite(array)):
                raise ValueError("log_input_gate must be finite; use a large negative number for a closed gate")
    return array.reshape(shape).astype(jnp.float32)


def _checked_sink(sink: Sink, num_heads: int, activation: Activation) -> Float32[Array, " NH"] | None:
    if sink is None:
        return None
    if not activation.is_normalised:
        raise ValueError(
            f"sink is a term of softmax's sum and has no meaning under activation_function {activation.name!r}; omit it"
        )
    return _one_per_head("sink", sink, num_heads)


def _checked_bias(sigmoid_bias: Bias, num_heads: int, n: int, activation: Activation) -> Float32[Array, " NH"] | None:
    if not activation.takes_bias:
        if sigmoid_bias is not None:
            raise ValueError(f"sigmoid_bias has no meaning under activation_function {activation.name!r}; omit it")
        return None
    return _one_per_head("sigmoid_bias", -math.log(n) if sigmoid_bias is None else sigmoid_bias, num_heads)


def _one_per_head(name: str, value: float | Array, num_heads: int) -> Float32[Array, " NH"]:
    if isinstance(value, Real) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    array = jnp.asarray(value, jnp.float32)
    if array.shape not in ((), (num_heads,)):
        raise ValueError(f"{name} must be a scalar or of shape (NH,) = {(num_heads,)}, got shape {array.shape}")
    return jnp.broadcast_to(array, (num_heads,))
