"""``xattn bench data``: tokenise a corpus of synthetic text, as bytes and as BPE, and train on it for a few steps.

    xattn bench data --megabytes 2000

For each tokenizer it prints the first start's MB/s (for BPE with and without its training on the first 100 MB), and
the seconds of the second start, which finds the tokens in the cache. It also prints this process's peak anonymous
memory (RssAnon in Linux's /proc, without mapped file pages) and the share of a training step spent waiting for its
batch. Each tokenizer has a separate process and a temporary cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from xattn.config import CONF, Config, compose
from xattn.errors import BadInput, ExitCode
from xattn.system.arguments import Parser

WORDS = 20_000
STEPS = 12


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="xattn bench data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2000, help="size of the corpus")
    parser.add_argument("--tokenizers", nargs="+", default=["bytes", "bpe"], help="values of data.tokenizer")
    parser.add_argument("--folder", type=Path, help="folder for corpus and cache; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print only one JSON object per tokenizer")
    parser.add_argument("--one", nargs=2, metavar=("TOKENIZER", "PATH"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="overrides of the training's config, as for train.py")
    arguments = parser.parse_args(argv)
    if not Path("/proc/self/status").exists():
        raise BadInput("xattn bench data: needs Linux, since it reads RssAnon in /proc/self/status")
    if arguments.one:
        tokenizer, path = arguments.one
        print(json.dumps(measure(_config(tokenizer, path, arguments.overrides))))
        return ExitCode.DONE
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="xattn-bench-data-") as scratch:
        corpus = Path(scratch) / "corpus.txt"
        write_corpus(corpus, arguments.megabytes * 10**6)
        for tokenizer in arguments.tokenizers:
            environment = os.environ | {
                "XDG_CACHE_HOME": f"{scratch}/cache-{tokenizer}",
                "PYTHONPATH": os.pathsep.join([str(CONF.parent), os.environ.get("PYTHONPATH", "")]),
            }
            command = [sys.executable, "-m", "xattn.bench.data", "--one", tokenizer, str(corpus), *arguments.overrides]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(found) if arguments.json else in_words(found), flush=True)
    return ExitCode.DONE


def write_corpus(path: Path, size: int) -> None:
    """Write lines of made-up words, drawn by Zipf's law from a vocabulary; they are about as compressible as text."""
    generator = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    words = ["".join(generator.choice(letters, length)) for length in generator.integers(1, 11, WORDS)]
    chances = 1 / np.arange(1, WORDS + 1)
    chances /= chances.sum()
    with path.open("w", encoding="ascii") as file:
        written = 0
        while written < size:
            drawn = [words[i] for i in generator.choice(WORDS, 200_000, p=chances)]
            text = "".join(" ".join(drawn[i : i + 12]) + ".\n" for i in range(0, len(drawn), 12))
            written += file.write(text[: size - written])


def measure(config: Config) -> dict[str, Any]:
    """Ingest twice and train; return the measurements of this process."""
    from xattn.data import corpus_tokenizer
    from xattn.data.run_data import RunData, load_data

    bpe_seconds, train_bpe = [0.0], corpus_tokenizer.train_bpe

    def timed(*arguments: Any) -> str:
        began = time.perf_counter()
        trained = train_bpe(*arguments)
        bpe_seconds[0] += time.perf_counter() - began
        return trained

    def load() -> tuple[RunData, float]:
        began = time.perf_counter()
        data = load_data(config.data, config.batching)
        return data, time.perf_counter() - began

    corpus_tokenizer.train_bpe = timed  # type: ignore[assignment]
    size = Path(str(getattr(config.data, "path", ""))).stat().st_size
    with _peak_of_anonymous_memory() as peak:
        _, first = load()
        ingest = peak[0]
        data, second = load()
        waits, steps = _train(config, data)
    return {
        "tokenizer": getattr(config.data, "tokenizer", None),
        "megabytes": size / 1e6,
        "megabytes_per_second": size / 1e6 / first,
        "megabytes_per_second_without_training_bpe": size / 1e6 / (first - bpe_seconds[0]),
        "bpe_seconds": bpe_seconds[0],
        "second_start_seconds": second,
        "ingest_anonymous_megabytes": ingest / 1e6,
        "peak_anonymous_megabytes": peak[0] / 1e6,
        "bytes_per_token": data.bytes_per_token(),
        "step_seconds": steps,
        "waiting_share": waits / steps,
    }


def _train(config: Config, data: Any) -> tuple[float, float]:
    """Return the median seconds of the wait for a batch, and of a step including it."""
    import jax

    from xattn.data.batches import Prefetch
    from xattn.training.programs import hyperparameters, programs

    compiled, _ = programs(config, data.tokenizer.vocab_size, optional=data.optional)
    state, waits, steps = compiled.init(hyperparameters(config)), list[float](), list[float]()
    with Prefetch(data.batch) as batch:
        for step in range(STEPS):
            began = time.perf_counter()
            rows = batch(step)
            waits.append(time.perf_counter() - began)
            state, _ = jax.block_until_ready(compiled.step(state, rows))
            steps.append(time.perf_counter() - began)
    return float(np.median(waits[2:])), float(np.median(steps[2:]))


def in_words(found: dict[str, Any]) -> str:
    """Return the measurements of one tokenizer as a line of text."""
    return (
        f"{found['tokenizer']:6} {found['megabytes']:,.0f} MB: {found['megabytes_per_second']:.1f} MB/s"
        f" (BPE's own training {found['bpe_seconds']:.0f} s, without it "
        f"{found['megabytes_per_second_without_training_bpe']:.1f} MB/s), second start "
        f"{found['second_start_seconds']:.1f} s, anonymous memory at most "
        f"{found['ingest_anonymous_megabytes']:,.0f} MB while ingesting, {found['peak_anonymous_megabytes']:,.0f} MB "
        f"with training; a step takes {1000 * found['step_seconds']:.0f} ms, "
        f"{100 * found['waiting_share']:.2f} % of it waiting for the batch"
    )


def _config(tokenizer: str, path: str, overrides: Sequence[str]) -> Config:
    return compose(["data=text", f'data.path="{path}"', f"data.tokenizer={tokenizer}", *overrides])


@contextmanager
def _peak_of_anonymous_memory() -> Iterator[list[int]]:
    """Yield a list with the peak in bytes, which a thread keeps up to date."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
            peak[0] = max(peak[0], now)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


if __name__ == "__main__":
    sys.exit(main())
