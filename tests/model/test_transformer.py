"""The language model: against an oracle in NumPy, by its gradients, and in every variant that a config can name."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from tests.quick import composed
from xattn.backend import xla_cpu
from xattn.model.generation import empty_caches
from xattn.model.loss import next_token_losses
from xattn.model.transformer import (
    LanguageModel,
    LayerHyperparameters,
    init_params,
    parameter_role,
)

# Sizes that differ, so that swapped axes show: B 3, S 7, D 12, heads 2 of width 6, MLP 10, V 23.
SMALL = [
    "backend.context_length=7",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.embedding_dim=12",
    "model.mlp_dim=10",
    "model.layers=scanned",
]
V = 23
TOKENS = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(V), (3, 1)), axis=1)[:, :7], jnp.int32)
HYPER = LayerHyperparameters(jnp.float32(100.0), jnp.float32(-1.5))


@cache
def model_of(*overrides: str, vocab_size: int = V) -> LanguageModel:
    config = composed(*SMALL, *overrides)
    return LanguageModel(config.model, config.backend, vocab_size)


@partial(jax.jit, static_argnames=("model", "seed"))
def init(model: LanguageModel, seed: int = 0) -> Any:
    return model.init(jax.random.key(seed), TOKENS, HYPER)["params"]


@cache
def shapes_of(model: LanguageModel) -> Any:
    return jax.eval_shape(model.scanned().init, jax.random.key(0), TOKENS, HYPER)["params"]


def random_params(model: LanguageModel) -> Any:
    """Every parameter away from its initial value: scales of 1 hide mistakes."""
    random, shapes = np.random.default_rng(7), shapes_of(model)
    return jax.tree.map(lambda leaf: (0.5 * random.standard_normal(leaf.shape) + 0.1).astype(leaf.dtype), shapes)


@partial(jax.jit, static_argnames=("model", "train"))
def forward(
    model: LanguageModel, params: Any, tokens: Any = TOKENS, hyper: Any = HYPER, train: bool = False, key: Any = None
) -> Any:
    if train:  # the losses of these tokens
        rngs = {"dropout": key}
        return model.apply({"params": params}, tokens, hyper, tokens, train=True, rngs=rngs, method="losses")
    return model.apply({"params": params}, tokens, hyper)


token_losses = jax.jit(next_token_losses)


@partial(jax.jit, static_argnames="model")
def logits_and_gradient(model: LanguageModel, params: Any) -> Any:
    """Logits, and the gradient of their mean loss on the next tokens."""

    def loss(params: Any) -> Any:
        logits = model.apply({"params": params}, TOKENS, HYPER)
        return jnp.mean(next_token_losses(logits[:, :-1], TOKENS[:, 1:])), logits

    gradient, logits = jax.grad(loss, has_aux=True)(params)
    return logits, gradient


# ---- against the formula ---------------------------------------------------------------------------------------------


def oracle(model: LanguageModel, params: Any, tokens: np.ndarray, hyper: LayerHyperparameters) -> np.ndarray:
    """The model in float64, one head and one token at a time where that is clearer."""
    config, backend = model.config, model.backend
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x: np.ndarray, scale: np.ndarray, kind: str) -> np.ndarray:
        if kind == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    def rope(x: np.ndarray) -> np.ndarray:
        width = x.shape[-1]
        out = np.empty_like(x)
        for t in range(len(x)):
            for i in range(width // 2):
                angle = t * float(hyper.theta) ** (-2 * i / width)
                a, b = x[t, 2 * i], x[t, 2 * i + 1]
                out[t, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    def attention(x: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
        width, length = config.head_dim, len(x)
        outs = []
        for head in range(config.num_heads):
            kv = head // (config.num_heads // config.kv_heads)
            q = (x @ layer["query"]["kernel"])[:, head * width : (head + 1) * width]
            k = (x @ layer["key"]["kernel"])[:, kv * width : (kv + 1) * width]
            v = (x @ layer["value"]["kernel"])[:, kv * width : (kv + 1) * width]
            if config.qk_norm == "rmsnorm":
                q, k = norm(q, layer["query_norm"]["scale"], "rmsnorm"), norm(k, layer["key_norm"]["scale"], "rmsnorm")
            if backend.qk_pre_activation == "swish":
                q, k = silu(q), silu(k)
            logits = rope(q) @ rope(k).T / math.sqrt(width)
            ahead = np.triu(np.ones((length, length), bool), 1)
            if backend.activation == "softmax":
                weights = np.exp(np.where(ahead, -np.inf, logits))
                weights /= weights.sum(-1, keepdims=True)
            elif backend.activation == "sigmoid":
                learned = backend.sigmoid_bias == "learned"
                bias = layer["sigmoid_bias"][head] if learned else float(hyper.sigmoid_bias)
                weights = np.where(ahead, 0, 1 / (1 + np.exp(-logits - bias)))
            else:
                weights = np.where(ahead, 0, logits)
            outs.append(weights @ v)
        return np.concatenate(outs, -1) @ layer["output"]["kernel"]

    def mlp(x: np.ndarray, layer: dict[str, Any]) -> np.ndarray:
        up = x @ layer["up"]["kernel"]
        if config.mlp == "swiglu":
            return (silu(x @ layer["gate"]["kernel"]) * up) @ layer["down"]["kernel"]
        gelu = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        return gelu @ layer["down"]["kernel"]

    out = []
    for row in tokens:
        x = p["token_embedding"]["embedding"][row]
        for number in range(config.num_layers):
            layer = jax.tree.map(lambda leaf, number=number: leaf[number], p["layers"])
            branch = attention(norm(x, layer["attention_norm"]["scale"], config.norm), layer["attention"])
            if config.norm_placement == "hybrid":
                branch = norm(branch, layer["attention_output_norm"]["scale"], config.norm)
            x = x + branch * layer.get("attention_layer_scale", 1)
            branch = mlp(norm(x, layer["mlp_norm"]["scale"], config.norm), layer["mlp"])
            x = x + branch * layer.get("mlp_layer_scale", 1)
        name = "token_embedding" if config.embeddings == "tied" else "output_embedding"
        out.append(norm(x, p["final_norm"]["scale"], config.norm) @ p[name]["embedding"].T)
    return np.stack(out)


VARIANTS = {
    "default": [],
    "sigmoid learned": ["backend=sigmoid", "backend.sigmoid_bias=learned"],
    "none swish": ["backend=none", "backend.qk_pre_activation=swish"],
    "gpt2": [
        "model.mlp=gelu",
        "model.norm=layernorm",
        "model.norm_placement=pre",
        "model.qk_norm=none",
        "model.embeddings=tied",
    ],
    "grouped heads, another epsilon": ["model.num_heads=6", "model.num_kv_heads=3", "model.norm_eps=0.25"],
    "layer scale": ["model.layer_scale=0.25", "model.norm=layernorm", "model.num_kv_heads=1", "model.layers=unrolled"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_its_formula(variant: str) -> None:
    """Logits equal the oracle's, and every parameter moves the loss."""
    model = model_of(*VARIANTS[variant])
    params = random_params(model)
    logits, gradient = logits_and_gradient(model, params)
    assert logits.shape == (3, 7, V)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, oracle(model, params, np.asarray(TOKENS), HYPER), rtol=2e-4, atol=2e-4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-6, path


