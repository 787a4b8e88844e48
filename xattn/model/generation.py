"""Generation token by token, through the decoding cache of the attention backend.

The parallel form reads the whole prompt in one call; after that each token costs one token's work. A cache has room for
context_length · 2ⁱ tokens and doubles when it is full, so nothing is forgotten unless the model has a window. Sigmoid's
n remains the context_length of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xattn.backend.cache import grow, init_cache
from xattn.backend.spec import AttentionSpec
from xattn.model.attention import LayerCache
from xattn.model.config import ModelConfig
from xattn.model.convolution import Recent
from xattn.model.hyperparameters import ModelHyperparameters, layer_hyperparameters, layer_spec
from xattn.model.pattern import Caches, layers_of
from xattn.model.transformer import LanguageModel

# Tokens drawn by one device call, and the size of the pieces that are streamed.
CHUNK = 16
# Most tokens to reserve room for up front; every later doubling recompiles.
ROOM = 1024


class Sampling(NamedTuple):
    """How a token is drawn from its logits. Tokens exactly as likely as the last one kept are kept too."""

    temperature: float | jax.Array = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | jax.Array | None = None
    """Keep only the k likeliest tokens; None keeps all."""
    top_p: float | jax.Array | None = None
    """Of those, keep the fewest likeliest that sum to p or more (Holtzman et al., arXiv 1904.09751); None keeps all."""


@partial(jax.tree_util.register_dataclass, data_fields=("params", "hyperparameters"), meta_fields=("model",))
@dataclass(frozen=True)
class TrainedModel:
    """A model with the numbers that it computes with."""

    model: LanguageModel
    params: Any
    hyperparameters: ModelHyperparameters


def generate(
    trained: TrainedModel,
    prompt: np.ndarray | Sequence[int],
    *,
    num_tokens: int,
    sampling: Sampling,
    key: jax.Array,
) -> np.ndarray:
    """Continue a prompt, int (P,) with P ≥ 1 → int32 (num_tokens,). See :func:`stream`."""
    pieces = stream(trained, prompt, num_tokens=num_tokens, sampling=sampling, key=key)
    return np.concatenate([np.zeros(0, np.int32), *pieces])


def stream(
    trained: TrainedModel,
    prompt: np.ndarray | Sequence[int],
    *,
    num_tokens: int,
    sampling: Sampling,
    key: jax.Array,
) -> Iterator[np.ndarray]:
    """Yield the continuation of a prompt, int (P,) with P ≥ 1, as int32 arrays of at most :data:`CHUNK` tokens.

    Each token is drawn given all tokens before it. Token i of the continuation uses the key folded with i, so a longer
    continuation starts with the shorter one.
    """
    prompt = np.asarray(prompt, np.int32)
    if not len(prompt):
        raise ValueError("prompt: must have at least one token")
    model, specs = trained.model, _specs(trained.model, trained.hyperparameters)
    capacity = model.backend.context_length
    while capacity < len(prompt) + min(-(-num_tokens // CHUNK) * CHUNK, ROOM):
        capacity *= 2
    # Pad the prompt to a power of two, at most the capacity: few lengths mean few compiled programs.
    padded = np.zeros(min(capacity, 1 << (len(prompt) - 1).bit_length()), np.int32)
    padded[: len(prompt)] = prompt
    caches = empty_caches(model, trained.hyperparameters, batch=1, capacity=capacity)
    logits, caches = _read(trained, padded[None], jnp.int32(len(prompt)), caches)
    as_arrays = _as_arrays(sampling, model.vocab_size)
    for done in range(0, num_tokens, CHUNK):
        caches = {
            kind: cache._replace(attention=grow(cache.attention, specs[kind], CHUNK)) for kind, cache in caches.items()
        }
        logits, caches, tokens = _decode(trained, logits, caches, jnp.int32(done), key, as_arrays)
        yield np.asarray(tokens)[: num_tokens - done]


def empty_caches(
    model: LanguageModel, hyperparameters: ModelHyperparameters, *, batch: int, capacity: int, documents: bool = False
) -> Caches:
    """Return empty caches for :meth:`LanguageModel.decode`: one per layer, stacked by kind.

    ``documents`` states whether calls pass segment_ids.
    """
    config, found = model.config, {}
    layers = layers_of(model.backend, config.num_layers)
    for kind, spec in _specs(model, hyperparameters).items():
        backend = model.backend.kinds[kind]
        attention = init_cache(
            spec,
            batch=batch,
            num_kv_heads=config.kv_heads,
            head_dim_qk=config.head_dim,
            head_dim_v=config.head_dim,
            capacity=capacity,
            dtype=jnp.dtype(config.dtype),
            fades=backend.decay != "none" or backend.input_gate != "none",
            documents=documents,
        )
        cache = LayerCache(attention, _nothing_recent(config, batch, documents))
        found[kind] = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(layers[kind])), cache)  # noqa: B023
    return found


def _nothing_recent(config: ModelConfig, batch: int, documents: bool) -> Recent | None:
    """Return what a layer's convolutions see before the first token."""
    if config.conv is None:
        return None
    shape = batch, config.conv - 1
    heads = {"query": config.num_heads, "key": config.kv_heads, "value": config.kv_heads}
    rows = {name: jnp.zeros((*shape, n * config.head_dim), config.dtype) for name, n in heads.items()}
    return Recent(rows, jnp.zeros(shape, jnp.int32) if documents else None)


