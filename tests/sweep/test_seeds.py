"""Seeds on demand, with made-up results: how many are asked for, for which arms, and what is printed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import xattn.config
from tests.quick import composed
from xattn.config import Config
from xattn.errors import BadInput
from xattn.report.answer import Question
from xattn.report.judge import judge
from xattn.report.read import read_study
from xattn.report.two_stage import pairs_needed, pilot_size, quantile, two_stage
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.sweep import study
from xattn.sweep.planned import Plan
from xattn.sweep.seeds import SeedStudy

Loss = Callable[[Config], float | None]


def config_of(*overrides: str) -> Config:
    return composed("trainer=debug", *overrides)


class Laboratory:
    """Makes run folders for some arms (each a list of overrides), with the losses that ``loss`` returns."""

    def __init__(self, outputs: Path, arms: Sequence[Sequence[str]], loss: Loss):
        self.outputs, self.arms, self.loss = outputs, arms, loss
        self.made, self.dies_after = 0, 10**6

    def jobs(self, wanted: Sequence[tuple[int, int]]) -> list[Job]:
        configs = [config_of(*self.arms[arm]).model_copy(update={"seed": seed}) for arm, seed in wanted]
        return [Job(config, self.outputs / xattn.config.run_name(config)) for config in configs]

    def train_all(self, jobs: Sequence[Job], outcomes: study.Outcomes) -> None:
        for job in jobs:
            if (job.folder / run_folder.CONFIG).is_file():
                continue
            if self.made >= self.dies_after:
                raise SystemExit(75)
            self.made += 1
            job.folder.mkdir(parents=True)
            (job.folder / run_folder.CONFIG).write_text(xattn.config.save(job.config))
            found = self.loss(job.config)
            provenance = {"started_at": f"2026-11-29T{self.made:06}", "data_sha256": "d" * 64}
            (job.folder / run_folder.PROVENANCE).write_text(json.dumps(provenance))
            summary = {"status": "diverged" if found is None else "done", "step": 20, "val_loss": found}
            summary |= {"val_bpb": None, "wall_seconds": 30.0}
            (job.folder / run_folder.SUMMARY).write_text(json.dumps(summary))

    def run_study(self, *options: str) -> None:
        arms = [[*arm, *options] for arm in self.arms]
        before, self.arms = self.arms, arms
        SeedStudy(self.jobs([(i, 0) for i in range(len(arms))]), self.jobs, self.train_all, Plan()).run()
        self.arms = before

    def seeds_of(self, key: str) -> dict[object, int]:
        """Return the number of seeds that have been made with each value of a key."""
        runs = read_study(self.outputs).runs
        return dict(Counter(run.config[key] for run in runs))


def losses(spread: float, effects: dict[object, float], key: str = "backend.activation") -> Loss:
    """Return losses with noise of the seed, shared by all arms, and of the run, whose differences have this spread."""

    def loss(config: Config) -> float:
        arm = xattn.config.hashed_values(config)[key]
        rng = np.random.default_rng([config.seed, *str(arm).encode()])
        return (
            2
            + effects.get(arm, 0.0)
            + np.random.default_rng(config.seed).normal(0, 0.1)
            + rng.normal(0, spread / 2**0.5)
        )

    return loss


TWO = [["backend.activation=softmax"], ["backend.activation=sigmoid"]]


def expected(laboratory: Laboratory, half_width: float, pilot: int = 8) -> int:
    """Return how many pairs Stein's formula asks for, from the losses of the pilot."""
    configs = [job.config for job in laboratory.jobs([(arm, seed) for arm in (0, 1) for seed in range(pilot)])]
    values = np.array([laboratory.loss(config) for config in configs], dtype=float).reshape(2, pilot)
    return pairs_needed(float((values[1] - values[0]).std(ddof=1)), pilot, 1, half_width)


