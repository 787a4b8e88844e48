"""Layers of two kinds: each is the layer of its own kind, and a pattern that changes nothing changes no bit."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quick import composed
from xattn.data.batches import Batch
from xattn.evaluation import attention as statistics
from xattn.model.generation import empty_caches
from xattn.model.pattern import layers_of
from xattn.model.transformer import LanguageModel, Layer, LayerHyperparameters, Stream, attention_inputs, init_params

from .test_transformer import SMALL, TOKENS, V

# They differ between the kinds, so that a layer with the other kind's numbers shows.
HYPER = {
    "backend": LayerHyperparameters(jnp.float32(100.0), jnp.float32(-1.5)),
    "then": LayerHyperparameters(jnp.float32(7.0), jnp.float32(0.5)),
}
DEPTH = "model.num_layers=5"
NONE_SOFTMAX = ("backend=none", "backend.every=2", "backend.then={activation: softmax}")
LEARNED_SOFTMAX = (
    *("backend=sigmoid", "backend.sigmoid_bias=learned"),
    *("backend.every=2", "backend.then={activation: softmax}"),
)


@cache
def model_of(*overrides: str) -> LanguageModel:
    config = composed(*SMALL, *overrides)
    return LanguageModel(config.model, config.backend, V)


@partial(jax.jit, static_argnums=0)
def init(model: LanguageModel) -> Any:
    return init_params(model, jax.random.key(0))


@cache
def shapes_of(model: LanguageModel) -> Any:
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def random_params(model: LanguageModel) -> Any:
    """Every parameter away from its initial value: scales of 1 hide mistakes."""
    random = np.random.default_rng(7)
    shapes = shapes_of(model)
    return jax.tree.map(lambda leaf: (0.5 * random.standard_normal(leaf.shape) + 0.1).astype(leaf.dtype), shapes)


@partial(jax.jit, static_argnums=0)
def forward(model: LanguageModel, params: Any, tokens: Any, hyper: Any) -> Any:
    return model.apply({"params": params}, tokens, hyper)


@partial(jax.jit, static_argnums=0)
def inputs_of(model: LanguageModel, params: Any, hyper: Any) -> Any:
    return attention_inputs(model, params, TOKENS, hyper, None)


@partial(jax.jit, static_argnums=0)
def losses_and_gradients(model: LanguageModel, params: Any, hyper: Any, dropout: Any = None) -> Any:
    """(losses (B, S), gradient of their mean by the parameters, and by the hyperparameters)."""

    def loss(params: Any, hyper: Any) -> Any:
        rngs = {} if dropout is None else {"dropout": dropout}
        train = dropout is not None
        losses: Any = model.apply(
            {"params": params}, TOKENS, hyper, TOKENS[:, ::-1], train=train, rngs=rngs, method="losses"
        )
        return jnp.mean(losses), losses

    gradients, losses = jax.grad(loss, (0, 1), has_aux=True)(params, hyper)
    return losses, *gradients


def different(one: Any, other: Any) -> list[str]:
    """Paths of the leaves whose bits differ."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    return [jax.tree_util.keystr(path) for (path, a), b in pairs if np.asarray(a).tobytes() != np.asarray(b).tobytes()]


def assert_close(one: Any, other: Any, **tolerance: float) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)


# ---- what the model computes -----------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def one_layer(model: LanguageModel, params: Any, x: jax.Array, hyper: Any) -> Any:
    """The stream after a layer of a model whose layers are all alike."""
    layer = Layer(model.config, model.backend, False)
    return layer.apply({"params": params}, Stream(x, None), hyper, None, None, None)[0].x


def layer_by_layer(params: Any, num_layers: int, every: int, *of_kinds: tuple[str, ...]) -> np.ndarray:
    """Logits, the layers called one after the other in Python: the overrides are those of models of one kind."""
    singles = dict(zip(("backend", "then"), (model_of(*each, "model.num_layers=2") for each in of_kinds), strict=True))
    seen = dict.fromkeys(singles, 0)
    x = params["token_embedding"]["embedding"][np.asarray(TOKENS)]
    for number in range(1, num_layers + 1):
        kind = "then" if number % every == 0 else "backend"
        layer = jax.tree.map(lambda leaf, row=number - 1: leaf[row], params["layers"])
        for name, own in params.get(f"{kind}_layers", {}).items():
            layer[name] = layer[name] | jax.tree.map(lambda leaf, row=seen[kind]: leaf[row], own)
        seen[kind] += 1
        x = one_layer(singles[kind], layer, x, HYPER[kind])
    x = np.asarray(x)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["final_norm"]["scale"]
    return normed @ params["output_embedding"]["embedding"].T


