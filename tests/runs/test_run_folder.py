"""The run folder: its lock, how it is moved aside, and that no reader sees half a file."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from xattn.errors import BadInput, ExitCode, FolderInUse
from xattn.runs import run_folder
from xattn.runs.run_folder import RunFolder, to_json, write_atomically, write_summary

HOLD = """
import sys, time
from pathlib import Path
from xattn.runs.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path / run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    root = Path(__file__).resolve().parent.parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


# ---- the lock --------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_is_dead(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """Also by SIGKILL: the kernel frees the lock, so that a stale one cannot exist."""
    with pytest.raises(FolderInUse, match="another process") as error:
        RunFolder(tmp_path / "run")
    assert error.value.exit_code == ExitCode.IN_USE == 5
    assert str(tmp_path / "run") in str(error.value)
    assert holder.poll() is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    RunFolder(tmp_path / "run").release()


def test_what_a_start_that_died_has_left_does_not_block_the_next(tmp_path: Path) -> None:
    """Hydra writes before we do, where a log or YAML files of its own are asked for."""
    (tmp_path / ".hydra").mkdir()
    for name in ("log.txt", "train.log", "foo.log", ".hydra/hydra.yaml", ".hydra/config.yaml"):
        (tmp_path / name).touch()
    RunFolder(tmp_path).release()
    for name in ("notes.txt", ".git/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        with pytest.raises(BadInput, match="not empty"):
            RunFolder(tmp_path)
        (tmp_path / name).unlink()


def test_a_second_holder_in_this_process_is_refused_too(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    with pytest.raises(FolderInUse):
        RunFolder(tmp_path / "run")
    first.release()
    RunFolder(tmp_path / "run").release()


def test_the_refused_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        with pytest.raises(FolderInUse):
            RunFolder(tmp_path / "run")
    assert len(os.listdir("/dev/fd")) == before
    first.release()


def test_a_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    """wandb's service may outlive the run."""
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(command, close_fds=False, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        folder.release()
        RunFolder(tmp_path / "run").release()
        child.kill()


@pytest.mark.parametrize("path", ["file", "file/below", "file/further/below"])
def test_a_file_where_a_folder_should_be_is_bad_input(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="is a file"):
        RunFolder(tmp_path / path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("path", ["link", "link/below"])
@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_link_to_nothing_is_bad_input_and_not_waited_for(path: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(BadInput, match="link"):
        RunFolder(tmp_path / path)
    assert (tmp_path / "link").is_symlink()


def test_a_name_too_long_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be written"):
        RunFolder(tmp_path / ("x" * 300))


# ---- moving aside ----------------------------------------------------------------------------------------------------


def filled(path: Path) -> dict[str, bytes]:
    """A folder with files of every kind that a run has; their names and bytes."""
    contents = {
        "config.yaml": b"seed: 0\n",
        "metrics.jsonl": b'{"step": 1}\n' * 1000,
        "checkpoints/20/params/data": bytes(range(256)) * 100,
        "wandb/offline-run/run.wandb": b"\0" * 33,
        "artifacts/ü sample.txt": b"text",
        ".hidden": b"",
    }
    for name, content in contents.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return contents


def test_moving_aside_keeps_every_byte(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    contents = filled(folder.path)
    target = folder.move_aside()
    assert target.parent == tmp_path / ".superseded"
    assert target.name.startswith("run-")
    assert "T" in target.name
    assert {name: (target / name).read_bytes() for name in contents} == contents
    assert folder.path == tmp_path / "run"
    assert [entry.name for entry in folder.path.iterdir()] == [run_folder.LOCK]
    with pytest.raises(FolderInUse):
        RunFolder(tmp_path / "run")
    folder.release()
    RunFolder(tmp_path / "run").release()


def test_moving_aside_many_times_loses_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for i in range(20):
        (folder / "config.yaml").write_text(str(i))
        folder.move_aside()
    kept = sorted((tmp_path / ".superseded").iterdir())
    assert [(old / "config.yaml").read_text() for old in kept] == [str(i) for i in range(20)]
    folder.release()


def test_a_lock_taken_in_a_folder_that_was_moved_away_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between the open and the lock another process may move the folder: the lock must be that of the new one."""
    flock = run_folder.fcntl.flock
    moved = []

    def move_then_lock(descriptor: int, operation: int) -> None:
        if not moved:
            (tmp_path / "run").rename(tmp_path / "moved")
            moved.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(run_folder.fcntl, "flock", move_then_lock)
    folder = RunFolder(tmp_path / "run")
    assert moved
    assert os.path.samestat(os.fstat(folder._lock), (tmp_path / "run" / run_folder.LOCK).stat())
    with pytest.raises(FolderInUse):
        RunFolder(tmp_path / "run")
    RunFolder(tmp_path / "moved").release()
    folder.release()


def test_a_folder_that_is_moved_away_while_it_is_made_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """mkdir says "exists" of a folder that is gone when pathlib looks whether it is one."""
    mkdir, refused = Path.mkdir, []

    def gone(path: Path, **options: bool) -> None:
        if not refused:
            refused.append(path)
            raise FileExistsError(17, "File exists", str(path))
        mkdir(path, **options)

    monkeypatch.setattr(Path, "mkdir", gone)
    RunFolder(tmp_path / "run").release()
    assert refused


def test_the_folder_is_held_all_through_the_move(tmp_path: Path) -> None:
    """A process that starts while a run is moved aside never gets a folder that another one thinks is its own."""
    folder = RunFolder(tmp_path / "run")
    (folder / "config.yaml").write_text("0")
    taken: list[RunFolder] = []
    stop = threading.Event()

    def intrude() -> None:
        while not stop.is_set():
            try:
                taken.append(RunFolder(tmp_path / "run"))
                return
            except FolderInUse:
                pass

    thread = threading.Thread(target=intrude)
    thread.start()
    lost = False
    for _ in range(200):
        try:
            folder.move_aside()
        except FolderInUse:
            lost = True  # the other was first in the new folder; then we must not think it is ours
            break
    stop.set()
    thread.join()
    assert lost == bool(taken)
    for held in taken:
        held.release()


# ---- what counts as empty, what counts as ours -----------------------------------------------------------------------


@pytest.mark.parametrize("entries", [[], [".lock", "log.txt"], ["config.yaml.tmp", "log.txt"], ["config.yaml", "any"]])
def test_an_empty_folder_and_a_runs_folder_are_taken(entries: list[str], tmp_path: Path) -> None:
    """A start may die before its config.yaml and leave a lock, a log and a temporary file."""
    (tmp_path / "run").mkdir()
    for entry in entries:
        (tmp_path / "run" / entry).write_text("x")
    folder = RunFolder(tmp_path / "run")
    assert folder.is_ours() == ("config.yaml" in entries)
    assert all((tmp_path / "run" / entry).read_text() == "x" for entry in entries if entry != ".lock")
    folder.release()


@pytest.mark.parametrize("entry", ["notes.txt", "thesis.tmp", ".git/", "folder/", "metrics.jsonl", "config.yml"])
def test_any_other_folder_is_refused_and_not_touched(entry: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / entry).mkdir() if entry.endswith("/") else (tmp_path / "run" / entry).write_text("x")
    with pytest.raises(BadInput, match=r"not empty.*config\.yaml"):
        RunFolder(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == [entry.rstrip("/")]


def test_withdrawing_takes_away_what_was_made_and_nothing_else(tmp_path: Path) -> None:
    """A log.txt stays: it may hold a traceback, or be somebody's."""
    for name in (None, "log.txt", "config.yaml"):
        folder = RunFolder(tmp_path / "run")
        if name is not None:
            (folder / name).write_text("x")
        folder.withdraw()
        folder.release()
        assert sorted(entry.name for entry in tmp_path.rglob("*")) == ([] if name is None else [name, "run"])
        if name is not None:
            (tmp_path / "run" / name).unlink()
            (tmp_path / "run").rmdir()


def test_withdrawing_leaves_no_empty_outputs(tmp_path: Path) -> None:
    for path, left in (("outputs/study/run", []), ("elsewhere/study/run", ["elsewhere"])):
        folder = RunFolder(tmp_path / path)
        folder.withdraw()
        folder.release()
        assert os.listdir(tmp_path) == left


def test_who_only_looks_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    """``xattn runs`` takes a shared lock for a moment, and a run that starts just then waits that long."""
    RunFolder(tmp_path / "run").release()
    with (tmp_path / "run" / run_folder.LOCK).open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.02, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        RunFolder(tmp_path / "run").release()
        fcntl.flock(looking, fcntl.LOCK_SH)
        with pytest.raises(FolderInUse):
            RunFolder(tmp_path / "run")


# ---- files -----------------------------------------------------------------------------------------------------------


def test_an_atomic_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, "a long first text")
    write_atomically(file, "ü")
    assert file.read_text("utf-8") == "ü"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_a_reader_never_sees_half_a_summary(tmp_path: Path) -> None:
    texts = [{"step": i, "filler": "x" * 20_000} for i in range(60)]
    write_summary(tmp_path, texts[0])
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            summary = run_folder.read_summary(tmp_path)
            assert summary is not None
            assert len(summary["filler"]) == 20_000
            seen.append(summary["step"])

    reader = threading.Thread(target=read)
    reader.start()
    for text in texts:
        write_summary(tmp_path, text)
    done.set()
    reader.join()
    assert seen == sorted(seen)
    assert run_folder.read_summary(tmp_path) == texts[-1]


def test_no_summary_is_none_and_a_broken_one_bad_input(tmp_path: Path) -> None:
    assert run_folder.read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text('{"step": 1')
    with pytest.raises(BadInput, match=r"summary\.json"):
        run_folder.read_summary(tmp_path)


def test_numbers_that_are_not_finite_are_null() -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e30, "e": 0.0, "f": 3, "g": "ü", "h": None, "i": True}
    read = json.loads(to_json(values))
    assert read == {"a": None, "b": None, "c": None, "d": 1e30, "e": 0.0, "f": 3, "g": "ü", "h": None, "i": True}
    assert json.loads(to_json({"nested": {"x": [1.0, math.nan]}})) == {"nested": {"x": [1.0, None]}}
    assert "\\n" not in to_json(values)


def test_a_path_is_shown_as_seen_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in full where it is not below, or "here" was deleted while a run went on."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert run_folder.shown(here / "outputs") == "outputs"
    assert run_folder.shown(tmp_path) == str(tmp_path)
    here.rmdir()
    assert run_folder.shown(here / "outputs") == str(here / "outputs")


@pytest.mark.parametrize("text", ["[]", '"done"', "3", "null", "true", "[" * 100_000, "\0", "{", ""])
@pytest.mark.parametrize("name", [run_folder.SUMMARY, run_folder.PROVENANCE])
def test_a_file_that_holds_no_json_object_is_bad_input(name: str, text: str, tmp_path: Path) -> None:
    """One that holds null is not one that is missing."""
    (tmp_path / name).write_text(text)
    read = run_folder.read_summary if name == run_folder.SUMMARY else run_folder.read_provenance
    with pytest.raises(BadInput, match=f"{name}: not readable"):
        read(tmp_path)
