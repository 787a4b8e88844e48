"""The contract, over every row of the table: each implementation is the formula, on all that it says it supports."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import activations, dispatch, linear as linear_module
from xattn.backend.dispatch import TABLE, Call, row
from xattn.testing.cases import BATCH, DECAYS, HEADS, LENGTH, MASKS, SUBJECTS, Case, Subject, inputs
from xattn.testing.contract import check_causal, check_theta_gradient, check_values

from .pairwise import allowed_pairs, covering, pairs

ACTIVATIONS = activations.names()

# Beside the terms two by two: without a decay a mask need not be causal, whatever the activation.
CASES = [
    *(Case(activation=a, mask=m) for a, m in itertools.product(ACTIVATIONS, MASKS)),
    *(Case(activation=a, dtype="float16") for a in ACTIVATIONS),
    *(Case(activation=a, length=1) for a in ACTIVATIONS),
    # A context that is not the sequence; biases that differ from head to head, which may be grouped.
    Case(activation="sigmoid", context_length=64),
    Case(activation="sigmoid", bias_step=0.3),
    Case(activation="sigmoid", bias_step=0.3, heads=6, kv_heads=2),
    Case(activation="none", heads=6, kv_heads=2),
]

# All terms of the formula, two by two.
FACTORS: dict[str, tuple[Any, ...]] = {
    "mask": tuple(mask for mask in MASKS if mask not in ("causal", "arbitrary")),  # "empty rows" is arbitrary too
    "decay": DECAYS,
    "rotary_fraction": (1.0, 0.0, 0.25, 0.5),
    "activation": ACTIVATIONS,
    "sink": ("none", "zero", "learned"),
    "heads": ((3, 3), (6, 2), (5, 1)),
    "length": (LENGTH, 29, 1),
    "dtype": ("float32", "bfloat16"),
    "input_gate": (False, True),
    "logit_scale": (1.0, 0.7),
    "pre_activation": ("none", "swish"),
    "context_length": (None, 5),
    "bias_step": (0.0, 0.3),
}
# Those of the only implementation that serves one activation. What it does about segments that return is in CASES.
LINEAR_FACTORS = FACTORS | {
    "mask": ("default", "documents"),
    "activation": ("none",),
    "sink": ("none",),
    "context_length": (None,),
    "bias_step": (0.0,),
}


def allowed(row: dict[str, Any]) -> bool:
    """A sink is softmax's, a bias sigmoid's."""
    activations = {row["activation"]} if "activation" in row else set()
    if row.get("sink", "none") != "none":
        activations.add("softmax")
    if row.get("bias_step", 0):
        activations.add("sigmoid")
    return len(activations) <= 1


ROWS = covering(FACTORS, allowed)
LINEAR_ROWS = covering(LINEAR_FACTORS, allowed)


def case_of(row: dict[str, Any]) -> Case:
    heads, kv_heads = row["heads"]
    return Case(**row | {"heads": heads, "kv_heads": kv_heads})


PLAIN = [Case(activation=a) for a in ACTIVATIONS]
FADING = [
    Case(activation=a, decay="mild", input_gate=True, rotary_fraction=0.5, sink="learned" if a == "softmax" else "none")
    for a in ACTIVATIONS
]
TERMS = [case_of(row) for row in ROWS]
LINEAR_TERMS = [case_of(row) for row in LINEAR_ROWS]


def served(cases: list[Case]) -> pytest.MarkDecorator:
    """Every implementation with every case that it says it supports."""
    return pytest.mark.parametrize(
        ("subject", "case"),
        [
            pytest.param(subject, case, id=f"{subject.name}-{case}")
            for subject in SUBJECTS
            if subject.name != "ring"  # without a mesh it is blockwise; with one it is in test_ring.py
            for case in cases
            if subject.serves(case)
        ],
    )


def test_every_row_is_here_and_what_it_leaves_out_it_says() -> None:
    # cudnn and hopper take no width of ours: the contract at widths of theirs is in test_cudnn.py and hopper/.
    assert {subject.implementation for subject in SUBJECTS} == {row.name for row in TABLE} - {"cudnn", "hopper"}
    refused = {row.name: [case for case in CASES if row.refusal(case.call())] for row in TABLE}
    assert refused["reference"] == refused["blockwise"] == []
    assert refused["cudnn"] == refused["hopper"] == CASES
    assert {case.activation for case in CASES if case not in refused["linear"]} == {"none"}
    assert {case.mask for case in CASES if case not in refused["linear"]} == {"default", "segments", "documents"}
    assert not any(row("linear").refusal(case.call()) for case in LINEAR_TERMS)


@pytest.mark.parametrize("mask", MASKS)
def test_the_table_sees_a_call_as_it_is(mask: str) -> None:
    case = Case(activation="sigmoid", mask=mask, heads=6, kv_heads=2, dtype="bfloat16")
    x = inputs(case)
    here = replace(case.call(), platform=dispatch.target().platform, compute_capability=None)
    assert here == Call.of(x.q, x.k, x.v, x.spec)


@pytest.mark.parametrize("case", [Case(activation=a, length=300) for a in ACTIVATIONS], ids=str)
@pytest.mark.parametrize("name", ["blockwise", "linear"])
def test_the_default_tiles_and_chunks_are_the_formula_too(name: str, case: Case) -> None:
    if row(name).refusal(case.call()) is None:
        check_values(row(name).function, case)


def test_a_state_that_float16_cannot_hold_gives_an_output_that_it_can() -> None:
    """The reference has no state: its weights, and the sum of them, are far below 65504."""
    rng = np.random.default_rng(5)
    q = jnp.asarray(0.002 * rng.standard_normal((1, 1, 700, 8)), jnp.float16)
    k, v = (jnp.asarray(20 + rng.standard_normal(q.shape), jnp.float16) for _ in range(2))
    spec = replace(inputs(Case(activation="none")).spec, theta=jnp.float32(1e6))
    state = linear_module.linear_with_state(q, k, v, spec, None)[1]
    assert jnp.max(state) > 65504
    arrays = [np.asarray(row(name).function(q, k, v, spec), np.float64) for name in ("linear", "reference")]
    np.testing.assert_allclose(*arrays, rtol=0, atol=4e-3 * np.max(np.abs(arrays[1])))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_accelerator_multiplies_float32_as_float32(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; what is narrower is left to its tensor cores."""
    x = inputs(Case(activation="softmax", dtype=dtype))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def loss(q: jax.Array) -> jax.Array:
        return jnp.sum(row("reference").function(q, x.k, x.v, x.spec), dtype="float32")

    text = str(jax.make_jaxpr(jax.grad(loss))(x.q))
    products = [part for part in text.split("dot_general[") if "([0, 1], [0, 1])" in part]  # not those of the rotation
    assert len(products) == 4
    exact = {"precision=(Precision.HIGHEST, Precision.HIGHEST)" in part for part in products}
    assert exact == {dtype == "float32"}


