"""Start commands as children of a fork server that has imported jax, which saves each of them two seconds.

A command is a process of its own, in its own session, with its own folder, environment and streams. It differs from a
real start in what happens before its first line: the interpreter's options, and jax's own variables, which jax reads
when it is imported. A test of these starts a real process.

A command that must not import jax is a child of a second server, which has not.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300.0  # seconds after which a process that has not ended is a failure

# Of xattn only what tests/faults/victim.py can still patch: a name that another module has imported keeps its function.
_PRELOADED = [
    "tests.quick",
    *("jax", "flax.linen", "optax", "orbax.checkpoint", "hydra", "wandb", "scipy.stats", "pandas", "xattn.runs.desk"),
    *("xattn.training.loop", "xattn.training.checkpoint", "xattn.training.programs", "xattn.model.generation"),
    "matplotlib.backends.backend_pdf",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__, *_PRELOADED])
_without_jax = multiprocessing.forkserver.ForkServer()
_without_jax.set_forkserver_preload([__name__, "tests.quick", "xattn.app"])
_streams = tempfile.TemporaryDirectory(prefix="xattn-tests-streams-")


def _of_jax(environment: Mapping[str, str]) -> dict[str, str]:
    """Return jax's own variables. It reads those of a job of several processes when the job connects."""
    of_job = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    return {name: value for name, value in environment.items() if name.startswith("JAX_") and name not in of_job}


@functools.cache
def _of_server() -> dict[str, str]:
    """Return jax's own variables in the server, which starts with the first process."""
    return _of_jax(os.environ)


def _nothing() -> None:
    pass


class Process:
    """``python WORDS…``: a script, ``-m module`` or ``-c code``, and its arguments.

    ``env`` is the whole environment; without it, this process's. ``before`` runs in the process first. Unless
    ``has_jax``, nothing has imported jax there.
    """

    def __init__(
        self,
        *words: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        before: Callable[[], None] = _nothing,
        has_jax: bool = True,
    ):
        environment = dict(os.environ if env is None else env)
        assert _of_jax(environment) == _of_server(), "jax has been imported already: start a real process"
        self._streams = tempfile.mkdtemp(dir=_streams.name)
        self._process = _context.Process(
            target=_become, args=(words, str(cwd), environment, self._streams, before, has_jax)
        )
        self.launched = time.monotonic()
        with contextlib.nullcontext() if has_jax else _second_server():
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.running:
            os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Return the exit code, −n if signal n killed the process."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)  # and the processes that it started
            self._process.join()
            raise AssertionError(f"not ended after {seconds} s; {self.out}{self.err}")
        return self._process.exitcode

    @property
    def out(self) -> str:
        return self._written("out")

    @property
    def err(self) -> str:
        return self._written("err")

    def _written(self, stream: str) -> str:
        file = Path(self._streams, stream)
        return file.read_text("utf-8", errors="replace") if file.exists() else ""


@contextlib.contextmanager
def _second_server() -> Iterator[None]:
    """Let multiprocessing start processes from the server without jax; it knows only one server itself."""
    first, module = multiprocessing.forkserver.connect_to_new_process, multiprocessing.forkserver
    module.connect_to_new_process = _without_jax.connect_to_new_process
    try:
        yield
    finally:
        module.connect_to_new_process = first


def run(
    *words: str, cwd: Path, env: Mapping[str, str] | None = None, has_jax: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS…`` to its end, as ``subprocess.run(…, capture_output=True, text=True)`` does."""
    process = Process(*words, cwd=cwd, env=env, has_jax=has_jax)
    code = process.wait()
    return subprocess.CompletedProcess([sys.executable, *words], code, process.out, process.err)


def train(*overrides: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python train.py OVERRIDES…`` to its end."""
    return run(str(ROOT / "train.py"), *overrides, cwd=cwd, env=env)


def _become(
    words: tuple[str, ...], cwd: str, env: dict[str, str], streams: str, before: Callable[[], None], has_jax: bool
) -> None:
    """Turn this child of the server into the command."""
    os.setsid()
    for descriptor, file in ((0, os.devnull), (1, f"{streams}/out"), (2, f"{streams}/err")):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.orig_argv = [sys.executable, *words]
    assert has_jax or "jax" not in sys.modules, "the server without jax has imported it"
    before()
    try:
        _run(words)
    finally:
        atexit._run_exitfuncs()  # multiprocessing's children leave without it


def _run(words: tuple[str, ...]) -> None:
    if words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = list(words[1:])
        sys.modules.pop(words[1], None)  # the server may have imported it
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        program = Path(words[0]).absolute()
        sys.path.insert(0, str(program.resolve().parent))
        sys.argv = list(words)
        runpy.run_path(str(program), run_name="__main__")
