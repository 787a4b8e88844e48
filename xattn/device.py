"""What jax and the libraries around it have to be told before they are used."""

from __future__ import annotations

import functools
import logging
import os
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from xattn.errors import BadInput, looking_at

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


def _check_xla_flags() -> None:
    """Raises RuntimeError where XLA cannot read its flags: it would end the process, so that another one is asked."""
    asked = subprocess.run([sys.executable, "-c", _READ_XLA_FLAGS], capture_output=True, text=True, errors="replace")
    told = [line.partition("] ")[2] for line in asked.stderr.splitlines() if re.match("[EF][0-9]+ .*flag", line)]
    if asked.returncode and told:  # any other trouble is left to jax, which can tell of it
        raise RuntimeError(told[0])


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


def keep_compiled_programs() -> None:
    """Lets processes share compiled programs through the user's cache folder, or does nothing where that is closed."""
    import jax

    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path(base) / "xattn" / "programs"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(cache, os.W_OK) or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
