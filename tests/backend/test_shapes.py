"""The shapes in the signatures are true: a type checker compares them with the arrays, and notices a wrong one."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from beartype.door import is_bearable
from jax.sharding import AxisType
from jaxtyping import TypeCheckError, jaxtyped

from xattn.backend import (
    api,
    arguments,
    blockwise,
    cache as backend_cache,
    cudnn,
    decay,
    decode,
    dispatch,
    formula,
    hopper,
    linear,
    module,
    reference,
    ring,
    rope,
    spec,
)
from xattn.backend.hopper import fused

MODULES = (
    *(api, arguments, backend_cache, blockwise, cudnn, decay, decode, dispatch, formula, fused, hopper),
    *(linear, module, reference, ring, rope, spec),
)
B, S, DHQK, DHV = 2, 8, 10, 3
# Axes of the queries' heads and of the keys': equal, grouped, and one head without an axis.
HEADS = (((5,), (5,)), ((6,), (2,)), ((), ()))
ACTIVATIONS = ("softmax", "sigmoid", "none")


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every public function of the backend checks what it takes and returns, whoever calls it."""
    for light in (dispatch, hopper):  # they import these for the type checker alone
        for name in ("AttentionSpec", "Keys", "Output", "Queries", "Values"):
            monkeypatch.setattr(light, name, getattr(spec, name), raising=False)
    wrapped: dict[Any, Any] = {}
    for each in MODULES:
        for name, value in list(vars(each).items()):
            if inspect.isfunction(value) and value.__module__.startswith("xattn.backend") and name[0] != "_":
                wrapped[value] = wrapped.get(value) or jaxtyped(value, typechecker=beartype)
                monkeypatch.setattr(each, name, wrapped[value])


def zeros(*shape: int, dtype: Any = "float32") -> jax.Array:
    return jnp.zeros(shape, dtype)


def arrays(heads: tuple[int, ...], kv_heads: tuple[int, ...], length: int = S) -> tuple[jax.Array, ...]:
    return zeros(B, *heads, length, DHQK), zeros(B, *kv_heads, length, DHQK), zeros(B, *kv_heads, length, DHV)


def fields_are_true(record: Any) -> None:
    with jaxtyped("context"):
        for name, hint in get_type_hints(type(record)).items():
            assert is_bearable(getattr(record, name), hint), (name, hint)


def trace(function: Any, *given: Any) -> None:
    """Traces value and gradients: the shapes show without computing anything."""
    jax.eval_shape(jax.grad(lambda *x: jnp.sum(function(*x).astype("float32"))), *given)


def terms(kv_heads: tuple[int, ...], length: int = S) -> dict[str, jax.Array]:
    return {name: zeros(B, *kv_heads, length) for name in ("log_decay", "log_input_gate")}


# What each implementation may be given besides its arrays.
RESTRICTED: dict[str, Any] = {"window": 3, "segment_ids": zeros(B, S, dtype="int32")}
PARTIAL: dict[str, Any] = {"rotary_fraction": 0.5, "logit_scale": jnp.float32(0.7)}
GIVEN: dict[str, list[dict[str, Any]]] = {
    "reference": [{}, RESTRICTED, {"attention_mask": zeros(S, S, dtype="bool")}],
    "blockwise": [{}, RESTRICTED, {"attention_mask": zeros(S, S, dtype="bool")}],
    "ring": [{}, RESTRICTED],
    "linear": [{}, {"segment_ids": zeros(B, S, dtype="int32")}],
}


@pytest.mark.parametrize(
    ("implementation", "devices"), [("reference", 1), ("blockwise", 1), ("ring", 2), ("linear", 1), ("linear", 2)]
)
def test_attention(implementation: str, devices: int) -> None:
    """Each activation with all that it may be given, for each kind of heads; less than all under one activation."""
    mesh = jax.make_mesh((devices,), ("context",), axis_types=(AxisType.Auto,))
    activations = ("none",) if implementation == "linear" else ACTIVATIONS
    lesser = GIVEN[implementation]
    calls = [
        (heads, activation, {**lesser[-1], **terms(heads[1]), **PARTIAL})
        for heads in HEADS
        for activation in activations
    ]
    for (heads, kv_heads), activation, given in [*calls, *((HEADS[1], activations[-1], given) for given in lesser)]:
        own = {"sigmoid_bias": zeros(*heads)} if activation == "sigmoid" else {}
        own = {"sink": zeros(*heads)} if activation == "softmax" else own
        attend = partial(
            api.attention,
            activation_function=activation,
            theta=jnp.float32(9.0),
            implementation=implementation,
            **given,
            **own,
        )
        with jax.set_mesh(mesh):
            trace(attend, *arrays(heads, kv_heads))


