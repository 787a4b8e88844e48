"""What remains of a finished run's checkpoints: ``trainer.keep``, ``xattn prune``, and messages of later readers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xattn
from xattn.cli import main
from xattn.commands import prune
from xattn.config import Config, compose
from xattn.errors import BadInput, ExitCode, NotKept
from xattn.runs import run_folder
from xattn.runs.desk import run
from xattn.runs.evaluations import evaluate_once
from xattn.runs.job import Job
from xattn.runs.run_folder import RunFolder
from xattn.runs.same_training import Trainings, answer
from xattn.training.kept import DELETED, MANIFEST, SEAL, keep_only, refuse_what_was_deleted, steps_in, superfluous

TINY = [
    *("trainer=debug", "tracking.wandb.mode=disabled", "model.embedding_dim=16", "model.num_layers=1"),
    *("model.num_heads=2", "model.mlp_dim=16", "backend.context_length=16", "evaluation.sequences=8"),
    *("trainer.steps=4", "trainer.eval_every=2", "trainer.log_every=2", "trainer.checkpoint_every=2"),
]


@pytest.fixture
def golden(outputs: Path) -> Path:
    """A finished run of 4 steps whose best checkpoint is that of step 2."""
    folder = next(path for path in sorted(outputs.iterdir()) if "every" not in path.name)
    checkpoint = folder / run_folder.CHECKPOINTS / "4"
    manifest = json.loads((checkpoint / MANIFEST).read_text()) | {"val_loss": 99.0}
    text = json.dumps(manifest).encode()
    (checkpoint / MANIFEST).write_bytes(text)
    (checkpoint / SEAL).write_text(sha256(text).hexdigest())
    return folder


def tree(folder: Path) -> list[str]:
    """Steps, and their parts."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*") if path.is_dir())


def parameters(folder: Path) -> dict[str, tuple[int, Any]]:
    """The last and the best, each with its step; of those that can be loaded."""
    found = {}
    for which in ("last", "best"):
        try:
            opened = xattn.load(folder, checkpoint=which)  # type: ignore[arg-type]
        except NotKept:
            continue
        found[which] = opened.step, np.asarray(opened.params["token_embedding"]["embedding"]).tobytes()
    return found


# ---- trainer.keep ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "left", "readable"),
    [
        ("best_and_last", ["2/params", "2/training", "4/params", "4/training"], ["last", "best"]),
        ("last", ["4/params", "4/training"], ["last"]),
        ("parameters", ["2/params", "4/params"], ["last", "best"]),
        ("nothing", [], []),
    ],
)
def test_what_stays_is_what_is_read_and_what_is_gone_says_why(
    keep: Any, left: list[str], readable: list[str], golden: Path
) -> None:
    folder, before = golden / run_folder.CHECKPOINTS, parameters(golden)
    assert (before["last"][0], before["best"][0]) == (4, 2)
    keep_only(folder, keep, why=f"trainer.keep={keep}")
    assert tree(folder) == left
    assert parameters(golden) == {which: before[which] for which in readable}
    assert keep_only(folder, keep, why="again") == []
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".tmp-", ".deleting-"))]
    for which in {"last", "best"} - set(readable):
        with pytest.raises(NotKept) as error:
            xattn.load(golden, checkpoint=which)  # type: ignore[arg-type]
        assert error.value.exit_code == ExitCode.BAD_INPUT
        assert f"{which} checkpoint, of step {before[which][0]}, were deleted (trainer.keep={keep})" in str(error.value)
        assert ("checkpoint=last" if readable else "losses are in summary.json") in str(error.value)


def test_deleting_twice_names_both_reasons(golden: Path) -> None:
    folder = golden / run_folder.CHECKPOINTS
    for keep in ("last", "parameters", "nothing"):
        keep_only(folder, keep, why=f"trainer.keep={keep}")  # type: ignore[arg-type]
    with pytest.raises(NotKept, match=r"of step 2.*trainer\.keep=last, then trainer\.keep=parameters, then"):
        xattn.load(golden, checkpoint="best")


