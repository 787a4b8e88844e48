"""The table of activations: a new row, of either kind, is computed correctly everywhere; a user's function is one."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn import registry, testing
from xattn.backend import activations, attention, decode, register_activation
from xattn.backend.activations import Activation
from xattn.backend.dispatch import TABLE, choose
from xattn.runs.provenance import registered
from xattn.testing import Check, check_activation, checks
from xattn.testing.cases import MASKS, Case

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_activation.py"


@pytest.fixture(autouse=True)
def _table_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_TABLE", dict(activations._TABLE))


def example() -> None:
    """Runs the example's file, as starting it does, but for its main()."""
    spec = importlib.util.spec_from_file_location("own_activation", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


# A row each, from inside a test: the bar that a fourth activation costs one line.
ROWS = [
    Activation(
        name="tanh", formula="(1 + tanh(A + b)) / n", weight=lambda a, n: (1 + jnp.tanh(a)) / n, takes_bias=True
    ),
    Activation(name="normalised", formula="e^A / Σ e^A"),
]


def cases() -> list[Any]:
    """(row, index of the check). Each test looks its check up again, because the row is in the table only there.

    Of the masks, "everything" has what the others have, which is the same code for every activation.
    """
    found, single = [], set(MASKS) - {"default", "everything"}
    for row in ROWS:
        table = activations._TABLE
        activations._TABLE = table | {row.name: row}
        found += [
            pytest.param(row, i, id=f"{row.name}: {what}")
            for i, (what, _) in enumerate(checks(row.name))
            if what.startswith("decoding") or single.isdisjoint(what.split("-"))
        ]
        activations._TABLE = table
    return found


@pytest.mark.parametrize(("row", "number"), cases())
def test_a_new_row_is_its_formula_wherever_it_is_computed(row: Activation, number: int) -> None:
    activations.add(row)
    list(checks(row.name))[number][1]()


def test_the_example_registers_relu_in_forty_lines() -> None:
    assert sum(bool(line.strip()) for line in EXAMPLE.read_text().splitlines()) <= 40
    with pytest.raises(ValueError, match="unknown activation_function 'relu'; choices: softmax, sigmoid, none"):
        attention(*[jnp.ones((1, 1, 3, 2))] * 3, activation_function="relu")
    example()
    assert activations.activation("relu").file == EXAMPLE
    weights = attention(*[jnp.eye(2)[None, None]] * 3, activation_function="relu", theta=1.0)
    assert np.all(np.asarray(weights) >= 0)


def test_check_activation_passes_what_is_right_and_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong here: a function that is another one on tiles than on whole rows; one case of each implementation shows."""
    example()
    check_activation("relu")

    @register_activation("by_shape")
    def by_shape(logits: jax.Array, n: int) -> jax.Array:
        return logits * (1 if logits.shape[-1] == 13 else 2)

    def one_of_each(name: str) -> Iterator[Check]:
        seen: set[str] = set()
        for what, check in checks(name):
            if (subject := what.split()[0]) not in seen:
                seen.add(subject)
                yield what, check

    monkeypatch.setattr(testing, "checks", one_of_each)
    with pytest.raises(AssertionError, match=r"by_shape fails \d+ checks:\n.*blockwise"):
        check_activation("by_shape")
    with pytest.raises(ValueError, match="unknown activation_function 'absent'"):
        check_activation("absent")


def test_a_given_slope_is_used_by_every_implementation() -> None:
    """Straight through: the step's own derivative is 0 everywhere."""

    @register_activation("step", slope=lambda logits, n: jnp.ones_like(logits) / n)
    def step(logits: jax.Array, n: int) -> jax.Array:
        return jnp.where(logits > 0, 1.0, 0.0) / n

    q, k, v = (jnp.asarray(np.random.default_rng(i).standard_normal((1, 2, 9, 4)), jnp.float32) for i in range(3))

    def gradient(name: str) -> jax.Array:
        return jax.grad(lambda q: jnp.sum(attention(q, k, v, activation_function="step", implementation=name)))(q)

    assert np.any(np.asarray(gradient("reference")) != 0)
    np.testing.assert_allclose(gradient("blockwise"), gradient("reference"), rtol=1e-5, atol=1e-6)


def test_names_that_cannot_be_are_refused() -> None:
    for name in ("softmax", "none"):
        with pytest.raises(ValueError, match="xattn already has this name"):
            register_activation(name)
    for name in ("null", "nan", "Relu", "two words", "1st", "", "_x", "größe", "a/b"):
        with pytest.raises(ValueError, match="a name must consist of lower-case letters"):
            register_activation(name)
    register_activation("mine")(lambda logits, n: logits)
    assert activations.names()[-1] == "mine"
    with pytest.raises(ValueError, match="a plain function"):
        register_activation("part")(partial(lambda logits, n, by: by * logits, by=2))


def test_a_cell_that_is_run_again_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are known by the activation's name; those of a replaced one are forgotten."""
    forgotten: list[str] = []
    monkeypatch.setattr(registry, "caches", [lambda: forgotten.append("programs")])
    call = jax.jit(lambda q: attention(q, q, q, activation_function="mine"))
    q = jnp.ones((1, 1, 3, 2))
    register_activation("mine")(lambda logits, n: logits)
    before = call(q)
    assert forgotten == []
    register_activation("mine")(lambda logits, n: 2 * logits)
    assert forgotten == ["programs"]
    np.testing.assert_allclose(call(q), 2 * before, rtol=1e-6)


def test_implementations_serve_it_or_say_why_not() -> None:
    """hopper once computed ``none`` for whatever is not softmax, and a threshold was a KeyError."""
    register_activation("mine")(lambda logits, n: logits)
    for length in (8, 4096):
        call = Case(activation="mine", length=length).call()
        assert choose(call).name == ("reference" if length == 8 else "blockwise")
        refused = {row.name: row.refusal(call) for row in TABLE}
        assert {name for name, reason in refused.items() if reason is None} == {"ring", "blockwise", "reference"}
        assert all(str(refused[name]).startswith("mine: it supports") for name in ("cudnn", "hopper", "linear"))


def test_decoding_wants_the_n_that_the_weights_depend_on() -> None:
    example()
    with pytest.raises(ValueError, match="decoding with relu needs context_length, the n of its weights"):
        decode.decoding_spec(num_heads=2, activation_function="relu")
    assert decode.decoding_spec(num_heads=2, activation_function="relu", context_length=7).n == 7
    with pytest.raises(ValueError, match="sigmoid_bias has no meaning under activation_function 'relu'"):
        decode.decoding_spec(num_heads=2, activation_function="relu", context_length=7, sigmoid_bias=1.0)


def test_the_pages_name_the_rows_of_the_table() -> None:
    root = EXAMPLE.parent.parent
    rows = [name for name in activations.names() if activations.activation(name).file is None]
    assert {file.stem for file in (root / "conf" / "backend").glob("*.yaml")} >= set(rows)
    assert f"# {' | '.join(rows)}\n" in (root / "conf" / "backend" / "softmax.yaml").read_text("utf-8")
    assert f"| {', '.join(f'`{name}`' for name in rows)} |\n" in (root / "README.md").read_text("utf-8")


def test_a_function_without_a_file_is_recorded_too() -> None:
    """As in a notebook or at a prompt."""
    place: dict[str, Any] = {}
    exec(compile("def mine(logits, n):\n    return logits\n", "<stdin>", "exec"), place)
    register_activation("mine")(place["mine"])
    example()
    recorded = registered()
    assert recorded.keys() == {"<stdin>", "own_activation.py"}
    assert recorded["own_activation.py"] == hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()
    assert len(recorded["<stdin>"]) == 64
