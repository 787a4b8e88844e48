"""Attention in a layer: projections, the call of the backend, and the terms before and after it.

x is the layer's normed input. Steps that name a config key are off unless the config enables them:

1. Project x to q, k and v.
2. ``model.conv``: apply a causal depthwise convolution to each of them (:mod:`xattn.model.convolution`).
3. ``model.value_residual=first``: v ← λ v + μ v¹, where v¹ is the first layer's values after its convolution. The first
   layer also has λ and μ, unused, so that the parameters of all layers stack.
4. ``model.qk_norm``.
5. Call the backend, with the log decay ℓ and log input gate of each token and key/value head, and with the sink.
6. On each head's output y, in float32 and in this order: ``model.exclusive``, ``output_norm``, ``output_gate``.
7. Apply the output projection.

The terms' parameters start where a layer behaves nearly as it would without them. Forget biases, of a learned or input
decay, spread the half-lives τ of the heads geometrically from 2 to max(context_length, 2) tokens, σ(b)^τ = ½. A single
head has their geometric mean. All gate kernels are 0, so an output gate starts at ½ everywhere. The bias of an input
gate is 4: σ(4) = 0.982. A convolution starts as the identity, λ and μ at ½, a learned sink at 0, and the scale of an
output norm at 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float32, Int

from xattn.backend import activations, dispatch
from xattn.backend.cache import Cache, Entry, StateCache
from xattn.backend.decode import append, attend, prefill
from xattn.backend.spec import Keys, Output, Queries, Values
from xattn.model.config import BackendConfig, ModelConfig, registered_norms
from xattn.model.convolution import Recent, convolve, identity, newest, preceded, same_run
from xattn.model.hyperparameters import LayerHyperparameters, layer_spec
from xattn.model.modules import Norm, dense, gate

F32 = jnp.float32
INPUT_GATE_BIAS = 4.0
# Bound on the relative rounding error of (q · k) v in float32: products that cancel a thousandfold are rare.
ROUNDING = 1e-4


class FirstValues(NamedTuple):
    """The values of a model's first layer, which later layers mix into theirs."""

    values: Values
    """Arbitrary before the first layer has run."""
    is_there: Bool[Array, ""]
    """False before the first layer has run."""


class Inputs(NamedTuple):
    """The arguments of the backend in a layer, recorded for attention statistics."""

    q: Queries
    k: Keys
    v: Values
    sigmoid_bias: Any
    """A scalar or (NH,); None if the activation takes no bias."""
    log_decay: Float32[Array, "B NKV S"] | None
    log_input_gate: Float32[Array, "B NKV S"] | None
    sink: Float32[Array, " NH"] | None


OF_TOKENS = ("q", "k", "v", "log_decay", "log_input_gate")
"""The inputs with an axis B. The others belong to the layer as a whole."""


class LayerCache(NamedTuple):
    """The decoding cache of a layer, or what one token adds to it."""

    attention: Cache | Entry
    recent: Recent | None
    """Present with a convolution. An added token replaces all of it."""


def appended(cache: LayerCache, added: LayerCache) -> LayerCache:
    """Return the cache with ``added`` of one token appended. For a prompt, ``added`` is already the complete cache."""
    if not isinstance(added.attention, Entry):
        return added
    assert not isinstance(cache.attention, Entry)
    return added._replace(attention=append(cache.attention, added.attention))


