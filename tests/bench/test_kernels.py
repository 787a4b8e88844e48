"""The kernels' bench, as far as it goes without a GPU: what it refuses, reads, counts and records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import dispatch
from xattn.backend.hopper.sizes import refuse_what_does_not_fit
from xattn.bench import kernel_accuracy, kernel_times, kernels, ptxas
from xattn.bench.kernel_bench import PASSES, Bench
from xattn.errors import BadInput

OUTPUT = """
ptxas warning : Registers are spilled to local memory in function 'a_mosaic_gpu_kernel', 12 bytes spill stores
ptxas warning : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for a_mosaic_gpu_kernel
    16 bytes stack frame, 12 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 16 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compiling entry function 'b_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for b_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 90 registers, used 16 barriers, 1 bytes smem
"""


def plain(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, *, sigmoid: bool, causal: bool) -> jax.Array:
    """S×S, weights rounded to the dtype: what the floor is said to be."""
    logits = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    weights = jax.nn.sigmoid(logits + bias[:, None, None]) if sigmoid else logits
    weights = jnp.where(jnp.tri(q.shape[2], dtype=bool) | (not causal), weights, 0).astype(v.dtype)
    return jnp.einsum("bhts,bhsd->bhtd", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)


def options(tmp_path: Path, *arguments: str) -> Any:
    return kernels.options_parser().parse_args([*arguments, "--output", str(tmp_path)])


def test_without_a_hopper_gpu_it_says_what_it_needs() -> None:
    if dispatch.target().platform == "cuda":
        pytest.skip("this is about a machine without a GPU")
    with pytest.raises(BadInput, match=r"needs a CUDA device of compute capability 9\.0 \(H100, H200\)"):
        kernels.main([])


def test_the_assemblers_report_is_read() -> None:
    a, b = ptxas.parse(OUTPUT)
    assert (a.kernel, a.registers, a.spill_stores, a.spill_loads) == ("a", 168, 12, 28)
    assert a.warnings == ("(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",)
    assert (b.kernel, b.registers, b.spill_stores, b.spill_loads, b.warnings) == ("b", 90, 0, 0, ())


@pytest.mark.parametrize(("activation", "causal"), [("sigmoid", True), ("none", False)])
def test_accuracy_of_the_plain_form_is_the_floor(activation: str, causal: bool) -> None:
    def run(*arrays: jax.Array) -> jax.Array:
        return plain(*arrays, sigmoid=activation == "sigmoid", causal=causal)

    accuracy = kernel_accuracy.measure(run, activation, "bfloat16", 16, 96, causal=causal)
    assert accuracy.holds
    for name in kernel_accuracy.RESULTS:
        assert 1e-3 < accuracy.floors[name] < 4e-3
        assert 0.9 < accuracy.ratios[name] < 1.1


@pytest.mark.parametrize("how", ["rough weights", "not a number"])
def test_accuracy_notices_what_is_rough_or_wrong(how: str) -> None:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
        if how == "not a number":
            return plain(q, k, v, bias * jnp.nan, sigmoid=True, causal=True)
        return plain(q, k, v, bias + 0.004, sigmoid=True, causal=True)  # small weights off by 0.4 %

    assert not kernel_accuracy.measure(run, "sigmoid", "bfloat16", 16, 96, causal=True).holds


def test_times_are_ratios_over_softmax_and_what_fails_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def subjects(activations: list[str]) -> Any:
        def slow(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, 3, lambda _, out: out + plain(q, out, v, bias, sigmoid=True, causal=True), q)

        def broken(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
            raise RuntimeError("no such instruction\nmore")

        def quick(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
            return q + bias[:, None, None].astype(q.dtype)

        return {kernel_times.SOFTMAX: slow, ("broken", "sigmoid"): broken, ("hopper", "sigmoid"): quick}

    monkeypatch.setattr(kernel_times, "subjects", subjects)
    sizes = ["--widths", "64", "--lengths", "1024", "--tokens", "1024", "--heads", "1", "--repeats", "2"]
    bench = Bench(options(tmp_path, *sizes))
    kernel_times.time_stage(bench)
    record = json.loads(bench.save().read_text())
    assert set(record["failures"]) == {f"broken, sigmoid, D 64, S 1024, {passes}" for passes in PASSES}
    assert set(record["failures"].values()) == {"RuntimeError: no such instruction"}
    softmax, hopper = (r for r in record["timings"] if r["passes"] == "forward")
    assert (softmax["over_softmax"], softmax["bar"]) == (1, None)
    assert hopper["bar"] == 1.0
    assert hopper["over_softmax"] == softmax["median_seconds"] / hopper["median_seconds"] > 1
    np.testing.assert_allclose(hopper["tflops"] * hopper["median_seconds"] * 1e12, 2 * 1024**2 * 64)
    assert "failed: broken, sigmoid" in capsys.readouterr().out


def test_the_sweep_has_the_default_tiles_and_no_others_twice() -> None:
    for passes in PASSES:
        found = kernel_times.variants(passes)
        assert found[0] == kernel_times.Tiles()
        assert len(set(found)) == len(found) == 32
        for t in found:  # none is refused
            refuse_what_does_not_fit(kept=1, tile=t.keys, stages=t.stages, width=128)
            if passes == PASSES[1]:
                refuse_what_does_not_fit(kept=2, tile=max(t.keys_dq, t.queries_dkv), stages=t.stages, width=128)


@pytest.mark.slow
def test_compiling_for_an_absent_gpu(tmp_path: Path) -> None:
    """Every kernel becomes machine code, with no register spilled in the loops that matter: no GPU is needed."""
    arguments = ["--stages", "compile", "--activations", "sigmoid", "--dtypes", "bfloat16", "--widths", "64"]
    try:
        ptxas.absent_h100()
    except NotImplementedError:
        pytest.skip("needs jax's CUDA plugin (the extra cuda) and ptxas")
    assert kernels.main([*arguments, "--output", str(tmp_path)]) == 0
    compiled = json.loads((tmp_path / "kernels.json").read_text())["compiled"]
    assert len(compiled) == 6
    assert all(report["registers"] * 384 <= 65536 and report["spill_stores"] < 64 for report in compiled)
