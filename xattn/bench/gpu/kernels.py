"""The hopper kernels: errors against float64, times beside their rivals, and the best tiles."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax

from xattn.backend.hopper.sizes import WIDTHS, Tiles
from xattn.backend.proven import ALLOWED, LENGTHS, PASSES, Accuracy, Passes, TileTimes, Times
from xattn.bench import kernel_accuracy
from xattn.bench.gpu.checks import Settings
from xattn.bench.gpu.record import Finding
from xattn.bench.kernel_bench import Bench, kernel, program
from xattn.bench.kernel_times import Key, Timing, interleaved, random_arrays, side_by_side
from xattn.bench.kernels import options_parser

_DTYPE = "bfloat16"
_SWEEP_LENGTH = 4096

# One field at a time from the default on, the most promising first: docs/kernels.md counts instructions.
_STEPS: tuple[dict[str, Any], ...] = (
    {"form": "split"},
    {"take_turns": False},
    {"keys": 64},
    {"queries_dkv": 128},
    {"form_backward": "split"},
    {"keys_dq": 64},
    {"stages": 1},
    {"stages": 3},
    {"form": "polynomial3"},
)
_OF_SIGMOID = {"form", "form_backward"}


def accuracy(settings: Settings, activation: str, length: int) -> Iterator[Finding]:
    """Errors of out, dq, dk and dv over those that the dtype alone costs, causal, at both head widths."""
    for width in WIDTHS:
        yield _accuracy(activation, width, length, Tiles())


def _accuracy(activation: str, width: int, length: int, tiles: Tiles, *, required: bool = True) -> Finding:
    measured = kernel_accuracy.measure(kernel(activation, tiles), activation, _DTYPE, width, length, causal=True)
    evidence = Accuracy(
        activation=activation,
        dtype=_DTYPE,
        width=width,
        length=length,
        tiles=tiles,
        errors=_finite(measured.errors),
        floors=_finite(measured.floors),
    )
    return Finding(
        what=f"largest error over the dtype's, D {width}, S {length}",
        value=evidence.worst if math.isfinite(evidence.worst) else None,
        unit="×",
        bar=f"≤ {ALLOWED}",
        holds=evidence.holds,
        required=required,
        details={"ratios": _finite(measured.ratios)},
        evidence=evidence,
    )


def _finite(errors: dict[str, float]) -> dict[str, float]:
    """Leave out what is no number, which counts as missing."""
    return {name: error for name, error in errors.items() if math.isfinite(error)}


def times(settings: Settings, activation: str, width: int, length: int) -> Iterator[Finding]:
    """Interleaved medians of every implementation, and of cuDNN's softmax, at B · S = 32768 and 16 heads."""
    bench = _bench(activation)
    for passes in PASSES:
        found = side_by_side(bench, width, length, passes)
        for timing in found:
            yield _of_subject(timing, passes)
        ours = [timing for timing in found if timing.bar is not None and timing.over_softmax is not None]
        for timing in ours:
            yield _over_softmax(timing, passes)
        if (evidence := _evidence(found, activation, width, length, passes)) is not None:
            best = min(evidence.others, key=lambda name: evidence.others[name])
            ratio = evidence.others[best] / evidence.seconds
            yield Finding(
                what=f"hopper+RoPE over {best}, {passes}",
                value=ratio,
                unit="×",
                bar="> 1",
                holds=ratio > 1,
                required=False,
                evidence=evidence,
            )
    for what, reason in bench.record["failures"].items():
        yield Finding(what=what, value=reason, holds=False if what.startswith("hopper") else None)


def _of_subject(timing: Timing, passes: str) -> Finding:
    return Finding(
        what=f"{timing.name} {timing.activation}, {passes}",
        value=timing.median_seconds * 1e3,
        unit="ms",
        details={"tflops": timing.tflops, "lowest": timing.lowest_seconds, "highest": timing.highest_seconds},
    )


def _over_softmax(timing: Timing, passes: str) -> Finding:
    assert timing.over_softmax is not None
    assert timing.bar is not None
    return Finding(
        what=f"{timing.name} over cuDNN's softmax, {passes}",
        value=timing.over_softmax,
        unit="×",
        bar=f"≥ {timing.bar:.2f}",
        holds=timing.over_softmax >= timing.bar,
        required=False,
    )


def _evidence(found: list[Timing], activation: str, width: int, length: int, passes: Passes) -> Times | None:
    """Of implementations of the same function: all rotate q and k themselves."""
    seconds = {timing.name: timing.median_seconds for timing in found if timing.activation == activation}
    others = {name: median for name, median in seconds.items() if not name.startswith("hopper")}
    if "hopper+RoPE" not in seconds or not others:
        return None
    return Times(
        activation=activation,
        dtype=_DTYPE,
        width=width,
        length=length,
        tiles=Tiles(),
        passes=passes,
        seconds=seconds["hopper+RoPE"],
        others=others,
    )


def _bench(activation: str) -> Bench:
    return Bench(options_parser().parse_args(["--activations", activation, "--repeats", "9"]))


def tiles(settings: Settings, activation: str, width: int) -> Iterator[Finding]:
    """One field of Tiles at a time, forward and backward: what is quicker by a hundredth stays for the next."""
    bench, best, default = _bench(activation), Tiles(), Tiles()
    arrays = random_arrays(bench.options, width, _SWEEP_LENGTH)

    def seconds_of(tried: Tiles, other: Tiles) -> tuple[float, float]:
        runs: dict[Key, Callable[..., Any]] = {}
        for each in (tried, other):
            run = jax.jit(program(kernel(activation, each), PASSES[1])).lower(*arrays).compile()
            jax.block_until_ready(run(*arrays))
            runs[str(each), activation] = run
        found = interleaved(runs, arrays, bench.options.repeats)
        first, second = (statistics.median(found[str(each), activation]) for each in (tried, other))
        return first, second

    for step in _STEPS:
        tried = replace(best, **step)
        if tried == best or (activation == "none" and step.keys() & _OF_SIGMOID):
            continue
        what = ", ".join(f"{field} = {value}" for field, value in step.items())
        with bench.attempt(what):
            quick, slow = seconds_of(tried, best)
            if quick < 0.99 * slow:
                best = tried
            yield Finding(what=f"{what}, over the best so far", value=slow / quick, unit="×")
    for what, reason in bench.record["failures"].items():
        yield Finding(what=what, value=reason)
    if best != default:
        yield from _as_evidence(activation, width, best, *seconds_of(best, default))


def _as_evidence(activation: str, width: int, best: Tiles, quick: float, slow: float) -> Iterator[Finding]:
    """The best tiles beside the default ones, and whether they are as accurate: their form may round otherwise."""
    yield Finding(
        what=f"best over default: {best}",
        value=slow / quick,
        unit="×",
        evidence=TileTimes(
            activation=activation,
            dtype=_DTYPE,
            width=width,
            length=_SWEEP_LENGTH,
            tiles=best,
            seconds=quick,
            default_seconds=slow,
        ),
    )
    for length in itertools.chain(LENGTHS, (32768,)):
        yield _accuracy(activation, width, length, best, required=False)
