"""Runs of earlier versions still load, report, evaluate, sample and resume, and the same command finds them.

tests/golden/runs/ has a run folder from each age, as its version wrote it (except host, cwd and command), and beside
them the text that they were trained on. A folder is created once and never edited. If a change of config keys breaks
one, the fix belongs in xattn/keys.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import xattn
from tests import processes
from xattn import config as xconfig, keys
from xattn.cli import main
from xattn.errors import BadInput, ExitCode
from xattn.report.read import flatten, read_run
from xattn.runs import run_folder
from xattn.sweep.config import Dimension, Tuning

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
RUNS = sorted(path.parent for path in (GOLDEN / "runs").glob("*/config.yaml"))
AGES = pytest.mark.parametrize("name", [run.name for run in RUNS])


def typed(folder: Path) -> list[str]:
    overrides: list[str] = yaml.safe_load((folder / run_folder.OVERRIDES).read_text())
    return overrides


def train(*overrides: str) -> tuple[int, str]:
    done = processes.train(*overrides, cwd=Path.cwd())
    return done.returncode, done.stdout + done.stderr


def test_there_is_a_run_of_each_age_and_none_is_big() -> None:
    assert len(RUNS) >= 3
    configs = [yaml.safe_load((run / run_folder.CONFIG).read_text()) for run in RUNS]
    ages = {("matmul_precision" in config["model"], "every" in config["backend"]) for config in configs}
    assert ages == {(False, False), (True, False), (True, True)}
    for run in RUNS:
        assert sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) < 300_000, run


@AGES
def test_its_name_is_still_the_name_of_its_config(name: str, outputs: Path) -> None:
    config = xconfig.load(outputs / name / run_folder.CONFIG)
    assert xconfig.folder_of(config, outputs / xconfig.run_name(config)) == outputs / name
    today = xconfig.compose(typed(outputs / name))
    assert today.model_copy(update={"tracking": config.tracking}) == config  # its project is null now


@AGES
def test_it_loads_samples_and_evaluates_to_what_it_recorded(name: str, outputs: Path) -> None:
    run = xattn.load(outputs / name)
    assert run.step == 4
    assert np.isfinite(run.logits(np.arange(10))).all()
    assert len(run.generate("It was ", max_tokens=5)) > 0
    # Other processors have other bits.
    assert run.evaluate()["val_loss"] == pytest.approx(run.summary["val_loss"], rel=1e-4)
    assert main(["evaluate", str(outputs / name), "--save"]) == 0
    assert main(["sample", str(outputs / name), "--max-tokens", "3"]) == 0
    assert main(["export", str(outputs / name), str(outputs.parent / "exported")]) == 0


def test_a_kind_of_layers_is_evaluated_under_other_numbers(outputs: Path) -> None:
    (name,) = (run.name for run in RUNS if "every2" in run.name)
    run = xattn.load(outputs / name)
    base = run.evaluate()["val_loss"]
    assert run.evaluate(["backend.then.theta=3"])["val_loss"] != base
    assert run.evaluate(["backend.theta=3"])["val_loss"] != base
    assert run.evaluate(["backend.then.logit_scale=3"])["val_loss"] != base
    # n stays that of training; a window of all tokens changes nothing.
    assert run.evaluate(["backend.then.window=16"])["val_loss"] == pytest.approx(base, rel=1e-5)
    with pytest.raises(BadInput, match="cannot be changed here"):
        run.evaluate(["backend.then.activation=sigmoid"])
    (alone,) = (run.name for run in RUNS if run.name.startswith("sigmoid"))
    with pytest.raises(BadInput, match="only one kind of layer"):
        xattn.load(outputs / alone).evaluate(["backend.then.theta=3"])
    single = xattn.load(outputs / alone)
    assert single.evaluate(["backend.logit_scale=3"])["val_loss"] != single.evaluate()["val_loss"]


def test_the_report_reads_all_ages_as_one_study(outputs: Path) -> None:
    """A key that older runs lack is no factor where its value is what they meant."""
    assert main(["report", str(outputs)]) == 0
    assert main(["runs", str(outputs)]) == 0
    assert main(["compare", *(str(outputs / run.name) for run in RUNS)]) == 0
    old, newer = (read_run(run) for run in RUNS if "every" not in run.name)
    for run in (old, newer):
        assert (run.config["model.matmul_precision"], run.config["backend.every"]) == ("default", None)
        assert run.problems == ()


@pytest.mark.slow
@AGES
def test_the_same_command_finds_it_done(name: str, outputs: Path) -> None:
    before = sorted(path.name for path in outputs.iterdir())
    code, out = train(*typed(outputs / name))
    assert code == ExitCode.DONE, out
    assert "already done at step 4" in out
    assert sorted(path.name for path in outputs.iterdir()) == before
    code, out = train("-m", *typed(outputs / name))
    assert code == ExitCode.DONE, out
    assert "1 already done" in out
    assert sorted(path.name for path in outputs.iterdir()) == before


@pytest.mark.slow
@AGES
def test_the_same_command_resumes_it(name: str, outputs: Path) -> None:
    """As after a kill between the second step and the end: each step once, and the loss that it came to."""
    folder = outputs / name
    wanted = json.loads((folder / run_folder.SUMMARY).read_text())
    shutil.rmtree(folder / run_folder.CHECKPOINTS / "4")
    rows = (folder / run_folder.METRICS).read_text().splitlines()
    (folder / run_folder.METRICS).write_text("\n".join(rows[:2]) + "\n")
    left: dict[str, Any] = wanted | {"status": "running", "step": 2, "committed_step": 2}
    run_folder.write_summary(folder, left)
    code, out = train(*typed(folder))
    assert code == ExitCode.DONE, out
    assert "resumed     from step 2" in out
    steps = [json.loads(line)["step"] for line in (folder / run_folder.METRICS).read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    found = json.loads((folder / run_folder.SUMMARY).read_text())
    assert found["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-4)
    assert {path.name for path in outputs.iterdir()} == {run.name for run in RUNS}


def test_where_both_names_hold_the_run_the_one_of_today_is_taken(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (old,) = (run.name for run in RUNS if "matmul_precision" not in (run / run_folder.CONFIG).read_text())
    config = xconfig.load(outputs / old / run_folder.CONFIG)
    today = outputs / xconfig.run_name(config)
    assert today.name != old
    shutil.copytree(outputs / old, today)
    assert xconfig.folder_of(config, today) == today
    assert f"{old}: holds the same run" in capsys.readouterr().err
    other = xconfig.compose([*typed(outputs / old), "model.matmul_precision=bfloat16"])
    assert xconfig.folder_of(other, outputs / xconfig.run_name(other)).name == xconfig.run_name(other)


@pytest.mark.slow
def test_starting_over_moves_the_old_folder_aside_and_takes_the_name_of_today(outputs: Path) -> None:
    (old,) = (run.name for run in RUNS if "matmul_precision" not in (run / run_folder.CONFIG).read_text())
    config = xconfig.load(outputs / old / run_folder.CONFIG)
    code, out = train(*typed(outputs / old), "resume=never")
    assert code == ExitCode.DONE, out
    assert "moved the run made by an older version to" in out
    assert not (outputs / old).exists()
    assert any(path.name.startswith(old) for path in (outputs / run_folder.SUPERSEDED).iterdir())
    assert (run_folder.read_summary(outputs / xconfig.run_name(config)) or {})["status"] == "done"


def test_a_tuning_study_of_968f896_keeps_its_name(tmp_path: Path) -> None:
    """The name is a hash of the config, and 968f896 had two keys fewer."""
    pytest.importorskip("optuna", reason="the extra tune is not installed")
    from xattn.sweep import tune

    space = {"backend.theta": Dimension(low=10.0, high=1e4, log=True)}
    options = yaml.safe_load((ROOT / "conf" / "hydra" / "sweeper" / "optuna.yaml").read_text())
    tuning = Tuning(**{key: value for key, value in options.items() if key in Tuning.model_fields})
    assert tune._search(tuning, space, xconfig.compose(), tmp_path).study_name == "e74d4a22ef"


# ---- xattn/keys.py itself --------------------------------------------------------------------------------------------


def test_a_key_that_968f896_lacks_declares_what_its_absence_means() -> None:
    """Whoever adds a key and forgets, makes every older run unreadable and moves every name."""
    had = dict(flatten(yaml.safe_load((GOLDEN / "of_968f896.yaml").read_text())))
    now = dict(flatten(xconfig.compose().model_dump(mode="json")))
    assert len(had) > 60
    assert now.keys() - had.keys() <= keys.ABSENT.keys() | {*keys.RENAMED.values()}
    assert had.keys() - now.keys() <= keys.RENAMED.keys() | keys.REMOVED.keys()


def test_the_default_is_named_as_968f896_names_it() -> None:
    assert xconfig.run_hash(xconfig.compose(["trainer=debug"])) == "8259ee9491"


def test_absence_keeps_its_meaning_when_the_default_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new key with another default: older runs are read as before, and only runs at the new value get a new name."""
    monkeypatch.setitem(keys.ABSENT, "model.norm_eps", 1e-6)
    old = {"model": {"norm": "rmsnorm"}, "backend": {"every": 2, "then": {"theta": 3.0}}}
    assert keys.up_to_date(old)["model"]["norm_eps"] == 1e-6
    assert keys.up_to_date(old)["backend"]["then"] == {"theta": 3.0}
    assert keys.up_to_date({"model": {"norm_eps": 1e-5}})["model"]["norm_eps"] == 1e-5
    named = {"model.matmul_precision": "default", "model.norm_eps": 1e-6, "backend.every": None}
    assert keys.naming(named) == {"model.matmul_precision": "default"}
    assert keys.naming(named | {"model.norm_eps": 1e-5})["model.norm_eps"] == 1e-5


def test_renamed_and_removed_keys_are_read_and_named_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(keys.RENAMED, "backend.base", "backend.theta")
    monkeypatch.setitem(keys.REMOVED, "model.bias", False)
    old = {"backend": {"base": 10.0}, "model": {"bias": False, "norm": "rmsnorm"}}
    new = keys.up_to_date(old)
    assert new["backend"]["theta"] == 10.0
    assert "base" not in new["backend"]
    assert "bias" not in new["model"]
    assert old["backend"] == {"base": 10.0}, "what was given is left as it is"
    values = {"backend.theta": 10.0, "model.norm": "rmsnorm", "model.matmul_precision": "default"}
    assert keys.naming(values) == {
        "backend.base": 10.0,
        "model.bias": False,
        "model.norm": "rmsnorm",
        "model.matmul_precision": "default",
    }
    with pytest.raises(BadInput, match=r"model\.bias = True: only False"):
        keys.up_to_date({"model": {"bias": True}})
