"""The kernels themselves, run in JAX's GPU interpreter: warpgroups, barriers, ring, copies, masks and sums, on a CPU.

It can't accumulate a wgmma through ``run_state`` (jax 0.12: "Cannot lower jaxpr with effects"): ``multiply_add`` is
a plain product here, and nothing else is replaced. It judges values, deadlocks and races; not layouts,
registers or speed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend.hopper import kernels
from xattn.backend.hopper.fused import fused
from xattn.backend.hopper.kernels import Meaning
from xattn.backend.hopper.sizes import Tiles
from xattn.testing import oracle
from xattn.testing.contract import TOLERANCE, close

pytestmark = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="the GPU interpreter came with jax 0.12 (Python ≥ 3.12)"
)

# Two blocks of queries, neither full; several tiles a ring of two slots; two query heads a key/value head.
BATCH, HEADS, KV_HEADS, LENGTH = 1, 2, 1, 200


def interpreted(function: Any, *arrays: Any) -> Any:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, on_race="raise")):
        return jax.jit(function)(*arrays)


@pytest.fixture(autouse=True)
def plain_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply_add(total: jax.Array, a: jax.Array, b: Any) -> jax.Array:
        tile = b[...]
        # wgmma reads shared memory as the copy engine writes it, in order with it; a plain load needs this fence.
        plgpu.commit_smem()
        return total + jnp.dot(a, tile, preferred_element_type=jnp.float32)

    monkeypatch.setattr(kernels, "multiply_add", multiply_add)


def arrays(dtype: str, width: int, heads: int, kv_heads: int) -> list[jax.Array]:
    rng = np.random.default_rng(3)
    return [
        jnp.asarray(rng.standard_normal((BATCH, n, LENGTH, width)), dtype) for n in (heads, kv_heads, kv_heads, heads)
    ]


@pytest.mark.parametrize(
    ("sigmoid", "causal", "dtype", "width", "kv_heads", "tiles"),
    [
        (True, True, "bfloat16", 64, 1, Tiles(form="split", form_backward="polynomial3", keys=64, keys_dq=64)),
        (False, True, "float16", 128, 2, Tiles(form="polynomial4")),
        pytest.param(
            True,
            False,
            "float16",
            128,
            1,
            Tiles(queries_dkv=128, stages=1, take_turns=False),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            True,
            True,
            "bfloat16",
            128,
            2,
            Tiles(form="polynomial4", form_backward="split", keys_dq=64, stages=3),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_values_and_gradients(sigmoid: bool, causal: bool, dtype: str, width: int, kv_heads: int, tiles: Tiles) -> None:
    q, k, v, g = arrays(dtype, width, HEADS, kv_heads)
    bias = jnp.array([[-1.0, -9.0]])

    def both(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, g: jax.Array) -> Any:
        out, vjp = jax.vjp(lambda *x: fused(*x, Meaning(sigmoid=sigmoid, causal=causal), tiles), q, k, v, bias)
        return out, vjp(g)

    out, (d_q, d_k, d_v, d_bias) = interpreted(both, q, k, v, bias, g)
    f64 = [np.asarray(x).astype(np.float64) for x in (q, k, v, g)]
    problem = oracle.Problem(
        q=f64[0],
        k=f64[1],
        v=f64[2],
        activation="sigmoid" if sigmoid else "none",
        swish=False,
        sin=np.zeros((LENGTH, width // 2)),
        cos=np.ones((LENGTH, width // 2)),
        keep=np.tri(LENGTH, dtype=bool)[None] | (not causal),
        bias=np.asarray(bias[0], np.float64) if sigmoid else None,
    )
    want = oracle.vjp(problem, f64[3])
    close("out", out, oracle.forward(problem), dtype)
    close("gradient of q", d_q, want.q, dtype)
    close("gradient of k", d_k, want.k, dtype)
    close("gradient of v", d_v, want.v, dtype)
    if sigmoid:
        assert want.bias is not None
        close("gradient of the bias", d_bias[0], want.bias, "float32", TOLERANCE[dtype, "none"].gradients)
