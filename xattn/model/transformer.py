"""The causal language model: a pre-norm decoder on the attention backend.

It uses Flax Linen because the seed's backend is a Linen module, and because ``init`` and ``apply`` are pure functions
of a plain tree of parameters. Packs (vmap over runs) and checkpoints need that.

Shapes: B batch, NH heads, S sequence, DH head width, D embedding, V vocabulary. Parameters of layers have a leading
layer axis, whether the layers are scanned or unrolled. :mod:`xattn.model.pattern` stacks layers of two kinds.

Initialisation: embeddings are normal with standard deviation 0.02. Matrices are truncated normal with variance
1 / fan-in; those that write to the residual stream are divided by √(2 · num_layers). Norm scales are 1, learned sigmoid
biases −log n. :mod:`xattn.model.attention` describes the initial values of attention's terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from xattn.backend import dispatch
from xattn.model import pattern
from xattn.model.attention import Attention, FirstValues, Inputs, LayerCache, appended
from xattn.model.config import BackendConfig, ModelConfig
from xattn.model.functions import projection, swiglu
from xattn.model.hyperparameters import LayerHyperparameters, ModelHyperparameters, layer_hyperparameters
from xattn.model.loss import at, projected_losses, spread
from xattn.model.modules import dense, norm

Role = Literal["matrix", "embedding", "vector"]


def parameter_role(path: tuple[Any, ...]) -> Role:
    """Return a parameter's role by its name in the tree. Its number of axes is no guide once layers are stacked."""
    name = path[-1].key
    if name == "kernel":
        return "matrix"
    return "embedding" if name == "embedding" else "vector"


