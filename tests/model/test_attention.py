"""The terms around the backend: against their formula in NumPy, at documents' borders, by their gradients, decoding."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quick import composed
from xattn.model import attention as subject
from xattn.model.attention import Attention, FirstValues
from xattn.model.generation import empty_caches
from xattn.model.transformer import LanguageModel, Layer, LayerHyperparameters, Stream, init_params

# B 2, S 7, D 24, four query heads of width 6 that share two key/value heads, MLP 5, V 11: none is another.
B, S, D, NH, NKV, DH, V = 2, 7, 24, 4, 2, 6, 11
SIZES = [
    *(f"model.embedding_dim={D}", f"model.num_heads={NH}", f"model.num_kv_heads={NKV}", "model.mlp_dim=5"),
    *("model.num_layers=3", "model.layers=scanned", "backend.context_length=5"),
]
HYPER = LayerHyperparameters(jnp.float32(30.0), jnp.float32(-1.5), jnp.float32(1.7))
# The third document has the first one's id.
SEGMENTS = np.asarray([[4, 4, 4, 9, 9, 4, 4], [0, 1, 1, 1, 1, 1, 2]], np.int32)
DOCUMENTS = np.asarray([[4, 4, 5, 5, 5, 6, 6], [0, 1, 1, 1, 1, 1, 2]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, V, (B, S), np.int32)

OUTPUT = ("model.exclusive=true", "model.output_norm=rmsnorm")
GATED = ("backend.decay=input", "backend.input_gate=sigmoid")
ALL = (*GATED, *OUTPUT, "model.output_gate=channel", "model.conv=3", "model.value_residual=first")
CASES = {
    "softmax": ("backend=softmax", *ALL, "backend.sink=learned", "backend.rotary_fraction=0.4"),
    "sigmoid": ("backend=sigmoid", *ALL, "model.output_gate=head", "backend.decay=learned", "model.conv=2"),
    "none": ("backend=none", *ALL, "model.conv=9"),
    "alibi": ("backend=softmax", "backend.decay=alibi", "backend.sink=zero", "backend.rotary_fraction=0"),
    "retnet": ("backend=none", "backend.decay=retnet", "model.output_norm=rmsnorm", "model.output_gate=head"),
    "gate alone": ("backend=sigmoid", "backend.input_gate=sigmoid", "backend.sigmoid_bias=learned", *OUTPUT[:1]),
}
PATTERN = (
    *("backend=none", *ALL, "backend.every=2"),
    "backend.then={activation: softmax, decay: alibi, input_gate: none, sink: learned, window: 4, rotary_fraction: 0}",
)


@cache
def model_of(*overrides: str) -> LanguageModel:
    config = composed(*SIZES, *overrides)
    return LanguageModel(config.model, config.backend, V)


def randomised(shapes: Any, seed: int = 3) -> Any:
    """Every parameter away from its initial value: a zero or a one hides mistakes."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.5 * random.standard_normal(leaf.shape) + 0.1).astype(leaf.dtype), shapes)


@cache
def shapes_of(model: LanguageModel) -> Any:
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def random_params(model: LanguageModel, seed: int = 3) -> Any:
    return randomised(shapes_of(model), seed)


@partial(jax.jit, static_argnums=0)
def init(model: LanguageModel) -> Any:
    return init_params(model, jax.random.key(0))


# ---- against the formula ---------------------------------------------------------------------------------------------


