"""The sweepers and launchers of ``-m`` as Hydra calls them, with a stand-in for the training."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, run_job
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

import xattn.config
from hydra_plugins import xattn_launcher
from hydra_plugins.xattn_launcher import XattnLauncher
from hydra_plugins.xattn_remote import ElsewhereLauncher
from hydra_plugins.xattn_sweeper import GridSweeper, OptunaSweeper
from xattn import app
from xattn.errors import BadInput, ExitCode
from xattn.model.size import num_params
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.sweep import study, workers
from xattn.sweep.table import print_table

RATE = "optimizer.learning_rate"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Job]:
    """The runs that would be trained in this process."""
    monkeypatch.chdir(tmp_path)
    made: list[Job] = []

    def make(jobs: Sequence[Job], *outcomes: study.Outcomes, **shown: Any) -> study.Outcomes:
        made.extend(jobs)
        for job in jobs:
            finish(job.folder)
        return {}

    monkeypatch.setattr(study, "make", make)
    monkeypatch.setattr(workers, "run_study", make)
    return made


def finish(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)  # Hydra has created it for a launcher's job
    run_folder.write_summary(folder, {"status": "done", "val_loss": 1.0, "val_bpb": 1.0})


@pytest.fixture
def start(tiny: list[str]) -> Iterator[Callable[..., None]]:
    """A function that does what ``python train.py -m TINY OVERRIDES`` does, without the command line."""

    def start(sweeper: GridSweeper | OptunaSweeper, launcher: Launcher, *overrides: str) -> None:
        hydra = [each for each in overrides if each.lstrip("+").startswith("hydra")]
        config = loader.load_configuration("config", [*hydra, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
        context, task = HydraContext(config_loader=loader, callbacks=Callbacks(config)), _task
        sweeper.setup(hydra_context=context, task_function=task, config=config)
        launcher.setup(hydra_context=context, task_function=task, config=config)
        sweeper._launcher = launcher
        sweeper.sweep([*tiny, *(each for each in overrides if each not in hydra)])

    xattn.config.register_resolvers()
    with initialize_config_dir(str(xattn.config.CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield start


def _task(config: DictConfig) -> None:
    raise AssertionError("not called by our launchers")


class OtherMachines(Launcher):
    """A stand-in for SLURM's or Ray's launcher."""

    def __init__(self) -> None:
        self.launched: list[Sequence[str]] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self.launched += job_overrides
        for job in xattn_launcher.jobs_of(self.context, self.config, job_overrides):
            finish(job.folder)
        return []


class AsSubmitit(Launcher):
    """A stand-in for submitit's launcher, which runs the jobs here, one after the other.

    ``before`` is called before each job, with its number.
    """

    def __init__(self, before: Callable[[int], None] = lambda number: None) -> None:
        self.before = before
        self.launched: list[Sequence[str]] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config, self.task = hydra_context, config, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        returned = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            self.launched.append(overrides)
            self.before(number)
            composed = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed.hydra.job):
                composed.hydra.job.id, composed.hydra.job.num = "77", number
            returned.append(
                run_job(
                    hydra_context=self.context,
                    task_function=self.task,
                    config=composed,
                    job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir",
                )
            )
            assert returned[-1].return_value == ExitCode.DONE
        return returned


class Noted(Launcher):
    """Records what it is asked to launch, and composes nothing."""

    def __init__(self) -> None:
        self.jobs: list[list[str]] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        pass

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self.jobs += map(list, job_overrides)
        return []


class Heard(Callback):
    """A user's callback that records the calls of Hydra."""

    told: ClassVar[list[tuple[str, Any]]] = []

    def on_job_start(self, config: DictConfig, **of_task: Any) -> None:
        self.told.append(("start", config.seed))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **others: Any) -> None:
        self.told.append(("end", config.seed))


def optuna_sweeper(**options: Any) -> OptunaSweeper:
    pytest.importorskip("optuna", reason="the extra tune is not installed")
    defaults = {"objective": "val_loss", "direction": "minimize", "sampler": "random", "pruner": "none"}
    return OptunaSweeper(**defaults | {"n_trials": 2, "at_once": 1, "seed": 0} | options)