def by_role(params: Any, choose: Callable[[Role], Any]) -> Any:
    """Map ``choose`` over the roles of all parameters; the result has the structure of the parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: choose(parameter_role(path)), params)


class LanguageModel(nn.Module):
    """A decoder from tokens to next-token logits or losses, or one token at a time.

    Call it by ``model.apply({"params": params}, …, method="losses")``, or without a method for logits. Parameters come
    from :func:`init_params`. Tokens of different ``segment_ids`` don't attend to each other, and an id must not come
    back after another one.
    """

    config: ModelConfig
    backend: BackendConfig
    vocab_size: int

    def scanned(self) -> LanguageModel:
        """Return the model with scanned layers. It compiles faster and runs slower, which suits one-off calls."""
        return self.clone(config=self.config.model_copy(update={"layers": "scanned"}))

    def logits(
        self,
        tokens: Int[Array, "B S"],
        hyperparameters: ModelHyperparameters,
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        places: Int[Array, "B K"] | None = None,
    ) -> Float[Array, "B S V"] | Float[Array, "B K V"]:
        """Compute next-token logits in the config's dtype, at all inputs or only at ``places``."""
        x, embedding, _ = self._run(tokens, hyperparameters, segment_ids)
        return self._scores(x if places is None else x[at(places)], embedding)

    __call__ = logits

    def losses(
        self,
        tokens: Int[Array, "B S"],
        hyperparameters: ModelHyperparameters,
        targets: Int[Array, "B S"],
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        places: Int[Array, "B K"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B S"]:
        """Compute −log p(target) in float32, with bounded memory for logits. With ``places``, only these inputs of each
        sequence are scored, and the loss is 0 at the others. train=True with dropout > 0 needs an rng named
        ``dropout``."""
        x, embedding, _ = self._run(tokens, hyperparameters, segment_ids, train=train)
        precision = self.config.matmul_precision
        if places is None:
            return projected_losses(x, embedding, targets, precision=precision)
        scored = at(places)
        found = projected_losses(x[scored], embedding, targets[scored], precision=precision)
        return spread(found, places, targets.shape[1])

    def decode(
        self,
        tokens: Int[Array, "B S"],
        hyperparameters: ModelHyperparameters,
        caches: pattern.Caches,
        *,
        length: Any = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B 1 V"], pattern.Caches]:
        """Return the logits after the last token, and the caches with the tokens added.

        One token continues from the caches. Several tokens are a prompt for empty caches; only the first ``length``
        count (an int or a traced scalar; None means all). :func:`xattn.model.generation.empty_caches` makes the caches;
        its argument ``documents`` states whether calls come with segment_ids, which must hold for all calls or none.
        """
        x, embedding, new = self._run(tokens, hyperparameters, segment_ids, caches=caches, length=length)
        return self._scores(x, embedding), {kind: appended(caches[kind], added) for kind, added in new.items()}

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
        """Return (the residual stream after the final norm, the output embedding (V, D), kind → cache additions). With
        caches, the stream is only that of the last token, (B, 1, D)."""
        config = self.config

        def embedding(name: str) -> nn.Embed:
            init = nn.initializers.normal(0.02)
            dtype = jnp.dtype(config.dtype)
            return nn.Embed(self.vocab_size, config.embedding_dim, dtype=dtype, embedding_init=init, name=name)

        token_embedding = embedding("token_embedding")
        stream = Stream(token_embedding(tokens), None)
        if config.value_residual == "first":
            values = jnp.zeros((tokens.shape[0], config.kv_heads, tokens.shape[1], config.head_dim), config.dtype)
            stream = stream._replace(first=FirstValues(values, jnp.array(False)))
        if self.backend.then is None:
            layers = nn.scan(
                _remat(config, nn.remat)(Layer),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
                length=config.num_layers,
                unroll=config.num_layers if _is_unrolled(config) else 1,
            )(config, self.backend, train, name="layers")
            cache = None if caches is None else caches["backend"]
            numbers = layer_hyperparameters(hyperparameters, "backend")
            stream, of_layers = layers(stream, numbers, segment_ids, cache, length)
            new = {"backend": of_layers}
        else:
            stream, new = self._mixed(stream, hyperparameters, segment_ids, train, caches, length)
        x = stream.x
        if caches is not None and tokens.shape[1] > 1:
            x = jax.lax.dynamic_slice_in_dim(x, (tokens.shape[1] if length is None else length) - 1, 1, axis=1)
        x = norm(config, "final_norm")(x)
        output = token_embedding if config.embeddings == "tied" else embedding("output_embedding")
        return x, output.embedding, new

    def _mixed(
        self,
        stream: Stream,
        hyperparameters: ModelHyperparameters,
        segment_ids: jax.Array | None,
        train: bool,
        caches: pattern.Caches | None,
        length: jax.Array | None,
    ) -> tuple[Stream, dict[str, Any]]:
        """Run layers of two kinds, in a loop over periods."""
        config, backend = self.config, self.backend
        is_watched = self.is_mutable_collection("intermediates")
        drops = train and config.dropout > 0
        keys = jax.random.split(self.make_rng("dropout"), config.num_layers) if drops else None
        params = self.variables["params"]
        assert "layers" in params, "a model with two kinds of layers gets its parameters from init_params"

        def layer(kind: str, params: Any, stream: Stream, cache: LayerCache | None, key: jax.Array | None) -> Any:
            module = Layer(config, backend.kinds[kind], train, parent=None)

            def run(params: Any, stream: Stream, cache: LayerCache | None) -> Any:
                return module.apply(
                    {"params": params},
                    *(stream, layer_hyperparameters(hyperparameters, kind), segment_ids, cache, length),
                    rngs={} if key is None else {"dropout": key},
                    mutable=["intermediates"] if is_watched else False,
                )

            out = _remat(config, jax.checkpoint)(run)(params, stream, cache)
            (stream, new), seen = out if is_watched else (out, None)
            return stream, (new, seen and seen["intermediates"]["attention"]["inputs"][0])

        per_layer, unrolled = pattern.PerLayer(params, caches, keys), _is_unrolled(config)
        stream, found = pattern.run(layer, stream, per_layer, config.num_layers, backend, unrolled=unrolled)
        if is_watched:
            self.sow("intermediates", "layers", {kind: inputs for kind, (_, inputs) in found.items()})
        return stream, {kind: new for kind, (new, _) in found.items()}


def init_params(model: LanguageModel, key: jax.Array) -> Any:
    """Initialise a model's parameters. A layer's initial values depend neither on its kind nor on the other layers'."""
    tokens = jnp.zeros((1, model.backend.context_length), jnp.int32)
    of_kinds = {
        # The implementation has no parameters, and the one configured need not support this device.
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
) -> dict[str, Inputs]:
    """Return kind of layer → the inputs of attention. The first axis of each array counts the layers of that kind."""
    _, seen = model.apply(
        {"params": params}, tokens, hyperparameters, segment_ids=segment_ids, mutable=["intermediates"]
    )
    layers = seen["intermediates"]["layers"]
    return {"backend": layers["attention"]["inputs"][0]} if model.backend.then is None else layers[0]


def _is_unrolled(config: ModelConfig) -> bool:
    return config.layers == "unrolled" and config.remat == "none"


def _remat(config: ModelConfig, remat: Any) -> Any:
    if config.remat == "none":
        return lambda function: function
    policy = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[config.remat]
    # With remat the layers always run in a loop, where no CSE between the passes is possible anyway.
    return lambda function: remat(function, policy=policy, prevent_cse=False)


class Stream(NamedTuple):
    """What each layer passes to the next."""

    x: Float[Array, "B S D"]
    """The residual stream."""
    first: FirstValues | None
    """None without a value residual."""


class Layer(nn.Module):
    """x + attention, then x + MLP. In the form that a scan needs: stream → (stream, cache addition)."""

    config: ModelConfig
    backend: BackendConfig
    train: bool

    @nn.compact
    def __call__(
        self,
        stream: Stream,
        hyperparameters: LayerHyperparameters,
        segment_ids: jax.Array | None,
        cache: LayerCache | None,
        length: jax.Array | None,
    ) -> tuple[Stream, LayerCache | None]:
        config, x = self.config, stream.x
        attention = Attention(config, self.backend, name="attention")
        normed = norm(config, "attention_norm")(x)
        branch, first, new = attention(normed, stream.first, hyperparameters, segment_ids, cache, length)
        if config.norm_placement == "hybrid":
            branch = norm(config, "attention_output_norm")(branch)
        x = x + self._residual("attention", branch)
        x = x + self._residual("mlp", MLP(config, name="mlp")(norm(config, "mlp_norm")(x)))
        return Stream(x, first), new

    def _residual(self, name: str, branch: jax.Array) -> jax.Array:
        config = self.config
        if config.layer_scale is not None:
            init = nn.initializers.constant(config.layer_scale)
            branch = branch * self.param(f"{name}_layer_scale", init, (config.embedding_dim,)).astype(branch.dtype)
        return nn.Dropout(config.dropout, deterministic=not self.train, name=f"{name}_dropout")(branch)


class MLP(nn.Module):
    """gelu: W₂ gelu(W₁ x). swiglu: W₃ (silu(W₁ x) ∘ W₂ x) (Shazeer, arXiv 2002.05202). No biases."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        if config.mlp == "swiglu":
            hidden = swiglu(dense(config, config.mlp_dim, "gate")(x), dense(config, config.mlp_dim, "up")(x))
        else:
            hidden = nn.gelu(dense(config, config.mlp_dim, "up")(x))
        return dense(config, config.embedding_dim, "down", residual=True)(hidden)
