"""The row of the dispatch table: why it refuses, that auto passes it over with the reason, and, on a Hopper GPU, that
it is the formula."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import attention, dispatch
from xattn.backend.activations import Activation, activation
from xattn.backend.dispatch import Call, choose, row
from xattn.testing.contract import TOLERANCE

CALL = Call(
    activation=activation("sigmoid"),
    dtype="bfloat16",
    batch=2,
    num_heads=4,
    num_kv_heads=2,
    sequence=1000,
    head_dim_qk=64,
    head_dim_v=64,
    platform="cuda",
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "the platform cpu"),
        ({"activation": activation("softmax")}, "softmax: it supports sigmoid and none only"),
        ({"activation": Activation(name="relu", formula="", weight=lambda logits, n: logits)}, "relu: it supports"),
        ({"dtype": "float32"}, "float32"),
        ({"head_dim_qk": 96, "head_dim_v": 96}, "96 and 96: must be equal, and 64 or 128"),
        ({"head_dim_v": 128}, "64 and 128"),
        ({"has_mask": True}, "causal only"),
        ({"has_segment_ids": True}, "segment_ids"),
        ({"window": 100}, "window"),
    ],
)
def test_what_it_does_not_support_it_says(change: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("cpu", "9.0", ""))
    assert row("hopper").refusal(CALL) is None
    assert reason in (row("hopper").refusal(replace(CALL, **change)) or "")


@pytest.mark.parametrize("capability", ["8.9", "10.0"])
def test_another_generation_is_refused(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("cpu", capability, ""))
    with pytest.raises(ValueError, match=f"'hopper' does not support compute capability {capability}"):
        choose(CALL, "hopper")


@pytest.mark.parametrize(("name", "other"), [("sigmoid", "blockwise"), ("none", "linear")])
def test_auto_passes_it_over_until_it_is_measured_here(name: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("cpu", "9.0", ""))
    choice = choose(replace(CALL, activation=activation(name)))
    assert choice.name == other
    assert "xattn bench gpu --keep" in choice.passed_over["hopper"]
    assert choose(replace(CALL, activation=activation(name)), "hopper").name == "hopper"


def test_nobody_loads_pallas_who_does_not_take_it() -> None:
    code = "import sys, xattn.backend.dispatch; sys.exit(any('pallas' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["sigmoid", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("width", "length", "kv_heads"), [(64, 200, 4), (128, 512, 2)])
def test_on_a_hopper_gpu_it_is_the_reference(name: str, dtype: str, width: int, length: int, kv_heads: int) -> None:
    if dispatch.target().platform != "cuda" or dispatch.target().compute_capability != "9.0":
        pytest.skip("needs a CUDA device of compute capability 9.0")
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((2, heads, length, width)), dtype) for heads in (4, kv_heads, kv_heads, 4)
    )

    def run(implementation: str) -> list[jax.Array]:
        def call(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
            given = {"sigmoid_bias": bias} if name == "sigmoid" else {}
            return attention(q, k, v, activation_function=name, implementation=implementation, **given)

        out, vjp = jax.vjp(call, q, k, v, jnp.array([-1.0, -3.0, -5.0, -7.0]))
        return [out, *vjp(g)]

    for fused, plain in zip(run("hopper"), run("reference"), strict=True):
        want = np.asarray(plain, np.float32)
        bound = TOLERANCE[dtype, "none"].output * np.max(np.abs(want))
        assert np.max(np.abs(np.asarray(fused, np.float32) - want)) <= bound
