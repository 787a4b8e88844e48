"""What is not ours: wandb in every bad mood, odd environments, odd places, a clock that goes back."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from .harness import (
    PATIENCE,
    ROOT,
    Reference,
    differences,
    processes_with,
    real,
    rows,
    runs,
    start,
    the_run,
    train,
    until,
)

pytestmark = pytest.mark.faults

# A wandb that writes down what it is told, and fails where a test wants it to.
FAKE_WANDB = """
import json, os, pathlib, sys, time, types

RECORD = pathlib.Path({record!r})
MOOD = {mood!r}

def sulk(where):
    if MOOD == where + " raises":
        raise OSError(28, "planted in " + where)
    if MOOD == where + " hangs":
        time.sleep(3600)

def write(**what):
    with RECORD.open("a") as file:
        file.write(json.dumps(what) + "\\n")

write(imported=True)
sulk("import")

def Settings(**settings):
    return settings

def Html(text, **how):
    return text

settings = types.SimpleNamespace(project=None, entity=None, run_tags=None, run_notes=None, run_job_type=None)
sdk = sys.modules["wandb.sdk"] = types.ModuleType("wandb.sdk")
sdk.wandb_setup = sys.modules["wandb.sdk.wandb_setup"] = types.ModuleType("wandb.sdk.wandb_setup")
sdk.wandb_setup.singleton = lambda: types.SimpleNamespace(settings=settings)

class Summary(dict):
    pass

class Run:
    summary = Summary()

    def define_metric(self, name, **how):
        pass

    def log(self, row, step=None, commit=None):
        sulk("log")
        if step is not None:  # the sample, in the end, has none
            write(step=step, row=row)

    def finish(self, exit_code=0):
        sulk("finish")
        write(finished=exit_code)

def init(**arguments):
    sulk("init")
    write(id=arguments["id"])
    return Run()