def test_seeds_are_added_until_the_difference_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laboratory = Laboratory(tmp_path / "study", TWO, losses(0.02, {"sigmoid": 0.03}))
    needed = expected(laboratory, 0.01)
    laboratory.run_study("sweep.half_width=0.01")
    assert needed > 8
    assert laboratory.seeds_of("backend.activation") == {"softmax": needed, "sigmoid": needed}
    told = capsys.readouterr().out
    assert f"after 8 seeds: up to {needed - 8} more seeds per arm, about " in told
    assert "backend.activation: sigmoid is worse than softmax: val_loss +0.0" in told
    assert "where ±0.01 was asked for" in told
    (effect,) = judge(read_study(laboratory.outputs), Question()).effects  # as xattn report finds it later
    assert effect.stage is not None
    assert (effect.stage.pilot, effect.stage.pairs, effect.stage.needed) == (8, needed, needed)
    assert effect.stage.half_width <= 0.01


def test_a_pilot_that_suffices_is_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laboratory = Laboratory(tmp_path / "study", TWO, losses(0.002, {}))
    laboratory.run_study("sweep.half_width=0.01")
    assert laboratory.seeds_of("backend.activation") == {"softmax": 8, "sigmoid": 8}
    assert "more seed" not in capsys.readouterr().out


def test_a_killed_study_ends_with_the_same_seeds_and_the_same_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Laboratory(tmp_path / "whole" / "study", TWO, losses(0.02, {"sigmoid": 0.03}))
    whole.run_study("sweep.half_width=0.01")
    said = capsys.readouterr().out.splitlines()[-1]
    killed = Laboratory(tmp_path / "killed" / "study", TWO, losses(0.02, {"sigmoid": 0.03}))
    for deaths in (5, 17, 30):
        killed.dies_after = deaths
        with pytest.raises(SystemExit):
            killed.run_study("sweep.half_width=0.01")
    killed.dies_after = 10**6
    killed.run_study("sweep.half_width=0.01")
    assert killed.seeds_of("seed") == whole.seeds_of("seed")
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_a_smaller_half_width_goes_on_and_the_report_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    laboratory = Laboratory(tmp_path / "study", TWO, losses(0.02, {}))
    laboratory.run_study("sweep.half_width=0.02")
    first = laboratory.seeds_of("backend.activation")["softmax"]
    laboratory.run_study("sweep.half_width=0.008")
    assert laboratory.seeds_of("backend.activation")["softmax"] == expected(laboratory, 0.008) > first
    (effect,) = judge(read_study(laboratory.outputs), Question()).effects
    assert effect.stage is not None
    assert effect.stage.half_widths == (0.02, 0.008)
    assert "extended" in capsys.readouterr().out.splitlines()[-1]


def test_each_arm_has_the_seeds_that_its_own_comparison_takes(tmp_path: Path) -> None:
    """The baseline has the seeds of the arm with the most."""
    three = [*TWO, ["backend.activation=none"]]

    def loss(config: Config) -> float:
        rng = np.random.default_rng([config.seed, *config.backend.activation.encode()])
        return 2 + rng.normal(0, {"softmax": 0.001, "sigmoid": 0.001, "none": 0.03}[config.backend.activation])

    laboratory = Laboratory(tmp_path / "study", three, loss)
    laboratory.run_study("sweep.half_width=0.02")
    counts = laboratory.seeds_of("backend.activation")
    assert counts["sigmoid"] == pilot_size(2) == 10
    assert counts["none"] == counts["softmax"] > 10


def test_the_budget_ends_it_with_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laboratory = Laboratory(tmp_path / "study", TWO, losses(0.05, {}))
    laboratory.run_study("sweep.half_width=0.01", "sweep.budget_minutes=0.01")
    assert laboratory.seeds_of("backend.activation") == {"softmax": 8, "sigmoid": 8}
    told = capsys.readouterr().out
    assert "sweep.budget_minutes = 0.01: time is up; stopped with the seeds so far" in told
    assert "±0.01 takes " in told.splitlines()[-1]