def test_the_records() -> None:
    def of(heads: int, kv_heads: int, mask: jax.Array, segments: jax.Array) -> None:
        given = {"attention_mask": mask, "segment_ids": segments, "activation_function": "sigmoid"}
        q, k, _ = arrays((heads,), (kv_heads,))
        sizes = {"batch": B, "num_heads": heads, "num_kv_heads": kv_heads, "length": S}
        meaning = arguments.checked_spec(**sizes, **given, **terms((kv_heads,)), **PARTIAL)
        fields_are_true(arguments.checked_spec(**sizes, sink=zeros(heads)))
        fields_are_true(blockwise.key_side(k, k, meaning))
        for record in (meaning, reference.attended(q, k, meaning), reference.attended(q, k, meaning, jnp.arange(4))):
            fields_are_true(record)

    for heads, kv_heads in ((5, 5), (6, 2)):
        jax.eval_shape(partial(of, heads, kv_heads), zeros(S, S, dtype="bool"), zeros(B, S, dtype="int32"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("fades", [False, True])
def test_decoding(activation: str, window: int | None, fades: bool) -> None:
    """Caches and entries too, of one layer and of three, stacked; where they fade there are documents too."""

    def stacked(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.stack([x, x, x]), tree)

    def of_tokens(meaning: Any, keys: jax.Array) -> Any:
        if not fades:
            return meaning
        keys = keys if keys.ndim == 4 else keys[:, None]
        length = keys.shape[2]
        own = terms(keys.shape[1:2], length)
        return decode.of_tokens(meaning, keys, segment_ids=zeros(B, length, dtype="int32"), **own)

    def run(meaning: Any, cache: Any, prompt: Any, token: Any) -> None:
        _, cache = decode.prefill(*prompt, cache, of_tokens(meaning, prompt[1]), length=S - 1)
        meaning = of_tokens(meaning, token[1])
        _, cache = decode.decode_step(*token, cache, meaning)
        _, entry = decode.attend(*token, cache, meaning)
        for record in (cache, entry, stacked(entry), decode.append(stacked(cache), stacked(entry))):
            fields_are_true(record)

    choices: Any = {"activation_function": activation, "window": window, "context_length": S}
    for heads, kv_heads in HEADS:
        meaning = decode.decoding_spec(num_heads=(*heads, 1)[0], **choices)
        sizes = {"num_kv_heads": (*kv_heads, 1)[0], "head_dim_qk": DHQK, "head_dim_v": DHV, "capacity": 13}
        cache = backend_cache.init_cache(meaning, batch=B, **sizes, fades=fades, documents=fades)
        fields_are_true(backend_cache.grow(stacked(cache), meaning, 20))
        jax.eval_shape(run, meaning, cache, arrays(heads, kv_heads), arrays(heads, kv_heads, 1))


def test_rotation() -> None:
    x, y = zeros(B, 3, S, DHQK), zeros(S, DHQK, dtype="bfloat16")
    rope.apply_rotary_emb(x, y)
    rope.apply_rotary_emb(x, y, *rope.precompute_freqs(DHQK, S + 4, jnp.float32(9.0)))
    rope.rotary_tables(zeros(3, B, dtype="int32"), DHQK, 9.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gates", ["none", "sigmoid"])
def test_the_module(activation: str, gates: Any) -> None:
    call = jaxtyped(inspect.unwrap(module.mLSTMBackendAttention.__call__), typechecker=beartype)
    backend = module.mLSTMBackendAttention(
        module.mLSTMBackendAttentionConfig(activation_function=activation, gates=gates)
    )
    for heads, kv_heads in HEADS:
        function = partial(call, i=zeros(B, *kv_heads, S), f=zeros(B, *kv_heads, S, 1)) if gates != "none" else call
        trace(partial(function, backend), *arrays(heads, kv_heads))
        if activation == "none":
            state = zeros(B, *kv_heads, DHQK, DHV)
            jax.eval_shape(
                partial(function, backend, c_initial=state, return_last_states=True), *arrays(heads, kv_heads)
            )


def test_the_kernels_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = zeros(B, 6, S, 64, dtype="bfloat16"), zeros(B, 2, S, 64, dtype="bfloat16")
    for activation in ("sigmoid", "none"):
        meaning = arguments.checked_spec(num_heads=6, length=S, activation_function=activation)
        jax.eval_shape(lambda q, k, meaning=meaning: hopper.hopper(q, k, k, meaning), q, k)
    # cuDNN itself is not here: XLA's attention takes and returns the same arrays.
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, implementation, **more: plain(*x, **more))
    softmax = arguments.checked_spec(num_heads=6, length=S)
    jax.eval_shape(lambda q, k: cudnn.cudnn(q, k, k, softmax), q.astype("float32"), k.astype("float32"))


def turned(x: jax.Array) -> jax.Array:
    return x.swapaxes(-1, -2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v, of: reference.reference(q, k, v[:, :, :-1], of),
        lambda q, k, v, of: reference.reference(q, turned(k), v, of),
        lambda q, k, v, of: reference.reference(q.astype(int), k, v, of),
        lambda q, k, v, of: api.attention(q, k, v, turned(zeros(S, S + 1, dtype="bool"))),
        lambda q, k, v, of: decode.attend(q, k, v, backend_cache.KVCache(k, v, zeros(dtype="int32")), of),
        lambda q, k, v, of: formula.scores(turned(q), k),
        lambda q, k, v, of: rope.rotate(q, zeros(S, DHQK // 2), zeros(S, 3)),
    ],
)
def test_a_wrong_array_is_noticed(wrong: Any) -> None:
    with pytest.raises(TypeCheckError):
        wrong(*arrays((6,), (2,)), arguments.checked_spec(num_heads=6, length=S))


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "product", lambda *x: turned(spec.product(*x)))
    with pytest.raises(TypeCheckError, match="return"):
        reference.reference(*arrays((6,), (2,)), arguments.checked_spec(num_heads=6, length=S))