@pytest.mark.parametrize("keep", ["last", "parameters", "nothing"])
def test_killed_at_any_moment_the_folder_is_readable_and_the_same_again_ends_it(
    keep: Any, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, between and within deletions: all that ``keep`` asks for is there, and the rest is whole or says why."""
    whole = golden / run_folder.CHECKPOINTS
    reference, pruned = tmp_path / "reference", tmp_path / "pruned"
    shutil.copytree(whole, reference)
    shutil.copytree(whole, pruned)
    keep_only(pruned, keep, why="a reason")
    wanted = tree(pruned)
    for moment in range(100):
        calls = [0]

        def counted(call: Callable[..., Any], at: int = moment, calls: list[int] = calls) -> Callable[..., Any]:
            def instead(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                if calls[0] > at:
                    raise KeyboardInterrupt
                return call(*args, **kwargs)

            return instead

        shutil.rmtree(whole)
        shutil.copytree(reference, whole)
        with monkeypatch.context() as patched:
            for owner, name in ((Path, "rename"), (Path, "replace"), (os, "unlink"), (os, "rmdir")):
                patched.setattr(owner, name, counted(getattr(owner, name)))
            try:
                keep_only(whole, keep, why="a reason")
                break
            except KeyboardInterrupt:
                pass
        assert set(wanted) <= set(tree(whole))
        for which, step in (("last", "4"), ("best", "2")):
            with contextlib.suppress(NotKept):
                refuse_what_was_deleted(whole, which)  # type: ignore[arg-type]
                assert files(whole / step / "params") == files(reference / step / "params")
        keep_only(whole, keep, why="a reason")
        assert tree(whole) == wanted
    assert moment > 10


def test_where_no_checkpoint_is_whole_nothing_is_superfluous(golden: Path) -> None:
    """And a broken last one does not take the place of one that is whole."""
    folder = golden / run_folder.CHECKPOINTS
    (folder / "4" / SEAL).write_text("broken")
    assert superfluous(folder, "last") == [folder / "4"]
    (folder / "2" / SEAL).write_text("broken")
    for keep in ("last", "parameters"):
        assert superfluous(folder, keep) == []  # type: ignore[arg-type]


def test_a_run_without_parameters_answers_for_what_needs_none(golden: Path) -> None:
    """Not for what would have to be measured: that is trained, and a line says why."""
    keep_only(golden / run_folder.CHECKPOINTS, "nothing", why="trainer.keep=nothing")
    config = xattn.config.load(golden / run_folder.CONFIG)

    def asked(**changes: Any) -> Config:
        return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=changes)})

    said: list[str] = []
    job = Job(asked(sequences=3), golden.parent / xattn.config.run_name(asked(sequences=3)))
    assert answer(Trainings([job]).find(job), said.append) is None
    assert "trainer.keep=nothing" in said[-1]
    with pytest.raises(NotKept):
        evaluate_once(golden, ["evaluation.sequences=3"])
    assert main(["runs", str(golden.parent)]) == 0
    assert main(["compare", str(golden)]) == 0
    for words in (["sample", str(golden)], ["evaluate", str(golden)], ["export", str(golden), "exported"]):
        assert main(words) == ExitCode.BAD_INPUT, words
    assert not Path("exported").exists()


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def odd_modes(folder: Path, umask: int) -> dict[str, str]:
    """What in the folder has another mode than the umask gives it."""
    return {
        str(path.relative_to(folder)): stat.filemode(path.lstat().st_mode)
        for path in [folder, *folder.rglob("*")]
        if not path.is_symlink() and stat.S_IMODE(path.lstat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~umask
    }


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "umask"), [("parameters", 0o027), ("nothing", 0o002)], indirect=["umask"])
def test_a_run_keeps_what_it_resumes_from_until_it_is_finished(
    keep: str, umask: int, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command shows it then, whatever it would keep now. All that is written has the umask's mode."""
    command = [*TINY, "data=text", f"data.path={text_file}"]
    folder, steps = tmp_path / "run", iter(range(10))
    asked = [*command, f"trainer.keep={keep}"]
    assert run(compose(asked), folder, asked, stop=lambda: next(steps) == 2) == ExitCode.PREEMPTED
    checkpoints = folder / run_folder.CHECKPOINTS
    assert tree(checkpoints) == [f"{step}/{part}" for step in (2, 3) for part in ("params", "training")]
    assert run(compose(asked), folder, asked) == ExitCode.DONE
    assert "resumed     from step 3" in capsys.readouterr().out
    assert {Path(part).name for part in tree(checkpoints)} == ({"params"} if keep == "parameters" else set())
    summary = run_folder.read_summary(folder)
    left = tree(checkpoints)
    for other in ("best_and_last", "nothing"):
        again = [*command, f"trainer.keep={other}"]
        assert run(compose(again), folder, again) == ExitCode.DONE
        assert "already done at step 4" in capsys.readouterr().out
    assert (run_folder.read_summary(folder), tree(checkpoints)) == (summary, left)
    code = main(["evaluate", str(folder), "--save"])
    assert code == (ExitCode.DONE if keep == "parameters" else ExitCode.BAD_INPUT)
    if keep == "parameters":
        assert main(["export", str(folder), str(tmp_path / "exported")]) == ExitCode.DONE
        assert odd_modes(tmp_path / "exported", umask) == {}
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == ExitCode.DONE
    assert odd_modes(tmp_path / "report", umask) == {}
    assert odd_modes(folder, umask) == {}


# ---- xattn prune -----------------------------------------------------------------------------------------------------


@pytest.fixture
def study(outputs: Path, golden: Path) -> Path:
    """Three finished runs, one of which has a broken checkpoint and wandb's files; and one that was moved aside."""
    shutil.copytree(golden, outputs / run_folder.SUPERSEDED / f"{golden.name}-20260101T000000Z")
    (golden / run_folder.CHECKPOINTS / ".bad" / "3-then").mkdir(parents=True)
    (golden / run_folder.CHECKPOINTS / ".bad" / "3-then" / "array").write_bytes(b"1234")
    (golden / run_folder.CHECKPOINTS / ".deleting-1").mkdir()
    (golden / "wandb" / "offline-run-1").mkdir(parents=True)
    (golden / "wandb" / "offline-run-1" / "run-1.wandb").write_bytes(b"12345")
    return outputs


def files(folder: Path) -> dict[str, bytes]:
    locks = (run_folder.LOCK, DELETED)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in locks
    }


