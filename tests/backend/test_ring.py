"""A sequence over 2 and 4 devices: by the ring, and for ``none`` by its states, it is the formula, and no device ever
holds all keys or values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from xattn.backend import activations, formula, linear as linear_module, ring as ring_module
from xattn.backend.arguments import checked_spec
from xattn.backend.blockwise import blockwise
from xattn.backend.dispatch import Call, choose
from xattn.backend.linear import linear
from xattn.backend.mesh import context_devices
from xattn.backend.ring import ring
from xattn.testing import oracle
from xattn.testing.cases import Case, Subject, inputs
from xattn.testing.contract import bound_of, check_theta_gradient, check_values, close

ACTIVATIONS = activations.names()
RING = Subject("ring", "ring", partial(ring, tile=4))
LINEAR = Subject("linear", "linear", partial(linear, chunks=linear_module.Chunks(4)))

# Stretches of 12 and of 6 tokens: one is a multiple of the tile, the other is not; a window of 4 reaches into one
# neighbour's.
LENGTH = 24
TERMS: dict[str, Any] = {"input_gate": True, "heads": 4, "kv_heads": 2, "rotary_fraction": 0.5, "logit_scale": 0.7}
# Each activation without more, under a window, with segments, and with a decay. What a term does within a stretch is in
# test_contract.py; here it must cross the borders, which depends on the activation only in whether parts have weights.
RINGS = [
    *(Case(activation=a, length=LENGTH) for a in ACTIVATIONS),
    *(Case(activation=a, length=LENGTH, mask="window", heads=4, kv_heads=2) for a in ("softmax", "none")),
    Case(activation="sigmoid", length=LENGTH, mask="segments", pre_activation="swish"),
    # What belongs to the keys travels with them, and a decay crosses the stretches in between.
    *(Case(activation=a, length=LENGTH, decay="mild", **TERMS) for a in ("softmax", "none")),
    Case(activation="softmax", length=LENGTH, mask="documents", decay="resets", sink="learned"),
    Case(activation="sigmoid", length=LENGTH, mask="window", decay="hard"),
    Case(activation="none", length=LENGTH, mask="segments", input_gate=True),
]
SOFTMAX, SIGMOID, _, _, WINDOWED, _, FADING, *_, SEGMENTED = RINGS
STATES = [
    Case(activation="none", length=LENGTH),
    Case(activation="none", length=LENGTH, decay="mild", pre_activation="swish", **TERMS),
    Case(activation="none", length=LENGTH, mask="documents"),
    Case(activation="none", length=LENGTH, mask="segments"),  # they return: no sum of a device knows them
    Case(activation="none", length=LENGTH, mask="documents", decay="resets", input_gate=True),
    Case(activation="none", length=LENGTH, decay="hard", dtype="bfloat16"),
]
PLAIN_STATE, FADING_STATE, DOCUMENTS_STATE, *_ = STATES


@contextmanager
def mesh_of(context: int) -> Iterator[jax.sharding.Mesh]:
    """Four devices, the others of which split the batch."""
    mesh = jax.make_mesh((4 // context, context), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.mark.parametrize(
    ("subject", "case", "devices"),
    [
        *((RING, case, 4) for case in RINGS),
        *((LINEAR, case, 4) for case in STATES),
        # Stretches of several whole tiles. No other lies between two of them, which the terms must allow too.
        (RING, FADING, 2),
        (LINEAR, FADING_STATE, 2),
    ],
    ids=lambda x: x.name if isinstance(x, Subject) else str(x),
)
def test_output_and_gradients_are_the_formulas(subject: Subject, case: Case, devices: int) -> None:
    with mesh_of(devices):
        assert subject.serves(case)
        check_values(subject.function, case)


@pytest.mark.parametrize(
    ("subject", "case"),
    [*((RING, case) for case in RINGS[:3]), (LINEAR, PLAIN_STATE)],
    ids=lambda x: x.name if isinstance(x, Subject) else str(x),
)
def test_theta_has_the_right_gradient(subject: Subject, case: Case) -> None:
    with mesh_of(4):
        check_theta_gradient(subject.function, case)


def test_bfloat16_is_joined_in_float32() -> None:
    with mesh_of(4):
        check_values(RING.function, Case(activation="softmax", length=LENGTH, dtype="bfloat16"))


def compiled(function: Any, activation: str, length: int, fades: bool = False) -> tuple[Any, int]:
    """Value and gradients of a call that lies split by its sequence over four devices, and the numbers in its keys.

    fades: whether it has decay, input gate and documents.
    """
    spec = checked_spec(
        batch=1,
        num_heads=2,
        length=length,
        activation_function=activation,
        qk_pre_activation_function="none",
        theta=100.0,
    )
    shape = (1, 2, length, 16)

    def loss(floats: list[jax.Array], segments: jax.Array | None) -> jax.Array:
        q, k, v, *logs = floats
        of_tokens = dict(zip(("log_decay", "log_input_gate"), logs, strict=bool(logs)))
        return jnp.sum(
            function(q, k, v, replace(spec, **of_tokens, segment_ids=segments, segments_are_runs=fades)) ** 2
        )

    with mesh_of(4) as mesh:
        split, of_ids = (NamedSharding(mesh, P(*axes, "context")) for axes in ((None, None), (None,)))
        floats = [shape] * 3 + [shape[:3]] * (2 if fades else 0)
        arrays = [jax.ShapeDtypeStruct(of, jnp.float32, sharding=split) for of in floats]
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=of_ids) if fades else None
        program = jax.jit(jax.value_and_grad(loss), out_shardings=(None, [split] * len(floats)))
        return program.lower(arrays, ids).compile(), math.prod(shape)


def gathered(program: Any, collectives: str = "all-gather|all-reduce|all-to-all") -> int:
    """Numbers in the largest array that a collective brings to each device; 0 where none does."""
    found = re.findall(rf"= \(?\w+\[([\d,]*)\][^=]*? (?:{collectives})\(", program.as_text())
    return max((math.prod(int(n) for n in shape.split(",") if n) for shape in found), default=0)


@pytest.mark.parametrize(("activation", "fades"), [("sigmoid", False), ("softmax", True)])
def test_keys_and_values_go_round_and_are_never_together(activation: str, fades: bool) -> None:
    program, keys = compiled(partial(ring, tile=4), activation, 64, fades)
    assert "collective-permute(" in program.as_text() or "collective-permute-start(" in program.as_text()
    assert gathered(program) < keys / 4


@pytest.mark.parametrize("fades", [False, True])
def test_only_states_are_gathered(fades: bool) -> None:
    program, keys = compiled(partial(linear, chunks=linear_module.Chunks(16)), "none", 2048, fades)
    # A device asks the one before it for a single token's segment.
    assert gathered(program, "collective-permute|collective-permute-start") <= (2 if fades else 0)
    assert 0 < gathered(program) <= 4 * 2 * 16 * 16 < keys / 4


def test_the_ring_saves_the_memory_that_gathering_takes() -> None:
    by_ring, keys = compiled(partial(ring, tile=32), "softmax", 4096)
    by_gathering, _ = compiled(partial(blockwise, tile=32), "softmax", 4096)
    assert gathered(by_gathering) >= keys, "the measure sees nothing"
    ours, theirs = (program.memory_analysis().temp_size_in_bytes for program in (by_ring, by_gathering))
    assert ours < theirs / 2


def test_auto_takes_the_ring_for_a_long_split_sequence_and_says_why_not_before() -> None:
    def chosen(activation: str, length: int, **more: Any) -> Any:
        return choose(replace(Case(activation=activation, length=length).call(), **{"context": 4, **more}))

    assert chosen("softmax", 1024).name == chosen("sigmoid", 1024).name == "ring"
    assert chosen("none", 1024).name == "linear"
    assert chosen("none", 1024, window=7).name == "ring"
    assert chosen("none", 1024, has_decay=True, has_input_gate=True, has_segment_ids=True).name == "linear"
    assert chosen("softmax", 1024, has_decay=True, has_sink=True).name == "ring"
    assert chosen("softmax", 64).passed_over["ring"] == "no faster than the reference below S = 256"
    assert chosen("softmax", 1024, context=1).passed_over["ring"] == "the mesh has no context axis"
    assert "process all of it" in chosen("softmax", 1024, has_mask=True).passed_over["blockwise"]
    with pytest.raises(ValueError, match="S = 10 on 4 devices"):
        choose(Call(**{**vars(Case(activation="none", length=10).call()), "context": 4}), "ring")
    with pytest.raises(ValueError, match="a mask"):
        choose(replace(Case(activation="none", mask="arbitrary").call(), context=1), "ring")


def test_a_call_sees_the_mesh_that_is_set_and_not_the_one_that_it_is_inside_of() -> None:
    seen = []

    def look(x: jax.Array) -> jax.Array:
        seen.append(context_devices())
        return x

    assert context_devices() == 1
    with mesh_of(2):
        assert context_devices() == 2
        jax.jit(jax.shard_map(look, in_specs=P("context"), out_specs=P("context"))).lower(jnp.ones(4))
    assert seen == [1]


def joined_without_weight(right: Any) -> Any:
    return lambda a, b: right(a, b) if b[1] is None else (right(a, b)[0] * 0 + a[0] + b[0], right(a, b)[1])


def stays_at_home(name: str) -> Any:
    """What belongs to the keys is the queries' own."""
    return lambda right: (
        lambda q, keys, meaning, *rest: right(q, keys._replace(**{name: getattr(meaning, name)}), meaning, *rest)
    )


