"""What jax and the libraries around it have to be told before they are used."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import subprocess
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from xattn.errors import BadInput, looking_at

THREADS = "NPROC"  # the variable by which XLA is told how many threads its CPU device has
_LOCKS = 16  # that compilations share, so that the cache does not fill with a lock for each
_threads: int | None = None  # what compute_with() has been told
_before: list[str | None] = []  # the variable's value, while it is ours

# Loads the part of jax that reads XLA_FLAGS, and has it read them.
_READ_XLA_FLAGS = "from jaxlib import xla_client; xla_client.CompileOptions()"


@functools.cache
def first_look() -> None:
    """Has jax find its devices. Raises :class:`BadInput` where the environment asks for what is not here."""
    with looking_at("device"):
        if os.environ.get("XLA_FLAGS"):
            _check_xla_flags()
        import jax

        jax.devices()
    _forget_threads()


def _check_xla_flags() -> None:
    """Raises RuntimeError where XLA cannot read its flags: it would end the process, so that another one is asked."""
    asked = subprocess.run([sys.executable, "-c", _READ_XLA_FLAGS], capture_output=True, text=True, errors="replace")
    told = [line.partition("] ")[2] for line in asked.stderr.splitlines() if re.match("[EF][0-9]+ .*flag", line)]
    if asked.returncode and told:  # any other trouble is left to jax, which can tell of it
        raise RuntimeError(told[0])


def compute_with(threads: int | None) -> None:
    """Has jax compute on the CPU with so many threads. None leaves the number to XLA, which makes one for each core
    that the process may use.

    jax makes the threads when it first looks at its devices. Raises :class:`BadInput` where it has made another number
    of them and the CPU is what it computes on.
    """
    global _threads
    if threads == _threads:
        return
    if _has_devices():
        import jax

        if jax.default_backend() == "cpu":
            has = "one for each core" if _threads is None else str(_threads)
            raise BadInput(
                f"trainer.threads = {'null' if threads is None else threads}: this process has its threads already "
                f"({has}); start the run by itself"
            )
        return
    _forget_threads()
    _threads = threads
    if threads is not None:
        _before.append(os.environ.get(THREADS))
        os.environ[THREADS] = str(threads)


def _forget_threads() -> None:
    """Leaves the environment as it was: a process that is started later may compute with other threads."""
    while _before:
        if (before := _before.pop()) is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before


def _has_devices() -> bool:
    """Whether jax has looked at its devices in this process; it does not say so in public."""
    if "jax" not in sys.modules:
        return False
    from jax._src import xla_bridge

    return bool(xla_bridge.backends_are_initialized())


def ask_for_determinism() -> None:
    """XLA reads its flags when a device is first used: later it is too late, which only a GPU minds."""
    too_late = "jax" in sys.modules
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_gpu_deterministic_ops" in flags:
        return
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    first_look()
    import jax

    if too_late and jax.default_backend() != "cpu":
        raise BadInput("trainer.deterministic = True: this process has used the GPU without it; start it by itself")


def hush_libraries(note: Callable[[str], None]) -> None:
    """Sends to ``note`` what orbax's threads say of an error: a person is told of it in our own words."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook = lambda args: note("".join(traceback.format_exception(args.exc_value)))
    sys.unraisablehook = lambda args: note("".join(traceback.format_exception(args.exc_value)))


@contextlib.contextmanager
def compiled_once(program: str) -> Iterator[None]:
    """Around the compilation of a program that several processes may want at this time: the first compiles it, and the
    others wait and read it from the cache. Does nothing where there is no cache of ours.

    program: its text.
    """
    import jax

    cache, kept = _cache_of_programs(), getattr(jax.config, "jax_compilation_cache_dir", None)
    if kept != str(cache) or jax.process_count() > 1:  # processes of one run compile together
        yield
        return
    number = zlib.crc32(program.encode()) % _LOCKS
    try:
        lock = (cache / f"compiling-{number}.lock").open("a")
    except OSError:
        yield
        return
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cache_of_programs() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "xattn" / "programs"


def keep_compiled_programs() -> None:
    """Lets processes share compiled programs through the user's cache folder, or does nothing where that is closed."""
    import jax

    cache = _cache_of_programs()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(cache, os.W_OK) or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
