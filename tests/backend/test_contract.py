"""The contract, over every row of the table: each implementation is the formula, on all that it says it supports."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import activations, dispatch, linear as linear_module
from xattn.backend.dispatch import TABLE, Call, row
from xattn.testing import oracle
from xattn.testing.cases import BATCH, DECAYS, HEADS, LENGTH, MASKS, SUBJECTS, Case, Sink, Subject, f64, inputs
from xattn.testing.contract import (
    bound_of,
    check_causal,
    check_theta_gradient,
    check_values,
    close,
    value_and_gradients,
)

from .pairwise import allowed_pairs, covering, pairs

ACTIVATIONS = activations.names()

# Beside the terms two by two: without a decay a given mask need not be causal, whatever the activation.
GIVEN_MASKS = ("causal", "arbitrary", "empty rows", "everything")
CASES = [
    *(Case(activation=a, mask=m) for a, m in itertools.product(ACTIVATIONS, ("default", *GIVEN_MASKS))),
    *(Case(activation="none", mask=mask) for mask in ("segments", "documents")),
    *(Case(activation=a, dtype="float16") for a in ACTIVATIONS),
    *(Case(activation=a, length=1) for a in ACTIVATIONS),
    # A context that is not the sequence; biases that differ from head to head, which may be grouped.
    Case(activation="sigmoid", context_length=64),
    Case(activation="sigmoid", bias_step=0.3),
    Case(activation="sigmoid", bias_step=0.3, heads=6, kv_heads=2),
    Case(activation="none", heads=6, kv_heads=2),
]

# All terms of the formula, two by two. What differs in the arrays' numbers alone is in all_numbers. Masks are combined
# in CASES, as they are whatever the terms, and only a state knows documents from other segments.
FACTORS: dict[str, tuple[Any, ...]] = {
    "mask": ("default", "empty rows", "window", "segments"),
    "decay": ("none", "mild"),
    "rotary_fraction": (1.0, 0.0, 0.25),
    "activation": ACTIVATIONS,
    "sink": ("none", "learned"),
    "heads": ((3, 3), (6, 2), (5, 1)),
    "length": (LENGTH, 29, 1),
    "dtype": ("float32", "bfloat16"),
    "input_gate": (False, True),
    "pre_activation": ("none", "swish"),
    "context_length": (None, 5),
    "bias_step": (0.0, 0.3),
}
# Those of the only implementation that serves one activation: with one chunk a step, or several, of several tokens.
LINEAR_FACTORS = FACTORS | {
    "subject": tuple(subject for subject in SUBJECTS if subject.implementation == "linear"),
    "mask": ("default", "segments", "documents"),
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
LINEAR_TERMS = [(row["subject"], case_of({k: v for k, v in row.items() if k != "subject"})) for row in LINEAR_ROWS]


def all_numbers(case: Case) -> Iterator[Case]:
    """Every kind of decay and of sink, if the case has one, and both scales: one program computes them all."""
    decays = ("none",) if case.decay == "none" else DECAYS[1:]
    sinks: tuple[Sink, ...] = ("none",) if case.sink == "none" else ("zero", "learned")
    for decay, sink, scale in itertools.product(decays, sinks, (1.0, 0.7)):
        yield replace(case, decay=decay, sink=sink, logit_scale=scale)


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
    assert all(subject.serves(case) for subject, case in LINEAR_TERMS)


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
    state = jax.jit(linear_module.linear_with_state)(q, k, v, spec, None)[1]
    assert jnp.max(state) > 65504
    arrays = [np.asarray(jax.jit(row(name).function)(q, k, v, spec), np.float64) for name in ("linear", "reference")]
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


@pytest.mark.parametrize(
    ("subject", "case"),
    [
        *itertools.product((subject for subject in SUBJECTS if subject.name in ("reference", "blockwise")), TERMS),
        *LINEAR_TERMS,
    ],
    ids=lambda x: x.name if isinstance(x, Subject) else str(x),
)
def test_terms_two_by_two_are_the_formulas(subject: Subject, case: Case) -> None:
    for each in all_numbers(case):
        check_values(subject.function, each)


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
    whole, _ = value_and_gradients(function, (x.q, x.k, x.v, x.terms), x.spec, x.g)

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
    thetas, queries = jnp.array([10.0, 1000.0]), jnp.stack([x.q, 2 * x.q])

    def run(theta: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        arrays = (q, x.k, x.v, x.terms | {"theta": theta})
        _, (d_q, _, _, d_terms) = value_and_gradients(subject.function, arrays, x.spec, x.g)
        return d_terms["theta"], d_q

    packed = jax.vmap(run)(thetas, queries)
    for i in range(2):
        for one, many in zip(run(thetas[i], queries[i]), packed, strict=True):
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


@pytest.mark.parametrize(
    ("shape", "axes"), [((2, 2), ("data", "tensor")), ((1, 1, 2), ("data", "tensor", "context"))], ids=str
)
@served([PLAIN[0], PLAIN[1], FADING[-1]])
def test_sharded_is_the_formula(subject: Subject, case: Case, shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
    """Batch and heads over four devices, or the sequence over two, under plain jit."""
    case = replace(case, heads=4, kv_heads=4, length=12)
    x = inputs(case)
    mesh = jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    arrays = (*jax.device_put((x.q, x.k, x.v), sharding), x.terms)
    out, (d_q, d_k, d_v, _) = value_and_gradients(subject.function, arrays, x.spec, x.g)
    assert len(d_q.sharding.device_set) == mesh.size
    close("out", out, oracle.forward(x.problem), case.dtype)
    want = oracle.vjp(x.problem, f64(x.g))
    for name, gradient in (("q", d_q), ("k", d_k), ("v", d_v)):
        close(f"gradient of {name}", gradient, getattr(want, name), case.dtype, bound_of(case).gradients)
