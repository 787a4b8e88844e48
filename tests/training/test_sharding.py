"""The mesh: which ones are allowed, that every parameter has a rule, and, in processes with eight and four devices,
that it computes what one device computes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from xattn.config import compose, program_key, run_hash
from xattn.errors import BadInput
from xattn.model.transformer import LanguageModel, LayerHyperparameters, parameter_role
from xattn.training.sharding import PARAMETERS, Layout, layout_of, mesh_sizes

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ["backend.context_length=8", "model.num_layers=1", "model.num_heads=2", "model.embedding_dim=8"]


def sizes(*overrides: str, devices: int, processes: int = 1) -> tuple[int, ...]:
    return tuple(mesh_sizes(compose(overrides).parallel, devices, processes).values())


def test_an_axis_that_is_null_takes_what_the_others_leave() -> None:
    assert sizes("parallel=data", devices=8) == (8, 1, 1, 1)
    assert sizes("parallel=fsdp", "parallel.data=2", devices=8) == (2, 4, 1, 1)
    assert sizes("parallel=context", "parallel.tensor=2", devices=8) == (1, 1, 4, 2)
    assert sizes("parallel.data=2", "parallel.tensor=4", devices=8) == (2, 1, 1, 4)
    assert sizes("parallel=data", devices=1) == (1, 1, 1, 1)


def test_one_device_need_not_be_all_there_are() -> None:
    assert sizes(devices=8) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("overrides", "devices", "processes", "told"),
    [
        (["parallel.data=2"], 1, 1, "parallel.data = 2: a mesh of 2 devices, but there is 1 device"),
        (["parallel.data=2"], 8, 1, "a mesh of 2 devices, but there are 8 devices"),
        (["parallel.data=3", "parallel.fsdp=null"], 8, 1, "3 does not divide the 8 devices"),
        (["parallel=tensor", "parallel.data=16"], 8, 1, "16 does not divide the 8 devices"),
        ([], 8, 2, "there are 8 devices in 2 processes"),
        ([], 2, 2, "there are 2 devices in 2 processes"),
    ],
)
def test_a_mesh_that_is_not_the_devices_is_refused(
    overrides: list[str], devices: int, processes: int, told: str
) -> None:
    with pytest.raises(BadInput, match=re.escape(told)):
        sizes(*overrides, devices=devices, processes=processes)


def test_two_axes_cannot_both_take_the_rest() -> None:
    with pytest.raises(BadInput, match="data and fsdp are null"):
        compose(["parallel=data", "parallel.fsdp=null"])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["parallel=data", "trainer.batch_size=9"], "trainer.batch_size = 9"),
        (["parallel=context", "backend.context_length=7"], "backend.context_length = 7"),
        (["parallel=fsdp", "model.embedding_dim=6", "model.num_heads=1"], "model.embedding_dim = 6"),
        (["parallel=tensor", "model.num_heads=1"], "model.num_heads = 1"),
    ],
)
def test_a_model_that_does_not_fit_the_mesh_is_refused(
    overrides: list[str], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(BadInput, match=re.escape(key)):
        layout_of(compose([*TINY, *overrides]))


def test_a_run_is_the_same_on_any_mesh_and_its_program_is_not() -> None:
    one, spread = compose(), compose(["parallel=data", "parallel.heartbeat_seconds=7"])
    assert run_hash(one) == run_hash(spread)
    assert program_key(one) != program_key(spread)
    assert program_key(spread) == program_key(compose(["parallel=data"]))


TERMS = [
    *("backend.activation=softmax", "backend.sigmoid_bias=auto", "backend.sink=learned", "backend.input_gate=sigmoid"),
    *("model.conv=3", "model.value_residual=first", "model.output_norm=rmsnorm", "model.output_gate=channel"),
]


@pytest.mark.parametrize(
    "model",
    [
        *([], ["model=gpt2"], ["model.mlp=gelu"], ["model.embeddings=tied"]),
        *([*TERMS, "backend.decay=input"], [*TERMS, "backend.decay=learned"]),
    ],
)
def test_every_matrix_and_embedding_has_a_rule(model: list[str]) -> None:
    """A parameter without a rule would be whole on every device."""
    config = compose([*TINY, "backend=sigmoid", "backend.sigmoid_bias=learned", "model.mlp_dim=8", *model])
    model, tokens = LanguageModel(config.model, config.backend, 256), jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, LayerHyperparameters(1e4, 0.0))["params"]
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        rule = PARAMETERS.get((path[-2].key, path[-1].key))
        of_heads = path[-1].key in ("bias", "decay_bias", "sink", "query_taps", "key_taps", "value_taps")
        assert rule is not None or (parameter_role(path) == "vector" and not of_heads), jax.tree_util.keystr(path)
        assert rule is None or len(rule) <= leaf.ndim


def test_one_device_has_no_mesh() -> None:
    assert Layout(dict.fromkeys(("data", "fsdp", "context", "tensor"), 1)).mesh is None


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes(tmp_path: Path) -> None:
    """Run the tests of on_eight_devices.py in a process with eight devices.

    The presets are left out, since they take minutes. With XLA_FLAGS=--xla_force_host_platform_device_count=8, ``pytest
    tests/training/on_eight_devices.py`` runs them too. The test of all terms there covers what they have.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-o", "cache_dir=.pytest_cache/eight-devices"]
    command += ["tests/training/on_eight_devices.py", "-k", "not presets"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
