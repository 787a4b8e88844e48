"""Times of the Hopper kernels beside their peers, and with other tiles: two stages of ``xattn bench kernels``."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp

from xattn.backend import attention
from xattn.backend.hopper.sizes import Form, Tiles
from xattn.bench.kernel_bench import PASSES, Bench, Function, kernel, program

Key = tuple[str, str]
"""(name, activation) of a subject."""

SOFTMAX: Key = ("cudnn", "softmax")

# Target speedups over cuDNN's softmax: (activation, pass, D, S) → ratio. D None means every width.
BARS: dict[tuple[str, str, int | None, int], float] = {
    ("sigmoid", "forward", 128, 4096): 1.20,
    ("sigmoid", "forward", 128, 16384): 1.20,
    ("sigmoid", "forward", 64, 4096): 1.15,
    ("sigmoid", "forward", 64, 16384): 1.15,
    ("sigmoid", "forward", None, 1024): 1.0,
    ("sigmoid", "forward+backward", None, 4096): 1.10,
    ("sigmoid", "forward+backward", None, 16384): 1.10,
    ("none", "forward+backward", None, 2048): 1.0,
    ("none", "forward+backward", None, 8192): 3.0,
    ("none", "forward+backward", None, 32768): 10.0,
}


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one subject."""

    name: str
    activation: str
    passes: str
    width: int
    length: int
    median_seconds: float
    lowest_seconds: float
    highest_seconds: float
    tflops: float
    """Counts 2 · B · NH · S² · D operations forward, 3.5 times that with the backward, for any subject."""
    over_softmax: float | None
    bar: float | None


def time_stage(bench: Bench) -> None:
    """Time every subject in turn at each width, length and pass, in bfloat16 and causal."""
    table = bench.table("times, bfloat16, causal", "D", "S", "pass", "subject", "ms", "TFLOP/s", "×cudnn", "bar")
    found: list[Timing] = []
    for width, length, passes in itertools.product(bench.options.widths, bench.options.lengths, PASSES):
        found += side_by_side(bench, width, length, passes)
    for t in found:
        ratio = "" if t.over_softmax is None else f"{t.over_softmax:.2f}"
        bar = "" if t.bar is None else f"{t.bar:.2f}" + ("" if (t.over_softmax or 0) >= t.bar else " MISSED")
        passes = "fwd" if t.passes == PASSES[0] else "fwd+bwd"
        milliseconds = f"{t.median_seconds * 1e3:.3f}"
        what = f"{t.name} {t.activation}"
        table.add_row(str(t.width), str(t.length), passes, what, milliseconds, f"{t.tflops:.0f}", ratio, bar)
    bench.record["timings"] = [asdict(timing) for timing in found]
    bench.console.print_table(table)
    bench.record["quickest none"] = _quickest(found)
    for where, name in bench.record["quickest none"].items():
        bench.console.print(f"quickest none, {where}: {name}", highlight=False)


def side_by_side(bench: Bench, width: int, length: int, passes: str) -> list[Timing]:
    """Times of every subject, in turn."""
    arrays = random_arrays(bench.options, width, length)
    of_turns = dict(_compiled(bench, width, length, passes, arrays))
    return _timings(bench.options, interleaved(of_turns, arrays, bench.options.repeats), width, length, passes)