class Attention(nn.Module):
    """Attention, (B, S, D) → (B, S, D). It also returns the first layer's values for the next layer.

    With a cache, it also returns what one token adds to the cache, or the complete cache after a prompt.
    """

    config: ModelConfig
    backend: BackendConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        first: FirstValues | None,
        hyperparameters: LayerHyperparameters,
        segment_ids: Int[Array, "B S"] | None,
        cache: LayerCache | None,
        length: Int[Array, ""] | int | None,
    ) -> tuple[Float[Array, "B S D"], FirstValues | None, LayerCache | None]:
        config, backend = self.config, self.backend
        (q, k, v), recent = self._heads(x, segment_ids, cache and cache.recent, length)
        v, first = self._with_first(v, first)
        if config.qk_norm == "rmsnorm":
            q = Norm("rmsnorm", config.norm_eps, name="query_norm")(q)
            k = Norm("rmsnorm", config.norm_eps, name="key_norm")(k)
        inputs = self._inputs(q, k, v, x, hyperparameters)
        batch, _, tokens, _ = q.shape
        spec = layer_spec(
            backend,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            length=tokens,
            batch=batch,
            segment_ids=segment_ids,
            **(hyperparameters._asdict() | of_terms(inputs)),
        )
        new: Cache | Entry | None = None
        if cache is None:
            self.sow("intermediates", "inputs", inputs)  # no effect unless the collection is mutable
            out = dispatch.compute(q, k, v, spec, backend.implementation)
        else:
            assert not isinstance(cache.attention, Entry)
            if tokens == 1:
                out, new = attend(q, k, v, cache.attention, spec)
            else:
                # Only one implementation keeps a state, whichever one the run was trained with.
                is_state = isinstance(cache.attention, StateCache)
                implementation = dispatch.AUTO if is_state else backend.implementation
                out, new = prefill(q, k, v, cache.attention, spec, length=length, implementation=implementation)
        out = self._after_heads(out, v, x)
        out = out.transpose(0, 2, 1, 3).reshape(batch, tokens, config.embedding_dim)
        out = dense(config, config.embedding_dim, "output", residual=True)(out)
        return out, first, None if new is None else LayerCache(new, recent)

    # ---- before the heads

    def _heads(
        self, x: jax.Array, segment_ids: jax.Array | None, before: Recent | None, seen: jax.Array | int | None
    ) -> tuple[tuple[Queries, Keys, Values], Recent | None]:
        """Return q, k, v, and the convolution inputs that later tokens need. Only the first ``seen`` tokens count."""
        config, width = self.config, self.config.conv
        batch, tokens, _ = x.shape
        rows: dict[str, jax.Array] = {}
        ids = runs = None
        if width is not None and segment_ids is not None:
            ids = preceded(segment_ids, before and before.segment_ids, width)
            runs = same_run(ids, width)

        def heads(name: str, number: int) -> jax.Array:
            flat = dense(config, number * config.head_dim, name)(x)
            if width is not None:
                rows[name] = preceded(flat, before and before.rows[name], width)
                flat = convolve(rows[name], self.param(f"{name}_taps", identity, (width, flat.shape[-1])), runs)
            return flat.reshape(batch, tokens, number, config.head_dim).transpose(0, 2, 1, 3)

        found = heads("query", config.num_heads), heads("key", config.kv_heads), heads("value", config.kv_heads)
        if width is None or before is None:
            return found, None
        of_tokens: Any = (rows, ids)
        return found, Recent(*jax.tree.map(lambda x: newest(x, width, tokens if seen is None else seen), of_tokens))

    def _with_first(self, v: Values, first: FirstValues | None) -> tuple[Values, FirstValues | None]:
        """Return λ v + μ v¹ (in the first layer v), and v¹ for the next layer."""
        if first is None:
            return v, None
        mix = self.param("value_mix", nn.initializers.constant(0.5), (2,)).astype(v.dtype)
        mixed = jnp.where(first.is_there, mix[0] * v + mix[1] * first.values, v)
        return mixed, FirstValues(jnp.where(first.is_there, first.values, v), jnp.array(True))

    def _inputs(self, q: Queries, k: Keys, v: Values, x: jax.Array, hyperparameters: LayerHyperparameters) -> Inputs:
        """Return the backend's arguments. The terms compute theirs from x and their own parameters."""
        config, backend = self.config, self.backend
        bias = hyperparameters.sigmoid_bias if activations.activation(backend.activation).takes_bias else None
        if bias is not None and backend.sigmoid_bias == "learned":
            init = nn.initializers.constant(-math.log(backend.context_length))
            bias = self.param("sigmoid_bias", init, (config.num_heads,))
        gated = None if backend.input_gate == "none" else self._log_gate(x, "input_gate", INPUT_GATE_BIAS)
        sink = None if backend.sink == "none" else jnp.zeros(config.num_heads)
        if backend.sink == "learned":
            sink = self.param("sink", nn.initializers.zeros, (config.num_heads,))
        return Inputs(q, k, v, bias, self._log_decay(x), gated, sink)

    def _log_decay(self, x: jax.Array) -> Float32[Array, "B NKV S"] | None:
        kv_heads, decay = self.config.kv_heads, self.backend.decay
        if decay == "none":
            return None
        biases = forget_biases(kv_heads, self.backend.context_length)
        if decay == "input":
            return self._log_gate(x, "decay", biases)
        if decay == "learned":
            of_heads = jax.nn.log_sigmoid(self.param("decay_bias", nn.initializers.constant(biases), (kv_heads,)))
        else:
            of_heads = jnp.asarray({"alibi": alibi, "retnet": retnet}[decay](kv_heads), F32)
        return jnp.broadcast_to(of_heads[None, :, None], (x.shape[0], kv_heads, x.shape[1]))

    def _log_gate(self, x: jax.Array, name: str, bias: Any) -> Float32[Array, "B NKV S"]:
        """Return log σ(W x + b)."""
        return jax.nn.log_sigmoid(gate(self.config, self.config.kv_heads, name, bias=bias)(x)).transpose(0, 2, 1)

    # ---- after the heads

    def _after_heads(self, out: Output, v: Values, x: jax.Array) -> Output:
        """Apply the terms on each head's output in float32."""
        config = self.config
        if not config.exclusive and config.output_norm == config.output_gate == "none":
            return out
        y = out.astype(F32)
        if config.exclusive:
            y = without_own_value(y, v)
        if config.output_norm == "rmsnorm":
            y = Norm("rmsnorm", config.norm_eps, name="output_norm")(y)
        elif config.output_norm != "none":
            y = registered_norms[config.output_norm](y)
        if config.output_gate != "none":
            y = y * self._output_gate(x)
        return y.astype(out.dtype)

    def _output_gate(self, x: jax.Array) -> Float32[Array, "B NH S #DHV"]:
        """Return σ(W x), one number per head or per channel of a head."""
        config = self.config
        width = config.head_dim if config.output_gate == "channel" else 1
        open_ = jax.nn.sigmoid(gate(config, config.num_heads * width, "output_gate")(x).astype(F32))
        return open_.reshape(*x.shape[:2], config.num_heads, width).transpose(0, 2, 1, 3)


