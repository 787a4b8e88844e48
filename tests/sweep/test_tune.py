"""Tuning: what is drawn, counted, pruned and continued, with a stand-in for the run, and once with real runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import xattn.config
from tests import processes
from xattn.errors import BadInput
from xattn.runs import run_folder
from xattn.sweep.config import OBJECTIVES, Dimension, Tuning
from xattn.sweep.view import StudyView

optuna = pytest.importorskip("optuna", reason="the extra tune is not installed")
from xattn.sweep.tune import STORAGE, tune  # noqa: E402  # needs optuna

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

BASE = xattn.config.compose([])
RATE = "optimizer.learning_rate"
OPTIONS: dict[str, Any] = {
    "n_trials": 6,
    "objective": "val_loss",
    "direction": "minimize",
    "sampler": "tpe",
    "pruner": "none",
    "at_once": 1,
    "seed": 0,
}


class Runs:
    """Makes runs instantly; the loss is lowest at a learning rate of 1e-3."""

    def __init__(self, folder: Path):
        self.folder, self.made, self.status = folder, list[tuple[str, ...]](), "done"

    def __call__(
        self, trials: Sequence[list[str]], prunes: Sequence[Any]
    ) -> tuple[list[Path], Callable[[StudyView], None]]:
        folders = [self.folder / "-".join(trial) for trial in trials]

        def make(view: StudyView) -> None:
            for trial, run, prune in zip(trials, folders, prunes, strict=True):
                self._one(trial, run, prune)

        return folders, make

    def _one(self, overrides: list[str], run: Path, prune: Any) -> None:
        self.made.append(tuple(overrides))
        run.mkdir(parents=True, exist_ok=True)
        loss = 1 + abs(math.log10(float(overrides[0].partition("=")[2])) + 3)
        pruned = any(prune({"step": step, "val_loss": loss + 1 / step}) for step in (1, 2, 3))
        run_folder.write_summary(
            run, {"status": "pruned" if pruned else self.status, "val_loss": loss, "tokens_per_second": 10 / loss}
        )


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "study")


def search(runs: Runs, space: dict[str, Dimension] | None = None, **options: Any) -> None:
    space = space or {RATE: Dimension(low=1e-5, high=1e-1, log=True)}
    tune(Tuning.model_validate(OPTIONS | options), space, BASE, runs.folder, runs)


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_trials_are_counted_and_the_same_command_goes_on_with_the_search(
    sampler: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    search(runs, sampler=sampler)
    assert len(set(runs.made)) == 6
    assert (runs.folder / STORAGE).is_file()
    search(runs, sampler=sampler)
    assert len(runs.made) == 6  # nothing new
    search(runs, sampler=sampler, n_trials=8)
    assert len(set(runs.made)) == 8
    assert "best of 8 trials" in capsys.readouterr().out


def test_tpe_draws_where_the_loss_is_low(runs: Runs) -> None:
    search(runs, n_trials=30)
    late = [abs(math.log10(float(trial[0].partition("=")[2])) + 3) for trial in runs.made[15:]]
    assert sorted(late)[len(late) // 2] < 0.7  # of four decades; a random draw's median is 1


def test_the_objective_is_any_number_of_the_summary(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    space = {RATE: Dimension(choices=["0.001", "0.1"])}
    search(runs, space, sampler="grid", objective="tokens_per_second", direction="maximize")
    assert f"with {RATE}=0.001" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"'probe/x/y': not a number in summary.json; allowed: val_loss"):
        search(runs, space, sampler="grid", objective="probe/x/y")


@pytest.mark.parametrize(("low", "high", "log"), [(0.0, 0.1, True), (0.1, 0.01, False)])
def test_an_interval_that_cannot_be_drawn_from_is_refused(low: float, high: float, log: bool, runs: Runs) -> None:
    with pytest.raises(BadInput, match=f"{RATE}: from {low} to {high}"):
        search(runs, {RATE: Dimension(low=low, high=high, log=log)})
    assert runs.made == []


def test_a_grid_is_gone_through_once(runs: Runs) -> None:
    space = {RATE: Dimension(choices=["0.001", "0.01"]), "seed": Dimension(choices=["0", "1", "2"])}
    search(runs, space, sampler="grid", n_trials=100)
    assert len(runs.made) == len(set(runs.made)) == 6
    runs.status = "failed"
    search(runs, space | {"seed": Dimension(choices=["3"])}, sampler="grid")
    runs.status = "done"
    search(runs, space | {"seed": Dimension(choices=["3"])}, sampler="grid")  # failed points are drawn again
    assert sorted(runs.made[6:8]) == sorted(runs.made[8:])
    with pytest.raises(BadInput, match=f"{RATE}.*not an interval"):
        search(runs, sampler="grid")


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_what_goes_badly_is_pruned_on_its_evaluations(pruner: str, runs: Runs) -> None:
    search(runs, sampler="random", pruner=pruner, n_trials=25)
    statuses = [(run_folder.read_summary(run) or {})["status"] for run in runs.folder.iterdir() if run.is_dir()]
    assert len(runs.made) == 25  # a pruned trial counts
    assert set(statuses) == ({"done", "pruned"} if pruner == "median" else set(statuses) & {"done", "pruned"})


def test_failures_are_not_counted_and_not_drawn_for_ever(runs: Runs) -> None:
    runs.status = "failed"
    search(runs, n_trials=3)
    assert len(runs.made) == 3
    runs.status = "done"
    search(runs, n_trials=3)
    assert len(runs.made) == 6


def test_a_trial_whose_process_died_is_drawn_again_as_it_was(runs: Runs) -> None:
    class Killed(BaseException):
        pass

    def dies(trials: Sequence[list[str]], prunes: Sequence[Any]) -> tuple[list[Path], Callable[[StudyView], None]]:
        folders, make = runs(trials, prunes)

        def die(view: StudyView) -> None:
            make(view)
            raise Killed

        return folders, die

    space = {RATE: Dimension(low=1e-5, high=1e-1, log=True)}
    with pytest.raises(Killed):
        tune(Tuning.model_validate(OPTIONS), space, BASE, runs.folder, dies)
    search(runs, n_trials=2)
    assert runs.made[1] == runs.made[0]
    assert len(runs.made) == 3


def test_a_second_terminal_leaves_alone_what_the_first_is_at(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts during the first one's trial, makes the two others, and then waits."""
    space = {RATE: Dimension(choices=["0.001", "0.01", "0.1"])}
    second = Runs(runs.folder)

    class Waits(Exception):
        pass

    def wait(seconds: float) -> None:
        raise Waits

    def first(trials: Sequence[list[str]], prunes: Sequence[Any]) -> tuple[list[Path], Callable[[StudyView], None]]:
        folders, make = runs(trials, prunes)

        def begin_the_second_meanwhile(view: StudyView) -> None:
            with pytest.raises(Waits):
                search(second, space, sampler="grid")
            make(view)

        return folders, begin_the_second_meanwhile

    monkeypatch.setattr("xattn.sweep.tune.time.sleep", wait)
    tune(Tuning.model_validate(OPTIONS | {"sampler": "grid"}), space, BASE, runs.folder, first)
    assert (len(runs.made), len(second.made)) == (1, 2)
    assert len({*runs.made, *second.made}) == 3
    assert not list(runs.folder.glob(".tuning-*"))  # no process is left


