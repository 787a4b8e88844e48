"""Errors from outside xattn, at the first use of something, become one message and a documented exit code."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xattn.data import cache
from xattn.errors import BadInput, StorageError
from xattn.runs import run_folder
from xattn.runs.run_folder import RunFolder, is_held
from xattn.sweep.presence import drawing, is_present
from xattn.system import entry
from xattn.system.device import OUTSIDE, Outside, looking_for_devices

ROOT = Path(__file__).resolve().parent.parent.parent

# The environment, what jax then raises, and what the user reads. Each row of the table is here, in jax's own words.
RAISED = [
    ({"XLA_FLAGS": "--odd=1"}, RuntimeError("Unknown flag in XLA_FLAGS: --odd=1"), "XLA_FLAGS = '--odd=1'"),
    (
        {"JAX_NUM_CPU_DEVICES": "0"},
        RuntimeError("Unable to initialize backend 'cpu': INVALID_ARGUMENT: Could not determine process_index"),
        "JAX_NUM_CPU_DEVICES = '0': must be",
    ),
    (
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=0"},
        RuntimeError("Unable to initialize backend 'cpu': INVALID_ARGUMENT: Could not determine process_index"),
        "XLA_FLAGS = '--xla_force_host_platform_device_count=0'",
    ),
    ({"JAX_PLATFORMS": "cuda"}, AssertionError(), "JAX_PLATFORMS = 'cuda': jax finds no such device"),
    (
        {"JAX_PLATFORMS": "odd"},
        RuntimeError("Unable to initialize backend 'odd': Backend 'odd' is not in the list of known backends: ['cpu']"),
        "JAX_PLATFORMS = 'odd': jax finds no such device",
    ),
    (
        {"JAX_PLATFORM_NAME": "odd"},
        RuntimeError("Unknown backend odd. Available backends are ['cpu']"),
        "JAX_PLATFORM_NAME = 'odd': Unknown backend",
    ),
    (
        {},
        RuntimeError("Unable to initialize backend 'cuda': FAILED_PRECONDITION: No visible GPU devices."),
        "jax finds no device: Unable",
    ),
    (
        {},
        ValueError('Invalid value "x" for JAX flag jax_num_cpu_devices'),
        "jax rejects an environment variable",
    ),
    ({}, ValueError("invalid truth value 'x' for environment 'JAX_ENABLE_X64'"), "'JAX_ENABLE_X64'"),
    ({}, ValueError("jax.default_device must be passed either a Device"), "jax.default_device"),
]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in OUTSIDE:
        if row.variable:
            monkeypatch.delenv(row.variable, raising=False)


def raised(environment: dict[str, str], error: Exception, monkeypatch: pytest.MonkeyPatch) -> BadInput:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput) as caught, looking_for_devices():
        raise error
    return caught.value


@pytest.mark.parametrize(("environment", "error", "message"), RAISED)
def test_each_row_is_a_line_and_a_code(
    environment: dict[str, str], error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = raised(environment, error, monkeypatch)
    assert message in str(said)
    assert len(str(said).splitlines()) <= 2


def test_no_row_is_without_an_error_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that who adds a row adds what raises it."""
    applied: list[Outside] = []
    applies = Outside.applies

    def noted(self: Outside, error: Exception) -> bool:
        if applies(self, error):
            applied.append(self)
            return True
        return False

    monkeypatch.setattr(Outside, "applies", noted)
    for environment, error, _ in RAISED:
        with monkeypatch.context() as patched:
            raised(environment, error, patched)
    assert {id(row) for row in OUTSIDE} == {id(row) for row in applied}


@pytest.mark.parametrize("error", [RuntimeError("ours"), AssertionError("ours"), ValueError("ours"), KeyError("ours")])
def test_errors_of_our_own_pass(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(type(error), match="ours"), looking_for_devices():
        raise error


def test_a_deleted_working_directory_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(BadInput, match=r"the working directory cannot be read \(\[Errno 2\]"):
        entry.check_working_directory()


# ---- a file system without locks -------------------------------------------------------------------------------------


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre without ``-o flock``, some FUSE, NFS without its lock service."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_a_run_is_refused_where_there_are_no_locks(tmp_path: Path) -> None:
    """Two processes in one folder would destroy checkpoints. What is left there counts as an empty folder."""
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(StorageError, match="has no locks") as caught:
        RunFolder(tmp_path / "run")
    assert run_folder._file_system(tmp_path) in str(caught.value)
    assert "hydra.run.dir" in str(caught.value)
    assert len(os.listdir("/dev/fd")) == before
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == [run_folder.LOCK]


@pytest.mark.usefixtures("no_locks")
def test_who_only_looks_finds_nobody_there(tmp_path: Path) -> None:
    """A report of runs that were copied to such a file system."""
    (tmp_path / run_folder.LOCK).touch()
    assert not is_held(tmp_path)


@pytest.mark.usefixtures("no_locks")
def test_tuning_is_refused_and_the_cache_of_tokens_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="has no locks"), drawing(tmp_path):
        pass
    (tmp_path / "there").touch()
    with pytest.raises(StorageError, match="has no locks"):
        is_present(tmp_path, "there")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.tokens_folder() is None


def test_the_file_system_is_named_with_its_kind() -> None:
    if not Path("/proc/self/mounts").exists():
        pytest.skip("no /proc here")
    assert run_folder._file_system(Path("/proc/self")) == "proc at /proc"


# ---- the device, for real --------------------------------------------------------------------------------------------

LOOK = "from xattn.system.device import first_look; first_look()"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JAX_PLATFORMS", "cuda"),  # where there is no GPU
        ("JAX_PLATFORMS", "nonsense"),
        ("JAX_NUM_CPU_DEVICES", "x"),
        ("JAX_NUM_CPU_DEVICES", "0"),
        ("XLA_FLAGS", "--nonsense=1"),
        ("XLA_FLAGS", "nonsense"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=x"),
        ("JAX_ENABLE_X64", "maybe"),
    ],
)
def test_what_jax_cannot_take_is_bad_input(variable: str, value: str) -> None:
    """The installed jax says it in the words that the table knows; XLA would end the process for its flags."""
    if value == "cuda" and Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU here")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=ROOT, env=environment | {variable: value}, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{BadInput.__module__}.{BadInput.__name__}: ")
    assert variable.lower() in last.lower()


def test_flags_that_xla_takes_are_no_error() -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", LOOK], cwd=ROOT, env=environment, check=True)