def of_terms(inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of :func:`xattn.model.hyperparameters.layer_spec` that a layer computes itself, by name."""
    return {name: value for name, value in inputs._asdict().items() if name not in ("q", "k", "v")}


def without_own_value(y: Float32[Array, "B NH S DHV"], v: Values) -> Float32[Array, "B NH S DHV"]:
    """Return y − (y · v̂_t) v̂_t, where v̂_t is the token's own value as a unit vector, or 0 (arXiv 2603.09078).

    The result is set to 0 if it may be rounding alone: at most 1e-4 plus one eps of v's dtype, relative to y. This
    happens for a token that attends only to itself, such as the first. A later norm would amplify that rounding.
    """
    own = jnp.repeat(v.astype(F32), y.shape[1] // v.shape[1], axis=1)
    squared = jnp.sum(own * own, axis=-1, keepdims=True)
    left = y - jnp.sum(y * own, axis=-1, keepdims=True) / jnp.where(squared > 0, squared, 1) * own
    rounding = np.float32(ROUNDING) + np.float32(jnp.finfo(v.dtype).eps)  # whatever type eps has
    is_rounding = jnp.sum(left * left, axis=-1, keepdims=True) <= rounding**2 * jnp.sum(y * y, axis=-1, keepdims=True)
    return jnp.where(is_rounding, 0, left)


def alibi(heads: int) -> np.ndarray:
    """Return ℓ = −m_h with the slopes of arXiv 2108.12409: m_h = 2^(−8(h + 1)/heads) for a power of two.

    Other numbers of heads take the slopes of the power of two below, then every other slope of the one above.
    """
    below = 1 << (heads.bit_length() - 1)

    def slopes(power: int) -> np.ndarray:
        return 2.0 ** (-8 * np.arange(1, power + 1) / power)

    return -np.concatenate([slopes(below), slopes(2 * below)[::2][: heads - below]])


def retnet(heads: int) -> np.ndarray:
    """Return ℓ = log(1 − 2^(−5 − h)) (arXiv 2307.08621)."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(heads))))


def forget_biases(heads: int, context_length: int) -> np.ndarray:
    """Return b with σ(b)^τ = ½ for half-lives τ from 2 to max(context_length, 2) tokens; see the module docstring."""
    places = np.linspace(0, 1, heads) if heads > 1 else np.array([0.5])
    half_lives = 2 * (max(context_length, 2) / 2) ** places
    return -np.log(np.expm1(math.log(2) / half_lives))
