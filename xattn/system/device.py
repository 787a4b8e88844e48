"""Settings that jax and the libraries around it need before they are used."""

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from xattn.errors import BadInput, first_line
from xattn.system.cache import cache_folder

THREADS = "NPROC"  # the variable that sets the number of threads of XLA's CPU device
_LOCKS = 16  # shared by compilations, so that the cache does not fill with one lock for each
_threads: int | None = None  # what compute_with() was given
_environment = contextlib.ExitStack()  # holds the variable until jax has read it

# Loads the part of jax that reads XLA_FLAGS, and makes it read them.
_READ_XLA_FLAGS = "from jaxlib import xla_client; xla_client.CompileOptions()"


@dataclass(frozen=True)
class Outside:
    """An error that jax may raise when it first looks for devices, and its message. All conditions must hold."""

    kinds: tuple[type[Exception], ...]
    message: str
    """The message, with {error} (its first line) and {value} (the variable's)."""
    says: str
    """A regular expression that the error's message must contain."""
    variable: str = ""
    """If given, the environment must have this variable."""

    def applies(self, error: Exception) -> bool:
        says_so = isinstance(error, self.kinds) and re.search(self.says, str(error)) is not None
        return says_so and (not self.variable or self.variable in os.environ)


# The first that applies is used. tests/system/test_outside.py raises each.
OUTSIDE = (
    Outside((RuntimeError,), "XLA_FLAGS = {value!r}: {error}", says="[Ff]lag", variable="XLA_FLAGS"),
    Outside(
        (RuntimeError,),
        "JAX_NUM_CPU_DEVICES = {value!r}: must be a number of at least 1, or unset",
        says="process_index",
        variable="JAX_NUM_CPU_DEVICES",
    ),
    Outside(
        (RuntimeError,),
        "XLA_FLAGS = {value!r}: leaves jax without a device; xla_force_host_platform_device_count must be ≥ 1",
        says="process_index",
        variable="XLA_FLAGS",
    ),
    Outside(  # jax asserts that it has a plugin for CUDA, and its assertion has no message
        (AssertionError, RuntimeError),
        "JAX_PLATFORMS = {value!r}: jax finds no such device here, or has no plugin for it ({error}); unset it, or set "
        "JAX_PLATFORMS=cpu",
        says="^$|nable to initialize backend|nknown backend",
        variable="JAX_PLATFORMS",
    ),
    Outside(
        (RuntimeError,),
        "JAX_PLATFORM_NAME = {value!r}: {error}; unset it, or set JAX_PLATFORM_NAME=cpu",
        says="nknown backend",
        variable="JAX_PLATFORM_NAME",
    ),
    Outside(  # a driver that does not answer, or a plugin of another version
        (RuntimeError,), "jax finds no device: {error}", says="nable to initialize backend"
    ),
    Outside(
        (ValueError,),
        "jax rejects an environment variable: {error}",
        says="for JAX flag jax_|for environment '|^jax\\.default_device",
    ),
)


@contextlib.contextmanager
def looking_for_devices() -> Iterator[None]:
    """Convert errors raised here into :class:`BadInput` if :data:`OUTSIDE` has them. Other errors pass unchanged."""
    try:
        yield
    except Exception as error:
        for row in OUTSIDE:
            if row.applies(error):
                message = row.message.format(error=first_line(error), value=os.environ.get(row.variable))
                raise BadInput(message) from error
        raise


@functools.cache
def first_look() -> None:
    """Make jax find its devices. Raises :class:`BadInput` if the environment asks for something unavailable."""
    with looking_for_devices():
        if os.environ.get("XLA_FLAGS"):
            _check_xla_flags()
        import jax

        jax.devices()
    _environment.close()  # a process started later may compute with other threads


def _check_xla_flags() -> None:
    """Raise RuntimeError if XLA cannot read its flags. This would end the process, so another process tries it."""
    asked = subprocess.run([sys.executable, "-c", _READ_XLA_FLAGS], capture_output=True, text=True, errors="replace")
    lines = [line.partition("] ")[2] for line in asked.stderr.splitlines() if re.match("[EF][0-9]+ .*flag", line)]
    if asked.returncode and lines:  # jax itself reports any other problem
        raise RuntimeError(lines[0])


def compute_with(threads: int | None) -> None:
    """Make jax compute on the CPU with this many threads; None lets XLA make one for each core that it may use.

    jax makes the threads when it first looks at its devices. Raises :class:`BadInput` if it has already made another
    number of them and computes on the CPU.
    """
    global _threads
    if threads == _threads:
        return
    if _has_devices():
        import jax

        if jax.default_backend() == "cpu":
            has = "one for each core" if _threads is None else str(_threads)
            raise BadInput(
                f"trainer.threads = {'null' if threads is None else threads}: this process already has its threads "
                f"({has}); start the run in a process of its own"
            )
        return
    _environment.close()
    _threads = threads
    if threads is not None:
        _environment.enter_context(environment({THREADS: str(threads)}))


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _has_devices() -> bool:
    """Return whether jax has looked at its devices in this process; no public function reports it."""
    if "jax" not in sys.modules:
        return False
    from jax._src import xla_bridge

    return bool(xla_bridge.backends_are_initialized())


def ask_for_determinism() -> None:
    """Set XLA's flag for determinism. XLA reads it when a device is first used; later is an error on a GPU."""
    too_late = "jax" in sys.modules
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_gpu_deterministic_ops" in flags:
        return
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    first_look()
    import jax

    if too_late and jax.default_backend() != "cpu":
        raise BadInput(
            "trainer.deterministic = True: this process has used the GPU without it; start the run in a new process"
        )


def hush_libraries(note: Callable[[str], None]) -> None:
    """Send errors from orbax's threads to ``note``: users see them in our own words."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook = lambda args: note("".join(traceback.format_exception(args.exc_value)))
    sys.unraisablehook = lambda args: note("".join(traceback.format_exception(args.exc_value)))


@contextlib.contextmanager
def compiled_once(program: str) -> Iterator[None]:
    """Let the first of several processes compile a program; the others wait and read it from the cache.

    Does nothing without a cache of ours. program: its text.
    """
    import jax

    cache, kept = cache_folder("programs"), getattr(jax.config, "jax_compilation_cache_dir", None)
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


def keep_compiled_programs() -> None:
    """Share compiled programs between processes through the user's cache folder, if that is writable."""
    import jax

    cache = cache_folder("programs")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(cache, os.W_OK) or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