@pytest.mark.parametrize(("factors", "rows"), [(FACTORS, ROWS), (LINEAR_FACTORS, LINEAR_ROWS)], ids=["all", "linear"])
def test_the_rows_hold_every_pair_of_two_values(factors: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    held = set().union(*map(pairs, rows))
    assert all(map(allowed, rows))
    assert held == set(allowed_pairs(factors, allowed))
    assert len(held) > 10 * len(rows), "the rows are not much fewer than the pairs"


@served(TERMS)
def test_terms_two_by_two_are_the_formulas(subject: Subject, case: Case) -> None:
    check_values(subject.function, case)


@pytest.mark.parametrize("case", LINEAR_TERMS, ids=str)
def test_terms_of_a_state_two_by_two_are_the_formulas(case: Case) -> None:
    """With several chunks a step, and several tokens a chunk."""
    check_values(next(subject for subject in SUBJECTS if subject.name == "linear2x2").function, case)


@served(CASES)
def test_output_and_gradients_are_the_formulas(subject: Subject, case: Case) -> None:
    check_values(subject.function, case)


@served(PLAIN + FADING)
def test_theta_has_the_right_gradient(subject: Subject, case: Case) -> None:
    check_theta_gradient(subject.function, case)


@served(PLAIN + FADING)
def test_causal_and_not_more(subject: Subject, case: Case) -> None:
    check_causal(subject.function, case)


@served(PLAIN)
def test_vmap_over_batch_and_over_heads_is_the_batched_call(subject: Subject, case: Case) -> None:
    x = inputs(case)
    function = subject.function
    whole = jax.jit(function)(x.q, x.k, x.v, x.spec)

    def one_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        bias = None if x.spec.bias is None else x.spec.bias[:1]
        return function(q[None, None], k[None, None], v[None, None], replace(x.spec, bias=bias))[0, 0]

    alone = jax.jit(jax.vmap(jax.vmap(one_head)))(x.q, x.k, x.v)
    assert whole.shape == (BATCH, HEADS, LENGTH, x.v.shape[-1])
    np.testing.assert_allclose(alone, whole, rtol=1e-5, atol=1e-6)


@served(PLAIN)
def test_a_pack_of_thetas_is_as_many_single_calls(subject: Subject, case: Case) -> None:
    """Packed sweeps: theta (and with it the whole spec's numbers) has a leading axis under vmap, q, k, v too."""
    x = inputs(case)
    function = subject.function
    thetas = jnp.array([10.0, 1000.0])

    def loss(theta: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.sum(function(q, x.k, x.v, replace(x.spec, theta=theta)) * x.g)

    run = jax.jit(jax.grad(loss, argnums=(0, 1)))
    packed = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1))))(thetas, jnp.stack([x.q, 2 * x.q]))
    for i, q in enumerate((x.q, 2 * x.q)):
        for one, many in zip(run(thetas[i], q), packed, strict=True):
            np.testing.assert_allclose(many[i], one, rtol=1e-4, atol=1e-5)
    assert not np.allclose(packed[1][0], packed[1][1]), "theta and q changed nothing"


