"""cuDNN's row: why it is refused, and, where there is a CUDA device, that it is the formula."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import attention, dispatch
from xattn.backend.dispatch import Call, row

CALL = Call(
    activation="softmax",
    dtype="bfloat16",
    batch=2,
    num_heads=4,
    num_kv_heads=2,
    sequence=1024,
    head_dim_qk=64,
    head_dim_v=64,
    platform="cuda",
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "the platform cpu"),
        ({"activation": "sigmoid"}, "sigmoid"),
        ({"dtype": "float32"}, "float32"),
        ({"head_dim_qk": 20, "head_dim_v": 20}, "20 and 20"),
        ({"head_dim_v": 32}, "64 and 32"),
        ({"has_mask": True}, "S×S"),
        ({"has_segment_ids": True}, "S×S"),
    ],
)
def test_what_it_does_not_support_it_says(change: dict, reason: str) -> None:
    assert reason in (row("cudnn").unsupported(replace(CALL, **change)) or "")


def test_a_cpu_names_the_reason() -> None:
    if dispatch.platform() != "cpu":
        pytest.skip("this is about a machine without a GPU")
    q = jnp.ones((1, 2, 8, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="'cudnn' does not support the platform cpu: it needs a CUDA device"):
        attention(q, q, q, implementation="cudnn")


@pytest.mark.parametrize("window", [None, 100])
def test_on_a_gpu_it_is_the_reference(window: int | None) -> None:
    if dispatch.platform() != "cuda":
        pytest.skip("needs a CUDA device")
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, heads, 256, 64)), jnp.bfloat16) for heads in (4, 2, 2, 4))

    def run(implementation: str) -> list[jax.Array]:
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, window=window, implementation=implementation), q, k, v)
        return [out, *vjp(g)]

    for fused, plain in zip(run("cudnn"), run("reference"), strict=True):
        want = np.asarray(plain, np.float32)
        assert np.max(np.abs(np.asarray(fused, np.float32) - want)) < 2.5e-2 * np.max(np.abs(want))
