"""``xattn sample``: text from a run's model, streamed to stdout, with its speed on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from xattn.errors import BadInput, ExitCode
from xattn.runs.loaded_run import load
from xattn.system.arguments import Parser, number, whole
from xattn.system.screen import UNPRINTABLE, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Stream the continuation of a prompt. Only text goes to stdout; a newline ends each sample. Bytes that are not
    UTF-8 are shown as ·; on a terminal, so are characters that are not printable."""
    parser = Parser(prog="xattn sample", description=main.__doc__)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--prompt", default="", help="text to continue; it is not printed again")
    parser.add_argument("--max-tokens", type=whole(1), default=300, metavar="N")
    parser.add_argument(
        "--temperature", type=number(0), default=0.8, metavar="T", help="0 always takes the likeliest token"
    )
    parser.add_argument("--top-k", type=whole(1), metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p",
        type=number(0, 1, above=True),
        metavar="P",
        help="draw from the fewest tokens with total probability P",
    )
    parser.add_argument("--seed", type=whole(0, 2**32), default=0, help="the same seed gives the same text")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--num-samples", type=whole(1), default=1, metavar="N", help="number of samples, each with its own random key"
    )
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    asked = parser.parse_args(argv)
    if "" in asked.stop:
        raise BadInput("--stop: an empty text would end every sample immediately")
    run = load(asked.run, checkpoint=asked.checkpoint)
    on_terminal = sys.stdout.isatty()  # which would obey control characters
    hides = False
    for sample in range(asked.num_samples):
        stream = run.stream(
            asked.prompt,
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            seed=asked.seed,
            sample=sample,
            stop=asked.stop,
        )
        began, pieces = time.perf_counter(), []
        for piece in stream:
            pieces.append((time.perf_counter(), piece.num_tokens))
            text = printable(piece.text) if on_terminal else piece.text.replace("\ufffd", "·")
            hides = hides or text.count("·") > piece.text.count("·")
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        print(_speed(began, pieces), file=sys.stderr)
    if hides:
        print(UNPRINTABLE, file=sys.stderr)
    return ExitCode.DONE


def _speed(began: float, pieces: Sequence[tuple[float, int]]) -> str:
    """Describe the speed. The first piece waits for the prompt and for compilation; the others show the pace."""
    tokens = sum(count for _, count in pieces)
    first, last = pieces[0][0], pieces[-1][0]
    later = tokens - pieces[0][1]
    pace = f", then {later / (last - first):,.0f} tokens/s" if later else ""
    return f"{tokens} tokens; the first {pieces[0][1]} after {first - began:.2f} s{pace}"