def test_the_arms_of_a_sweep_have_as_many_parameters(
    made: list[Job], start: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each arm gets its own mlp_dim, which is shown in the table and used in the folder's name."""
    sweep = ("backend.decay=none,input", "model.output_gate=none,channel", "model.parameters=20000")
    start(GridSweeper(), XattnLauncher(), *sweep)
    sizes = [num_params(job.config.model, job.config.backend, vocab_size=256) for job in made]
    assert all(abs(size - 20_000) <= 3 * 16 / 2 for size in sizes)
    widths = [job.config.model.mlp_dim for job in made]
    assert len({job.folder for job in made}) == len(set(widths)) == 4
    folders = [job.folder for job in made]
    assert [xattn.config.run_name(job.config) for job in made] == [folder.name for folder in folders]
    print_table(
        folders, xattn.config.varying_keys([job.config for job in made]), {job.folder: job.config for job in made}
    )
    table = capsys.readouterr().out
    assert all(key in table for key in ("decay", "output_gate", "mlp_dim", *map(str, widths)))
    assert "parameters" not in table


def test_a_sweep_with_an_arm_that_cannot_be_so_small_starts_nothing(
    made: list[Job], start: Callable[..., None]
) -> None:
    with pytest.raises(BadInput, match=r"model\.parameters = 9000: must be at least 9"):
        start(GridSweeper(), XattnLauncher(), "model.embeddings=tied,untied", "model.parameters=9000")
    assert made == []


def test_trials_are_made_where_the_launcher_makes_them(made: list[Job], start: Callable[..., None]) -> None:
    others = OtherMachines()
    start(optuna_sweeper(), ElsewhereLauncher(others), f"{RATE}=interval(1e-4, 1e-2)")
    assert len(others.launched) == 2
    assert made == []


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[Job]]:
    """The runs that each job of a launcher would train together."""
    monkeypatch.chdir(tmp_path)
    grouped: list[list[Job]] = []

    def run_study(jobs: Sequence[Job], **how: Any) -> study.Outcomes:
        grouped.append(list(jobs))
        for job in jobs:
            finish(job.folder)
        return {}

    monkeypatch.setattr(workers, "run_study", run_study)
    return grouped


def test_a_job_carries_runs_of_one_program(
    grouped: list[list[Job]], start: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A job has as many as asked for, and each run has its own config in whatever order the sweep has them."""
    others = AsSubmitit()
    start(GridSweeper(), ElsewhereLauncher(others, 2), "seed=0,1", "backend.activation=softmax,sigmoid")
    assert len(others.launched) == 2
    made = [[(job.config.backend.activation, job.config.seed) for job in group] for group in grouped]
    assert made == [[("softmax", 0), ("softmax", 1)], [("sigmoid", 0), ("sigmoid", 1)]]
    assert "submitted 4 runs" in capsys.readouterr().out
    start(GridSweeper(), ElsewhereLauncher(others, 2), "seed=0,1", "backend.activation=softmax,sigmoid")
    assert len(others.launched) == 2


def test_runs_of_a_job_are_as_hydra_has_them(
    grouped: list[list[Job]], start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run, and not the job, has a number in the sweep, which may name its folder, and gets the callbacks."""
    monkeypatch.setattr(Heard, "told", [])
    (tmp_path / "outputs" / "default").mkdir(parents=True)
    finish(tmp_path / "outputs" / "default" / "run0")
    heard = f"+hydra.callbacks.heard._target_={__name__}.Heard"
    own = ["hydra.sweep.subdir='run${hydra.job.num}'", heard, "hydra.output_subdir=.hydra", "seed=0,1,2,3,4"]
    start(GridSweeper(), ElsewhereLauncher(AsSubmitit(), 2), *own)
    assert [[job.folder.name for job in group] for group in grouped] == [["run1", "run2"], ["run3", "run4"]]
    assert [job.config.seed for group in grouped for job in group] == [1, 2, 3, 4]
    pairs = ((1, 2), (3, 4))
    assert Heard.told == [(at, seed) for pair in pairs for at in ("start", "end") for seed in pair]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["+hydra.job.env_set.XATTN_SET='${seed}'"], r"hydra\.job\.env_set: XATTN_SET: differs"),
        (["hydra.job.chdir=true"], r"hydra\.job\.chdir = true"),
    ],
)
def test_runs_that_cannot_share_a_process_are_not_put_into_one_job(
    typed: list[str], told: str, grouped: list[list[Job]], start: Callable[..., None]
) -> None:
    others = AsSubmitit()
    with pytest.raises(BadInput, match=rf"{told}.*runs_per_job=1"):
        start(GridSweeper(), ElsewhereLauncher(others, 2), *typed, "seed=0,1")
    assert (others.launched, grouped) == ([], [])


