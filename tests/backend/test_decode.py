"""Decoding: token by token, or a prompt and then token by token, is the parallel form at every position."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend.cache import Cache, KVCache, StateCache, grow, init_cache
from xattn.backend.decode import decode_step, decoding_spec, of_tokens, prefill
from xattn.backend.spec import AttentionSpec
from xattn.testing import oracle
from xattn.testing.cases import LENGTH, THETA, Case, Inputs, inputs
from xattn.testing.contract import call_of, check_decoding, close, decoding

# n is the context length, and the sequence runs past it.
CONTEXT = 5

CASES = [
    *(Case(activation=a, context_length=CONTEXT) for a in ("softmax", "sigmoid", "none")),
    *(Case(activation=a, context_length=CONTEXT, mask="window") for a in ("softmax", "sigmoid", "none")),
    *(
        Case(activation=a, context_length=CONTEXT, pre_activation="swish", heads=6, kv_heads=2)
        for a in ("softmax", "sigmoid", "none")
    ),
    *(Case(activation=a, context_length=CONTEXT, dtype="bfloat16") for a in ("softmax", "sigmoid", "none")),
]
FADING: dict[str, Any] = {"decay": "resets", "input_gate": True, "heads": 6, "kv_heads": 2}
OF_TOKENS = [
    *(Case(activation=a, context_length=CONTEXT, decay="mild") for a in ("softmax", "sigmoid", "none")),
    *(Case(activation=a, context_length=CONTEXT, input_gate=True) for a in ("softmax", "none")),
    *(Case(activation=a, context_length=CONTEXT, mask="documents", **FADING) for a in ("softmax", "sigmoid", "none")),
    *(Case(activation=a, context_length=CONTEXT, mask="window", **FADING) for a in ("softmax", "sigmoid", "none")),
    *(Case(activation=a, context_length=CONTEXT, mask="documents") for a in ("softmax", "none")),
    Case(activation="softmax", mask="segments", decay="hard", sink="learned"),
    Case(activation="softmax", mask="window", sink="learned", logit_scale=0.7, rotary_fraction=0.5),
    Case(activation="none", decay="hard", logit_scale=0.7, rotary_fraction=0.5, pre_activation="swish"),
    Case(activation="none", decay="mild", mask="documents", rotary_fraction=0.0, dtype="bfloat16"),
]

SIZES: dict[str, Any] = {"batch": 2, "num_kv_heads": 3, "head_dim_qk": 10, "head_dim_v": 7, "capacity": 4}

step = jax.jit(decode_step)


def start(case: Case, capacity: int = LENGTH) -> tuple[Inputs, AttentionSpec, Cache]:
    spec, cache = decoding(case, capacity)
    return inputs(case), spec, cache


def tokens(x: Inputs, first: int) -> Any:
    return ((x.q[:, :, t : t + 1], x.k[:, :, t : t + 1], x.v[:, :, t : t + 1]) for t in range(first, LENGTH))


@pytest.mark.parametrize("prompt", [0, 7])
@pytest.mark.parametrize("case", CASES + OF_TOKENS, ids=str)
def test_a_prompt_and_then_token_by_token_is_the_parallel_form(case: Case, prompt: int) -> None:
    check_decoding(case, prompt=prompt)


def test_a_prompt_of_full_length_needs_no_length() -> None:
    x, spec, cache = start(CASES[0])
    out, cache = prefill(x.q[:, :, :4], x.k[:, :, :4], x.v[:, :, :4], cache, spec)
    last, _ = step(*next(tokens(x, 4)), cache, spec)
    close("out", jnp.concatenate([out, last], axis=2), oracle.forward(x.problem)[:, :, :5], "float32")


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_a_scan_decodes_as_the_loop_does_and_one_head_has_three_axes(activation: Any) -> None:
    x, spec, cache = start(Case(activation=activation, heads=1, kv_heads=1, context_length=CONTEXT))

    def body(cache: Cache, token: tuple[jax.Array, ...]) -> tuple[Cache, jax.Array]:
        out, cache = decode_step(*(a[:, None] for a in token), cache, spec)
        return cache, out[:, 0]

    _, out = jax.lax.scan(body, cache, tuple(jnp.moveaxis(a[:, 0], 1, 0) for a in (x.q, x.k, x.v)))
    close("out", jnp.moveaxis(out, 0, 1)[:, None], oracle.forward(x.problem), "float32")


def test_what_is_kept() -> None:
    def kept(activation: str, window: int | None) -> Cache:
        spec = decoding_spec(num_heads=4, activation_function=activation, context_length=8, window=window)
        return init_cache(spec, batch=1, num_kv_heads=2, head_dim_qk=6, head_dim_v=5, capacity=99, dtype=jnp.bfloat16)

    for activation in ("softmax", "sigmoid"):
        whole, windowed = kept(activation, None), kept(activation, 7)
        assert isinstance(whole, KVCache)
        assert isinstance(windowed, KVCache)
        assert whole.k.shape == (1, 2, 99, 6)
        assert whole.v.shape == (1, 2, 99, 5)
        assert windowed.k.shape == (1, 2, 7, 6)
        assert whole.k.dtype == jnp.bfloat16
    state = kept("none", None)
    assert isinstance(state, StateCache)
    assert state.state.shape == (1, 2, 6, 5)
    assert state.state.dtype == jnp.float32
    assert isinstance(kept("none", 7), KVCache)
    assert jax.tree.leaves((state.segment, kept("softmax", None).terms, kept("softmax", None).segments)) == []


def test_what_is_kept_of_tokens_that_fade_in_documents() -> None:
    sizes: dict[str, Any] = {"batch": 3, "num_kv_heads": 2, "head_dim_qk": 6, "head_dim_v": 5, "capacity": 99}
    for activation, window, kept in (("softmax", None, 99), ("none", 7, 7)):
        spec = decoding_spec(num_heads=4, activation_function=activation, window=window)
        cache = init_cache(spec, **sizes, fades=True, documents=True)
        assert isinstance(cache, KVCache)
        assert cache.terms is not None
        assert cache.segments is not None
        assert cache.terms.shape == (3, 2, kept)
        assert cache.segments.shape == (3, kept)
    state = init_cache(decoding_spec(num_heads=4, activation_function="none"), **sizes, fades=True, documents=True)
    assert isinstance(state, StateCache)
    assert state.segment is not None
    assert state.segment.shape == (3,)


@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_a_cache_keeps_its_dtypes_whatever_integers_the_segments_are(activation: str) -> None:
    """A loop over tokens carries the cache, and may not change what it carries."""
    x = inputs(Case(activation=activation, mask="documents"))
    small = replace(x.spec, segment_ids=x.spec.segment_ids.astype(jnp.int16))
    spec, empty = decoding(Case(activation=activation, mask="documents"), LENGTH)
    of_prompt = replace(spec, segment_ids=small.segment_ids)
    _, cache = jax.eval_shape(partial(prefill, length=5), x.q, x.k, x.v, empty, of_prompt)
    of_token = replace(spec, segment_ids=small.segment_ids[:, 5:6])
    _, after = jax.eval_shape(decode_step, *(array[:, :, 5:6] for array in (x.q, x.k, x.v)), cache, of_token)
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), each) for each in (empty, cache, after)]
    assert kinds[0] == kinds[1] == kinds[2]


@pytest.mark.parametrize(
    "case", [CASES[0], Case(activation="softmax", mask="documents", decay="mild", input_gate=True)], ids=str
)
def test_a_cache_grows_by_doubling_and_past_its_end_is_loud(case: Case) -> None:
    x, spec, cache = start(case, capacity=3)
    full = cache
    calls = [call_of(x, spec, slice(t, t + 1)) for t in range(LENGTH)]
    outs, capacities = [], set()
    for token, of_token in calls:
        cache = grow(cache, spec)
        capacities.add(cache.k.shape[2])
        out, cache = step(*token, cache, of_token)
        outs.append(out)
    close("out", jnp.concatenate(outs, axis=2), oracle.forward(x.problem), "float32")
    assert capacities == {3, 6, 12, 24}
    for t, (token, of_token) in enumerate(calls):
        out, full = step(*token, full, of_token)
        assert np.all(np.isnan(out)) == (t >= 3)


def test_what_never_overflows_does_not_grow() -> None:
    for case in (CASES[2], CASES[3]):
        _, spec, cache = start(case, capacity=2)
        assert grow(replace(cache, length=jnp.int32(100)), spec, 100).length == 100
        assert jax.tree.map(jnp.shape, grow(cache, spec, 100)) == jax.tree.map(jnp.shape, cache)


def test_a_state_does_not_drift() -> None:
    """Float32 positions and sums alone: 2048 steps lose no more than the chunkwise form does."""
    rng = np.random.default_rng(5)
    length = 2048
    q, k, v = (jnp.asarray(rng.standard_normal((1, 1, length, 4)), jnp.float32) for _ in range(3))
    spec = decoding_spec(num_heads=1, activation_function="none", theta=THETA)
    cache = init_cache(spec, batch=1, num_kv_heads=1, head_dim_qk=4, head_dim_v=4, capacity=1)

    def body(cache: Cache, token: tuple[jax.Array, ...]) -> tuple[Cache, jax.Array]:
        out, cache = decode_step(*token, cache, spec)
        return cache, out

    cut = tuple(jnp.moveaxis(a, 2, 0)[:, :, :, None] for a in (q, k, v))
    _, out = jax.jit(partial(jax.lax.scan, body))(cache, cut)
    parallel, _ = prefill(q, k, v, cache, spec)
    error = np.max(np.abs(out[:, :, :, 0].transpose(1, 2, 0, 3) - parallel)) / np.max(np.abs(parallel))
    assert error < 5e-6


def test_errors() -> None:
    x, spec, cache = start(CASES[0], capacity=4)
    with pytest.raises(ValueError, match=r"13 tokens .* capacity of 4"):
        prefill(x.q, x.k, x.v, cache, spec)
    with pytest.raises(ValueError, match="'hopper' does not support"):
        prefill(x.q[:, :, :4], x.k[:, :, :4], x.v[:, :, :4], cache, spec, implementation="hopper")
    y, of_none, state = start(Case(activation="none", context_length=CONTEXT))
    arrays = (y.q, y.k, y.v, state, of_none)
    np.testing.assert_array_equal(prefill(*arrays, implementation="linear")[0], prefill(*arrays)[0])
    with pytest.raises(ValueError, match="'blockwise' cannot use the state"):
        prefill(*arrays, implementation="blockwise")
    with pytest.raises(ValueError, match="unknown attention implementation 'quick'"):
        prefill(*arrays, implementation="quick")
    with pytest.raises(ValueError, match=r"fades=False, and this call has fades=True"):
        prefill(*arrays[:3], cache, of_tokens(spec, y.k, log_decay=jnp.zeros(y.k.shape[:3])))
    with pytest.raises(ValueError, match=r"documents=False, and this call has documents=True"):
        prefill(*arrays[:3], cache, of_tokens(spec, y.k, segment_ids=jnp.zeros((2, LENGTH), int)))
    fading = init_cache(spec, **SIZES, fades=True)
    with pytest.raises(ValueError, match=r"fades=True, and this call has fades=False"):
        decode_step(*next(tokens(x, 0)), fading, spec)
    with pytest.raises(ValueError, match="log_decay must be at most 0"):
        of_tokens(spec, y.k, log_decay=jnp.ones(y.k.shape[:3]))
    with pytest.raises(ValueError, match="one token, got 13"):
        decode_step(x.q, x.k, x.v, cache, spec)
    with pytest.raises(ValueError, match="context_length"):
        decoding_spec(num_heads=2, activation_function="sigmoid")
    with pytest.raises(ValueError, match="got 0"):
        init_cache(spec, batch=1, num_kv_heads=1, head_dim_qk=4, head_dim_v=4, capacity=0)
