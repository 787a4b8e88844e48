"""``xattn bench attention``: time and memory of the attention implementations, with JAX's own as their peer.

All implementations of one activation and length take turns in one process, so that a disturbed machine affects them all
alike. Medians are reported with their spread. Memory is that of the compiled program: arguments, results and
temporaries. It is exact and needs no run. The peak of the whole process is recorded too. It never falls, so it is
meaningful only for one implementation at one length:

    xattn bench attention --implementations blockwise --activations softmax --lengths 16384 --heads 4 --repeats 1

``--decay none input`` measures each without a decay and with one for every head and token, including its gradient.
Half-lives range from 2 to S.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from xattn.backend import activations, attention, dispatch
from xattn.backend.arguments import DTYPES
from xattn.bench.record import write_record
from xattn.system.arguments import Parser
from xattn.tracking.display import Screen

PEER = "jax.nn"
"""The name of ``jax.nn.dot_product_attention`` in the results."""
DECAYED = "+decay"
"""The suffix of an implementation that is measured with a decay."""


@dataclass(frozen=True)
class Subject:
    """A compiled program to measure."""

    name: str
    activation: str
    length: int
    run: Callable[..., Any]
    compile_seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Result:
    """The measurements of one :class:`Subject`; the seconds are those of one call."""

    name: str
    activation: str
    length: int
    median_seconds: float
    lowest_seconds: float
    highest_seconds: float
    ratio_to_reference: float | None
    """The reference's median over this one; above 1 is faster."""
    compile_seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    name: str
    activation: str
    length: int
    reason: str


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write ``attention.json`` and ``attention.png``. Return an exit code."""
    options = _parser().parse_args(argv)
    results: list[Result] = []
    skipped: list[Skipped] = []
    for length in options.lengths:
        arrays = _arrays(options, length)
        for activation in options.activations:
            subjects = []
            for name, decay in itertools.product(options.implementations, options.decay):
                made = _prepare(name, activation, arrays, options, has_decay=decay == "input")
                if isinstance(made, Skipped):
                    skipped.append(made)
                else:
                    subjects.append(made)
            results += _measure(subjects, arrays, options.repeats)
    _print(results, skipped)
    found = {
        "process_peak_bytes": _process_peak_bytes(),
        "results": [asdict(result) for result in results],
        "skipped": [asdict(skip) for skip in skipped],
    }
    device = jax.local_devices()[0].device_kind
    write_record(options, "attention", found, platform=dispatch.target().platform, device=device)
    if results:
        _draw(results, options.output / "attention.png")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="xattn bench attention", description="Time and memory of attention implementations, side by side."
    )
    everything = [*dispatch.names(), PEER]
    parser.add_argument("--implementations", nargs="+", choices=everything, default=everything, metavar="NAME")
    parser.add_argument("--activations", nargs="+", choices=activations.names(), default=list(activations.names()))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048], metavar="S")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="default: the same as --heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int)
    parser.add_argument("--decay", nargs="+", choices=("none", "input"), default=["none"])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--passes", choices=("forward", "forward+backward"), default="forward+backward")
    parser.add_argument("--repeats", type=int, default=5, help="number of timings per implementation")
    parser.add_argument("--memory-limit", type=float, default=4.0, metavar="GB", help="skip programs that need more")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    return parser


def _arrays(options: argparse.Namespace, length: int) -> tuple[jax.Array, ...]:
    """Return q, k, v, the cotangent of the output, and a log decay."""
    kv_heads = options.kv_heads or options.heads
    rng = np.random.default_rng(0)
    qkvg = tuple(
        jnp.asarray(rng.standard_normal((options.batch, heads, length, options.head_dim), np.float32), options.dtype)
        for heads in (options.heads, kv_heads, kv_heads, options.heads)
    )
    half_lives = np.exp(rng.uniform(np.log(2), np.log(max(length, 2)), (options.batch, kv_heads, length)))
    return *qkvg, jnp.asarray(-np.log(2) / half_lives, jnp.float32)


def _prepare(
    name: str, activation: str, arrays: tuple[jax.Array, ...], options: argparse.Namespace, *, has_decay: bool
) -> Subject | Skipped:
    length, shown = arrays[0].shape[2], name + DECAYED * has_decay
    if reason := _refusal(name, activation, arrays, options, has_decay):
        return Skipped(shown, activation, length, reason)
    if name == PEER:

        def call(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> jax.Array:
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            window = None if options.window is None else (options.window - 1, 0)
            out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window)
            return out.swapaxes(1, 2)

    else:

        def call(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array) -> jax.Array:
            given: Any = {"log_decay": log_decay} if has_decay else {}
            choices: Any = {"activation_function": activation, "window": options.window, "implementation": name}
            return attention(q, k, v, **choices, **given)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, log_decay: jax.Array) -> Any:
        if options.passes == "forward":
            return call(q, k, v, log_decay)
        out, vjp = jax.vjp(call, q, k, v, log_decay)
        return out, vjp(g)

    traced = jax.jit(both).lower(*arrays)
    began = time.perf_counter()
    compiled = traced.compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    assert memory is not None, "CPU, GPU and TPU programs all know their memory"
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    if needed > options.memory_limit * 1e9:
        return Skipped(shown, activation, length, f"needs {needed / 1e9:.1f} GB of memory (--memory-limit)")
    return Subject(shown, activation, length, compiled, seconds, needed)


def _refusal(
    name: str, activation: str, arrays: tuple[jax.Array, ...], options: argparse.Namespace, has_decay: bool
) -> str | None:
    """Return why the named implementation cannot serve, or None."""
    if name == PEER:
        if has_decay:
            return "it does not support decay"
        return None if activation == "softmax" else "it supports softmax only"
    if name == dispatch.AUTO:
        return None
    q, k, v, *_ = arrays
    call = dispatch.Call(
        activation=activations.activation(activation),
        dtype=q.dtype.name,
        batch=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        sequence=q.shape[2],
        head_dim_qk=q.shape[3],
        head_dim_v=v.shape[3],
        window=options.window,
        has_decay=has_decay,
    )
    missing = dispatch.row(name).refusal(call)
    return missing and f"it does not support {missing}"


def _measure(subjects: list[Subject], arrays: tuple[jax.Array, ...], repeats: int) -> list[Result]:
    """Run each in turn, ``repeats`` times; a first turn is not counted."""
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for turn in range(repeats + 1):
        for subject in subjects:
            began = time.perf_counter()
            jax.block_until_ready(subject.run(*arrays))
            if turn:
                seconds[subject.name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = medians.get("reference")
    return [
        Result(
            name=subject.name,
            activation=subject.activation,
            length=subject.length,
            median_seconds=medians[subject.name],
            lowest_seconds=min(seconds[subject.name]),
            highest_seconds=max(seconds[subject.name]),
            ratio_to_reference=None if reference is None else reference / medians[subject.name],
            compile_seconds=subject.compile_seconds,
            memory_bytes=subject.memory_bytes,
        )
        for subject in subjects
    ]


def _print(results: list[Result], skipped: list[Skipped]) -> None:
    console = Screen()
    table = Table("S", "activation", "implementation", "ms", "from", "to", "×ref", "MB", "compile")
    for column in table.columns:
        column.no_wrap = True
    for result in results:
        ratio = "" if result.ratio_to_reference is None else f"{result.ratio_to_reference:.2f}"
        times = (result.median_seconds, result.lowest_seconds, result.highest_seconds)
        table.add_row(
            str(result.length),
            result.activation,
            result.name,
            *(f"{seconds * 1e3:.1f}" for seconds in times),
            ratio,
            f"{result.memory_bytes / 1e6:.0f}",
            f"{result.compile_seconds:.1f} s",
        )
    console.print_table(table)
    reasons: dict[tuple[str, str, str], list[int]] = {}
    for skip in skipped:
        reasons.setdefault((skip.name, skip.activation, skip.reason), []).append(skip.length)
    for (name, activation, reason), lengths in reasons.items():
        at = ", ".join(str(length) for length in lengths)
        console.print(f"not run: {name}, {activation}, S {at}: {reason}")


def _draw(results: list[Result], path: Path) -> None:
    from matplotlib.figure import Figure  # takes half a second to import, and is needed last

    activations = list(dict.fromkeys(result.activation for result in results))
    figure = Figure(figsize=(4 * len(activations), 6), layout="constrained")
    axes = figure.subplots(2, len(activations), sharex=True, sharey="row", squeeze=False)
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(result.name for result in results))}
    for column, activation in enumerate(activations):
        of_activation = [result for result in results if result.activation == activation]
        for name in dict.fromkeys(result.name for result in of_activation):
            line = [result for result in of_activation if result.name == name]
            lengths = [result.length for result in line]
            median = [result.median_seconds for result in line]
            low = [result.lowest_seconds for result in line]
            high = [result.highest_seconds for result in line]
            memory = [result.memory_bytes for result in line]
            axes[0, column].fill_between(lengths, low, high, color=colours[name], alpha=0.2)
            axes[0, column].plot(lengths, median, color=colours[name], marker="o", label=name)
            axes[1, column].plot(lengths, memory, color=colours[name], marker="o")
        axes[0, column].set(title=activation, yscale="log")
        axes[0, column].set_xscale("log", base=2)
        axes[1, column].set(xlabel="S", yscale="log")
        axes[0, column].legend(frameon=False)
    axes[0, 0].set_ylabel("seconds, median and range")
    axes[1, 0].set_ylabel("bytes of the program")
    figure.savefig(path, dpi=120)


def _process_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kilobytes on Linux


if __name__ == "__main__":
    sys.exit(main())
