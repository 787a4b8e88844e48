"""The ``xattn`` command. Each subcommand loads what it needs and no more."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from xattn.errors import ExitCode, XattnError

# Command → the module whose main(argv) carries it out, and what it is for.
_COMMANDS = {
    "bench attention": ("xattn.bench.attention", "time implementations × activations × sizes of attention"),
    "bench data": ("xattn.bench.data", "ingest a big corpus as bytes and as BPE, and train: MB/s and memory"),
    "bench generation": ("xattn.bench.generation", "time generation through the cache against forward passes"),
    "bench train": ("xattn.bench.train", "speed, utilisation and memory of training steps; nanoGPT beside them"),
    "bench kernels": ("xattn.bench.kernels", "the Hopper kernels: accuracy, times beside cuDNN's softmax, tuning"),
    "bench start": ("xattn.bench.start", "seconds from the command to the first step, cold and warm"),
    "bench sweep": ("xattn.bench.sweep", "a sweep against its runs one by one; packs against a run alone"),
    "plan": ("xattn.plan", "what a run will cost in memory and time, here or on other devices"),
    "launch": ("xattn.launch", "one run over several processes of this machine"),
    "runs": ("xattn.sweep.runs", "list the runs in outputs/, the best of each study first"),
    "sample": ("xattn.sample", "text from a run's model"),
    "evaluate": ("xattn.evaluate", "a run's model on any text, at any length, with any probes"),
    "export": ("xattn.interchange", "a run's parameters as safetensors, or as a Llama for transformers"),
    "report": ("xattn.report", "judge a study and write its report"),
    "compare": ("xattn.compare", "set runs side by side"),
    "sync": ("xattn.sync", "rebuild runs of wandb from their metrics.jsonl"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 where it went well, else that of the error, after one message."""
    words = list(sys.argv[1:] if argv is None else argv)
    for command, (module, _) in _COMMANDS.items():
        length = len(command.split())
        if " ".join(words[:length]) == command:
            try:
                return int(import_module(module).main(words[length:]))
            except XattnError as error:
                print(f"xattn: {error}", file=sys.stderr)
                return error.exit_code
    lines = [f"  xattn {command:16} {purpose}" for command, (_, purpose) in _COMMANDS.items()]
    asked_for = words in (["-h"], ["--help"])
    print(
        "\n".join(["xattn's tools besides train.py; each takes --help:", *lines]),
        file=sys.stdout if asked_for else sys.stderr,
    )
    return ExitCode.DONE if asked_for else ExitCode.BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
