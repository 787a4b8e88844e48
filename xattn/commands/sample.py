"""``xattn sample``: text from a run's model, streamed to stdout, with its speed on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from xattn.errors import BadInput, ExitCode
from xattn.runs.loaded_run import load
from xattn.system.arguments import Parser, number, whole
from xattn.system.screen import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Stream the continuation of a prompt. Only text goes to stdout; a newline ends each sample. On a terminal,
    characters that are not printable are shown as ·."""
    parser = Parser(prog="xattn sample", description=main.__doc__)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--prompt", default="", help="what is continued; it is not printed again")
    parser.add_argument("--max-tokens", type=whole(1), default=300, metavar="N")
    parser.add_argument("--temperature", type=number(0), default=0.8, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=whole(1), metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=number(0, 1, above=True), metavar="P", help="draw among the fewest that reach P together"
    )
    parser.add_argument("--seed", type=whole(0, 2**32), default=0, help="the same seed says the same")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends before it; may be repeated")
    parser.add_argument("--num-samples", type=whole(1), default=1, metavar="N", help="each with a key of its own")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    asked = parser.parse_args(argv)
    if "" in asked.stop:
        raise BadInput("--stop: an empty text would end every sample before it begins")
    run = load(asked.run, checkpoint=asked.checkpoint)
    on_terminal = sys.stdout.isatty()  # which would obey control characters
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
            sys.stdout.write(printable(piece.text) if on_terminal else piece.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        print(_speed(began, pieces), file=sys.stderr)
    return ExitCode.DONE


def _speed(began: float, pieces: Sequence[tuple[float, int]]) -> str:
    """Describe the speed. The first piece waits for the prompt and for compilation; the others show the pace."""
    tokens = sum(count for _, count in pieces)
    first, last = pieces[0][0], pieces[-1][0]
    later = tokens - pieces[0][1]
    pace = f", then {later / (last - first):,.0f} tokens/s" if later else ""
    return f"{tokens} tokens; the first {pieces[0][1]} after {first - began:.2f} s{pace}"