@pytest.mark.parametrize(("begun", "resume"), [("2001-01-01T00:00:00+00:00", "never"), ("2999-01-01", "auto")])
@pytest.mark.parametrize("runs_per_job", [1, 2])
def test_a_job_that_is_queued_again_starts_nothing_over(
    runs_per_job: int, begun: str, resume: str, grouped: list[list[Job]], start: Callable[..., None], tmp_path: Path
) -> None:
    """``resume=never`` moves an earlier command's run aside, but not one that this command's first attempt began."""
    study_folder, seen = tmp_path / "outputs" / "default", []

    def begin(number: int) -> None:
        for name in ("a0", "a1"):
            (study_folder / name).mkdir(parents=True, exist_ok=True)
            (study_folder / name / run_folder.PROVENANCE).write_text(f'{{"started_at": "{begun}"}}')

    def task(config: DictConfig) -> ExitCode:
        seen.append(config.resume)
        return ExitCode.DONE

    def make(jobs: Sequence[Job], **how: Any) -> study.Outcomes:
        seen.extend(job.config.resume for job in jobs)
        return {}

    launcher = ElsewhereLauncher(AsSubmitit(begin), runs_per_job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "run_study", make)
        patch.setitem(globals(), "_task", task)
        with pytest.raises(SystemExit):  # nothing has trained
            start(GridSweeper(), launcher, "hydra.sweep.subdir='a${seed}'", "resume=never", "seed=0,1")
    assert seen == [resume, resume]


def test_trials_that_draw_the_same_values_are_one_run(made: list[Job], start: Callable[..., None]) -> None:
    start(optuna_sweeper(n_trials=6, at_once=6), XattnLauncher(), f"{RATE}=choice(0.001, 0.01)")
    assert 1 <= len(made) <= 2


def test_runs_that_differ_do_not_share_a_folder(made: list[Job], start: Callable[..., None]) -> None:
    with pytest.raises(BadInput, match=r"runs that differ in seed; hydra\.sweep\.subdir must"):
        start(GridSweeper(), XattnLauncher(), "hydra.sweep.subdir=x", "seed=0,1")
    assert made == []


@pytest.mark.parametrize("values", ["study_sigmoid_bias,study_theta", "choice(study_sigmoid_bias, study_theta)"])
def test_each_experiment_is_swept_as_its_file_says(values: str, start: Callable[..., None]) -> None:
    """They have 45 and 50 runs. A further typed key multiplies both; a typed key that both sweep replaces theirs."""
    noted, typed = Noted(), f"experiment={values}"
    start(GridSweeper(), noted, typed)
    of = [[job for job in noted.jobs if f"experiment={name}" in job] for name in ("study_sigmoid_bias", "study_theta")]
    assert [len(jobs) for jobs in of] == [45, 50]
    assert len(noted.jobs) == 95
    assert all(any(word.startswith("optimizer.learning_rate=") for word in job) for job in of[0])
    assert not any(word.startswith("backend.theta=") for job in of[0] for word in job)
    assert {word for job in of[1] for word in job if word.startswith("seed=")} == {f"seed={seed}" for seed in range(5)}
    noted = Noted()
    start(GridSweeper(), noted, typed, "seed=7,8", "schedule=cosine,linear")
    assert len(noted.jobs) == (9 + 10) * 2 * 2


def test_experiments_that_sweep_nothing_are_one_grid_in_the_order_typed(start: Callable[..., None]) -> None:
    noted = Noted()
    start(GridSweeper(), noted, "seed=0,1", "backend=none,sigmoid")
    assert [job[-2:] for job in noted.jobs] == [
        [f"seed={seed}", f"backend={backend}"] for seed in (0, 1) for backend in ("none", "sigmoid")
    ]


