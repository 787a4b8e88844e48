"""The ``xattn`` command. Each subcommand loads only what it needs."""

from __future__ import annotations

import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from xattn.errors import BadInput, ExitCode, XattnError, did_you_mean, storage_error
from xattn.system import entry, screen
from xattn.system.device import first_look

# Command → the module whose main(argv) executes it, and its purpose; in the order of a study, benchmarks last.
_COMMANDS = {
    "train": ("xattn.app", "train a model or a sweep; the same as python train.py in a clone"),
    "report": ("xattn.commands.publish", "judge a study and write its report"),
    "runs": ("xattn.sweep.runs", "list runs, the best of each study first, and unfinished sweeps"),
    "sample": ("xattn.commands.sample", "generate text with a run's model"),
    "resume": ("xattn.sweep.resume", "continue an interrupted sweep"),
    "compare": ("xattn.commands.compare", "compare runs side by side"),
    "evaluate": ("xattn.commands.evaluate", "evaluate a run's model on any text, length or probe"),
    "findings": ("xattn.commands.findings", "list the claims that studies state, and their verdicts"),
    "verdict": ("xattn.report.decide", "is an arm better? exit 0 yes, 10 undecided, 11 worse"),
    "explain": ("xattn.commands.explain", "explain a key: its meaning, allowed values and default"),
    "plan": ("xattn.commands.plan", "estimate a run's memory and time, on any device"),
    "launch": ("xattn.commands.launch", "start one run as several processes on this machine"),
    "export": ("xattn.commands.interchange", "export a run as safetensors, or as a Llama for transformers"),
    "wandb": ("xattn.tracking.command", "print the commands that show a run's wandb files and send them"),
    "bug": ("xattn.commands.bug", "pack the files for a bug report: no text, no keys"),
    "sync": ("xattn.commands.sync", "rebuild wandb's runs from their metrics.jsonl"),
    "prune": ("xattn.commands.prune", "free disk space of finished runs, after asking"),
    "bench attention": ("xattn.bench.attention", "compare attention implementations, activations and sizes"),
    "bench checkpoints": ("xattn.bench.checkpoints", "measure what saving costs a run, and how long it takes"),
    "bench data": ("xattn.bench.data", "read a big corpus as bytes and BPE: MB/s and memory"),
    "bench generation": ("xattn.bench.generation", "compare generation with the cache and by forward passes"),
    "bench gpu": ("xattn.bench.gpu.command", "check what only a GPU can show, in ten minutes"),
    "bench kernels": ("xattn.bench.kernels", "measure the Hopper kernels: accuracy, times, tiles"),
    "bench start": ("xattn.bench.start", "time from the command to the first step, cold and warm"),
    "bench sweep": ("xattn.bench.sweep", "compare a sweep with its runs one by one, and packs"),
    "bench train": ("xattn.bench.train", "measure training steps: speed, utilisation, memory"),
}
_GROUPS = {"bench": "measure speed and memory; `xattn bench` lists its parts"}  # one line in place of their commands

_IMPORT_JAX = ("bench", "plan")  # on being loaded; other commands look at the device only after parsing their arguments
_NEVER_LOOK = ("bench gpu",)  # the processes that it starts look at the device


def main(argv: Sequence[str] | None = None) -> int:
    """Execute a command and return its exit code; print one message for an error."""
    entry.open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        entry.check_working_directory()
        code = _run(words)
        sys.stdout.flush()
    except XattnError as error:
        entry.tell(error)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has read enough: `xattn runs | head`
        screen.abandon(sys.stdout)
        return ExitCode.DONE
    except KeyboardInterrupt:
        entry.tell("interrupted")
        return 128 + signal.SIGINT
    except Exception as error:  # the outermost rim: a bug of ours
        if (full := storage_error(error, Path("standard output"))) is not None:
            entry.tell(full)
            return full.exit_code
        entry.tell(f"{type(error).__name__}: {error}".splitlines()[0] + _kept())
        return ExitCode.ERROR
    return code


def is_command(word: str) -> bool:
    """Return whether a command line that begins with this word is for :func:`main`."""
    return any(command.split()[0] == word for command in _COMMANDS)


def _run(words: Sequence[str]) -> int:
    if words == ["--version"]:
        print(f"xattn {version('xattn')}")
        return ExitCode.DONE
    for command, (module, _) in _COMMANDS.items():
        length = len(command.split())
        if " ".join(words[:length]) == command:
            with entry.loading(command, words[length:]):
                if words[0] in _IMPORT_JAX and command not in _NEVER_LOOK and not {"-h", "--help"} & set(words):
                    first_look()
                loaded = import_module(module)
            return int(loaded.main(words[length:]))
    group = words[0] if words and words[0] in _GROUPS else None
    asked = words[1:] if group else words
    if asked in ([], ["-h"], ["--help"]):
        print("\n".join(["usage: xattn COMMAND …; each takes --help", *_listed(group)]))
        return ExitCode.DONE if asked else ExitCode.BAD_INPUT
    near = did_you_mean(" ".join(words[:2]), _COMMANDS) or did_you_mean(words[0], _COMMANDS)
    raise BadInput(f"{' '.join(words[:2])}: no such command{near}; `xattn --help` lists them all")


def _listed(group: str | None) -> list[str]:
    """Return a line for each command of the group; without a group, for each command and each group."""
    purposes = {command: purpose for command, (_, purpose) in _COMMANDS.items()} | _GROUPS
    purposes = {name: purpose for name, purpose in purposes.items() if name.rpartition(" ")[0] == (group or "")}
    width = max(map(len, purposes))
    columns = screen.columns(sys.stdout)
    return [screen.fitted(f"  xattn {name:{width}}  {purpose}", columns) for name, purpose in purposes.items()]


def _kept() -> str:
    """Save the traceback of the current error, since there is no log.txt here, and return where it is."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="xattn-", suffix=".log", delete=False, encoding="utf-8") as file:
            traceback.print_exc(file=file)
    except OSError:
        return ""
    return f"; the traceback is in {file.name}"


if __name__ == "__main__":
    sys.exit(main())
