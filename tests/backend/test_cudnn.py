"""cuDNN's row: why it is refused, and, where there is a CUDA device, that it is the formula."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import attention, dispatch
from xattn.backend.activations import activation
from xattn.backend.dispatch import Call, row
from xattn.testing.cases import Case
from xattn.testing.contract import TOLERANCE, check_causal, check_values

CALL = Call(
    activation=activation("softmax"),
    dtype="bfloat16",
    batch=2,
    num_heads=4,
    num_kv_heads=2,
    sequence=1024,
    head_dim_qk=64,
    head_dim_v=64,
    platform="cuda",
    compute_capability="9.0",
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "the platform cpu"),
        ({"activation": activation("sigmoid")}, "sigmoid"),
        ({"dtype": "float32"}, "float32"),
        ({"head_dim_qk": 20, "head_dim_v": 20}, "20 and 20"),
        ({"head_dim_v": 32}, "64 and 32"),
        ({"head_dim_qk": 264, "head_dim_v": 264}, "264 and 264: must be equal, a multiple of 8, at most 256"),
        ({"head_dim_qk": 136, "head_dim_v": 136, "compute_capability": "8.9"}, "at most 128"),
        ({"compute_capability": "7.5"}, "compute capability 7.5: it needs 8.0"),
        ({"has_mask": True}, "S×S"),
        ({"has_segment_ids": True}, "S×S"),
    ],
)
def test_what_it_does_not_support_it_says(change: dict, reason: str) -> None:
    assert reason in (row("cudnn").refusal(replace(CALL, **change)) or "")


def test_hopper_takes_wide_heads_and_what_came_before_does_not() -> None:
    """As ``check_is_flash_attention`` in jax/_src/cudnn/fused_attention_stablehlo.py."""
    for width, capability, serves in ((256, "9.0", True), (256, "10.0", True), (256, "8.0", False), (128, "8.0", True)):
        call = replace(CALL, head_dim_qk=width, head_dim_v=width, compute_capability=capability)
        assert (row("cudnn").refusal(call) is None) is serves


def test_a_cpu_names_the_reason() -> None:
    if dispatch.target().platform != "cpu":
        pytest.skip("this is about a machine without a GPU")
    q = jnp.ones((1, 2, 8, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="'cudnn' does not support the platform cpu: it needs a CUDA device"):
        attention(q, q, q, implementation="cudnn")


@pytest.mark.parametrize("window", [None, 100])
def test_on_a_gpu_it_is_the_reference(window: int | None) -> None:
    if dispatch.target().platform != "cuda":
        pytest.skip("needs a CUDA device")
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, heads, 256, 64)), jnp.bfloat16) for heads in (4, 2, 2, 4))

    def run(implementation: str) -> list[jax.Array]:
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, window=window, implementation=implementation), q, k, v)
        return [out, *vjp(g)]

    for fused, plain in zip(run("cudnn"), run("reference"), strict=True):
        want = np.asarray(plain, np.float32)
        bound = TOLERANCE["bfloat16", "none"].output * np.max(np.abs(want))
        assert np.max(np.abs(np.asarray(fused, np.float32) - want)) <= bound


# What cuDNN takes, at the least width: causal softmax with a window, grouped heads, either pre-activation.
CASES = [
    Case(activation="softmax", width=8, platform="cuda", **more)
    for more in (
        {"dtype": "bfloat16"},
        {"dtype": "float16", "mask": "window"},
        {"dtype": "bfloat16", "heads": 6, "kv_heads": 2, "pre_activation": "swish"},
        {"dtype": "float16", "length": 1},
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_xla_in_the_librarys_place_it_passes_the_contract(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What of it is ours, on any machine: axes, scale, window, RoPE before it. The library's call is the same one."""
    call = jax.nn.dot_product_attention
    asked = []

    def by_xla(*arrays: jax.Array, implementation: str, **options: object) -> jax.Array:
        asked.append(implementation)
        wide = (array.astype(jnp.float32) for array in arrays)  # a CPU has no product of float16
        with jax.numpy_rank_promotion("allow"):  # it is not ours to be strict
            return call(*wide, implementation="xla", **options).astype(arrays[0].dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    assert row("cudnn").refusal(case.call()) is None
    check_values(row("cudnn").function, case)
    if case == CASES[0]:
        check_causal(row("cudnn").function, case)
    assert set(asked) == {"cudnn"}