def test_a_rate_is_chosen_by_other_seeds_than_it_is_judged_by(tmp_path: Path) -> None:
    """Four seeds train at all rates; the pilot and later seeds train only at each arm's best rate."""
    rates = ("1e-3", "3e-3")
    arms = [[*arm, f"optimizer.learning_rate={rate}"] for arm in TWO for rate in rates]

    def loss(config: Config) -> float:
        best = {"softmax": 1e-3, "sigmoid": 3e-3}[config.backend.activation]
        rng = np.random.default_rng([config.seed, *config.backend.activation.encode()])
        return 2 + 0.1 * (config.optimizer.learning_rate != best) + rng.normal(0, 0.004)

    laboratory = Laboratory(tmp_path / "study", arms, loss)
    laboratory.run_study("sweep.half_width=0.01")
    runs = read_study(laboratory.outputs).runs
    made = Counter((run.config["backend.activation"], run.config["optimizer.learning_rate"]) for run in runs)
    assert made == {("softmax", 1e-3): 12, ("softmax", 3e-3): 4, ("sigmoid", 1e-3): 4, ("sigmoid", 3e-3): 12}
    found = judge(read_study(laboratory.outputs), Question())
    assert found.selection == "heldout"
    assert list(found.effects[0].by_seed) == [*range(4, 12)]


def test_an_arm_that_always_diverges_asks_for_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laboratory = Laboratory(
        tmp_path / "study", TWO, lambda config: None if config.backend.activation == "sigmoid" else 2.0
    )
    laboratory.run_study("sweep.half_width=0.01")
    assert laboratory.seeds_of("backend.activation") == {"softmax": 8, "sigmoid": 8}
    assert "8 of 8 of sigmoid diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (TWO[:1], "nothing differs between the runs"),
        ([["seed=1"], ["seed=2"]], "seed = 1,2: sweep.half_width adds seeds by itself"),
    ],
    ids=["one arm", "seeds"],
)
def test_what_cannot_be_compared_is_refused(arms: list[list[str]], message: str, tmp_path: Path) -> None:
    configs = [xattn.config.compose(["trainer=debug", "sweep.half_width=0.01", *arm]) for arm in arms]
    jobs = [Job(config, tmp_path / xattn.config.run_name(config)) for config in configs]
    with pytest.raises(BadInput, match=message):
        SeedStudy(jobs, lambda wanted: [], lambda jobs, outcomes: None, Plan())


def test_the_formula_of_two_stages() -> None:
    """Checked by hand: s₀ is the spread of the first four pairs, with n₀ − 1 = 3 degrees of freedom."""
    d = [1.0, -1.0, 0.0, 0.0, 5.0]
    spread = float(np.std(d[:4], ddof=1))
    found = two_stage(d, 4, 2, (0.5,))
    assert found is not None
    assert quantile(4, 2) == pytest.approx(4.1765, abs=1e-4)  # t(0.9875, 3)
    half = 4.1765 * spread / 5**0.5
    assert (found.ci_low, found.ci_high) == pytest.approx((1 - half, 1 + half), abs=1e-3)
    assert found.needed == int(np.ceil((4.1765 * spread / 0.5) ** 2))
    assert not found.is_reached
    assert two_stage(d[:3], 4, 1, (0.5,)) is None
    assert two_stage([0.1] * 8, 8, 1, (0.5,)) is None
    assert [pilot_size(m) for m in (1, 3, 10)] == [8, 12, 16]


def test_lengths_of_training_are_no_comparison_beside_an_arm(tmp_path: Path) -> None:
    """Training the baseline for more lengths, to value the arm, widens no interval and asks for no seed."""
    laboratory = Laboratory(tmp_path / "study", TWO, losses(0.02, {"sigmoid": 0.03}))
    laboratory.run_study("sweep.half_width=0.01")
    (before,) = judge(read_study(laboratory.outputs), Question()).effects
    for steps in (40, 80):
        longer = Laboratory(laboratory.outputs, [[*TWO[0], f"trainer.steps={steps}"]], laboratory.loss)
        longer.train_all(longer.jobs([(0, seed) for seed in range(8)]), {})
    effects = judge(read_study(laboratory.outputs), Question()).effects
    assert {effect.factor: effect.stage for effect in effects} == {
        "backend.activation": before.stage,
        "trainer.steps": None,
    }
