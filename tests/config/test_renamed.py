"""A renamed key is read under its old name wherever a user may have it: ``evaluation.windows``, now ``.sequences``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import xattn.config
from xattn import keys
from xattn.cli import main
from xattn.commands.like import expanded
from xattn.config import compose, renamed
from xattn.config.schema import composed
from xattn.errors import BadInput, ExitCode
from xattn.report.claim import finding_of
from xattn.report.metric import unit_of
from xattn.report.options import pairs
from xattn.report.read import read_run
from xattn.runs import run_folder
from xattn.runs.evaluations import equal_row
from xattn.sweep.config import Dimension, Tuning

OLD, NEW = "evaluation.windows", "evaluation.sequences"
ROOT = Path(__file__).resolve().parent.parent.parent
CONTRAST = {"name": "c", "of": {OLD: 8, "seed": [0, 1]}, "minus": {OLD: 9}, "shown": "> 0", "contradicted": "< 0"}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Make a folder of a user's own YAML files, written for an earlier version."""
    files: dict[str, Any] = {
        "evaluation/few": {"windows": 32, "probes": []},
        "experiment/plain": {"evaluation": {"windows": 33}},
        "experiment/on_ours": {"defaults": ["mqar"], "evaluation": {"windows": 34}},
        "experiment/newer": {"defaults": ["plain"], "evaluation": {"sequences": 35}},
        "experiment/both": {"evaluation": {"windows": 1, "sequences": 2}},
        "experiment/study": {"hydra": {"sweeper": {"params": {OLD: "64,256", "seed": "0,1"}}}},
        "experiment/claims": {"finding": {"claim": "It holds.", "source": "here", "contrasts": [CONTRAST]}},
        "experiment/refers": {"evaluation": {"windows": "${trainer.log_every}"}, "trainer": {"log_every": 7}},
    }
    for name, content in files.items():
        path = tmp_path / "mine" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        head = "# @package _global_\n" if name.startswith("experiment") else ""
        path.write_text(head + yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "mine"


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        ([f"{OLD}=32"], 32),
        ([f"++{OLD}=32"], 32),
        ([f"{OLD}=all"], "all"),
        (["evaluation=few"], 32),
        (["experiment=plain"], 33),
        (["experiment=on_ours"], 34),  # ours sets the new key, which the user's file, read later, sets again
        (["experiment=newer"], 35),  # and the reverse
        (["experiment=refers"], 7),
        (["experiment=plain", f"{NEW}=5"], 5),
        (["experiment=plain", f"{OLD}=5"], 5),
        (["experiment=mqar", f"{OLD}=5"], 5),
    ],
    ids=str,
)
def test_it_is_read_where_an_override_or_a_file_has_it(overrides: list[str], number: int | str, mine: Path) -> None:
    found = compose(overrides, config_dir=mine)
    assert found.evaluation.sequences == number
    chosen = [each for each in overrides if keys.renamed(each).partition("=")[0].lstrip("+") != NEW]
    assert xattn.config.run_name(found) == xattn.config.run_name(compose([*chosen, f"{NEW}={number}"], config_dir=mine))


def test_the_new_name_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    renamed._warn.cache_clear()
    compose([f"{OLD}=3"])
    compose([f"{OLD}=4"])
    assert capsys.readouterr() == ("", f"{OLD} is now {NEW}\n")


@pytest.mark.parametrize(
    ("overrides", "where"), [([f"{OLD}=1", f"{NEW}=2"], ""), (["experiment=both"], "experiment/both.yaml: ")]
)
def test_both_names_are_one_error(overrides: list[str], where: str, mine: Path) -> None:
    message = f"{where}{OLD}: is now {NEW}, and both are given; leave out {OLD}"
    with pytest.raises(BadInput) as error:
        compose(overrides, config_dir=mine)
    assert str(error.value) == message


def test_both_names_in_a_contrast_or_a_runs_config_are_an_error() -> None:
    with pytest.raises(BadInput, match="both are given"):
        keys.up_to_date({"evaluation": {"windows": 1, "sequences": 2}})
    with pytest.raises(BadInput, match="both are given"):
        keys.under_new_names({OLD: 1, NEW: 2})


def test_a_reference_to_it_is_an_error_with_the_new_name() -> None:
    with pytest.raises(BadInput, match=f"{OLD}: no such key; it is now {NEW}"):
        compose([f"trainer.log_every=${{{OLD}}}"])


def test_an_experiment_may_sweep_it(mine: Path) -> None:
    found = composed(["experiment=study", f"--config-dir={mine}"], with_hydra=True)
    assert found.hydra.sweeper.params == {NEW: "64,256", "seed": "0,1"}


