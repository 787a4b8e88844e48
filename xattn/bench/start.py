"""``xattn bench start``: seconds from ``python train.py`` to its first step, without and with compiled programs.

    xattn bench start experiment=shakespeare_cpu data.path=input.txt

Each start is a separate process in a folder that is deleted afterwards. The first step is done when its row is in
metrics.jsonl; then the run is stopped. wandb records offline, as it does where no key is configured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from xattn.bench.record import write_record
from xattn.errors import XattnError
from xattn.system.arguments import Parser

_TRAIN = [sys.executable, "-m", "xattn.cli", "train"]
_PATIENCE = 600


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="xattn bench start", description="Measure the seconds to the first step, cold and warm.")
    parser.add_argument("overrides", nargs="*", help="overrides of the config, as for train.py")
    parser.add_argument("--repeats", type=int, default=3, help="number of warm starts; the quickest is reported")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    options = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        cold = _seconds_to_first_step(options.overrides, Path(folder), "cold")
        warm = [_seconds_to_first_step(options.overrides, Path(folder), f"warm-{i}") for i in range(options.repeats)]
    print(f"first step    cold {cold:.1f} s, warm {min(warm):.1f} s")
    write_record(options, "start", {"cold_seconds": cold, "warm_seconds": warm})
    return 0


def _seconds_to_first_step(overrides: Sequence[str], folder: Path, name: str) -> float:
    run = folder / name
    pace = ["trainer.steps=1000000", "trainer.log_every=1", "trainer.eval_every=1000000", "tracking.wandb.mode=offline"]
    command = [*_TRAIN, *overrides, *pace, f"hydra.run.dir={run}"]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    log = (folder / f"{name}.log").open("w", encoding="utf-8")
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        rows = run / "metrics.jsonl"
        while not (rows.exists() and rows.stat().st_size):
            if process.poll() is not None:
                raise XattnError(f"the run ended before its first step: {(folder / f'{name}.log').read_text('utf-8')}")
            if time.perf_counter() - began > _PATIENCE:
                raise XattnError(f"no first step within {_PATIENCE} s")
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()
        log.close()


if __name__ == "__main__":
    sys.exit(main())