Mutation = tuple[str, Any, str, Any, Subject, Case]
"""What is broken, where, the function, what breaks it, a case that notices."""

OF_OUTPUT: list[Mutation] = [
    ("parts joined without weight", formula, "joined", joined_without_weight, RING, SOFTMAX),
    ("window's last stretch unseen", ring_module, "_stretches", lambda r: lambda *a: r(*a) - 1, RING, WINDOWED),
    ("a device's own state twice", linear_module, "_earlier", lambda r: lambda n, *_: jnp.tri(n), LINEAR, PLAIN_STATE),
    (
        "positions of one device",
        linear_module,
        "chunked",
        lambda right: lambda q, k, v, spec, stretch, chunks: right(q, k, v, spec, stretch._replace(first=None), chunks),
        LINEAR,
        PLAIN_STATE,
    ),
    (
        "decay of the stretches between dropped",
        ring_module,
        "_distance",
        lambda right: lambda *given: right(*given)._replace(log_decay=None),
        RING,
        FADING,
    ),
    ("decay stays at home", ring_module, "forward_tiles", stays_at_home("log_decay"), RING, FADING),
    (
        "states of earlier devices do not decay",
        linear_module,
        "_earlier",
        lambda right: lambda devices, meaning, of: right(devices, replace(meaning, log_decay=None), of),
        LINEAR,
        FADING_STATE,
    ),
    (
        "states of earlier devices cross borders",
        linear_module,
        "_earlier",
        lambda right: lambda devices, meaning, of: right(devices, meaning, None),
        LINEAR,
        DOCUMENTS_STATE,
    ),
]
OF_GRADIENTS: list[Mutation] = [
    (
        "gradients stay abroad",
        ring_module,
        "_pass_on",
        lambda right: lambda tree, distance, devices: tree if distance < 0 else right(tree, distance, devices),
        RING,
        RINGS[2],
    ),
    (
        "segments stay at home",
        ring_module,
        "backward_tiles",
        lambda right: lambda q, keys, *rest: right(q, keys._replace(segments=None), *rest),
        RING,
        SEGMENTED,
    ),
    ("bias of one device", jax.lax, "psum", lambda right: lambda x, axis: x, RING, SIGMOID),
    ("gate stays at home", ring_module, "backward_tiles", stays_at_home("log_input_gate"), RING, FADING),
    (
        "gradient of the gate stays abroad",
        ring_module,
        "_pass_on_with_keys",
        lambda right: lambda found, *rest: right(found, *rest)._replace(columns=found.columns),
        RING,
        FADING,
    ),
]


def broken(mutations: list[Mutation]) -> pytest.MarkDecorator:
    cases = [pytest.param(*mutation, id=what) for what, *mutation in mutations]
    return pytest.mark.parametrize(("module", "name", "breaks", "subject", "case"), cases)


@pytest.fixture
def traced_again() -> Iterator[None]:
    """What jax has traced of a function knows nothing of what is put in its place, and the other way round."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("traced_again")
@broken(OF_OUTPUT)
def test_a_broken_function_is_noticed(
    module: Any, name: str, breaks: Any, subject: Subject, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, breaks(getattr(module, name)))
    x = inputs(case)
    with mesh_of(4):
        out = jax.jit(subject.function)(x.q, x.k, x.v, x.spec)
    with pytest.raises(AssertionError, match="out is off by"):
        close("out", out, oracle.forward(x.problem), case.dtype, bound_of(case).output)


@pytest.mark.usefixtures("traced_again")
@broken(OF_GRADIENTS)
def test_a_broken_gradient_is_noticed(
    module: Any, name: str, breaks: Any, subject: Subject, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, breaks(getattr(module, name)))
    with mesh_of(4), pytest.raises(AssertionError, match=r"gradient of .* is off by"):
        check_values(subject.function, case)
