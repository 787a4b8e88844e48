"""``xattn bench checkpoints``: what saving costs a run, and how long a save takes.

    xattn bench checkpoints                    # python train.py, saving every 50 steps, against never
    xattn bench checkpoints --every 10 model=small

Stretches of the training loop with and without saves take turns in one process, on one compiled program. Every other
pair runs in reverse order. A stretch's seconds are those of the loop's own clock, which keeps running while a save is
written in the background, plus those for which the loop stopped for saves. The end of the last save, for which every
run waits, is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from xattn.bench.record import write_record
from xattn.config import Config, compose
from xattn.data.batches import Batch, Prefetch
from xattn.data.run_data import load_data
from xattn.system.arguments import Parser
from xattn.training.checkpoint import Checkpoints
from xattn.training.loop import Member, Progress, train
from xattn.training.programs import Programs, TrainState, hyperparameters, programs


class TimedCheckpoints(Checkpoints):
    """Checkpoints that record each save's seconds: those that blocked the caller, and those until it was committed.

    waited: seconds that the caller waited for the end of saves.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, on_commit=self._there)
        self.blocking: list[float] = []
        self.in_all: list[float] = []
        self.waited = 0.0

    def save(self, step: int, state: TrainState, progress: Mapping[str, Any], *, val_loss: float | None) -> None:
        self._began = time.perf_counter()
        super().save(step, state, progress, val_loss=val_loss)
        self.blocking.append(time.perf_counter() - self._began)

    def wait(self) -> None:
        began = time.perf_counter()
        super().wait()
        self.waited += time.perf_counter() - began

    def _there(self, step: int) -> None:
        self.in_all.append(time.perf_counter() - self._began)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the results, and write ``checkpoints.json``. Return an exit code."""
    parser = _parser()
    options = parser.parse_intermixed_args(argv)
    if options.repeats < 1 or not 1 <= options.every <= options.steps:
        parser.error("--repeats must be at least 1, and --every from 1 to --steps")
    config = compose(options.overrides)
    data = load_data(config.data, replace(config.batching, sequences=1))
    compiled, _ = programs(config, data.tokenizer.vocab_size, optional=data.optional)
    pairs, blocking, in_all = [], list[float](), list[float]()
    with tempfile.TemporaryDirectory() as scratch, Prefetch(data.batch) as batch:
        for pair in range(options.repeats + 1):
            seconds = dict[bool, float]()
            for saving in (True, False) if pair % 2 else (False, True):
                checkpoints = TimedCheckpoints(Path(scratch) / f"{pair}") if saving else None
                seconds[saving] = _stretch(config, compiled, batch, data.held_out, checkpoints, options)
                if checkpoints is not None and pair:
                    blocking += checkpoints.blocking
                    in_all += checkpoints.in_all
            if pair:  # the first pair is a warm-up
                pairs.append({"with": seconds[True], "without": seconds[False]})
    ratios = [pair["with"] / pair["without"] for pair in pairs]
    print(f"{options.steps} steps with a save every {options.every} / without: {statistics.median(ratios):.3f}")
    print(f"  in pairs: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    print(
        f"a save: {statistics.median(blocking) * 1e3:.1f} ms blocking, {statistics.median(in_all) * 1e3:.0f} ms total"
    )
    found = {"pairs": pairs, "ratio": statistics.median(ratios), "blocking_seconds": blocking, "seconds": in_all}
    write_record(options, "checkpoints", found)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="xattn bench checkpoints", description="Measure what saving costs a run.")
    parser.add_argument("overrides", nargs="*", help="overrides of the config, as for train.py")
    parser.add_argument("--every", type=int, default=50, help="steps between two saves")
    parser.add_argument("--steps", type=int, default=200, help="steps in a stretch")
    parser.add_argument("--repeats", type=int, default=5, help="number of pairs of stretches; their median is reported")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    return parser


def _stretch(
    config: Config,
    compiled: Programs,
    batch: Prefetch,
    held_out: Sequence[Batch],
    checkpoints: TimedCheckpoints | None,
    options: argparse.Namespace,
) -> float:
    """Return the seconds of the stretch's steps from a new state, including those that the loop stopped for saves."""
    pace = {
        "steps": options.steps,
        "eval_every": options.steps,
        "checkpoint_every": options.every if checkpoints else None,
        "checkpoint_minutes": None,
    }
    progress = Progress(compiled.init(hyperparameters(config)))
    jax.block_until_ready(progress.state)
    member = Member(progress, batch, checkpoints)
    trainer = config.trainer.model_copy(update=pace)
    with checkpoints or contextlib.nullcontext():
        train(compiled, [member], held_out, trainer, bytes_per_token=None)
        stood_still = sum(checkpoints.blocking) + checkpoints.waited if checkpoints else 0.0
    return progress.clock.seconds + stood_still


if __name__ == "__main__":
    sys.exit(main())
