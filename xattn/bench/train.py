"""``xattn bench train``: speed, utilisation and memory of whole training steps, with nanoGPT's as their peer.

    xattn bench train --models nano --activations softmax sigmoid none
    xattn bench train --peer nanoGPT --peer-python torch/bin/python experiment=shakespeare_cpu optimizer=adamw

Subjects take turns in one session, a block of steps each, so that a disturbed machine affects all alike. A subject's
figure is its median step over all blocks. Ratios to the peer compare medians; above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from xattn.backend import activations
from xattn.bench.peer import Peer
from xattn.bench.record import write_record
from xattn.config import Config, compose, sized
from xattn.data.batches import Batch
from xattn.errors import BadInput
from xattn.system.arguments import Parser
from xattn.system.device import keep_compiled_programs
from xattn.system.hardware import hardware_of, measured_peak
from xattn.tracking.display import Screen
from xattn.training.programs import Programs, TrainState, hyperparameters, num_params, programs

PEER = "nanoGPT"


@dataclass
class Subject:
    """A training step to measure, and the seconds of each step made."""

    model: str
    activation: str
    config: Config
    programs: Programs
    state: TrainState
    batch: Any
    seconds: list[float] = field(default_factory=list)

    def steps(self, number: int) -> None:
        """Make steps and wait for each, as nanoGPT does by reading the loss."""
        for _ in range(number):
            began = time.perf_counter()
            self.state, metrics = self.programs.step(self.state, self.batch)
            jax.block_until_ready((self.state, metrics))
            self.seconds.append(time.perf_counter() - began)


@dataclass(frozen=True)
class Result:
    """The measurements of one model and activation."""

    model: str
    activation: str
    num_params: int
    batch_size: int
    context_length: int
    median_seconds: float
    lowest_seconds: float
    highest_seconds: float
    tokens_per_second: float
    flops_per_step: int
    mfu: float
    """model FLOP/s utilisation: flops_per_step ÷ seconds ÷ the device's peak in the dtype of the projections' factors;
    docs/cost.md explains how nanoGPT's differs"""
    memory_bytes: int
    """of the compiled step: arguments and temporaries"""
    compile_seconds: float
    ratio_to_peer: float | None
    """the peer's median step ÷ ours"""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(argv)
    if options.cache:
        keep_compiled_programs()
    subjects = [_prepare(model, activation, options) for model in options.models for activation in options.activations]
    peer = None
    if options.peer is not None:
        peer = Peer(options.peer, options.peer_python, _peer_settings(subjects, options))
    peer_seconds = _measure(subjects, peer, options.steps, options.repeats)
    peak = _peak(subjects[0])
    results = [_result(subject, peak, peer_seconds) for subject in subjects]
    found = {
        "results": [asdict(result) for result in results],
        "peer": peer and {**peer.facts, "median_seconds": statistics.median(peer_seconds), "name": PEER},
    }
    if peer is not None:
        peer.close()
    _print(results, peer_seconds)
    device = {"device": jax.local_devices()[0].device_kind, "devices": jax.device_count()}
    write_record(options, "train", found, **device, peak_flops_per_second=peak)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="xattn bench train", description="Compare the speed, utilisation and memory of training steps."
    )
    parser.add_argument("overrides", nargs="*", help="overrides of the config, as for train.py")
    parser.add_argument("--models", nargs="+", metavar="NAME", default=["nano"], help="choices of conf/model")
    parser.add_argument("--activations", nargs="+", choices=activations.names(), default=list(activations.names()))
    parser.add_argument("--vocab-size", type=int, default=256, help="default: that of bytes")
    parser.add_argument("--steps", type=int, default=5, help="in a block")
    parser.add_argument("--repeats", type=int, default=6, help="number of blocks of each")
    parser.add_argument("--cache", action="store_true", help="compiled programs may come from the cache on disk")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of nanoGPT, to compare with")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PYTHON", help="a Python interpreter with torch"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    return parser