@pytest.mark.parametrize("variant", ["default"])
def test_bfloat16_computes_the_same_with_float32_parameters(variant: str) -> None:
    model = model_of(*VARIANTS[variant], "model.dtype=bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote bfloat16 to float32 implicitly
        params = random_params(model)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        logits, gradient = logits_and_gradient(model, params)
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    expected = oracle(model, params, np.asarray(TOKENS), HYPER)
    np.testing.assert_allclose(logits.astype(jnp.float32), expected, atol=0.05 * np.abs(expected).max())


def test_scanned_and_unrolled_layers_are_one_model() -> None:
    """The same parameters from the same key, the same logits, the same gradients."""
    scanned, unrolled = model_of("model.layers=scanned"), model_of("model.layers=unrolled")
    params = init(scanned)
    assert jax.tree.structure(params) == jax.tree.structure(init(unrolled))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(init(unrolled)), strict=True):
        np.testing.assert_array_equal(a, b)
    one, other = (jax.tree.leaves(logits_and_gradient(model, params)) for model in (scanned, unrolled))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    kernel = params["layers"]["attention"]["query"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01  # each layer draws its own


# ---- causality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides", [["backend=softmax"], ["backend=sigmoid"], ["backend=none"], ["backend.window=3"]]
)
def test_no_token_looks_ahead(overrides: list[str]) -> None:
    """Gradient of the logits at t by the embedding of the token at s: 0 for s > t, not 0 for every s it may see."""
    model = model_of(*overrides)
    params = random_params(model)
    table = params["token_embedding"]["embedding"]
    direction = np.random.default_rng(1).standard_normal(V).astype(np.float32)

    def logits_of(table: jax.Array) -> jax.Array:
        changed = params | {"token_embedding": {"embedding": table}}
        return model.apply({"params": changed}, TOKENS[:1], HYPER)[0] @ direction

    by_token = np.abs(np.asarray(jax.jit(jax.jacrev(logits_of))(table))).max(-1)  # (S, V)
    by_position = by_token[:, np.asarray(TOKENS[0])]  # every token of the row is another one
    reach = 7 if model.backend.window is None else model.config.num_layers * (model.backend.window - 1)
    for t in range(7):
        for s in range(7):
            if s > t or t - s > reach:
                assert by_position[t, s] == 0, (t, s)
            else:
                assert by_position[t, s] > 1e-5, (t, s)
    absent = sorted(set(range(V)) - set(np.asarray(TOKENS[0]).tolist()))
    assert (by_token[:, absent] == 0).all()