def test_prune_deletes_what_nothing_but_training_reads(study: Path, golden: Path) -> None:
    before, loaded = files(study), parameters(golden)
    runs = [path for path in study.iterdir() if path.name != run_folder.SUPERSEDED]
    assert main(["report", str(study), "--out", "before"]) == 0
    assert main(["prune", str(study), "--yes"]) == 0
    after = files(study)
    assert after == {name: before[name] for name in after}
    gone = {name for name in before if name not in after}
    parts = {name: set(Path(name).parts) for name in gone}
    assert [name for name in gone if not parts[name] & {"2", "training", ".bad", run_folder.SUPERSEDED}] == []
    assert tree(golden / run_folder.CHECKPOINTS) == ["2/params", "4/params"]  # 2 is its best, of the others the last is
    for each in runs:
        assert {Path(part).name for part in tree(each / run_folder.CHECKPOINTS)} == {"params"}
    assert not (study / run_folder.SUPERSEDED).exists()
    assert not list(golden.glob(f"{run_folder.CHECKPOINTS}/.*"))
    assert (golden / "wandb" / "offline-run-1" / "run-1.wandb").exists()
    assert parameters(golden) == loaded
    assert main(["report", str(study), "--out", "after"]) == 0
    for name in ("results.csv", "effects.csv", "table.tex"):
        text = Path("after", name).read_text().replace("after", "before")
        assert text == Path("before", name).read_text()