def sigma(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def turned(x: np.ndarray, position: int, fraction: float) -> np.ndarray:
    out, width = x.copy(), 2 * round(fraction * DH / 2)
    for i in range(width // 2):
        angle = position * 30.0 ** (-2 * i / width)
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i], out[2 * i + 1] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return out


def by_formula(model: LanguageModel, p: Any, x: np.ndarray, segments: list[int], first: np.ndarray | None) -> Any:
    """(the layer's attention (S, D), its values (NKV, S, DH) after the convolution) of one sequence in float64."""
    config, backend = model.config, model.backend

    def convolved(name: str) -> np.ndarray:
        rows = x @ p[name]["kernel"]
        if config.conv is None:
            return rows
        out = np.zeros_like(rows)
        for t in range(S):
            for j in range(config.conv):
                if t >= j and len(set(segments[t - j : t + 1])) == 1:
                    out[t] += p[f"{name}_taps"][j] * rows[t - j]
        return out

    q, k, v = (convolved(name).reshape(S, -1, DH).transpose(1, 0, 2) for name in ("query", "key", "value"))
    own = v
    if first is not None:
        v = p["value_mix"][0] * v + p["value_mix"][1] * first
    q, k = rms(q, p["query_norm"]["scale"]), rms(k, p["key_norm"]["scale"])
    decay = {
        "none": lambda: np.zeros((S, NKV)),
        "alibi": lambda: np.tile([-(2.0**-4), -(2.0**-8)], (S, 1)),
        "retnet": lambda: np.tile(np.log([1 - 1 / 32, 1 - 1 / 64]), (S, 1)),
        "learned": lambda: np.tile(np.log(sigma(p["decay_bias"])), (S, 1)),
        "input": lambda: np.log(sigma(x @ p["decay"]["kernel"] + p["decay"]["bias"])),
    }[backend.decay]()
    gate = np.zeros((S, NKV))
    if backend.input_gate == "sigmoid":
        gate = np.log(sigma(x @ p["input_gate"]["kernel"] + p["input_gate"]["bias"]))
    heads = []
    for h in range(NH):
        kv = h // (NH // NKV)
        y = np.zeros((S, DH))
        for t in range(S):
            keys = [s for s in range(t + 1) if segments[s] == segments[t]]
            a = np.array(
                [
                    turned(q[h, t], t, backend.rotary_fraction) @ turned(k[kv, s], s, backend.rotary_fraction)
                    for s in keys
                ]
            )
            a = 1.7 * a / math.sqrt(DH)
            e = np.array([decay[s + 1 : t + 1, kv].sum() + gate[s, kv] for s in keys])
            if backend.activation == "softmax":
                sink = {"none": 0.0, "zero": 1.0, "learned": np.exp(p["sink"][h]) if "sink" in p else 0.0}[backend.sink]
                w = np.exp(a + e) / (sink + np.exp(a + e).sum())
            elif backend.activation == "sigmoid":
                w = sigma(a + (p["sigmoid_bias"][h] if "sigmoid_bias" in p else -1.5) + e)
            else:
                w = a * np.exp(e)
            y[t] = w @ v[kv, keys]
            if config.exclusive and len(keys) == 1:
                y[t] = 0  # what rounding leaves in float64, a norm would make large
            elif config.exclusive:
                unit = v[kv, t] / np.linalg.norm(v[kv, t])
                y[t] -= (y[t] @ unit) * unit
        heads.append(rms(y, p["output_norm"]["scale"]) if config.output_norm == "rmsnorm" else y)
    out = np.stack(heads, 1)
    if config.output_gate != "none":
        out = out * sigma(x @ p["output_gate"]["kernel"]).reshape(S, NH, -1)
    return out.reshape(S, D) @ p["output"]["kernel"], own


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_its_formula(case: str, segments: np.ndarray | None) -> None:
    """With another layer's values to mix in, and without."""
    model = model_of(*CASES[case])
    module = Attention(model.config, model.backend)
    random = np.random.default_rng(1)
    x = random.standard_normal((B, S, D)).astype(np.float32)
    mixes = model.config.value_residual == "first"
    others = FirstValues(random.standard_normal((B, NKV, S, DH)).astype(np.float32), np.array(True)) if mixes else None
    params = randomised(jax.eval_shape(module.init, jax.random.key(0), x, others, HYPER, segments, None, None))[
        "params"
    ]

    @jax.jit
    def run(first: FirstValues | None) -> Any:
        return module.apply({"params": params}, x, first, HYPER, segments, None, None)

    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    ids = [[0] * S] * B if segments is None else segments.tolist()
    for is_there in (True, False) if others else (False,):
        first = others and others._replace(is_there=np.array(is_there))
        out, after, _ = jax.device_get(run(first))
        for row in range(B):
            mixed_in = np.asarray(others.values[row], np.float64) if others and is_there else None
            expected, values = by_formula(model, exact, np.asarray(x[row], np.float64), ids[row], mixed_in)
            np.testing.assert_allclose(out[row], expected, rtol=1e-3, atol=2e-4)
            if after is not None:
                np.testing.assert_allclose(after.values[row], mixed_in if is_there else values, rtol=1e-3, atol=1e-4)
                assert after.is_there


def test_the_slopes_of_alibi_are_the_papers_for_any_number_of_heads() -> None:
    np.testing.assert_allclose(-subject.alibi(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    np.testing.assert_allclose(-subject.alibi(3), [1 / 16, 1 / 256, 1 / 4])
    np.testing.assert_allclose(-subject.alibi(12)[8:], [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    np.testing.assert_allclose(-subject.alibi(1), [1 / 256])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_of_a_token_that_attends_to_itself_alone_nothing_is_left(dtype: Any) -> None:
    """Nor has it a gradient; a multiple of the value, rounded. A hundredth in another direction stays."""
    random = np.random.default_rng(2)
    v = random.standard_normal((1, 2, 50, 64)).astype(dtype)

    @jax.jit
    def left(v: jax.Array, more: float) -> jax.Array:
        y = (jnp.float32(0.37) * v.astype(jnp.float32)).astype(dtype)
        y = y.at[..., 1].add(jnp.asarray(more, dtype)).astype(jnp.float32)
        return subject.without_own_value(y, v)

    np.testing.assert_array_equal(left(v, 0.0), 0)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda v: 1e3 * left(v, 0.0).sum()))(v).astype(np.float32), 0)
    np.testing.assert_allclose(np.linalg.norm(left(v, 0.3), axis=-1), 0.3, rtol=0.2)


def test_a_value_of_zero_takes_nothing_out() -> None:
    y = np.ones((1, 2, 1, 3), np.float32)

    @jax.jit
    def left_and_gradient(v: jax.Array) -> Any:
        left, backward = jax.vjp(lambda v: subject.without_own_value(jnp.asarray(y), v), v)
        return left, backward(jnp.ones_like(left))

    left, gradient = left_and_gradient(np.zeros((1, 1, 1, 3), np.float32))
    np.testing.assert_array_equal(left, y)
    assert np.isfinite(gradient).all()


# ---- from layer to layer ---------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def forward(model: LanguageModel, params: Any, segments: Any = None, tokens: Any = TOKENS) -> Any:
    return model.apply({"params": params}, tokens, HYPER, segment_ids=segments)


@partial(jax.jit, static_argnums=0)
def losses_and_gradient(model: LanguageModel, params: Any, hyper: Any) -> Any:
    def loss(params: Any) -> Any:
        losses: Any = model.apply(
            {"params": params}, TOKENS, hyper, TOKENS[:, ::-1], segment_ids=SEGMENTS, method="losses"
        )
        return losses.mean(), losses

    gradient, losses = jax.grad(loss, has_aux=True)(params)
    return losses, gradient


def test_the_first_layers_values_reach_every_later_layer() -> None:
    """The layers called one after the other in Python, in a model of two kinds and in one of one."""
    for overrides, of_layers in ((CASES["softmax"], 3 * ["backend"]), (PATTERN, ["backend", "then", "backend"])):
        model = model_of(*overrides)
        params = random_params(model)
        stream = Stream(
            params["token_embedding"]["embedding"][TOKENS],
            FirstValues(np.zeros((B, NKV, S, DH), np.float32), np.array(False)),
        )
        seen: dict[str, int] = {}
        values = []
        run = {kind: jax.jit(Layer(model.config, keys, False).apply) for kind, keys in model.backend.kinds.items()}
        for i, kind in enumerate(of_layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
            row = seen[kind] = seen.get(kind, -1) + 1
            own = jax.tree.map(lambda leaf, row=row: leaf[row], params.get(f"{kind}_layers", {}))
            layer["attention"] |= own.get("attention", {})
            stream, _ = run[kind]({"params": layer}, stream, HYPER, None, None, None)
            stream = jax.device_get(stream)
            values.append(stream.first.values)
        np.testing.assert_allclose(values[2], values[0], rtol=1e-6)
        x = stream.x
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["final_norm"]["scale"]
        expected = x @ params["output_embedding"]["embedding"].T
        np.testing.assert_allclose(forward(model, params), expected, rtol=2e-3, atol=2e-3)


def test_every_way_to_compile_computes_the_same() -> None:
    model, rematerialised = (model_of(*CASES["softmax"], *how) for how in ((), ("model.remat=full",)))
    params = random_params(model)
    expected, found = (losses_and_gradient(each, params, HYPER) for each in (model, rematerialised))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=jax.tree_util.keystr(path))
    for meaning in (CASES["softmax"], PATTERN):
        model, unrolled = (model_of(*meaning, *how) for how in ((), ("model.layers=unrolled",)))
        params = random_params(model)
        np.testing.assert_allclose(forward(unrolled, params), forward(model, params), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("meaning", [CASES["softmax"], PATTERN], ids=["one kind", "two kinds"])
def test_every_parameter_has_a_gradient_but_the_first_layers_mix(meaning: tuple[str, ...]) -> None:
    """At random parameters, and where the terms of one kind start: gates of zeros learn too."""
    model = model_of(*meaning)
    for params in (random_params(model), *([init(model)] if model.backend.then is None else [])):
        _, gradient = jax.device_get(losses_and_gradient(model, params, HYPER))
        mix = gradient["layers"]["attention"].pop("value_mix")
        assert not mix[0].any()
        assert (np.abs(mix[1:]) > 0).all()
        of_terms = {name: layers["attention"] for name, layers in gradient.items() if name.endswith("layers")}
        for path, leaf in jax.tree_util.tree_leaves_with_path(of_terms):
            assert np.isfinite(leaf).all(), path
            assert (np.abs(leaf).reshape(len(leaf), -1).max(-1) > 1e-9).all(), jax.tree_util.keystr(path)


def test_a_pack_computes_what_its_members_do() -> None:
    """Under vmap over parameters and numbers, which differ."""
    model = model_of(*CASES["softmax"])
    members = [(random_params(model, seed), HYPER._replace(logit_scale=np.float32(seed))) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    together = jax.device_get(jax.jit(jax.vmap(partial(losses_and_gradient, model)))(*stacked))
    for i, member in enumerate(members):
        alone = losses_and_gradient(model, *member)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(b[i], a, rtol=1e-3, atol=1e-4, err_msg=jax.tree_util.keystr(path))


# ---- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["softmax", "none"])
def test_a_document_in_a_window_is_read_as_if_it_stood_alone(case: str) -> None:
    """No convolution, no decay and no value reaches over a border."""
    model = model_of(*CASES[case])
    params = random_params(model)
    packed, joined = (
        np.asarray(forward(model, params, np.asarray([[0, 0, 0, second, second, second, second]] * B, np.int32)))
        for second in (1, 0)
    )
    for part in (slice(0, 3), slice(3, 6)):
        alone = forward(model, params, None, TOKENS[:, part])
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-3, atol=1e-3)
    assert not np.allclose(packed[:, 3:], joined[:, 3:], atol=1e-2)


# ---- where it starts -------------------------------------------------------------------------------------------------


def test_the_terms_start_as_stated() -> None:
    found = jax.device_get(init(model_of(*CASES["softmax"]))["layers"]["attention"])
    half_lives = np.array([2, 5])  # up to the context length
    np.testing.assert_allclose(
        sigma(np.asarray(found["decay"]["bias"], np.float64)) ** half_lives, np.full((3, NKV), 0.5), rtol=1e-5
    )
    np.testing.assert_allclose(sigma(np.asarray(found["input_gate"]["bias"])), 0.982, atol=1e-4)
    for name in ("decay", "input_gate", "output_gate"):
        assert not found[name]["kernel"].any(), name
    for name in ("query_taps", "key_taps", "value_taps"):
        np.testing.assert_array_equal(found[name], np.broadcast_to([[1.0], [0], [0]], found[name].shape))
    np.testing.assert_array_equal(found["value_mix"], np.full((3, 2), 0.5))
    assert not found["sink"].any()
    np.testing.assert_array_equal(found["output_norm"]["scale"], np.ones((3, DH)))


@pytest.mark.parametrize(("heads", "length", "half_lives"), [(1, 50, [10]), (2, 1, [2, 2]), (4, 54, [2, 6, 18, 54])])
def test_half_lives_are_spread_over_the_heads(heads: int, length: int, half_lives: list[int]) -> None:
    np.testing.assert_allclose(sigma(subject.forget_biases(heads, length)) ** half_lives, 0.5)


def test_a_learned_decay_starts_as_an_input_decay_does() -> None:
    @jax.jit
    def started() -> Any:
        models = [model_of(f"backend.decay={decay}") for decay in ("learned", "input")]
        learned, by_input = (
            Attention(model.config, model.backend).init(
                jax.random.key(0), jnp.ones((B, S, D)), None, HYPER, None, None, None
            )["params"]
            for model in models
        )
        return learned["decay_bias"], by_input["decay"]["bias"]

    np.testing.assert_array_equal(*started())


# ---- decoding --------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def decoded(model: LanguageModel, params: Any, segments: Any) -> Any:
    """The logits after each token from the third on: a padded prompt of three, then one token after the other."""

    def call(tokens: Any, ids: Any, caches: Any, **length: Any) -> Any:
        given = (tokens, HYPER, caches)
        return model.apply({"params": params}, *given, segment_ids=ids, method="decode", **length)

    def step(caches: Any, column: Any) -> Any:
        logits, caches = call(*(None if x is None else x[:, None] for x in column), caches)
        return caches, logits[:, 0]

    caches = empty_caches(model, HYPER, batch=B, capacity=S, documents=segments is not None)
    prompt = TOKENS[:, :4] + (np.arange(4) == 3).astype(np.int32)
    logits, caches = call(prompt, None if segments is None else segments[:, :4], caches, length=jnp.int32(3))
    columns = TOKENS[:, 3:].T, None if segments is None else segments[:, 3:].T
    _, rest = jax.lax.scan(step, caches, columns)
    return jnp.concatenate([logits, rest.swapaxes(0, 1)], axis=1)


@pytest.mark.parametrize(
    ("overrides", "segments"),
    [
        (CASES["softmax"], DOCUMENTS),
        (CASES["sigmoid"], None),
        (CASES["none"], DOCUMENTS),
        (PATTERN, DOCUMENTS),
    ],
    ids=["softmax, documents", "sigmoid", "none, documents", "two, documents"],
)
def test_decoding_is_the_parallel_form_at_every_position(
    overrides: tuple[str, ...], segments: np.ndarray | None
) -> None:
    """Past context_length; convolutions of 3, 2 and 9 tokens."""
    model = model_of(*overrides)
    params = random_params(model)
    expected = np.asarray(forward(model, params, segments))
    np.testing.assert_allclose(decoded(model, params, segments), expected[:, 2:], rtol=2e-3, atol=2e-3)
    assert np.abs(expected[:, 1:] - expected[:, :-1]).max((0, 2)).min() > 0.1  # one position is not the next


def test_caches_know_whether_documents_come() -> None:
    model = model_of(*CASES["softmax"])
    caches = empty_caches(model, HYPER, batch=B, capacity=S)
    call = partial(model.apply, segment_ids=DOCUMENTS, method="decode")
    with pytest.raises(ValueError, match="documents=False, and this call has documents=True"):
        jax.eval_shape(call, {"params": shapes_of(model)}, TOKENS, HYPER, caches)