def subjects(activations: list[str]) -> dict[Key, Function]:
    """Return all subjects. ``hopper`` and cuDNN take rotated arrays; the others rotate q and k themselves."""

    def softmax(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
        # cuDNN takes (B, S, NH, D): the same bytes are read in that order, so that nothing is moved for it.
        batch, heads, length, width = q.shape
        q, k, v = (x.reshape(batch, length, heads, width) for x in (q, k, v))
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return out.reshape(batch, heads, length, width)

    def whole(
        q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, *, activation: str, implementation: str
    ) -> jax.Array:
        given = bias if activation == "sigmoid" else None
        return attention(q, k, v, activation_function=activation, sigmoid_bias=given, implementation=implementation)

    others = {"sigmoid": ("blockwise", "reference"), "none": ("linear", "blockwise", "reference")}
    found: dict[Key, Function] = {SOFTMAX: softmax}
    for activation in activations:
        found["hopper", activation] = kernel(activation, Tiles())
        found["hopper+RoPE", activation] = partial(whole, activation=activation, implementation="hopper")
        for name in others[activation]:
            found[name, activation] = partial(whole, activation=activation, implementation=name)
    return found


def random_arrays(options: argparse.Namespace, width: int, length: int) -> tuple[jax.Array, ...]:
    """Return q, k, v, bias, g; bias is (NH,), the others are (B, NH, S, D)."""
    batch = max(options.tokens // length, 1)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (batch, options.heads, length, width), jnp.bfloat16) for key in keys)
    return q, k, v, jnp.full((options.heads,), -math.log(length), jnp.float32), g


def _compiled(
    bench: Bench, width: int, length: int, passes: str, arrays: tuple[jax.Array, ...]
) -> Iterator[tuple[Key, Callable[..., Any]]]:
    """Yield the subjects that compile, fit in memory and run."""
    for (name, activation), function in subjects(bench.options.activations).items():
        what = f"{name}, {activation}, D {width}, S {length}, {passes}"
        run = None
        with bench.attempt(what):
            compiled = jax.jit(program(function, passes)).lower(*arrays).compile()
            memory: Any = compiled.memory_analysis()
            size = (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes) / 1e9
            if size > bench.options.memory_limit:
                bench.console.print(f"not timed: {what}: {size:.0f} GB (--memory-limit)", highlight=False)
            else:
                jax.block_until_ready(compiled(*arrays))
                run = compiled
        if run is not None:
            yield (name, activation), run


def interleaved(
    of_turns: dict[Key, Callable[..., Any]], arrays: tuple[jax.Array, ...], repeats: int
) -> dict[Key, list[float]]:
    """Return seconds per call, one number per turn. A turn makes enough calls to fill 5 ms, to hide their launch."""
    seconds: dict[Key, list[float]] = {key: [] for key in of_turns}
    calls = dict.fromkeys(of_turns, 1)
    for turn in range(-1, repeats):
        for key, run in of_turns.items():
            began = time.perf_counter()
            for _ in range(calls[key]):
                last = run(*arrays)
            jax.block_until_ready(last)
            each = (time.perf_counter() - began) / calls[key]
            if turn < 0:
                calls[key] = max(1, round(5e-3 / each))
            else:
                seconds[key].append(each)
    return seconds


def _timings(
    options: argparse.Namespace, seconds: dict[Key, list[float]], width: int, length: int, passes: str
) -> list[Timing]:
    operations = 2 * max(options.tokens // length, 1) * options.heads * length**2 * width
    operations *= 3.5 if passes == PASSES[1] else 1.0
    softmax = statistics.median(seconds[SOFTMAX]) if SOFTMAX in seconds else None
    found = []
    for (name, activation), each in seconds.items():
        median = statistics.median(each)
        ours = name == "hopper" or (name, activation) == ("linear", "none")
        bar = BARS.get((activation, passes, width, length), BARS.get((activation, passes, None, length)))
        ratio = None if softmax is None else softmax / median
        spread = (median, min(each), max(each))
        tflops = operations / median / 1e12
        found.append(Timing(name, activation, passes, width, length, *spread, tflops, ratio, bar if ours else None))
    return found


def _quickest(found: list[Timing]) -> dict[str, str]:
    """Return the quickest none at each pass, D and S: where its quadratic kernel gives way to the linear form."""
    best: dict[str, Timing] = {}
    for t in found:
        where = f"{t.passes}, D {t.width}, S {t.length}"
        if t.activation == "none" and (where not in best or t.median_seconds < best[where].median_seconds):
            best[where] = t
    return {where: t.name for where, t in best.items()}


def variants(passes: str) -> list[Tiles]:
    """Return the default tiles, and every combination of the numbers that the pass's kernels read."""
    forms: tuple[Form, ...] = get_args(Form)
    if passes == PASSES[0]:
        of_forward = itertools.product(forms, (64, 128), (2, 3), (True, False))
        grid = [replace(Tiles(), form=e, keys=k, stages=s, take_turns=t) for e, k, s, t in of_forward]
    else:
        of_backward = itertools.product(forms, (64, 128), (64, 128), (1, 2))
        grid = [replace(Tiles(), form_backward=e, keys_dq=k, queries_dkv=q, stages=s) for e, k, q, s in of_backward]
    return list(dict.fromkeys([Tiles(), *grid]))


def sweep_stage(bench: Bench) -> None:
    """Time every choice of tiles at one length, the quickest first in the table. The backward includes the forward."""
    length = bench.options.sweep_length
    bench.record["sweep"] = []
    for activation, width, passes in itertools.product(bench.options.activations, bench.options.widths, PASSES):
        what = f"{activation}, D {width}, S {length}, {passes}"
        arrays = random_arrays(bench.options, width, length)
        runs: dict[Key, Callable[..., Any]] = {}
        for tiles in variants(passes):
            with bench.attempt(f"{what}, {tiles}"):
                run = jax.jit(program(kernel(activation, tiles), passes)).lower(*arrays).compile()
                jax.block_until_ready(run(*arrays))
                runs[str(tiles), activation] = run
        seconds = interleaved(runs, arrays, bench.options.repeats)
        table = bench.table(f"tiles of {what}", "ms", "tiles")
        for median, name in sorted((statistics.median(each), name) for (name, _), each in seconds.items()):
            table.add_row(f"{median * 1e3:.3f}", name.removeprefix("Tiles"))
            bench.record["sweep"].append({"what": what, "seconds": median, "tiles": name})
        bench.console.print_table(table)
