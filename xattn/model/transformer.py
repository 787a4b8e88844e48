"""The causal language model: a pre-norm decoder on the attention backend.

Flax Linen, because the seed's backend is a Linen module, and because ``init`` and ``apply`` are pure functions of a
plain tree of parameters: what packs (vmap over runs) and checkpoints want.

Shapes: B batch, NH heads, S sequence, DH head width, D embedding, V vocabulary. Parameters of the layers have one more
axis in front, the layer, whether the layers are scanned or unrolled. How layers of two kinds are stacked is in
:mod:`xattn.model.pattern`.

Initialisation: embeddings normal with standard deviation 0.02; matrices truncated normal with variance 1 / fan-in,
those that write to the residual stream divided by √(2 · num_layers); norm scales 1; learned sigmoid biases −log n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from xattn.backend import activations, dispatch
from xattn.backend.arguments import checked_spec
from xattn.backend.decode import Cache, Entry, StateCache, append, attend, prefill
from xattn.backend.spec import AttentionSpec
from xattn.model import pattern
from xattn.model.config import BackendConfig, ModelConfig
from xattn.model.functions import layer_norm, rms_norm, swiglu
from xattn.model.loss import projected_losses
from xattn.model.projection import projection

Role = Literal["matrix", "embedding", "vector"]


class LayerHyperparameters(NamedTuple):
    """The swept numbers that a layer reads at each call: float32 scalars, or Python floats."""

    theta: jax.Array | float
    """RoPE's wavelength base."""
    sigmoid_bias: jax.Array | float
    """Added to the logits of an activation that takes a bias; not read where the bias is learned."""
    logit_scale: jax.Array | float = 1.0
    """A factor on the logits besides 1/√DHQK."""


ModelHyperparameters = LayerHyperparameters | Mapping[str, LayerHyperparameters]
"""Those of a model with one kind of layer, or kind → those of its layers."""


def layer_hyperparameters(hyperparameters: ModelHyperparameters, kind: str) -> LayerHyperparameters:
    """What the layers of that kind read."""
    return hyperparameters if isinstance(hyperparameters, LayerHyperparameters) else hyperparameters[kind]


def layer_spec(
    layers: BackendConfig,
    *,
    num_heads: int,
    theta: Any,
    sigmoid_bias: Any,
    logit_scale: Any,
    length: int = 1,
    batch: int = 1,
    segment_ids: Int[Array, "B S"] | None = None,
    **of_tokens: Any,
) -> AttentionSpec:
    """What attention means in layers of one kind; theta, bias and scale are numbers of the train state.

    sigmoid_bias: ignored under an activation that takes none. length, batch: S and B of the segment_ids. of_tokens:
    num_kv_heads, log_decay, log_input_gate and sink, as :func:`xattn.backend.arguments.checked_spec` takes them.
    """
    takes_bias = activations.activation(layers.activation).takes_bias
    return checked_spec(
        num_heads=num_heads,
        length=length,
        batch=batch,
        activation_function=layers.activation,
        qk_pre_activation_function=layers.qk_pre_activation,
        theta=theta,
        context_length=layers.context_length,
        sigmoid_bias=sigmoid_bias if takes_bias else None,
        segment_ids=segment_ids,
        window=layers.window,
        rotary_fraction=layers.rotary_fraction,
        logit_scale=logit_scale,
        **of_tokens,
    )


def with_sigmoid_bias(hyperparameters: ModelHyperparameters, biases: Mapping[str, Any]) -> ModelHyperparameters:
    """The same with another bias in the kinds that are given: kind → scalar."""

    def changed(kind: str, each: LayerHyperparameters) -> LayerHyperparameters:
        return each._replace(sigmoid_bias=biases[kind]) if kind in biases else each

    if isinstance(hyperparameters, LayerHyperparameters):
        return changed("backend", hyperparameters)
    return {kind: changed(kind, each) for kind, each in hyperparameters.items()}


def parameter_role(path: tuple[Any, ...]) -> Role:
    """What a parameter is, by its name in the tree: its number of axes says nothing once layers are stacked."""
    name = path[-1].key
    if name == "kernel":
        return "matrix"
    return "embedding" if name == "embedding" else "vector"


