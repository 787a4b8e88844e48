"""Shared fixtures and hooks. No test may use the network or write into the home folder."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import quick  # noqa: F401
from xattn import registry

_SCRATCH = tempfile.TemporaryDirectory(prefix="xattn-tests-")
os.environ |= {
    "WANDB_MODE": "offline",
    "XDG_CACHE_HOME": f"{_SCRATCH.name}/cache",
    "WANDB_CONFIG_DIR": f"{_SCRATCH.name}/wandb/config",
    "WANDB_CACHE_DIR": f"{_SCRATCH.name}/wandb/cache",
    "WANDB_DATA_DIR": f"{_SCRATCH.name}/wandb/data",
    "NETRC": f"{_SCRATCH.name}/netrc",
}
os.environ.pop("WANDB_API_KEY", None)
os.environ.pop("WANDB_RUN_ID", None)

# Each session draws the same examples.
hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("deterministic")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="of each test's cases only every N-th")


def pytest_configure(config: pytest.Config) -> None:
    """Make the processes that tests start compile quickly too; those of ``-m faults`` compile as users' runs do."""
    if config.option.markexpr != "faults":
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use two processes for the whole suite, and none if files are named.

    Each process takes a whole file, so that its tests share compiled programs; fast tests compile nothing.
    """
    if config.args_source != pytest.Config.ArgsSource.TESTPATHS:
        return 0
    config.option.dist = "worksteal" if config.option.markexpr == "fast" else "loadfile"
    config.option.loadscopereorder = False
    return 2


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep compiled programs in .pytest_cache between sessions: compiling is most of the time of a first session.

    Also exempt all that was imported from garbage collections, and collect less often: jax makes many objects.

    jax finds a program by its text, its compile options and jax's version. It can limit a folder's size, but then
    reads every entry whenever it adds one, which took longer than compiling. So a month removes an entry here.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    if (cache := getattr(session.config, "cache", None)) is None:  # -p no:cacheprovider
        return
    of_runs = Path(os.environ["XDG_CACHE_HOME"], "xattn", "programs")  # for processes started by tests
    of_runs.parent.mkdir(parents=True, exist_ok=True)
    of_runs.symlink_to(cache.mkdir("programs-of-runs"))
    if "jax" not in sys.modules:
        return
    import jax
    from jax._src.lru_cache import LRUCache
    from jax.experimental.compilation_cache import compilation_cache

    programs = cache.mkdir("programs")
    for entry in programs.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process of this session removed it
            if time.time() - entry.stat().st_mtime > 30 * 24 * 3600:
                entry.unlink()
    LRUCache.put = _put
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # something may have been compiled before


def _put(cache: Any, key: str, program: bytes) -> None:
    """Add a program to jax's cache in one step: other processes read while jax's own method writes."""
    entry = Path(cache.path, f"{key}-cache")
    part = entry.with_name(f"{entry.name}.{os.getpid()}")
    part.write_bytes(program)
    part.replace(entry)


# Folders and files whose tests compile no model and draw little: less than 90 seconds in total on two idle cores.
_FAST = {
    *("data", "tracking", "test_config.py", "test_explain.py", "test_forge.py", "test_image.py", "test_like.py"),
    *("test_metrics.py", "test_screen.py", "test_claim.py", "test_compare.py", "test_finding.py", "test_propose.py"),
    *("test_read.py", "test_architecture.py", "test_renamed.py"),
}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests in :data:`_FAST` as fast, unless they are slow."""
    parts = item.path.relative_to(Path(__file__).parent).parts
    is_slow = any(item.get_closest_marker(name) is not None for name in ("slow", "faults"))
    if not _FAST.isdisjoint((parts[0], item.path.name)) and not is_slow:
        item.add_marker("fast")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--every N``, keep the first case of each test and every N-th case after it.

    Files with slow tests come first and fast files last, so that no process waits for the other at the end.
    """
    every, cases, left = config.getoption("--every"), Counter[str](), set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if cases[test] % every:
            left.add(item)
        cases[test] += 1
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=sorted(left, key=lambda item: item.nodeid))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    fast = {item.path for item in items if item.get_closest_marker("fast")} - slow
    items.sort(key=lambda item: (item.path not in slow) + (item.path in fast))


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo registrations after each test: they would appear in the provenance of later tests' runs."""
    monkeypatch.setattr(registry, "_ADDITIONS", dict(registry._ADDITIONS))


_emitters = "quick"


@pytest.fixture(scope="session", autouse=True)
def _quick_compiles() -> Iterator[None]:
    """Compile with little optimisation, in one piece, and with XLA's older emitters, in a third of the time.

    The tests' programs take longer to compile than to run. jax has no global setting for the emitters, only an option
    per program, so processes that tests start compile with those of users' runs.
    """
    if "jax" not in sys.modules:
        yield
        return
    import jax
    from jax._src import compiler

    jax.config.update("jax_disable_most_optimizations", True)
    right = compiler.get_compile_options

    def knows(option: str, value: Any) -> bool:
        """Return whether this version of XLA has the option."""
        try:
            jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    wanted = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    quicker = {option: value for option, value in wanted.items() if knows(option, value)}

    def options(*given: Any, env_options_overrides: dict[str, Any] | None = None, **named: Any) -> Any:
        if _emitters == "quick" and jax.config.read("jax_disable_most_optimizations"):
            env_options_overrides = quicker | dict(env_options_overrides or {})
        return right(*given, env_options_overrides=env_options_overrides, **named)

    compiler.get_compile_options = options
    yield
    compiler.get_compile_options = right


@pytest.fixture
def optimised() -> Iterator[None]:
    """Compile programs as runs do."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def emitters_of_runs() -> Iterator[None]:
    """Compile with the emitters that runs use, for tests where two programs must agree bit for bit, or nearly."""
    import jax

    global _emitters
    jax.clear_caches()
    _emitters = "of runs"
    yield
    _emitters = "quick"
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def room_for_programs() -> Iterator[None]:
    """Drop old programs when a sixth of the process's memory mappings are in use.

    A compiled CPU program takes hundreds. Linux allows 65,530, and a process that needs more dies of SIGSEGV.
    """
    yield
    mappings = Path("/proc/self/maps")
    if "jax" in sys.modules and mappings.exists() and mappings.read_bytes().count(b"\n") > 10_000:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 36 kB of text with something to learn in it: numbered lines of arithmetic."""
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"line {i}: {i} + {i * 7 % 13} = {i + i * 7 % 13}\n" for i in range(1500)))
    return path


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the study of golden runs, with their text, below the current folder; each is of 4 steps."""
    golden = Path(__file__).resolve().parent / "golden" / "runs"
    shutil.copy(golden / "text.txt", tmp_path)
    for config in golden.glob("*/config.yaml"):
        shutil.copytree(config.parent, tmp_path / "outputs" / "golden" / config.parent.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs" / "golden"