@pytest.mark.parametrize(("num_layers", "every"), [(5, 2), (3, 3)])
def test_the_layers_are_those_of_their_kinds_in_turn(num_layers: int, every: int) -> None:
    """With a layer after the last full period, and without; each kind with its own numbers."""
    model = model_of(*NONE_SOFTMAX, f"backend.every={every}", f"model.num_layers={num_layers}")
    params = random_params(model)
    assert set(params) == {"token_embedding", "layers", "final_norm", "output_embedding"}
    expected = layer_by_layer(params, num_layers, every, ("backend=none",), ("backend=softmax",))
    logits = forward(model, params, TOKENS, HYPER)
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)
    swapped = forward(model, params, TOKENS, {"backend": HYPER["then"], "then": HYPER["backend"]})
    assert np.abs(swapped - expected).max() > 0.01  # the tolerance would see another layer's numbers


def test_parameters_that_one_kind_alone_has_reach_its_layers_in_their_order() -> None:
    """A learned bias, another in each layer, of five layers in periods of three."""
    model = model_of(*LEARNED_SOFTMAX, "backend.every=3", "model.num_layers=5")
    params = random_params(model)
    learned = ("backend=sigmoid", "backend.sigmoid_bias=learned")
    expected = layer_by_layer(params, 5, 3, learned, ("backend=softmax",))
    np.testing.assert_allclose(forward(model, params, TOKENS, HYPER), expected, rtol=2e-4, atol=2e-4)
    shuffled = jax.tree.map(lambda leaf: leaf[::-1], params["backend_layers"])
    assert np.abs(forward(model, params | {"backend_layers": shuffled}, TOKENS, HYPER) - expected).max() > 0.01


@pytest.mark.parametrize("overrides", [NONE_SOFTMAX, LEARNED_SOFTMAX], ids=["none softmax", "learned softmax"])
def test_no_token_looks_ahead(overrides: tuple[str, ...]) -> None:
    """What follows a token changes none of its logits, and what precedes it does."""
    model = model_of(*overrides, DEPTH)
    params = random_params(model)
    base = np.asarray(forward(model, params, TOKENS, HYPER))
    for changed in range(7):
        tokens = np.asarray(TOKENS) + (np.arange(7) == changed).astype(np.int32)
        other = np.asarray(forward(model, params, tokens % V, HYPER))
        np.testing.assert_array_equal(other[:, :changed], base[:, :changed])
        assert (np.abs(other - base)[:, changed:].max((0, 2)) > 1e-4).all(), changed


@partial(jax.jit, static_argnums=0)
def decoded(model: LanguageModel, params: Any, tokens: Any, caches: Any, length: Any = None) -> Any:
    return model.apply({"params": params}, tokens, HYPER, caches, length=length, method="decode")


@pytest.mark.parametrize(
    "overrides",
    [
        LEARNED_SOFTMAX,
        (
            *("backend=softmax", "backend.window=3", "backend.every=2", "model.num_kv_heads=1"),
            "backend.then={activation: none, window: null}",
        ),
    ],
    ids=["learned softmax", "windows none"],
)
def test_decoding_is_the_parallel_form_at_every_position(overrides: tuple[str, ...]) -> None:
    """A padded prompt, then token by token; states and caches of keys in one model."""
    model = model_of(*overrides, DEPTH)
    params = random_params(model)
    expected = np.asarray(forward(model, params, TOKENS, HYPER))
    tokens = np.asarray(TOKENS)
    caches = empty_caches(model, HYPER, batch=3, capacity=7)
    assert set(caches) == {"backend", "then"}
    prompt = np.where(np.arange(4) < 3, tokens[:, :4], 0)  # three tokens count
    logits, caches = decoded(model, params, prompt, caches, jnp.int32(3))
    np.testing.assert_allclose(np.asarray(logits)[:, 0], expected[:, 2], rtol=1e-3, atol=1e-3)
    for position in range(3, 7):
        logits, caches = decoded(model, params, tokens[:, position, None], caches)
        np.testing.assert_allclose(
            np.asarray(logits)[:, 0], expected[:, position], rtol=1e-3, atol=1e-3, err_msg=str(position)
        )
    assert np.abs(expected[:, 1:] - expected[:, :-1]).max((0, 2)).min() > 0.1  # one position is not the next


# ---- initial parameters ----------------------------------------------------------------------------------------------