"""

CLI = ["-c", "import sys, xattn.cli; sys.exit(xattn.cli.main())"]
MIRRORED = "tracking.wandb.mode=offline"


class Wandb:
    """A fake wandb, the points that put it first on the path, and what it was told."""

    def __init__(self, folder: Path, mood: str = ""):
        self.folder, self._record = folder, folder / "record.jsonl"
        folder.mkdir(exist_ok=True)
        (folder / "wandb.py").write_text(FAKE_WANDB.format(record=str(self._record), mood=mood))
        self.points = [f"path:{folder}", "patience:3"]

    def told(self, key: str) -> list[object]:
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        return [json.loads(line)[key] for line in lines if key in json.loads(line)]


@pytest.mark.parametrize(
    "mood", ["import raises", "import hangs", "init raises", "init hangs", "log raises", "finish hangs"]
)
def test_whatever_wandb_does_the_run_is_unharmed(
    mood: str, command: list[str], cwd: Path, reference: Reference, tmp_path: Path
) -> None:
    wandb = Wandb(tmp_path / "fake", mood)
    training = train(*command, MIRRORED, cwd=cwd, points=wandb.points)
    assert training.wait() == 0, training.out + training.err
    assert wandb.told("imported")
    assert "wandb" in training.out
    assert "Traceback" not in training.out + training.err
    assert differences(the_run(cwd), reference) == []


def test_an_unwritable_wandb_folder_harms_nothing(
    command: list[str], cwd: Path, reference: Reference, tmp_path: Path
) -> None:
    """A file is where the folder should be."""
    train(*command, cwd=cwd, points=["step:5"])
    (the_run(cwd) / "wandb").write_text("in the way")
    training = train(*command, MIRRORED, cwd=cwd, points=Wandb(tmp_path / "fake").points)
    assert training.wait() == 0, training.out + training.err
    assert "mirror off" in training.out
    assert differences(the_run(cwd), reference) == []


def test_killed_in_wandbs_finish_and_elsewhere_no_step_is_sent_twice_and_the_id_stays(
    command: list[str], cwd: Path, reference: Reference, tmp_path: Path
) -> None:
    """Killed after the run was done, the same command shows the result."""
    wandb = Wandb(tmp_path / "fake")
    for kill in ("logged:8", "renamed:16", "wandb-finish"):
        training = train(*command, MIRRORED, cwd=cwd, points=[*wandb.points, kill])
        assert training.wait() == -signal.SIGKILL, training.out + training.err
    assert differences(the_run(cwd), reference) == []
    assert train(*command, MIRRORED, cwd=cwd).wait() == 0
    sent = wandb.told("step")
    assert sent == sorted(set(map(int, map(str, sent))))
    assert len(set(map(str, wandb.told("id")))) == 1


def test_sync_brings_back_what_wandb_lost(command: list[str], cwd: Path, tmp_path: Path) -> None:
    """Every row once, under the same id."""
    wandb = Wandb(tmp_path / "fake")
    train(*command, MIRRORED, cwd=cwd, points=[*wandb.points, "logged:8"])
    assert train(*command, MIRRORED, cwd=cwd, points=wandb.points).wait() == 0
    ids = set(map(str, wandb.told("id")))
    again = Wandb(tmp_path / "again")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(again.folder), str(ROOT)])}
    with start(
        "sync",
        str(the_run(cwd)),
        cwd=cwd,
        env=environment,
        program=CLI,
    ) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out + err
    assert again.told("step") == [row["step"] for row in rows(the_run(cwd))]
    assert set(map(str, again.told("id"))) == ids


def test_a_kill_leaves_no_process_of_wandb_behind(command: list[str], cwd: Path, reference: Reference) -> None:
    """The real one, offline; its service dies with the run, and the run outlives its service."""
    mark = {"XATTN_FAULTS_MARK": cwd.parent.name}
    for victim_is_the_service in (False, True):
        process = start(*command, MIRRORED, cwd=cwd, points=["pace:200"], env=mark)
        until(lambda: len(processes_with(*next(iter(mark.items())))) > 1 and any(rows(run) for run in runs(cwd)))
        if victim_is_the_service:
            for pid in processes_with(*next(iter(mark.items()))):
                if pid != process.pid:
                    os.kill(pid, signal.SIGKILL)
        else:
            process.kill()
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == (0 if victim_is_the_service else -signal.SIGKILL), out + err
        until(lambda: processes_with(*next(iter(mark.items()))) == [], seconds=30)
    assert differences(the_run(cwd), reference) == []


# ---- odd environments and places -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": None},
        {"HOME": "/proc/nobody", "XDG_CACHE_HOME": None},  # where not even root can make it
        {"LC_ALL": "C", "LANG": "C"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["no HOME", "a HOME that is not there", "locale C", "locale C and ASCII"],
)
def test_an_odd_environment_changes_nothing(
    environment: dict[str, str | None], command: list[str], cwd: Path, reference: Reference
) -> None:
    code, out, err = real(*command, cwd=cwd, env=environment)
    assert code == 0, out + err
    assert "Traceback" not in out + err
    assert differences(the_run(cwd), reference) == []


def test_paths_with_spaces_and_umlauts(text_file: Path, command: list[str], cwd: Path, reference: Reference) -> None:
    """Of the working folder, the run and the data; killed and resumed."""
    (odd := cwd / "ein Ordner, größer (2)").mkdir()
    overrides = [*command, 'hydra.run.dir="Läufe/der erste"']
    train(*overrides, cwd=odd, points=["step:9"])
    training = train(*overrides, cwd=odd)
    assert training.wait() == 0, training.out + training.err
    assert differences(odd / "Läufe" / "der erste", reference) == []


def test_a_clock_that_is_set_back_changes_nothing(command: list[str], cwd: Path, reference: Reference) -> None:
    overrides = [*command, "trainer.checkpoint_minutes=1"]
    train(*overrides, cwd=cwd, points=["clock-back", "step:9"])
    training = train(*overrides, cwd=cwd, points=["clock-back"])
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [("JAX_PLATFORMS", "nonsense"), ("XLA_FLAGS", "--nonsense=1"), ("JAX_NUM_CPU_DEVICES", "x")],
)
@pytest.mark.parametrize("more", [(), ("-m", "seed=0,1")])
def test_a_device_that_is_not_here_is_bad_input(
    variable: str, value: str, more: tuple[str, ...], command: list[str], cwd: Path
) -> None:
    """One line that names the variable, and no run is begun. tests/system/test_outside.py has the other kinds."""
    code, out, err = real(*more, *command, cwd=cwd, env={variable: value})
    assert code == 2, out + err
    (line,) = [line for line in err.splitlines() if line.startswith("xattn: ")]
    assert variable.lower() in line.lower()
    assert len(err.splitlines()) <= 5
    assert not any((run / "config.yaml").exists() for run in runs(cwd))
