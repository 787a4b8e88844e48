"""The contract suite on the Hopper row: wrapper, kernels and gradients in JAX's GPU interpreter, on any machine.

Of the kernels one thing is replaced, as in test_interpreter.py: the product that accumulates.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest

from xattn.backend.dispatch import row
from xattn.testing.cases import Case
from xattn.testing.contract import check_causal, check_values

from .test_interpreter import plain_accumulation as plain_accumulation  # a fixture

pytestmark = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="the GPU interpreter came with jax 0.12 (Python ≥ 3.12)"
)

CASES = [
    Case(activation="sigmoid", width=64, platform="cuda", dtype="bfloat16", heads=2, kv_heads=1, bias_step=0.3),
    Case(activation="none", width=64, platform="cuda", dtype="float16", heads=2, kv_heads=2, pre_activation="swish"),
]


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_passes_the_contract(case: Case) -> None:
    assert row("hopper").refusal(case.call()) is None
    check_values(row("hopper").function, case)


def test_it_is_causal() -> None:
    check_causal(row("hopper").function, CASES[1])