def draw(key: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw one token, int32 (), from float logits (V,)."""
    temperature, top_k, top_p = sampling
    logits = logits.astype(jnp.float32)
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    if top_k is not None and top_p is not None:
        ordered = jnp.sort(scaled, descending=True)
        ordered = jnp.where(jnp.arange(len(ordered)) < top_k, ordered, -jnp.inf)
        p = jax.nn.softmax(ordered)
        before = jnp.cumsum(p) - p
        last = jnp.min(jnp.where((before < top_p) & jnp.isfinite(ordered), ordered, jnp.inf))
        scaled = jnp.where(scaled >= last, scaled, -jnp.inf)
    return jnp.where(temperature > 0, jax.random.categorical(key, scaled), logits.argmax()).astype(jnp.int32)


def _as_arrays(sampling: Sampling, vocab_size: int) -> Sampling:
    """Return the numbers as arrays, so that changing them does not recompile. Without k and p nothing is sorted."""
    temperature = jnp.float32(sampling.temperature)
    if sampling.top_k is None and sampling.top_p is None:
        return Sampling(temperature)
    top_k = jnp.int32(min(sampling.top_k or vocab_size, vocab_size))
    return Sampling(temperature, top_k, jnp.float32(1.0 if sampling.top_p is None else sampling.top_p))


@jax.jit
def _read(trained: TrainedModel, tokens: jax.Array, length: jax.Array, caches: Caches) -> tuple[jax.Array, Caches]:
    """Return the logits (V,) after the first ``length`` tokens of a prompt (1, P), and the caches including them."""
    after: Any = trained.model.scanned().apply(
        {"params": trained.params}, tokens, trained.hyperparameters, caches, length=length, method="decode"
    )
    logits, caches = after
    return logits[0, 0], caches


@jax.jit
def _decode(
    trained: TrainedModel,
    logits: jax.Array,
    caches: Caches,
    first: jax.Array,
    key: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, Caches, jax.Array]:
    """Draw CHUNK tokens after logits (V,); return (logits after the last one, caches, int32 (CHUNK,))."""

    def step(carry: tuple[jax.Array, Caches], place: jax.Array) -> tuple[tuple[jax.Array, Caches], jax.Array]:
        logits, caches = carry
        token = draw(jax.random.fold_in(key, place), logits, sampling)
        after: Any = trained.model.apply(
            {"params": trained.params}, token[None, None], trained.hyperparameters, caches, method="decode"
        )
        logits, caches = after
        return (logits[0, 0], caches), token

    (logits, caches), tokens = jax.lax.scan(step, (logits, caches), first + jnp.arange(CHUNK))
    return logits, caches, tokens


def _specs(model: LanguageModel, hyperparameters: ModelHyperparameters) -> dict[str, AttentionSpec]:
    """Return kind of layer → its attention spec, without learned biases, which differ between layers."""
    return {
        kind: layer_spec(
            backend,
            num_heads=model.config.num_heads,
            length=1,
            **layer_hyperparameters(hyperparameters, kind)._asdict(),
        )
        for kind, backend in model.backend.kinds.items()
    }
