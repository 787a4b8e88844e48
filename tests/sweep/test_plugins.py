"""The sweeper and the launchers of ``-m`` as Hydra calls them, with a stand-in for what makes the runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig

import xattn.config
from hydra_plugins import xattn_launcher
from hydra_plugins.xattn_launcher import ElsewhereLauncher, XattnLauncher
from hydra_plugins.xattn_sweeper import GridSweeper, OptunaSweeper
from xattn import run_folder
from xattn.attempt import Job
from xattn.errors import BadInput, ExitCode
from xattn.sweep import study

RATE = "optimizer.learning_rate"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Job]:
    """The runs that were to be made in this process."""
    monkeypatch.chdir(tmp_path)
    made: list[Job] = []

    def make(jobs: Sequence[Job], **shown: Any) -> None:
        made.extend(jobs)
        for job in jobs:
            finish(job.folder)

    monkeypatch.setattr(study, "make", make)
    monkeypatch.setattr(xattn_launcher, "carry_out", make)
    return made


def finish(folder: Path) -> None:
    folder.mkdir(parents=True)
    run_folder.write_summary(folder, {"status": "done", "val_loss": 1.0, "val_bpb": 1.0})


@pytest.fixture
def start(tiny: list[str]) -> Iterator[Callable[..., None]]:
    """``python train.py -m TINY OVERRIDES``, but for the command line."""

    def start(sweeper: GridSweeper | OptunaSweeper, launcher: Launcher, *overrides: str) -> None:
        hydra = [each for each in overrides if each.startswith("hydra.")]
        config = loader.load_configuration("config", [*hydra, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
        context, task = HydraContext(config_loader=loader, callbacks=Callbacks()), _task
        sweeper.setup(hydra_context=context, task_function=task, config=config)
        launcher.setup(hydra_context=context, task_function=task, config=config)
        sweeper._launcher = launcher
        sweeper.sweep([*tiny, *(each for each in overrides if not each.startswith("hydra."))])

    xattn.config.register_resolvers()
    with initialize_config_dir(str(xattn.config.CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield start


def _task(config: DictConfig) -> None:
    raise AssertionError("not called by our launchers")


class OtherMachines(Launcher):
    """In place of SLURM's or Ray's."""

    def __init__(self) -> None:
        self.launched: list[Sequence[str]] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self.launched += job_overrides
        for job in xattn_launcher.jobs_of(self.context, self.config, job_overrides):
            finish(job.folder)
        return []


def optuna_sweeper(**options: Any) -> OptunaSweeper:
    pytest.importorskip("optuna", reason="the extra tune is not installed")
    defaults = {"objective": "val_loss", "direction": "minimize", "sampler": "random", "pruner": "none"}
    return OptunaSweeper(**defaults | {"n_trials": 2, "at_once": 1, "seed": 0} | options)


def test_trials_are_made_where_the_launcher_makes_them(made: list[Job], start: Callable[..., None]) -> None:
    others = OtherMachines()
    start(optuna_sweeper(), ElsewhereLauncher(others), f"{RATE}=interval(1e-4, 1e-2)")
    assert len(others.launched) == 2
    assert made == []


def test_trials_that_draw_the_same_values_are_one_run(made: list[Job], start: Callable[..., None]) -> None:
    start(optuna_sweeper(n_trials=6, at_once=6), XattnLauncher(), f"{RATE}=choice(0.001, 0.01)")
    assert 1 <= len(made) <= 2


def test_runs_that_differ_do_not_share_a_folder(made: list[Job], start: Callable[..., None]) -> None:
    with pytest.raises(BadInput, match=r"runs that differ in seed; hydra\.sweep\.subdir must"):
        start(GridSweeper(), XattnLauncher(), "hydra.sweep.subdir=x", "seed=0,1")
    assert made == []


@pytest.mark.parametrize("batch", [None, 1])
def test_one_bad_run_in_any_batch_and_nothing_begins(
    batch: int | None, made: list[Job], start: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"none is started: optimizer\.learning_rate = -1"):
        start(GridSweeper(batch), XattnLauncher(), f"{RATE}=1e-3,-1")
    assert made == []
    assert list(tmp_path.iterdir()) == []
    start(GridSweeper(batch), XattnLauncher(), f"{RATE}=1e-3,2e-3")
    assert [job.config.optimizer.learning_rate for job in made] == [1e-3, 2e-3]


def test_what_is_bad_for_one_run_alone_starts_none(
    start: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As far as it shows without training: the files of the corpus, the mesh, the attention on these devices."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "start", lambda jobs: pytest.fail("started"))
    monkeypatch.setattr(study, "make", lambda jobs, start: pytest.fail("started"))
    for typed, told in (
        (["data.path=missing.txt,/dev/null"], r"data\.path = 'missing\.txt'"),
        (["parallel.data=2048", "seed=0,1"], r"parallel\.data = 2048"),
        (["backend.implementation=reference,hopper", "sweep.pack=2"], r"backend\.implementation: .*hopper"),
    ):
        with pytest.raises(BadInput, match=f"of 2 runs none is started: {told}"):
            start(GridSweeper(), XattnLauncher(), *typed, "sweep.workers=1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"n_trials": 0}, r"hydra\.sweeper\.n_trials = 0: must be greater than 0"),
        ({"sampler": "tpee"}, r"hydra\.sweeper\.sampler = 'tpee': must be 'tpe', .*did you mean tpe\?"),
        ({"objective": "val_los"}, r"hydra\.sweeper\.objective = 'val_los': must be .*did you mean val_loss\?"),
    ],
    ids=str,
)
def test_options_of_tuning_that_are_bad_are_told_by_key_value_and_choices(
    option: dict[str, Any], told: str, made: list[Job], start: Callable[..., None]
) -> None:
    with pytest.raises(BadInput, match=told) as refused:
        start(optuna_sweeper(**option), XattnLauncher(), f"{RATE}=choice(0.001, 0.01)")
    assert len(str(refused.value).splitlines()) == 1
    assert made == []


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (
            ["optimizer.lerning_rate=choice(1,2)"],
            r"optimizer\.lerning_rate: no such key \(did you mean optimizer\.learn",
        ),
        (["optimizer=choice(adamw,mun)"], r"optimizer = mun: no such choice \(did you mean muon\?\)"),
        ([f"{RATE}=choice(1,2)", "sweep.workers=2"], r"sweep\.workers = 2: a process tunes alone"),
    ],
    ids=["key", "choice", "workers"],
)
def test_a_space_that_is_mistyped_begins_no_study(
    typed: list[str], told: str, made: list[Job], start: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=told):
        start(optuna_sweeper(), XattnLauncher(), *typed)
    assert made == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sweeper", ["grid", "optuna"])
def test_a_fault_of_ours_is_no_bad_input(
    sweeper: str,
    made: list[Job],
    start: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fault(jobs: Sequence[Job], **shown: Any) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(study, "make", fault)
    monkeypatch.setattr(xattn_launcher, "carry_out", fault)
    with pytest.raises(SystemExit) as left:
        start(GridSweeper() if sweeper == "grid" else optuna_sweeper(), XattnLauncher(), f"{RATE}=choice(0.001, 0.01)")
    assert left.value.code == ExitCode.ERROR
    assert "Traceback" in capsys.readouterr().err


def test_what_hydra_cannot_compose_is_bad_input(made: list[Job], start: Callable[..., None]) -> None:
    with pytest.raises(BadInput, match=r"optimizer = adamx: no such choice"):
        start(GridSweeper(), XattnLauncher(), "optimizer=adamw,adamx")
    assert made == []


def test_no_trial_is_drawn_where_the_corpus_is_missing(
    made: list[Job], start: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"missing\.txt"):
        start(optuna_sweeper(), XattnLauncher(), f"{RATE}=choice(0.001, 0.01)", "data.path=missing.txt")
    assert made == []
    assert list(tmp_path.iterdir()) == []
