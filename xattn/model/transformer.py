"""The causal language model: a pre-norm decoder on the attention backend.

Flax Linen, because the seed's backend is a Linen module, and because ``init`` and ``apply`` are pure functions of a
plain tree of parameters: what packs (vmap over runs) and checkpoints want.

Shapes: B batch, NH heads, S sequence, DH head width, D embedding, V vocabulary. Parameters of the layers have one more
axis in front, the layer, whether the layers are scanned or unrolled.

Initialisation: embeddings normal with standard deviation 0.02; matrices truncated normal with variance 1 / fan-in,
those that write to the residual stream divided by √(2 · num_layers); norm scales 1; learned sigmoid biases −log n.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from xattn.backend import attention
from xattn.backend.config import BackendConfig
from xattn.backend.decode import Cache, Entry, StateCache, append, attend, decoding_spec, prefill
from xattn.model.config import ModelConfig
from xattn.model.functions import layer_norm, rms_norm, swiglu
from xattn.model.loss import projected_losses
from xattn.model.projection import projection

Role = Literal["matrix", "embedding", "vector"]


class ModelHyperparameters(NamedTuple):
    """The swept numbers that the model reads at each call: float32 scalars, or Python floats.

    theta: RoPE's wavelength base. sigmoid_bias: added to sigmoid's logits; not read where it is learned.
    """

    theta: jax.Array | float
    sigmoid_bias: jax.Array | float


def parameter_role(path: tuple[Any, ...]) -> Role:
    """What a parameter is, by its name in the tree: its number of axes says nothing once layers are stacked."""
    name = path[-1].key
    if name == "kernel":
        return "matrix"
    return "embedding" if name == "embedding" else "vector"


class LanguageModel(nn.Module):
    """Next-token logits.

    ``__call__(tokens, hyperparameters, *, segment_ids=None, targets=None, train=False)``: int (B, S) → float (B, S, V)
    in the config's dtype; with targets, int (B, S), their losses instead, float32 (B, S), without all logits at once.
    segment_ids: int (B, S); tokens of different segments don't attend to each other. With train=True and dropout > 0
    an rng named ``dropout`` is needed.

    ``__call__(tokens, hyperparameters, cache=cache, length=None)`` decodes: one token (B, 1) goes on from the cache;
    several are a prompt for one that has seen nothing, of which the first ``length`` count (None: all). The result is
    the logits after the last of them, (B, 1, V), and the cache with them. A cache is that of
    :mod:`xattn.backend.decode` with one more axis in front, the layer; :func:`xattn.model.generation.empty_cache` makes
    one.
    """

    config: ModelConfig
    backend: BackendConfig
    vocab_size: int

    def scanned(self) -> LanguageModel:
        """The same model, its layers in a loop, for what runs once: it compiles faster and runs slower."""
        return self.clone(config=self.config.model_copy(update={"layers": "scanned"}))

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        hyperparameters: ModelHyperparameters,
        *,
        segment_ids: jax.Array | None = None,
        targets: jax.Array | None = None,
        train: bool = False,
        cache: Cache | None = None,
        length: jax.Array | None = None,
    ) -> Any:
        config = self.config
        dtype = jnp.dtype(config.dtype)

        def embedding(name: str) -> nn.Embed:
            init = nn.initializers.normal(0.02)
            return nn.Embed(self.vocab_size, config.embedding_dim, dtype=dtype, embedding_init=init, name=name)

        token_embedding = embedding("token_embedding")
        x = token_embedding(tokens)
        layers = nn.scan(
            _rematerialised(config),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
            length=config.num_layers,
            unroll=config.num_layers if config.layers == "unrolled" and config.remat == "none" else 1,
        )(config, self.backend, train, name="layers")
        x, new = layers(x, hyperparameters, segment_ids, cache, length)
        if cache is not None and tokens.shape[1] > 1:
            x = jax.lax.dynamic_slice_in_dim(x, (tokens.shape[1] if length is None else length) - 1, 1, axis=1)
        x = _norm(config, "final_norm")(x)
        output = token_embedding if config.embeddings == "tied" else embedding("output_embedding")
        if targets is not None:
            return projected_losses(x, output.embedding, targets, precision=config.matmul_precision)
        logits = projection(x, output.embedding.astype(x.dtype).T, precision=config.matmul_precision)
        if cache is None:
            return logits
        return logits, append(cache, new) if isinstance(new, Entry) else new


def _rematerialised(config: ModelConfig) -> Any:
    """The layer, with what of its forward pass the backward pass keeps, and what it computes again."""
    if config.remat == "none":
        return Layer
    policy = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[config.remat]
    return nn.remat(Layer, policy=policy, prevent_cse=False)  # in a loop nothing can be shared between the passes


class Layer(nn.Module):
    """x + attention, then x + MLP: (B, S, D) → ((B, S, D), what :class:`Attention` returns), the form that a
    scan wants."""

    config: ModelConfig
    backend: BackendConfig
    train: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        hyperparameters: ModelHyperparameters,
        segment_ids: jax.Array | None,
        cache: Cache | None,
        length: jax.Array | None,
    ) -> tuple[jax.Array, Cache | Entry | None]:
        config = self.config
        attention = Attention(config, self.backend, name="attention")
        normed = _norm(config, "attention_norm")(x)
        branch, new = attention(normed, hyperparameters, segment_ids, cache, length)
        if config.norm_placement == "hybrid":
            branch = _norm(config, "attention_output_norm")(branch)
        x = x + self._residual("attention", branch)
        return x + self._residual("mlp", MLP(config, name="mlp")(_norm(config, "mlp_norm")(x))), new

    def _residual(self, name: str, branch: jax.Array) -> jax.Array:
        config = self.config
        if config.layer_scale is not None:
            init = nn.initializers.constant(config.layer_scale)
            branch = branch * self.param(f"{name}_layer_scale", init, (config.embedding_dim,)).astype(branch.dtype)
        return nn.Dropout(config.dropout, deterministic=not self.train, name=f"{name}_dropout")(branch)


class Attention(nn.Module):
    """Projections around the attention backend: (B, S, D) → (B, S, D).

    With a cache, also this layer's part of it: what one token adds, or all of it after a prompt.
    """

    config: ModelConfig
    backend: BackendConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        hyperparameters: ModelHyperparameters,
        segment_ids: jax.Array | None,
        cache: Cache | None,
        length: jax.Array | None,
    ) -> tuple[jax.Array, Cache | Entry | None]:
        config, backend = self.config, self.backend
        batch, tokens, _ = x.shape

        def heads(name: str, number: int) -> jax.Array:
            flat = _dense(config, number * config.head_dim, name)(x)
            return flat.reshape(batch, tokens, number, config.head_dim).transpose(0, 2, 1, 3)

        q = heads("query", config.num_heads)
        k = heads("key", config.kv_heads)
        v = heads("value", config.kv_heads)
        if config.qk_norm == "rmsnorm":
            q = Norm("rmsnorm", name="query_norm")(q)
            k = Norm("rmsnorm", name="key_norm")(k)
        bias = hyperparameters.sigmoid_bias if backend.activation == "sigmoid" else None
        if bias is not None and backend.sigmoid_bias == "learned":
            init = nn.initializers.constant(-math.log(backend.context_length))
            bias = self.param("sigmoid_bias", init, (config.num_heads,))
        meaning: dict[str, Any] = {
            "activation_function": backend.activation,
            "qk_pre_activation_function": backend.qk_pre_activation,
            "theta": hyperparameters.theta,
            "context_length": backend.context_length,
            "sigmoid_bias": bias,
            "window": backend.window,
        }
        new: Cache | Entry | None = None
        if cache is None:
            self.sow("intermediates", "inputs", (q, k, v, bias))  # nothing, unless that collection is asked for
            out = attention(q, k, v, **meaning, segment_ids=segment_ids, implementation=backend.implementation)
        else:
            spec = decoding_spec(num_heads=config.num_heads, **meaning)
            if tokens == 1:
                out, new = attend(q, k, v, cache, spec)
            else:
                # A state has one implementation, whatever the run was trained with.
                implementation = "auto" if isinstance(cache, StateCache) else backend.implementation
                out, new = prefill(q, k, v, cache, spec, length=length, implementation=implementation)
        out = out.transpose(0, 2, 1, 3).reshape(batch, tokens, config.embedding_dim)
        return _dense(config, config.embedding_dim, "output", residual=True)(out), new


class MLP(nn.Module):
    """gelu: W₂ gelu(W₁ x). swiglu: W₃ (silu(W₁ x) ∘ W₂ x) (Shazeer, arXiv 2002.05202). No biases."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        if config.mlp == "swiglu":
            hidden = swiglu(_dense(config, config.mlp_dim, "gate")(x), _dense(config, config.mlp_dim, "up")(x))
        else:
            hidden = nn.gelu(_dense(config, config.mlp_dim, "up")(x))
        return _dense(config, config.embedding_dim, "down", residual=True)(hidden)