def test_each_key_varies_by_itself_and_seeds_and_rates_go_with_every_arm(start: Callable[..., None]) -> None:
    """This also holds if a swept key is typed again, with other values or with a single one."""
    varied = ["model.conv=null,4", "trainer.steps=2,3", "backend=softmax,none,sigmoid", "seed=0,1"]
    noted = Noted()
    start(
        GridSweeper(one_at_a_time=True), noted, *varied, "backend=softmax,sigmoid", "optimizer.learning_rate=1e-3,1e-2"
    )
    conv, steps, backend = (
        ("model.conv=null", "model.conv=4"),
        ("trainer.steps=2", "trainer.steps=3"),
        ("backend=softmax", "backend=sigmoid"),
    )
    base = {conv[0], steps[0], backend[0]}
    arms = [base, *(base - {first} | {other} for first, other in (conv, steps, backend))]
    numbers = [{f"seed={seed}", f"optimizer.learning_rate={rate}"} for seed in (0, 1) for rate in ("0.001", "0.01")]
    found = [set(job) & set().union(*arms, *numbers) for job in noted.jobs]
    assert sorted(map(sorted, found)) == sorted(sorted(arm | number) for arm in arms for number in numbers)
    noted = Noted()
    start(GridSweeper(one_at_a_time=True), noted, *varied, "backend=sigmoid")
    assert len(noted.jobs) == 3 * 2
    assert all("backend=sigmoid" in job for job in noted.jobs)
    noted = Noted()
    start(GridSweeper(one_at_a_time=True), noted, *varied, "++seed=0,1,2", "++model.conv=2")
    assert len(noted.jobs) == 4 * 3
    assert not any(word.startswith("model.conv=") for job in noted.jobs for word in job)
    with pytest.raises(BadInput, match=r"hydra\.sweeper\.one_at_a_time = perhaps: must be true or false"):
        start(GridSweeper(one_at_a_time="perhaps"), noted, "seed=0,1")  # type: ignore[arg-type]