@served(PLAIN)
def test_numbers_do_not_compile_again_and_runs_repeat_bit_for_bit(subject: Subject, case: Case) -> None:
    x = inputs(case)
    function = subject.function
    traces = 0

    @jax.jit
    def counted(q: jax.Array, theta: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return function(q, x.k, x.v, replace(x.spec, theta=theta))

    first = counted(x.q, jnp.float32(100.0))
    again = counted(x.q, jnp.float32(100.0))
    other = counted(x.q, jnp.float32(9.0))
    assert traces == 1
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(other) != np.asarray(first))
    # The first token has angle 0: no theta changes it.
    np.testing.assert_array_equal(other[:, :, 0], first[:, :, 0])


@served(PLAIN + FADING[-1:])
def test_sharded_is_unsharded(subject: Subject, case: Case) -> None:
    """Batch and heads over four devices, or the sequence over two, under plain jit."""
    case = replace(case, heads=4, kv_heads=4, length=12)
    x = inputs(case)
    auto = jax.sharding.AxisType.Auto

    @jax.jit
    def value_and_gradients(*arrays: jax.Array) -> tuple:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(subject.function(q, k, v, x.spec) * x.g)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)

    alone = value_and_gradients(x.q, x.k, x.v)
    for shape, axes in (((2, 2), ("data", "tensor")), ((1, 1, 2), ("data", "tensor", "context"))):
        mesh = jax.make_mesh(shape, axes, axis_types=(auto,) * len(axes))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        shared = value_and_gradients(*jax.device_put((x.q, x.k, x.v), sharding))
        assert len(shared[1][0].sharding.device_set) == mesh.size
        for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True):
            np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)