def _dense(config: ModelConfig, features: int, name: str, *, residual: bool = False) -> nn.Dense:
    variance = 1.0 / (2 * config.num_layers) if residual else 1.0
    init = nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
    dtype = jnp.dtype(config.dtype)
    return nn.Dense(
        features,
        use_bias=False,
        dtype=dtype,
        precision=config.matmul_precision,
        kernel_init=init,
        dot_general=projection,
        name=name,
    )


class Norm(nn.Module):
    """RMSNorm or LayerNorm with a scale and no bias, over the last axis."""

    kind: Literal["rmsnorm", "layernorm"]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return (rms_norm if self.kind == "rmsnorm" else layer_norm)(x, scale)


def _norm(config: ModelConfig, name: str) -> Norm:
    return Norm(config.norm, name=name)


def matmul_flops_per_token(config: ModelConfig, *, context_length: int, vocab_size: int) -> int:
    """Floating-point operations of the forward pass's matrix products, for one token of a full window.

    2 for each weight of a matrix that the token is multiplied with (the output projection included, the embedding
    look-up not), and for causal attention, over the average of S/2 positions that a token attends to, 2 · S/2 for each
    query, key pair of products: 2 · S · D a layer. A training step costs three times this.
    """
    d, kv_dim = config.embedding_dim, config.kv_heads * config.head_dim
    mlp = (3 if config.mlp == "swiglu" else 2) * d * config.mlp_dim
    layer = 2 * (2 * d * d + 2 * d * kv_dim + mlp) + 2 * context_length * d
    return config.num_layers * layer + 2 * d * vocab_size