@pytest.mark.parametrize("seeds", [("3", "12", "3"), ("+3", "x", "1e1", "007")])
def test_another_seed_is_composed_as_hydra_does(seeds: Sequence[str], start: Callable[..., None]) -> None:
    """The configs are identical, including what Hydra records of the job."""
    hydra = ["hydra.job.config.override_dirname.item_sep=+", "hydra.job.config.override_dirname.kv_sep=."]
    loader = GlobalHydra.instance().config_loader()
    config = loader.load_configuration("config", [*hydra, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
    load = xattn_launcher.loader(HydraContext(config_loader=loader, callbacks=Callbacks(config)), config)
    for seed in ("0", *seeds):
        typed = ["study='a+seed=0+b'", f"seed={seed}", "backend.theta=30", *hydra, "++hydra.job.name=x"]
        assert OmegaConf.to_yaml(load(typed)) == OmegaConf.to_yaml(loader.load_sweep_config(config, typed))


def test_an_experiment_with_a_sweeper_of_its_own_is_swept_by_itself(start: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nhydra: {sweeper: {max_batch_size: 3}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    noted = Noted()
    with pytest.raises(BadInput, match=r"experiment=mine: has its own launcher or sweeper"):
        start(GridSweeper(), noted, f"hydra.searchpath=[file://{tmp_path}]", "experiment=study_theta,mine")
    assert noted.jobs == []


def test_several_search_spaces_are_not_tuned_at_once(start: Callable[..., None]) -> None:
    with pytest.raises(BadInput, match=r"experiment=study_activation,study_theta.*with a separate command"):
        start(optuna_sweeper(), XattnLauncher(), "experiment=study_activation,study_theta")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("backend=glob(zzz*)", r"backend=glob\(zzz\*\): matches no choice.*allowed: alibi, fox, gla"),
        ("seed=glob(*)", r"seed=glob\(\*\): matches no choice, so there is nothing to run$"),
        ("seed=range(5, 5)", r"seed=range\(5, 5\): has no value"),
        ("seed=range(0, 5, 0)", r"seed=range\(0, 5, 0\): .*zero"),
        ("optimizer.learning_rate=interval(0.1, 1)", r"interval\(0\.1, 1\): a grid takes choice"),
        ("backend=choice(softmax, sigmod)", r"backend = sigmod: no such choice \(did you mean sigmoid\?\)"),
    ],
)
def test_a_sweep_of_no_runs_says_why(typed: str, told: str, made: list[Job], start: Callable[..., None]) -> None:
    with pytest.raises(BadInput, match=told):
        start(GridSweeper(), XattnLauncher(), typed)
    if "interval" not in typed and "range(0" not in typed:
        with pytest.raises(BadInput, match=r"nothing to run|no such choice|takes choice"):
            start(optuna_sweeper(), XattnLauncher(), typed)
    assert made == []


@pytest.mark.parametrize("sweeper", ["grid", "optuna"])
def test_the_environment_that_hydra_is_to_set_is_there_for_every_run(
    sweeper: str, start: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is set before anything looks at a device, and only until the sweep ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XATTN_COPIED", "7")
    seen: list[tuple[str | None, str | None]] = []

    def look(jobs: Sequence[Job], *outcomes: study.Outcomes, **shown: Any) -> study.Outcomes:
        seen.append((os.environ.get("XATTN_SET"), os.environ.get("XATTN_COPIED")))
        for job in jobs:
            finish(job.folder)
        return {}

    monkeypatch.setattr(study, "make", look)
    monkeypatch.setattr(workers, "run_study", look)
    which = GridSweeper() if sweeper == "grid" else optuna_sweeper(n_trials=1)
    typed = ["+hydra.job.env_set.XATTN_SET=5", "hydra.job.env_copy=[XATTN_COPIED]", "seed=choice(0, 1)"]
    start(which, XattnLauncher(), *typed)
    assert seen == [("5", "7")]
    assert "XATTN_SET" not in os.environ


def test_runs_of_one_process_have_one_environment_and_working_directory(
    made: list[Job], start: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nhydra: {job: {env_set: {XATTN_SET: '1'}}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    search = f"hydra.searchpath=[file://{tmp_path}]"
    for names in ("mine,plain_layers", "plain_layers,mine"):
        with pytest.raises(
            BadInput, match=r"hydra\.job\.env_set: XATTN_SET: differs between runs that share a process"
        ):
            start(GridSweeper(), XattnLauncher(), search, f"experiment={names}")
    with pytest.raises(BadInput, match=r"hydra\.job\.chdir = true: .*one working directory"):
        start(GridSweeper(), XattnLauncher(), "hydra.job.chdir=true", "seed=0,1")
    assert made == []


def test_log_files_and_callbacks_that_hydra_is_asked_for_are_there(
    made: list[Job], start: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configured: list[DictConfig] = []
    monkeypatch.setattr(xattn_launcher, "configure_log", lambda config, verbose: configured.append(config))
    monkeypatch.setattr(Heard, "told", told := [])
    monkeypatch.setattr(workers, "run_study", lambda jobs, plan: told.append(("runs", len(jobs))) or {})
    asked = ["hydra/job_logging=default", "hydra.output_subdir=.hydra"]
    asked.append(f"+hydra.callbacks.heard._target_={__name__}.Heard")
    start(GridSweeper(), XattnLauncher(), *asked, "study=s", "seed=0,1")
    assert told == [("start", 0), ("start", 1), ("runs", 2), ("end", 0), ("end", 1)]
    assert [config.handlers.file.filename for config in configured] == [str(tmp_path / "outputs" / "s" / "train.log")]
    files = sorted(path.name for path in (tmp_path / "outputs" / "s").glob("*/.hydra/*"))
    assert files == sorted(["config.yaml", "hydra.yaml", "overrides.yaml"] * 2)


def test_no_run_of_a_sweep_is_called_as_the_folder_of_the_report(made: list[Job], start: Callable[..., None]) -> None:
    with pytest.raises(BadInput, match=r"default/report: a run's folder cannot be called report"):
        start(GridSweeper(), XattnLauncher(), "hydra.sweep.subdir=report", "seed=0")
    start(GridSweeper(), XattnLauncher(), "study=report", "seed=0")
    assert made[0].folder.parts[:2] == ("outputs", "report")


@pytest.mark.parametrize(
    ("space", "metric"),
    [
        (["data.tokenizer=choice(bytes, bpe)"], "val_bpb"),
        (["data.tokenizer=choice(bpe)", "data.vocab_size=interval(300, 400)"], "val_bpb"),
        (["data.vocab_size=interval(300, 400)"], "val_loss"),  # bytes do not use it
        (["backend=choice(softmax, none)"], "val_loss"),
    ],
)
def test_the_loss_that_is_tuned_is_one_that_all_points_can_be_compared_by(
    space: list[str], metric: str, made: list[Job], start: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    start(optuna_sweeper(objective="auto"), XattnLauncher(), *space)
    assert f"trials: {metric} 1.0000" in capsys.readouterr().out
    assert made


def test_a_key_that_needs_a_value_gets_it_from_the_space(
    made: list[Job], start: Callable[..., None], tiny: list[str]
) -> None:
    path = next(word.partition("=")[2] for word in tiny if word.startswith("data.path="))
    start(optuna_sweeper(n_trials=1), XattnLauncher(), f"data.path=choice({path!r})")
    assert [job.config.data.path for job in made] == [path]


def test_tokens_that_stand_for_no_bytes_are_not_tuned_against_others(
    made: list[Job], start: Callable[..., None]
) -> None:
    with pytest.raises(BadInput, match=r"objective = auto: tokens differ.*data=memmap has no bits per byte"):
        start(optuna_sweeper(objective="auto"), XattnLauncher(), "data=memmap", "data.path=choice(a, b)")
    assert made == []


def test_an_interval_of_a_key_that_holds_whole_numbers_draws_whole_numbers(
    made: list[Job], start: Callable[..., None]
) -> None:
    """A float key draws from all numbers, even if its ends are whole."""
    start(optuna_sweeper(), XattnLauncher(), "model.mlp_dim=interval(8, 40)", "optimizer.clip_norm=interval(1, 2)")
    assert len(made) == 2
    assert all(8 <= job.config.model.mlp_dim <= 40 for job in made)
    assert all(job.config.optimizer.clip_norm % 1 for job in made)


@pytest.mark.parametrize("batch", [None, 1])
def test_one_bad_run_in_any_batch_and_nothing_begins(
    batch: int | None, made: list[Job], start: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"nothing was started \(2 runs\): optimizer\.learning_rate = -1"):
        start(GridSweeper(batch), XattnLauncher(), f"{RATE}=1e-3,-1")
    assert made == []
    assert list(tmp_path.iterdir()) == []
    start(GridSweeper(batch), XattnLauncher(), f"{RATE}=1e-3,2e-3")
    assert [job.config.optimizer.learning_rate for job in made] == [1e-3, 2e-3]


def test_what_is_bad_for_one_run_alone_starts_none(
    start: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This covers all that shows without training: the corpus files, the mesh, the attention on these devices."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "start", lambda jobs: pytest.fail("started"))
    monkeypatch.setattr(study, "make", lambda jobs, start: pytest.fail("started"))
    for typed, told in (
        (["data.path=missing.txt,/dev/null"], r"data\.path = 'missing\.txt'"),
        (["parallel.data=2048", "seed=0,1"], r"parallel\.data = 2048"),
        (["backend.implementation=reference,hopper", "sweep.pack=2"], r"backend\.implementation: .*hopper"),
    ):
        with pytest.raises(BadInput, match=rf"nothing was started \(2 runs\): {told}"):
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
        ([f"{RATE}=choice(1,2)", "sweep.workers=2"], r"sweep\.workers = 2: tuning uses one process"),
        ([f"{RATE}=choice(1,2)", "sweep.half_width=0.1"], r"sweep\.half_width = 0\.1: adds seeds to given arms"),
    ],
    ids=["key", "choice", "workers", "half_width"],
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
    def fault(jobs: Sequence[Job], *outcomes: study.Outcomes, **shown: Any) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(study, "make", fault)
    monkeypatch.setattr(workers, "run_study", fault)
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


def test_what_a_launcher_pickles_of_a_run_refers_to_this_package_and_copies_nothing() -> None:
    """Signals would not reach a copy of the interruption object: SIGUSR2 to a submitit job once lost its steps."""
    cloudpickle = pytest.importorskip("cloudpickle", reason="neither the extra slurm nor ray is installed")
    task = app.hydra_app([]).__wrapped__  # Hydra hands this to its launchers
    unpickled = pickle.loads(cloudpickle.dumps(task))
    assert unpickled is not task
    assert [name for name in unpickled.__code__.co_names if name in vars(app)] == ["train_one"]
    assert unpickled.__globals__["train_one"] is app.train_one