def test_a_layer_begins_with_the_same_numbers_whatever_its_kind() -> None:
    """Bit for bit as in the models of one kind; and the bias is learned in the layers alone that have one."""
    depth = "model.num_layers=3"
    mixed = init(model_of(*LEARNED_SOFTMAX, depth))
    sigmoid = init(model_of("backend=sigmoid", "backend.sigmoid_bias=learned", depth))
    softmax = init(model_of("backend=softmax", depth))
    own = mixed.pop("backend_layers")
    assert different(mixed, softmax) == []
    bias = sigmoid["layers"]["attention"].pop("sigmoid_bias")
    assert different(mixed, sigmoid) == []
    assert different(own, {"attention": {"sigmoid_bias": bias[jnp.asarray([0, 2])]}}) == []
    np.testing.assert_allclose(own["attention"]["sigmoid_bias"], -math.log(7), rtol=1e-6)
    kernel = mixed["layers"]["attention"]["query"]["kernel"]
    assert np.abs(kernel[1:] - kernel[:-1]).max((1, 2)).min() > 0.01  # each layer draws its own


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        (NONE_SOFTMAX, 0),
        (LEARNED_SOFTMAX, 3 * 2),
        (("backend=none", "backend.every=2", "backend.then={activation: sigmoid, sigmoid_bias: learned}"), 2 * 2),
        (("backend=sigmoid", "backend.sigmoid_bias=learned", "backend.every=2", "backend.then={theta: 3}"), 5 * 2),
    ],
    ids=["no bias", "first kind's", "second kind's", "both kinds'"],
)
def test_the_number_of_parameters(overrides: tuple[str, ...], more: int) -> None:
    """Of five layers that of a model without a bias, and a bias a head in each layer of a kind that learns it."""

    def count(model: LanguageModel) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model)))

    assert count(model_of(*overrides, DEPTH)) == count(model_of("backend=softmax", DEPTH)) + more


# ---- a pattern that changes nothing ----------------------------------------------------------------------------------


def of_one_kind_and_of_two(then: str, *same: str) -> tuple[Any, Any]:
    """Losses and gradients of a model, and of the same with a pattern that changes nothing."""
    lean = "model.mlp=gelu", "model.norm_placement=pre", "model.qk_norm=none", "model.num_layers=3"
    alone, mixed = (model_of(*lean, *same, *more) for more in ((), ("backend.every=2", f"backend.then={then}")))
    assert mixed.backend.then is not None  # it is a pattern
    params = random_params(alone)
    assert different(random_params(mixed), params) == []
    one = HYPER["backend"]
    losses, gradient, expected_by_number = losses_and_gradients(alone, params, one)
    ours, our_gradient, by_number = losses_and_gradients(mixed, params, dict.fromkeys(HYPER, one))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    total = by_number["backend"].theta + by_number["then"].theta
    np.testing.assert_allclose(total, expected_by_number.theta, rtol=1e-5)
    return (losses, gradient), (ours, our_gradient)


@pytest.mark.usefixtures("emitters_of_runs")
def test_two_kinds_that_compute_the_same_are_one() -> None:
    """Scanned: losses and gradients, bit for bit."""
    one, two = of_one_kind_and_of_two("{window: 7}", "backend=softmax")
    assert different(two, one) == []


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("layers", "activation", "then"),
    [("scanned", "softmax", "{window: 7}"), ("unrolled", "sigmoid", "{implementation: reference}")],
    ids=["scanned", "unrolled"],
)
def test_two_kinds_that_compute_the_same_are_one_as_runs_are_compiled(layers: str, activation: str, then: str) -> None:
    """Unrolled bit for bit. Scanned, XLA fuses the layer after the last period in another way than in the loop."""
    # A width that no other test here has: jit does not see that its programs would be optimised.
    one, two = of_one_kind_and_of_two(then, f"backend={activation}", f"model.layers={layers}", "model.mlp_dim=11")
    assert_close(two, one, rtol=1e-5, atol=1e-6)
    if layers == "unrolled":
        assert different(two, one) == []


# ---- how it is compiled ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["model.layers=unrolled", "model.remat=full", "model.remat=dots"])
def test_scanned_unrolled_and_computed_again_are_one_model(how: str) -> None:
    """The same parameters, losses, and gradients by parameters and numbers."""
    scanned, other = (model_of(*LEARNED_SOFTMAX, DEPTH, *more) for more in ((), (how,)))
    params = random_params(scanned)
    assert different(random_params(other), params) == []
    found = losses_and_gradients(other, params, HYPER)
    assert_close(found, losses_and_gradients(scanned, params, HYPER), rtol=1e-4, atol=1e-5)
    assert np.abs(found[0]).max() > 0.1


def test_bfloat16_computes_the_same_with_float32_parameters() -> None:
    exact, narrow = (model_of(*LEARNED_SOFTMAX, DEPTH, *more) for more in ((), ("model.dtype=bfloat16",)))
    params = random_params(exact)
    expected, exactly, _ = losses_and_gradients(exact, params, HYPER)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote bfloat16 to float32 implicitly
        losses, gradient, _ = losses_and_gradients(narrow, params, HYPER)
        assert jax.eval_shape(partial(forward, narrow), params, TOKENS, HYPER).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((losses, gradient))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses, expected, atol=0.05 * np.abs(expected).max())
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(exactly), strict=True):
        assert np.linalg.norm(ours - theirs) < 0.2 * np.linalg.norm(theirs)