def test_pruned_again_there_is_nothing_to_free_but_wandbs_files(
    study: Path, golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", str(study), str(golden), "--yes"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{len(list(study.iterdir()))} runs, ")
    told = {line.split("  ")[-1] for line in out.splitlines() if line.startswith("  ")}
    assert told == {
        "optimizer states (4)",
        "checkpoints that are neither the last nor the best (2)",
        "broken or half-deleted checkpoints (2)",
        "runs moved aside by resume=never (1)",
    }
    assert "freed" in out
    assert main(["prune", str(study), "--yes"]) == 0
    assert "there is nothing to free" in capsys.readouterr().out
    assert main(["prune", str(golden), "--yes", "--wandb"]) == 0
    assert "freed 5 B" in capsys.readouterr().out
    assert not (golden / "wandb" / "offline-run-1").exists()


def test_what_is_freed_is_what_was_said(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = prune._size(study)
    assert main(["prune", str(study), "--yes"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(f", {prune._bytes(before)}")
    written = sum(path.stat().st_size for path in study.rglob(DELETED))
    assert said[-1] == f"freed {prune._bytes(before - prune._size(study) + written)}"


@pytest.mark.parametrize(("typed", "deletes"), [("y", True), ("Yes", True), ("", False), ("n", False), (None, False)])
def test_it_asks_on_a_terminal(
    typed: str | None, deletes: bool, study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answered(prompt: str) -> str:
        assert "[y/N]" in prompt
        if typed is None:
            raise EOFError
        return typed

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answered)
    before = files(study)
    assert main(["prune", str(study)]) == 0
    assert (files(study) != before) == deletes
    assert ("nothing was deleted" in capsys.readouterr().out) != deletes


def test_without_a_terminal_it_deletes_nothing_unless_yes_is_given(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    before = files(study)
    assert main(["prune", str(study)]) == ExitCode.BAD_INPUT
    out, err = capsys.readouterr()
    assert "can be freed" in out
    assert "--yes deletes without asking" in err
    assert files(study) == before


@pytest.mark.parametrize("status", ["running", "preempted", "failed", "pruned", "not begun", "unreadable", "in use"])
def test_runs_that_need_their_checkpoints_are_left_alone(
    status: str, golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or that somebody is in."""
    held = None
    if status == "in use":
        held = RunFolder(golden)
    elif status == "unreadable":
        (golden / run_folder.SUMMARY).write_text("[")
    elif status == "not begun":
        (golden / run_folder.SUMMARY).unlink()
    else:
        run_folder.write_summary(golden, {"status": status})
    before = files(golden)
    assert main(["prune", str(golden), "--yes"]) == 0
    out = capsys.readouterr().out
    assert f"left alone: 1 {status}" in out
    assert "there is nothing to free" in out
    assert files(golden) == before
    if held is not None:
        held.release()


@pytest.mark.parametrize("change", ["in use", "resumed"])
def test_a_run_that_begins_while_it_is_asked_is_left_alone(
    change: str, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[RunFolder] = []

    def begins(prompt: str) -> str:
        if change == "in use":
            held.append(RunFolder(golden))
        else:
            run_folder.write_summary(golden, {"status": "running"})
        return "y"

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", begins)
    assert main(["prune", str(golden)]) == 0
    assert steps_in(golden / run_folder.CHECKPOINTS) == [2, 4]
    assert "4/training" in tree(golden / run_folder.CHECKPOINTS)
    for each in held:
        each.release()


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "notes.txt"):
        with pytest.raises(BadInput, match="neither a run's folder nor a study's"):
            prune.main([str(folder), "--yes"])
    assert (tmp_path / "notes.txt").exists()