def _prepare(model: str, activation: str, options: argparse.Namespace) -> Subject:
    choices = [f"model={model}", f"backend.activation={activation}"]
    if not any(override.startswith("data") for override in options.overrides):
        choices.append("data=python_stdlib")  # not read; an experiment's data may still require a path
    config = sized(compose([*options.overrides, *choices]), options.vocab_size)
    compiled, _ = programs(config, options.vocab_size)
    rows, length = config.trainer.batch_size, config.backend.context_length
    tokens = np.random.default_rng(0).integers(options.vocab_size, size=(rows, length + 1), dtype=np.int32)
    batch = Batch(tokens, np.ones((rows, length), np.float32))
    state = compiled.init(hyperparameters(config))
    return Subject(model, activation, config, compiled, state, batch)


def _peer_settings(subjects: list[Subject], options: argparse.Namespace) -> dict[str, int]:
    if len({subject.model for subject in subjects}) > 1:
        raise BadInput(f"--models = {options.models}: --peer compares one model at a time")
    config = subjects[0].config
    return {
        "num_layers": config.model.num_layers,
        "num_heads": config.model.num_heads,
        "embedding_dim": config.model.embedding_dim,
        "context_length": config.backend.context_length,
        "batch_size": config.trainer.batch_size,
        "vocab_size": options.vocab_size,
    }


def _measure(subjects: list[Subject], peer: Peer | None, steps: int, repeats: int) -> list[float]:
    """Run a block of steps of each in turn, without counting the first block; return the peer's seconds."""
    peer_seconds: list[float] = []
    for turn in range(repeats + 1):
        for subject in subjects:
            subject.steps(steps)
        if peer is not None:
            peer_seconds += peer.steps(steps)
        if turn == 0:
            peer_seconds = []
            for subject in subjects:
                subject.seconds.clear()
    return peer_seconds


def _peak(subject: Subject) -> float:
    """Return the step's devices' joint operations per second: the table's, else those of a large product here."""
    dtype = subject.config.model.factor_dtype
    known = hardware_of(jax.local_devices()[0].device_kind)
    if known is None:
        return measured_peak(dtype)
    return known.peak(dtype) * math.prod(subject.programs.layout.sizes.values())


def _result(subject: Subject, peak: float, peer_seconds: list[float]) -> Result:
    config, compiled = subject.config, subject.programs
    median = statistics.median(subject.seconds)
    tokens = config.trainer.batch_size * config.backend.context_length
    return Result(
        model=subject.model,
        activation=subject.activation,
        num_params=num_params(subject.state),
        batch_size=config.trainer.batch_size,
        context_length=config.backend.context_length,
        median_seconds=median,
        lowest_seconds=min(subject.seconds),
        highest_seconds=max(subject.seconds),
        tokens_per_second=tokens / median,
        flops_per_step=compiled.flops_per_step,
        mfu=compiled.flops_per_step / median / peak,
        memory_bytes=compiled.peak_memory_bytes,
        compile_seconds=compiled.compile_seconds,
        ratio_to_peer=statistics.median(peer_seconds) / median if peer_seconds else None,
    )


def _print(results: list[Result], peer_seconds: list[float]) -> None:
    columns = ("model", "activation", "M", "ms", "range", "tokens/s", "MFU", "MB", "compile", "×peer")
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for result in results:
        table.add_row(
            result.model,
            result.activation,
            f"{result.num_params / 1e6:.2f}",
            f"{result.median_seconds * 1e3:.1f}",
            _range(result.lowest_seconds, result.highest_seconds),
            f"{result.tokens_per_second:,.0f}",
            f"{result.mfu:.2f}",
            f"{result.memory_bytes / 1e6:.0f}",
            f"{result.compile_seconds:.1f} s",
            "" if result.ratio_to_peer is None else f"{result.ratio_to_peer:.2f}",
        )
    if peer_seconds:
        spread = _range(min(peer_seconds), max(peer_seconds))
        table.add_row(PEER, "softmax", "", f"{statistics.median(peer_seconds) * 1e3:.1f}", spread)
    Screen().print_table(table)


def _range(lowest: float, highest: float) -> str:
    return f"{lowest * 1e3:.1f}–{highest * 1e3:.1f}"


if __name__ == "__main__":
    sys.exit(main())