class LanguageModel(nn.Module):
    """A decoder: tokens to next-token logits, their losses, or one more token at a time.

    Call it by ``model.apply({"params": params}, …, method="losses")``, or without a method for logits; parameters come
    from :func:`init_params`. Tokens of different ``segment_ids`` don't attend to each other.
    """

    config: ModelConfig
    backend: BackendConfig
    vocab_size: int

    def scanned(self) -> LanguageModel:
        """The same model, its layers in a loop, for what runs once: it compiles faster and runs slower."""
        return self.clone(config=self.config.model_copy(update={"layers": "scanned"}))

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        hyperparameters: ModelHyperparameters,
        *,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """:meth:`logits`."""
        return self.logits(tokens, hyperparameters, segment_ids=segment_ids)

    def logits(
        self,
        tokens: Int[Array, "B S"],
        hyperparameters: ModelHyperparameters,
        *,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Scores of each next token, in the config's dtype."""
        x, embedding, _ = self._run(tokens, hyperparameters, segment_ids)
        return self._scores(x, embedding)

    def losses(
        self,
        tokens: Int[Array, "B S"],
        hyperparameters: ModelHyperparameters,
        targets: Int[Array, "B S"],
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B S"]:
        """−log p(target) in float32, without all logits at once. With train=True and dropout > 0 an rng named
        ``dropout`` is needed."""
        x, embedding, _ = self._run(tokens, hyperparameters, segment_ids, train=train)
        return projected_losses(x, embedding, targets, precision=self.config.matmul_precision)

    def decode(
        self,
        tokens: Int[Array, "B S"],
        hyperparameters: ModelHyperparameters,
        caches: pattern.Caches,
        *,
        length: Any = None,
    ) -> tuple[Float[Array, "B 1 V"], pattern.Caches]:
        """The logits after the last token, and the caches with the tokens.

        One token continues from the caches; several are a prompt for caches that have seen nothing, of which the first
        ``length`` count (an int or a traced scalar; None: all). :func:`xattn.model.generation.empty_caches` makes them.
        """
        x, embedding, new = self._run(tokens, hyperparameters, None, caches=caches, length=length)
        after = {kind: append(caches[kind], add) if isinstance(add, Entry) else add for kind, add in new.items()}
        return self._scores(x, embedding), after

    def _scores(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        return projection(x, embedding.astype(x.dtype).T, precision=self.config.matmul_precision)

    @nn.compact
    def _run(
        self,
        tokens: jax.Array,
        hyperparameters: ModelHyperparameters,
        segment_ids: jax.Array | None,
        *,
        train: bool = False,
        caches: pattern.Caches | None = None,
        length: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """(the residual stream after its last norm, the output embedding (V, D), kind → what its layers add to their
        caches); with caches the stream is that of the last token, (B, 1, D)."""
        config = self.config

        def embedding(name: str) -> nn.Embed:
            init = nn.initializers.normal(0.02)
            dtype = jnp.dtype(config.dtype)
            return nn.Embed(self.vocab_size, config.embedding_dim, dtype=dtype, embedding_init=init, name=name)

        token_embedding = embedding("token_embedding")
        x = token_embedding(tokens)
        if self.backend.then is None:
            layers = nn.scan(
                _rematerialised(config),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
                length=config.num_layers,
                unroll=config.num_layers if _is_unrolled(config) else 1,
            )(config, self.backend, train, name="layers")
            cache = None if caches is None else caches["backend"]
            x, of_layers = layers(x, layer_hyperparameters(hyperparameters, "backend"), segment_ids, cache, length)
            new = {"backend": of_layers}
        else:
            x, new = self._mixed(x, hyperparameters, segment_ids, train, caches, length)
        if caches is not None and tokens.shape[1] > 1:
            x = jax.lax.dynamic_slice_in_dim(x, (tokens.shape[1] if length is None else length) - 1, 1, axis=1)
        x = _norm(config, "final_norm")(x)
        output = token_embedding if config.embeddings == "tied" else embedding("output_embedding")
        return x, output.embedding, new

    def _mixed(
        self,
        x: jax.Array,
        hyperparameters: ModelHyperparameters,
        segment_ids: jax.Array | None,
        train: bool,
        caches: pattern.Caches | None,
        length: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The layers of two kinds, in a loop over periods."""
        config, backend = self.config, self.backend
        is_watched = self.is_mutable_collection("intermediates")
        drops = train and config.dropout > 0
        keys = jax.random.split(self.make_rng("dropout"), config.num_layers) if drops else None
        params = self.variables["params"]
        assert "layers" in params, "a model with two kinds of layers gets its parameters from init_params"

        def layer(kind: str, params: Any, x: jax.Array, cache: Cache | None, key: jax.Array | None) -> Any:
            module = Layer(config, backend.kinds[kind], train, parent=None)

            def run(params: Any, x: jax.Array, cache: Cache | None) -> Any:
                return module.apply(
                    {"params": params},
                    *(x, layer_hyperparameters(hyperparameters, kind), segment_ids, cache, length),
                    rngs={} if key is None else {"dropout": key},
                    mutable=["intermediates"] if is_watched else False,
                )

            out = _remat(config, jax.checkpoint)(run)(params, x, cache)
            (x, new), seen = out if is_watched else (out, None)
            return x, (new, seen and seen["intermediates"]["attention"]["inputs"][0])

        x, found = pattern.run(
            layer, x, params, caches, keys, config.num_layers, backend, unrolled=_is_unrolled(config)
        )
        if is_watched:
            self.sow("intermediates", "layers", {kind: inputs for kind, (_, inputs) in found.items()})
        return x, {kind: new for kind, (new, _) in found.items()}


def init_params(model: LanguageModel, key: jax.Array) -> Any:
    """The parameters of a model. A layer begins with the same numbers whatever kind it and the others are."""
    tokens = jnp.zeros((1, model.backend.context_length), jnp.int32)
    of_kinds = {
        # What computes the attention has no parameters, and need not serve the device here.
        kind: model.clone(backend=backend.model_copy(update={"implementation": dispatch.AUTO}))
        .scanned()
        .init(key, tokens, LayerHyperparameters(1.0, 0.0))["params"]
        for kind, backend in model.backend.kinds.items()
    }
    params = of_kinds["backend"]
    if model.backend.then is None:
        return params
    layers = {kind: tree["layers"] for kind, tree in of_kinds.items()}
    return params | pattern.merged(layers, model.config.num_layers, model.backend)


def attention_inputs(
    model: LanguageModel,
    params: Any,
    tokens: jax.Array,
    hyperparameters: ModelHyperparameters,
    segment_ids: jax.Array | None,
) -> dict[str, tuple[jax.Array, ...]]:
    """Kind of layer → (q, k, v, bias) as attention gets them, with the kind's layers as the first axis; a bias is None
    where the activation takes none."""
    _, seen = model.apply(
        {"params": params}, tokens, hyperparameters, segment_ids=segment_ids, mutable=["intermediates"]
    )
    layers = seen["intermediates"]["layers"]
    return {"backend": layers["attention"]["inputs"][0]} if model.backend.then is None else layers[0]


def _is_unrolled(config: ModelConfig) -> bool:
    return config.layers == "unrolled" and config.remat == "none"


def _rematerialised(config: ModelConfig) -> Any:
    """The layer, with what of its forward pass the backward pass keeps, and what it computes again."""
    return _remat(config, nn.remat)(Layer)


def _remat(config: ModelConfig, remat: Any) -> Any:
    if config.remat == "none":
        return lambda function: function
    policy = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[config.remat]
    # In a loop nothing can be shared between the passes.
    return lambda function: remat(function, policy=policy, prevent_cse=False)


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
        hyperparameters: LayerHyperparameters,
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
        hyperparameters: LayerHyperparameters,
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
            q = Norm("rmsnorm", config.norm_eps, name="query_norm")(q)
            k = Norm("rmsnorm", config.norm_eps, name="key_norm")(k)
        bias = hyperparameters.sigmoid_bias if activations.activation(backend.activation).takes_bias else None
        if bias is not None and backend.sigmoid_bias == "learned":
            init = nn.initializers.constant(-math.log(backend.context_length))
            bias = self.param("sigmoid_bias", init, (config.num_heads,))
        spec = layer_spec(
            backend,
            num_heads=config.num_heads,
            theta=hyperparameters.theta,
            sigmoid_bias=bias,
            logit_scale=hyperparameters.logit_scale,
            length=tokens,
            batch=batch,
            segment_ids=segment_ids,
        )
        new: Cache | Entry | None = None
        if cache is None:
            self.sow("intermediates", "inputs", (q, k, v, bias))  # nothing, unless that collection is asked for
            out = dispatch.compute(q, k, v, spec, backend.implementation)
        elif tokens == 1:
            out, new = attend(q, k, v, cache, spec)
        else:
            # A state has one implementation, whatever the run was trained with.
            implementation = dispatch.AUTO if isinstance(cache, StateCache) else backend.implementation
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
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return (rms_norm if self.kind == "rmsnorm" else layer_norm)(x, scale, self.epsilon)


def _norm(config: ModelConfig, name: str) -> Norm:
    return Norm(config.norm, config.norm_eps, name=name)


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