def test_points_that_no_config_can_have_are_left_out(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """This also holds in a batch. If all points are invalid, it is bad input."""
    space = {RATE: Dimension(choices=["0.001", "1", "0.1"])}

    def plan(trials: Sequence[list[str]], prunes: Sequence[Any]) -> tuple[list[Path], Callable[[StudyView], None]]:
        if any(trial == [f"{RATE}=1"] for trial in trials):
            raise BadInput("1 is too much")
        return runs(trials, prunes)

    options = Tuning.model_validate(OPTIONS | {"sampler": "grid", "at_once": 3})
    tune(options, space, BASE, runs.folder, plan)
    assert sorted(runs.made) == [(f"{RATE}=0.001",), (f"{RATE}=0.1",)]
    assert "left out: 1 is too much" in capsys.readouterr().err
    with pytest.raises(BadInput, match="1 is too much"):
        tune(options, {RATE: Dimension(choices=["1"])}, BASE, runs.folder, plan)


def test_another_config_behind_the_same_command_is_another_search(runs: Runs) -> None:
    """What a run computes matters; how it is made, and the base value of a drawn key, do not."""
    space = {RATE: Dimension(choices=["0.001", "0.01"])}
    for change, made in (("sweep.pack=off", 2), (f"{RATE}=0.5", 2), ("trainer.steps=7", 4)):
        base = xattn.config.compose([change])
        for _ in range(2):
            tune(Tuning.model_validate(OPTIONS | {"sampler": "grid"}), space, base, runs.folder, runs)
        assert len(runs.made) == made, change
    with pytest.raises(BadInput, match="resume = never"):
        tune(Tuning.model_validate(OPTIONS), space, xattn.config.compose(["resume=never"]), runs.folder, runs)


def test_a_journal_that_ends_within_a_line_is_gone_on_with(runs: Runs) -> None:
    search(runs, n_trials=3)
    journal = runs.folder / STORAGE
    journal.write_bytes(journal.read_bytes()[:-20])
    search(runs, n_trials=4)
    assert len(set(runs.made)) == 4


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_nothing_is_pruned_by_what_is_not_the_objective(pruner: str, runs: Runs) -> None:
    for objective in ("tokens_per_second", "train_loss"):
        with pytest.raises(ValueError, match=f"{objective} is not known before the end"):
            Tuning.model_validate(OPTIONS | {"objective": objective, "pruner": pruner})
    for objective in ("best_val_loss", "val_bpb", "probe/mqar/accuracy"):
        Tuning.model_validate(OPTIONS | {"objective": objective, "pruner": pruner})


def test_where_none_is_finite_none_is_best(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.status = "diverged"
    search(runs, n_trials=2)
    assert "best of" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_command_in_another_process_repeats_nothing(tiny: list[str], tmp_path: Path) -> None:
    """Two trials of an interval and a choice train; the same command trains none; with three asked for, one more."""
    command = ["-m", "hydra/sweeper=optuna", *tiny, "trainer.steps=4"]
    command += [f"{RATE}=tag(log, interval(1e-4, 1e-2))", "backend.theta=choice(100, 10000)"]
    before: dict[Path, bytes] = {}
    for wanted, expected in ((2, 2), (2, 0), (3, 1)):
        done = processes.train(*command, f"hydra.sweeper.n_trials={wanted}", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("done, val_loss") == expected
        assert f"best of {wanted} trials: val_loss" in done.stdout
        made = {path: path.read_bytes() for path in (tmp_path / "outputs" / "default").glob("*/summary.json")}
        assert len(made) == wanted
        assert before.items() <= made.items()
        assert all(set(OBJECTIVES) <= json.loads(summary).keys() for summary in made.values())
        before = made