def test_dropout_acts_in_training_and_differs_from_layer_to_layer() -> None:
    """Five layers of the same parameters that add nothing: their gradients differ only by what is dropped."""
    drops, plain = (model_of(*LEARNED_SOFTMAX, DEPTH, *more) for more in (("model.dropout=0.5",), ()))
    params = random_params(plain)
    layers = jax.tree.map(lambda leaf: np.broadcast_to(leaf[:1], leaf.shape), params["layers"])
    for branch, last in (("attention", "output"), ("mlp", "down")):
        layers[branch][last]["kernel"] = np.zeros_like(layers[branch][last]["kernel"])
    params = params | {"layers": layers}

    def by_layer(model: LanguageModel, seed: int | None) -> np.ndarray:
        dropout = None if seed is None else jax.random.key(seed)
        return np.asarray(losses_and_gradients(model, params, HYPER, dropout)[1]["layers"]["mlp"]["down"]["kernel"])

    kept = by_layer(plain, None)
    np.testing.assert_allclose(kept, kept[:1].repeat(5, 0), rtol=1e-4, atol=1e-6)  # without it they are alike
    np.testing.assert_array_equal(by_layer(drops, None), kept)
    first, again, other = by_layer(drops, 1), by_layer(drops, 1), by_layer(drops, 2)
    np.testing.assert_array_equal(first, again)
    size = np.abs(kept).max()
    for i in range(5):
        assert np.abs(first[i] - kept[i]).max() > 0.1 * size, i
        assert np.abs(first[i] - other[i]).max() > 0.1 * size, i
        for j in range(i):
            assert np.abs(first[i] - first[j]).max() > 0.1 * size, (i, j)


# ---- numbers of each kind --------------------------------------------------------------------------------------------


def test_each_kind_reads_its_own_numbers() -> None:
    """Theta acts through the layers of its kind; where the kinds have the same numbers they may be given once."""
    model = model_of(*LEARNED_SOFTMAX, DEPTH)
    params = random_params(model)
    _, _, by_number = losses_and_gradients(model, params, HYPER)
    assert abs(by_number["backend"].theta) > 1e-7
    assert abs(by_number["then"].theta) > 1e-7
    assert by_number["backend"].sigmoid_bias == by_number["then"].sigmoid_bias == 0  # it is learned, or there is none

    def inputs(hyper: Any) -> dict[str, Any]:
        """What attention gets in the layers, by their numbers."""
        found = inputs_of(model, params, hyper)
        rows = layers_of(model.backend, 5)
        return {
            str(i): [x if x is None else np.asarray(x)[at] for x in found[kind]]
            for kind in rows
            for at, i in enumerate(rows[kind])
        }

    changed = HYPER | {"then": HYPER["then"]._replace(theta=jnp.float32(3.0))}
    moved = {path.split("'")[1] for path in different(inputs(changed), inputs(HYPER))}
    assert moved == {"2", "3", "4"}  # the second layer's keys and queries are not rotated yet: what follows it changes
    once = HYPER["backend"]
    given_once, twice = (forward(model, params, TOKENS, numbers) for numbers in (once, dict.fromkeys(HYPER, once)))
    assert different(given_once, twice) == []
    assert different(given_once, forward(model, params, TOKENS, HYPER)) != []


# ---- what it attends to ----------------------------------------------------------------------------------------------


def test_the_statistics_of_a_layer_are_those_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the layers; from the same queries, keys and values as for a model of one kind."""
    model = model_of(*NONE_SOFTMAX, DEPTH)
    params = random_params(model)
    batch = Batch(np.pad(np.asarray(TOKENS), ((0, 0), (0, 1))), np.ones((3, 7), np.float32))
    found = statistics.attention_statistics(model)(params, HYPER, batch)
    sums = np.asarray(found.statistics["weight_sum"])
    assert sums.shape == (5, 2)
    is_softmax = (np.abs(sums - 1) < 1e-5).all(1)
    assert np.flatnonzero(is_softmax).tolist() == [1, 3]
    assert (np.abs(sums - 1) > 1e-3).all(1).tolist() == (~is_softmax).tolist()

    inputs = inputs_of(model, params, HYPER)
    for kind, activation, rows in (("then", "softmax", is_softmax), ("backend", "none", ~is_softmax)):
        monkeypatch.setattr(statistics, "attention_inputs", lambda *_, kind=kind: {"backend": inputs[kind]})
        alone = statistics.attention_statistics(model_of(f"backend={activation}", DEPTH))(params, HYPER[kind], batch)
        assert_close(alone, jax.tree.map(lambda leaf, rows=rows: leaf[rows], found), rtol=1e-4, atol=1e-5)
        assert np.abs(alone.statistics["entropy"][0] - alone.statistics["entropy"][1]).max() > 1e-3