def test_a_prefix_means_the_same_alone() -> None:
    """Sigmoid's n is the context length, not the length of the text at hand."""
    model = model_of("backend=sigmoid", "backend.sigmoid_bias=learned")
    params = random_params(model)
    np.testing.assert_allclose(
        forward(model, params, TOKENS[:, :4]), forward(model, params)[:, :4], rtol=1e-4, atol=1e-5
    )


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_roles_are_told_by_name() -> None:
    """Stacked scales have two axes, stacked matrices three: only the name says what decays."""
    params = random_params(model_of("backend=sigmoid", "backend.sigmoid_bias=learned", "model.layer_scale=0.1"))
    roles: dict[str, set[str]] = {"matrix": set(), "embedding": set(), "vector": set()}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        roles[parameter_role(path)].add("/".join(key.key for key in path))
    assert roles["embedding"] == {"token_embedding/embedding", "output_embedding/embedding"}
    assert roles["matrix"] == {
        *(f"layers/attention/{name}/kernel" for name in ("query", "key", "value", "output")),
        *(f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down")),
    }
    assert {"layers/attention/sigmoid_bias", "layers/mlp_layer_scale", "final_norm/scale"} < roles["vector"]


def test_initialisation_is_as_stated() -> None:
    wide = [
        "model.embedding_dim=96",
        "model.mlp_dim=192",
        "model.num_layers=8",
        "backend=sigmoid",
        "backend.sigmoid_bias=learned",
        "backend.context_length=40",
        "model.layer_scale=0.125",
    ]
    params = init(model_of(*wide, vocab_size=256))
    layers = params["layers"]

    def deviation(kernel: jax.Array) -> float:
        return float(np.std(kernel))

    for name in ("query", "key", "value"):
        assert deviation(layers["attention"][name]["kernel"]) == pytest.approx(96**-0.5, rel=0.03)
    for name in ("gate", "up"):
        assert deviation(layers["mlp"][name]["kernel"]) == pytest.approx(96**-0.5, rel=0.03)
    assert deviation(layers["attention"]["output"]["kernel"]) == pytest.approx(96**-0.5 / 4, rel=0.03)
    assert deviation(layers["mlp"]["down"]["kernel"]) == pytest.approx(192**-0.5 / 4, rel=0.03)
    assert deviation(params["token_embedding"]["embedding"]) == pytest.approx(0.02, rel=0.03)
    assert deviation(params["output_embedding"]["embedding"]) == pytest.approx(0.02, rel=0.03)
    np.testing.assert_allclose(layers["attention"]["sigmoid_bias"], -math.log(40), rtol=1e-6)
    assert layers["attention"]["sigmoid_bias"].shape == (8, 2)
    np.testing.assert_array_equal(layers["mlp_layer_scale"], 0.125)
    np.testing.assert_array_equal(params["final_norm"]["scale"], 1)


@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_the_first_loss_is_that_of_knowing_nothing(activation: str) -> None:
    model = model_of(f"backend={activation}", "model.embedding_dim=128", vocab_size=256)
    losses = token_losses(np.asarray(forward(model, init(model)))[:, :-1], np.asarray(TOKENS)[:, 1:])
    assert np.mean(losses) == pytest.approx(math.log(256), abs=0.15)


# ---- hyperparameters and dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "reads_bias"), [("sigmoid", True), ("softmax", False)])
def test_theta_and_bias_are_read_at_the_call(activation: str, reads_bias: bool) -> None:
    """One program for all their values; and the bias is not read where it means nothing."""
    model = model_of(f"backend={activation}")
    params = random_params(model)

    def call(theta: float, bias: float) -> Any:
        return forward(model, params, TOKENS, LayerHyperparameters(jnp.float32(theta), jnp.float32(bias)))

    base = call(100.0, -1.5)
    programs = forward._cache_size()
    assert np.abs(call(3.0, -1.5) - base).max() > 1e-3
    assert (np.abs(call(100.0, 1.0) - base).max() > 1e-3) == reads_bias
    np.testing.assert_array_equal(call(100.0, -1.5), base)
    assert forward._cache_size() == programs


def test_a_learned_bias_replaces_the_number() -> None:
    learned, fixed = model_of("backend=sigmoid", "backend.sigmoid_bias=learned"), model_of("backend=sigmoid")
    params = random_params(learned)
    bias = np.float32(-0.7)
    params["layers"]["attention"]["sigmoid_bias"] = np.full((2, 2), bias)
    logits = forward(learned, params)
    np.testing.assert_array_equal(forward(learned, params, TOKENS, HYPER._replace(sigmoid_bias=jnp.float32(2))), logits)
    del params["layers"]["attention"]["sigmoid_bias"]
    np.testing.assert_allclose(
        forward(fixed, params, TOKENS, HYPER._replace(sigmoid_bias=bias)), logits, rtol=1e-4, atol=1e-5
    )


def test_dropout_acts_in_training_alone() -> None:
    model, plain = model_of("model.dropout=0.5"), model_of()
    params = random_params(model)
    evaluated = token_losses(forward(plain, params), TOKENS)
    np.testing.assert_array_equal(forward(model, params), forward(plain, params))
    trained = [np.asarray(forward(model, params, train=True, key=jax.random.key(seed))) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(trained[0], trained[1])
    assert np.abs(trained[0] - trained[2]).max() > 1e-3
    assert np.abs(trained[0] - evaluated).max() > 1e-3


# ---- loss and operations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_loss_is_the_negative_log_likelihood(dtype: str, scale: float) -> None:
    random = np.random.default_rng(0)
    logits = (scale * random.standard_normal((3, 5, 11))).astype(jnp.dtype(dtype))
    targets = random.integers(0, 11, (3, 5), np.int32)
    exact = logits.astype(np.float64)
    largest = exact.max(-1, keepdims=True)
    log_p = exact - largest - np.log(np.exp(exact - largest).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    losses = token_losses(logits, targets)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5 * scale)
    gradient = jax.jit(jax.grad(lambda x: next_token_losses(x, targets).sum()))(logits)
    expected_gradient = np.exp(log_p) - np.eye(11)[targets]
    np.testing.assert_allclose(
        np.asarray(gradient, np.float32), expected_gradient, atol=1e-2 if dtype == "bfloat16" else 1e-5
    )


@pytest.mark.parametrize("precision", ["default", "bfloat16"])
@pytest.mark.parametrize("targets", [(), (TOKENS,)], ids=["logits", "losses"])
def test_every_projection_has_the_precision_that_the_config_names(
    precision: str, targets: tuple[jax.Array, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k, v, output, gate, up and down, each time that the layer is traced, and the logits."""
    seen = []

    def project(x: jax.Array, kernel: jax.Array, precision: str) -> jax.Array:
        seen.append(precision)
        return x @ kernel

    model = model_of(f"model.matmul_precision={precision}")
    params = shapes_of(model_of())
    monkeypatch.setattr(xla_cpu, "project", project)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    method = "losses" if targets else "logits"
    jax.eval_shape(lambda params: model.apply({"params": params}, TOKENS, HYPER, *targets, method=method), params)
    assert len(seen) % 7 == 1
    assert set(seen) == {precision}


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_what_the_backward_pass_computes_again_changes_no_gradient(remat: str) -> None:
    kept, again = (
        logits_and_gradient(model, random_params(model)) for model in (model_of(), model_of(f"model.remat={remat}"))
    )
    assert jax.tree.structure(kept) == jax.tree.structure(again)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_a_document_in_a_window_is_read_as_if_it_stood_alone(activation: str) -> None:
    """Positions count from the window's start; RoPE sees their differences only."""
    model = model_of(f"backend.activation={activation}")
    params = random_params(model)

    @jax.jit
    def logits(tokens: jax.Array, segment_ids: jax.Array | None) -> Any:
        return model.apply({"params": params}, tokens, HYPER, segment_ids=segment_ids)

    tokens = np.asarray(TOKENS)
    packed, joined = (
        np.asarray(logits(tokens, np.asarray([[0, 0, 0, second, second, second, second]] * 3, np.int32)))
        for second in (1, 0)
    )
    for part in (slice(0, 3), slice(3, 6)):
        np.testing.assert_allclose(packed[:, part], logits(tokens[:, part], None), rtol=1e-3, atol=1e-4)
    assert not np.allclose(packed[:, 3:], joined[:, 3:], atol=1e-2)


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [(), ("backend.every=2", "backend.then={activation: none}")], ids=["one", "two"])
def test_the_methods_take_and_give_the_shapes_that_they_are_annotated_with(pattern: tuple[str, ...]) -> None:
    """One kind of layers and two; and a batch of targets that is not the tokens' is noticed."""
    model = model_of(*pattern)

    def calls() -> None:
        params = init_params(model, jax.random.key(0))

        def call(method: Any, *arguments: Any, **keywords: Any) -> Any:
            checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)(method.__wrapped__)  # flax wraps methods
            return model.apply({"params": params}, *arguments, **keywords, method=checked)

        assert call(LanguageModel.logits, TOKENS, HYPER).shape == (3, 7, V)
        assert call(LanguageModel.losses, TOKENS, HYPER, TOKENS, segment_ids=TOKENS).shape == (3, 7)
        caches = empty_caches(model, HYPER, batch=3, capacity=9)
        logits, caches = call(LanguageModel.decode, TOKENS, HYPER, caches, length=5)
        assert logits.shape == (3, 1, V)
        assert call(LanguageModel.decode, TOKENS[:, :1], HYPER, caches)[0].shape == (3, 1, V)
        with pytest.raises(jaxtyping.TypeCheckError):
            call(LanguageModel.losses, TOKENS, HYPER, TOKENS[:2])

    jax.eval_shape(calls)
