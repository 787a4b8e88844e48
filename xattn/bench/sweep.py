"""``xattn bench sweep``: a sweep in one command against its runs one by one; or, with ``--packs``, packs against a run.

    xattn bench sweep                          # 24 runs: 3 activations × 4 learning rates × 2 seeds, trainer=debug
    xattn bench sweep --packs 1 4 16 64        # runs as one program, on the device here: steps a second in total

The first form makes the same runs in two ways: by ``python train.py -m …``, before and after all others, with an empty
cache of programs each time; and as separate processes, alternately without a cache of programs and with one that has
them all. In the second form, packs take turns and make equally many steps.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from xattn.bench.record import write_record
from xattn.errors import BadInput, XattnError
from xattn.system.arguments import Parser
from xattn.tracking.display import Screen

_TRAIN = [sys.executable, "-m", "xattn.cli", "train"]
# Four layers of width 128, 64 tokens, 12 rows: a model too small to fill a GPU.
_SMALL = ["model.num_layers=4", "model.embedding_dim=128", "backend.context_length=64", "trainer.batch_size=12"]


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(argv)
    name, found = ("packs", _packs(options)) if options.packs else ("sweep", _sweep(options))
    write_record(options, name, found)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="xattn bench sweep", description="Compare a sweep with its runs one by one, and packs with a single run."
    )
    parser.add_argument("overrides", nargs="*", help="overrides of the config, as for train.py")
    parser.add_argument("--rates", type=int, default=4, help="number of learning rates, at most 4")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--every", type=int, default=1, help="train only every Nth run by itself, and scale the sum")
    parser.add_argument("--packs", nargs="+", type=int, metavar="N", help="sizes of packs, 1 among them")
    parser.add_argument("--steps", type=int, default=50, help="of a pack, in a block")
    parser.add_argument("--repeats", type=int, default=6, help="blocks of each pack; their median is reported")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    return parser


# ---- one command against many ----------------------------------------------------------------------------------------


def _sweep(options: argparse.Namespace) -> dict[str, Any]:
    grid = {
        "backend.activation": ["softmax", "sigmoid", "none"],
        "optimizer.learning_rate": ["3e-4", "1e-3", "3e-3", "1e-2"][: options.rates],
        "seed": [str(seed) for seed in range(options.seeds)],
    }
    fixed = ["trainer=debug", "tracking.wandb.mode=disabled", *options.overrides]
    many = [f"{key}={','.join(values)}" for key, values in grid.items()]
    runs = [
        [f"{key}={value}" for key, value in zip(grid, run, strict=True)] for run in itertools.product(*grid.values())
    ]
    with tempfile.TemporaryDirectory() as scratch:
        seconds: dict[str, list[float]] = {"sweep": [], "without a cache": [], "with a warm cache": []}

        def take(kind: str, name: str, overrides: Sequence[str], environment: Mapping[str, str]) -> None:
            seconds[kind].append(_seconds([*overrides, *fixed], Path(scratch) / name, environment))

        warm = {"XDG_CACHE_HOME": f"{scratch}/cache"}  # the sweep fills it
        take("sweep", "first", ["-m", *many], warm)
        for number, run in enumerate(runs[:: options.every]):
            take("without a cache", f"cold-{number}", run, warm | {"JAX_ENABLE_COMPILATION_CACHE": "false"})
            take("with a warm cache", f"warm-{number}", run, warm)
        take("sweep", "last", ["-m", *many], {"XDG_CACHE_HOME": f"{scratch}/another"})
    once = statistics.mean(seconds["sweep"])
    apart = {kind: statistics.mean(each) * len(runs) for kind, each in seconds.items() if kind != "sweep"}
    print(f"{len(runs)} runs in one command: {once:.1f} s ({', '.join(f'{each:.1f}' for each in seconds['sweep'])})")
    for kind, total in apart.items():
        print(f"{len(runs)} processes {kind}: {total:.1f} s, {once / total:.3f} of which the one command takes")
    ratios = {kind: once / total for kind, total in apart.items()}
    return {"runs": len(runs), "seconds": seconds, "sweep_seconds": once, "apart_seconds": apart, "ratios": ratios}


def _seconds(overrides: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> float:
    cwd.mkdir()
    began = time.perf_counter()
    command = [*_TRAIN, *overrides]
    done = subprocess.run(command, cwd=cwd, env=os.environ | dict(environment), capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise XattnError(f"xattn train {' '.join(overrides)} exited with {done.returncode}: {done.stderr[-500:]}")
    return seconds


# ---- packs -----------------------------------------------------------------------------------------------------------


def _packs(options: argparse.Namespace) -> dict[str, Any]:
    if 1 not in options.packs or min(options.packs) < 1:
        raise BadInput(
            f"--packs = {options.packs}: must be numbers of runs and contain 1, the one that others are compared with"
        )
    import jax

    from xattn.config import compose

    config = compose([*_SMALL, "data=python_stdlib", *options.overrides])  # the data is not read
    steps = {size: _Packed(config, size) for size in options.packs}
    for turn in range(options.repeats + 1):
        for packed in steps.values():
            packed.take(options.steps, counted=turn > 0)
    alone = statistics.median(steps[1].seconds)
    rows = [packed.row(alone) for packed in steps.values()]
    table = Table(*("runs", "ms a step", "range", "steps/s", "× one run's", "MB", "compile"), box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            str(row["runs"]),
            f"{row['median_seconds'] * 1e3:.3f}",
            f"{row['lowest_seconds'] * 1e3:.3f}–{row['highest_seconds'] * 1e3:.3f}",
            f"{row['steps_per_second']:,.0f}",
            f"{row['times_one']:.2f}",
            f"{row['memory_bytes'] / 1e6:.0f}",
            f"{row['compile_seconds']:.1f} s",
        )
    Screen().print_table(table)
    return {"device": jax.local_devices()[0].device_kind, "packs": rows}


class _Packed:
    """Stacked runs of different seeds and learning rates, and the seconds per step of all of them in each block."""

    def __init__(self, config: Any, size: int):
        import numpy as np

        from xattn.data.batches import Batch
        from xattn.training.programs import hyperparameters, programs

        rows, length, vocab_size = config.trainer.batch_size, config.backend.context_length, 256
        self.programs, _ = programs(config, vocab_size, size=size)
        states = []
        for number in range(size):
            rate = config.optimizer.learning_rate * (1 + number % 4)
            optimizer = config.optimizer.model_copy(update={"learning_rate": rate})
            own = config.model_copy(update={"seed": number, "optimizer": optimizer})
            states.append(self.programs.init(hyperparameters(own)))
        draw = np.random.default_rng(0)
        tokens = [draw.integers(vocab_size, size=(rows, length + 1), dtype=np.int32) for _ in range(size)]
        self._batches = [Batch(each, np.ones((rows, length), np.float32)) for each in tokens]
        self._state = self.programs.stack(states)
        self.seconds: list[float] = []

    def take(self, steps: int, *, counted: bool) -> None:
        """Time steps as in the training loop: batches are stacked and sent each time; only the last step is awaited."""
        import jax

        began = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self.programs.step(self._state, self.programs.stack_batches(self._batches))
        jax.block_until_ready((self._state, metrics))
        if counted:
            self.seconds.append((time.perf_counter() - began) / steps)

    def row(self, alone: float) -> dict[str, float]:
        """Return the measurements. steps_per_second: of all runs together. alone: seconds per step of one run."""
        median, size = statistics.median(self.seconds), self.programs.size
        return {
            "runs": size,
            "median_seconds": median,
            "lowest_seconds": min(self.seconds),
            "highest_seconds": max(self.seconds),
            "steps_per_second": size / median,
            "times_one": size * alone / median,
            "memory_bytes": self.programs.peak_memory_bytes,
            "compile_seconds": self.programs.compile_seconds,
        }


if __name__ == "__main__":
    sys.exit(main())