def test_a_sweep_over_it_is_one_over_the_new_key(mine: Path) -> None:
    """What is typed replaces what the experiment sweeps. One of its values is bad, so nothing starts."""
    words = ["-m", "--config-dir", str(mine), "experiment=study", f"{OLD}=64,0"]
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words], capture_output=True, text=True, cwd=mine)
    assert done.returncode == ExitCode.BAD_INPUT, done.stderr
    assert done.stderr.count(f"{OLD} is now {NEW}") == 1
    assert f"nothing was started (4 runs): {NEW} = 0" in done.stderr


def test_a_value_drawn_by_a_sweep_of_wandb_is_read() -> None:
    (word,) = create_sweep_command_args({"args": {OLD: {"value": 64}}})["args_no_hyphens"]
    assert compose([word]).evaluation.sequences == 64


def test_a_run_is_started_like_an_older_one(outputs: Path) -> None:
    run = min(outputs.iterdir())
    assert f"{OLD}=4" in yaml.safe_load((run / run_folder.OVERRIDES).read_text())
    assert f"{NEW}=4" in expanded(["--like", str(run)])
    words = expanded(["--like", str(run), f"{NEW}=5"])
    assert compose(words).evaluation.sequences == 5


def test_a_claims_contrasts_may_name_it(mine: Path, outputs: Path) -> None:
    """In a user's experiment, and in the config.yaml of a run that an earlier version made of it."""
    finding = compose(["experiment=claims"], config_dir=mine).finding
    assert finding is not None
    (contrast,) = finding.contrasts
    assert (contrast.of, contrast.minus) == ({NEW: 8, "seed": [0, 1]}, {NEW: 9})
    run = min(outputs.iterdir())
    config = yaml.safe_load((run / run_folder.CONFIG).read_text())
    config["finding"] = {"claim": "It holds.", "source": "here", "contrasts": [CONTRAST | {"of": {OLD: 4}}]}
    (run / run_folder.CONFIG).write_text(yaml.safe_dump(config))
    decided = finding_of([read_run(run)])
    assert decided is not None
    assert decided.contrasts[0].why_not == f"no run is done that has {NEW}=9"
    assert xattn.config.load(run / run_folder.CONFIG).finding == decided.stated


def test_the_options_of_a_question_take_it(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(pairs([f"{OLD}=64,256"], "--where")) == [(NEW, "64,256")]
    assert main(["report", str(outputs), "--where", f"{OLD}=4", "--tuned", OLD]) == 0
    assert main(["report", str(outputs), "--where", f"{OLD}=9"]) == ExitCode.BAD_INPUT
    assert main(["explain", OLD]) == 0
    assert NEW in capsys.readouterr().out


def test_stored_evaluations_under_either_name_are_the_same(outputs: Path) -> None:
    rows = [{"step": 4, "overrides": [f"{OLD}=all"], "results": {"val_loss": 1.5}}]
    assert equal_row(rows, 4, [f"{NEW}=all"]) == equal_row(rows, 4, [f"{OLD}=all"]) == rows[0]
    run = read_run(min(outputs.iterdir()))
    assert run.config[NEW] == 4
    assert unit_of(run, [f"{OLD}=all"]) == unit_of(run, [f"{NEW}=all"])
    assert unit_of(run, [f"{OLD}=all"]).sequences == "all"


def test_a_tuning_study_over_it_is_continued(tmp_path: Path) -> None:
    """Its name, and the names of its parameters in the journal, are those that it began with."""
    pytest.importorskip("optuna", reason="the extra tune is not installed")
    from xattn.sweep import tune

    options = yaml.safe_load((ROOT / "conf" / "hydra" / "sweeper" / "optuna.yaml").read_text())
    tuning = Tuning(**{key: value for key, value in options.items() if key in Tuning.model_fields})
    tuning = tuning.model_copy(update={"objective": "val_loss", "n_trials": 1})
    drawn: list[list[str]] = []

    def plan(overrides: list[list[str]], prunes: list[Any]) -> tuple[list[Path], Any]:
        drawn.extend(overrides)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / run_folder.SUMMARY).write_text(json.dumps({"status": "done", "val_loss": 1.0}))
        return [tmp_path / "run"], lambda view: None

    tune.tune(tuning, {NEW: Dimension(choices=["64"])}, compose(), tmp_path, plan)
    assert drawn == [[f"{NEW}=64"]]
    (trial,) = tune._search(tuning, {OLD: Dimension(choices=["64"])}, compose(), tmp_path).get_trials()
    assert trial.params == {OLD: "64"}
