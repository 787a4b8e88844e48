"""The statistics, against values computed by hand and on simulated studies with a known truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from xattn.report.answer import Question
from xattn.report.command import panels_of
from xattn.report.defaults import conf_defaults
from xattn.report.design import Design, find_design
from xattn.report.judge import judge
from xattn.report.metric import Metric
from xattn.report.read import read_study
from xattn.report.selection import Candidate, choose, sensitivity, split
from xattn.report.simulate import promises, some_rejected
from xattn.report.statistics import (
    EXACT_TO,
    Effect,
    detectable,
    holm,
    interactions,
    main_effects,
    paired,
)

from .folders import Writer

LOSS = Metric("val_loss")


def design_of(writer: Writer) -> Design:
    return find_design(read_study(writer.folder).runs, conf_defaults())


def effects_of(writer: Writer, **how: str) -> list[Effect]:
    design = design_of(writer)
    chosen = choose(design, LOSS, **how)  # type: ignore[arg-type]
    return main_effects(design, chosen, LOSS)


# ---- one comparison --------------------------------------------------------------------------------------------------


def test_three_pairs_by_hand() -> None:
    """d = 1, 2, 3: mean 2, s = 1, standard error 1/√3, t(0.975, 2) = 4.302653; p = 1 − t/√(t² + 2) for 2 degrees."""
    found = paired([1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert found.difference == 2
    assert found.ci_low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.ci_high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert found.p_signflip == 0.25


def test_signflips_are_counted_by_hand() -> None:
    """For d = −1, 2, 4, two of the 8 sums ±1 ± 2 ± 4 (5 and 7) are at least 5, so p = 2 · 2/8."""
    assert paired([-1.0, 2.0, 4.0]).p_signflip == 0.5


@pytest.mark.parametrize("seeds", [2, 3, 5, 6, 10])
def test_the_smallest_signflip_p_is_reached_and_not_passed(seeds: int) -> None:
    assert paired(1 + np.arange(seeds) / 100).p_signflip == pytest.approx(2.0 ** (1 - seeds))


def test_signflips_are_all_looked_at_up_to_13_seeds() -> None:
    d = np.random.default_rng(0).standard_normal(14)
    exact, random = paired(d[:EXACT_TO]).p_signflip, paired(d).p_signflip
    assert exact is not None
    assert random is not None
    assert (exact * 2**EXACT_TO) % 1 == 0 != (random * 2**14) % 1
    assert random * 10_000 == pytest.approx(round(random * 10_000))  # the drawn ones and the observed one


@pytest.mark.parametrize(("seeds", "arms"), [(3, 1), (3, 2), (3, 5), (8, 3)])
def test_the_detectable_difference_is_found_four_times_in_five_by_holm(seeds: int, arms: int) -> None:
    """One arm differs by it, and the others do not differ. "Found" means what the verdict calls found."""
    rng = np.random.default_rng(0)
    trials = 0.01 * rng.standard_normal((20_000, arms, seeds))
    trials[:, 0] += detectable(0.01, seeds, arms)
    p_values = stats.ttest_1samp(trials, 0.0, axis=-1).pvalue
    found = [min(row) == row[0] and row[0] <= 0.05 / arms for row in p_values]  # Holm's first step
    assert np.mean(found) == pytest.approx(0.8, abs=0.015)


def test_what_a_study_would_have_found_is_less_with_more_arms(writer: Writer) -> None:
    found = []
    for arm in ("softmax", "sigmoid", "none"):
        for seed, own in enumerate((0.0, 0.02, 0.01)):
            writer.run({"backend.activation": arm, "seed": seed}, 2.0 + (own if arm != "softmax" else 0.0))
        found += [effects_of(writer)[0]] if arm != "softmax" else []
    one, two = found
    assert (one.comparisons, two.comparisons) == (1, 2)
    assert one.paired == two.paired
    assert one.detectable == pytest.approx(0.01 * 3.264, rel=1e-3)  # by statsmodels' TTestPower
    assert two.detectable == pytest.approx(0.01 * 4.625, rel=1e-3)


@pytest.mark.parametrize(("differences", "mean"), [([], None), ([0.5], 0.5), ([0.5, 0.5, 0.5], 0.5), ([0.0, 0.0], 0.0)])
def test_nothing_is_said_of_what_has_no_spread(differences: list[float], mean: float | None) -> None:
    found = paired(differences)
    assert found.difference == mean
    assert (found.ci_low, found.ci_high, found.p, found.p_signflip, found.spread) == (None,) * 5


@pytest.mark.parametrize(("seeds", "there"), [(19, False), (20, True)])
def test_the_bootstrap_begins_at_20_seeds(seeds: int, there: bool) -> None:
    found = paired(np.random.default_rng(0).standard_normal(seeds))
    assert (found.bootstrap is not None) == there
    if found.bootstrap is not None and found.ci_low is not None:
        assert found.bootstrap[0] == pytest.approx(found.ci_low, abs=0.15)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.03, 0.04: 3 · 0.01, max(2 · 0.03, …), max(1 · 0.04, …)."""
    assert holm([0.03, None, 0.01, 0.04]) == [pytest.approx(0.06), None, pytest.approx(0.03), pytest.approx(0.06)]
    assert holm([None]) == [None]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_bonferronis_test_of_each_subset(p_values: list[float]) -> None:
    """A hypothesis is rejected if each set of hypotheses with it in is, by its least p times its size."""
    each = range(len(p_values))
    subsets = [subset for size in each for subset in combinations(each, size + 1)]
    worst = [max(len(subset) * min(p_values[j] for j in subset) for subset in subsets if i in subset) for i in each]
    assert holm(p_values) == pytest.approx([min(p, 1.0) for p in worst])


def test_arms_of_one_baseline_are_one_family_and_factors_of_a_grid_are_not(writer: Writer) -> None:
    """Holm covers the family, each arm is named by what it changes, and one panel shows them. Training lengths are not
    part of it: they only measure what an arm is worth. One more cell makes the design a grid."""
    base: dict[str, Any] = {"backend.theta": 1e4, "backend.activation": "softmax", "trainer.steps": 250}
    changes = [{}, {"backend.theta": 100.0}, {"backend.activation": "none"}, {"backend.activation": "sigmoid"}]
    noise = np.random.default_rng(0)
    for change in [*changes, {"trainer.steps": 500}]:
        for seed in range(4):
            writer.run(base | change | {"seed": seed}, 2.0 + len(change) * 0.1 + 0.01 * noise.standard_normal())
    found = {effect.arm: effect for effect in effects_of(writer)}
    assert {arm: effect.comparisons for arm, effect in found.items()} == {100.0: 3, "none": 3, "sigmoid": 3, 500: 1}
    ps = holm([found[arm].paired.p for arm in (100.0, "none", "sigmoid")])
    assert [found[arm].p_holm for arm in (100.0, "none", "sigmoid")] == ps
    design = design_of(writer)
    arms = ["activation none", "activation sigmoid", "steps 500", "the baseline", "theta 100"]
    assert sorted(map(design.label, design.runs)) == arms
    (compared,) = judge(read_study(writer.folder), Question()).comparisons
    assert {title: [*arms] for title, arms in panels_of(compared).items()} == {
        "each arm against the one baseline": ["activation = none", "activation = sigmoid", "theta = 100"]
    }
    (compared,) = judge(read_study(writer.folder), Question(baselines={"backend.activation": "none"})).comparisons
    assert {effect.arm: effect.comparisons for effect in compared.effects}[100.0] == 1
    for seed in range(4):
        writer.run(base | {"backend.theta": 100.0, "backend.activation": "none", "seed": seed}, 2.0)
    design = design_of(writer)
    assert "activation softmax, theta 10000, steps 250" in map(design.label, design.runs)
    assert [effect.comparisons for effect in effects_of(writer)] == [2, 2, 1, 1]


# ---- what a study asks -----------------------------------------------------------------------------------------------


def test_factors_tuned_keys_and_the_pairing_are_found(write_study: Callable[..., Writer]) -> None:
    design = design_of(write_study())
    (factor,) = design.factors
    assert (factor.key, factor.arms) == ("backend.activation", ("softmax", "none", "sigmoid"))
    assert (factor.baseline, factor.baseline_is_given) == ("softmax", True)
    assert design.tuned == ("optimizer.learning_rate",)
    assert design.seeds == (0, 1, 2)


def test_a_learning_rate_alone_is_the_question(writer: Writer) -> None:
    for rate in (1e-3, 3e-3):
        for seed in range(2):
            writer.run({"optimizer.learning_rate": rate, "seed": seed}, 2.0 + rate + seed * rate)
    design = design_of(writer)
    assert design.tuned == ()
    assert [(factor.key, factor.baseline) for factor in design.factors] == [("optimizer.learning_rate", 3e-3)]


def test_keys_that_change_together_are_one_factor(writer: Writer) -> None:
    for name, decay, rate in (("adamw", 0.1, 3e-3), ("lion", 1.0, 3e-4)):
        for seed in range(2):
            keys = {
                "optimizer.weight_decay": decay,
                "optimizer.learning_rate": rate,
                "optimizer.name": name,
                "seed": seed,
            }
            writer.run(keys, 2.0 + seed * decay)
    (factor,) = design_of(writer).factors
    assert factor.key == "optimizer.name"
    assert factor.also == ("optimizer.weight_decay", "optimizer.learning_rate")
    assert design_of(writer).tuned == ()


def test_where_a_run_is_tracked_is_no_factor(writer: Writer) -> None:
    writer.run({"seed": 0, "study": "a", "trainer.checkpoint_every": 5, "backend.theta": 10.0})
    writer.run({"seed": 0, "study": "b", "trainer.checkpoint_every": 9, "backend.theta": 10000.0})
    assert [(factor.key, factor.also) for factor in design_of(writer).factors] == [("backend.theta", ())]


def test_without_its_default_the_baseline_is_the_arm_with_most_runs(writer: Writer) -> None:
    for theta, seeds in ((10.0, 2), (100.0, 3)):
        for seed in range(seeds):
            writer.run({"backend.theta": theta, "seed": seed})
    (factor,) = design_of(writer).factors
    assert (factor.baseline, factor.baseline_is_given) == (100.0, False)


# ---- effects ---------------------------------------------------------------------------------------------------------


def test_each_arm_is_judged_at_its_own_best_rate(writer: Writer) -> None:
    losses = {("softmax", 1e-3): 2.0, ("softmax", 3e-3): 2.5, ("sigmoid", 1e-3): 3.0, ("sigmoid", 3e-3): 2.2}
    for (arm, rate), loss in losses.items():
        for seed, own in enumerate((0.0, 0.01, 0.02)):
            more = own if arm == "sigmoid" else 0.0
            keys = {"backend.activation": arm, "optimizer.learning_rate": rate, "seed": seed}
            writer.run(keys, loss + 0.3 * seed + more)
    (effect,) = effects_of(writer)
    assert (effect.factor, effect.arm, effect.baseline) == ("backend.activation", "sigmoid", "softmax")
    assert effect.paired.seeds == 3
    assert effect.paired.difference == pytest.approx(0.21)
    assert effect.paired.ci_low == pytest.approx(0.21 - 4.302653 * 0.01 / math.sqrt(3), abs=1e-6)


def test_heldout_seeds_judge_what_others_chose(writer: Writer) -> None:
    """Seeds 0 and 1 choose 1e-3, which is worse for seeds 2, 3 and 4."""
    for seed in range(5):
        writer.run({"backend.activation": "softmax", "optimizer.learning_rate": 1e-3, "seed": seed}, 2.0)
        for rate in (1e-3, 3e-3):
            lucky = (rate == 1e-3) == (seed < 2)
            keys = {"backend.activation": "sigmoid", "optimizer.learning_rate": rate, "seed": seed}
            writer.run(keys, (1.9 if lucky else 2.4) + seed / 1000)
    (effect,) = effects_of(writer, selection="heldout")
    assert effect.paired.seeds == 3
    assert effect.paired.difference == pytest.approx(0.403)
    (same,) = effects_of(writer)
    assert same.paired.seeds == 5


def test_seeds_are_split_only_where_something_was_chosen(writer: Writer) -> None:
    for seed in range(3):
        for activation in ("softmax", "sigmoid"):
            writer.run({"backend.activation": activation, "optimizer.learning_rate": 1e-3, "seed": seed}, 2.0)
    assert split(design_of(writer), "heldout") == ((0, 1, 2), (0, 1, 2))
    for seed in range(3):
        writer.run({"backend.activation": "sigmoid", "optimizer.learning_rate": 3e-3, "seed": seed}, 2.0)
    assert split(design_of(writer), "heldout") == ((0,), (1, 2))
    assert split(design_of(writer), "same") == ((0, 1, 2), (0, 1, 2))


def test_seeds_of_one_setting_judge_what_those_of_several_have_chosen(writer: Writer) -> None:
    """``sweep.half_width`` makes them so: the tuning seeds have every rate, the others only the best."""
    for seed in range(10):
        for rate in (1e-3, 3e-3) if seed < 4 else (3e-3,):
            for activation in ("softmax", "sigmoid"):
                writer.run({"backend.activation": activation, "optimizer.learning_rate": rate, "seed": seed}, 2 - rate)
    assert split(design_of(writer), "heldout") == ((0, 1, 2, 3), (4, 5, 6, 7, 8, 9))


def test_a_diverged_run_is_worse_than_any_loss(writer: Writer) -> None:
    """3e-3 has the lowest mean, but one of its seeds diverged."""
    for rate in (1e-3, 3e-3):
        for seed in range(3):
            lost = rate == 3e-3 and seed == 1
            keys = {"backend.activation": "sigmoid", "optimizer.learning_rate": rate, "seed": seed}
            writer.run(keys, None if lost else 2.0 - rate, status="diverged" if lost else "done")
    for seed in range(3):
        writer.run({"backend.activation": "softmax", "optimizer.learning_rate": 1e-3, "seed": seed}, 2.0)
    chosen_settings = {cell: each.setting for cell, each in choose(design_of(writer), LOSS).items()}
    assert chosen_settings[("sigmoid",)] == (1e-3,)


def test_settings_without_a_seed_in_common_are_ranked_by_the_share_that_diverged() -> None:
    seeds = range(6)
    few = Candidate((1e-3,), {0: 1.0}, (1,))
    many = Candidate((3e-3,), {2: 2.0, 3: 2.0, 4: 2.0}, (5,))
    assert many.rank(seeds) < few.rank(seeds)


def test_diverged_runs_are_counted(writer: Writer) -> None:
    for arm in ("softmax", "none"):
        for seed in range(4):
            lost = arm == "none" and seed == 2
            loss = None if lost else (2.0 if arm == "softmax" else 1.9 + seed / 100)
            writer.run({"backend.activation": arm, "seed": seed}, loss, status="diverged" if lost else "done")
    (effect,) = effects_of(writer)
    assert (effect.paired.seeds, effect.diverged, effect.ended) == (3, 1, 4)
    assert (effect.baseline_diverged, effect.baseline_ended) == (0, 4)


def test_a_missing_seed_does_not_change_the_choice(writer: Writer) -> None:
    """1e-3 is better for both seeds, and its run with the lucky seed 2 is missing."""
    luck = (0.0, 0.0, -1.0)
    for arm in ("softmax", "sigmoid"):
        for rate, worse in ((1e-3, 0.0), (3e-3, 0.1)):
            for seed in range(3):
                if (arm, rate, seed) != ("sigmoid", 1e-3, 2):
                    keys = {"backend.activation": arm, "optimizer.learning_rate": rate, "seed": seed}
                    writer.run(keys, 2.0 + worse + luck[seed])
    chosen = choose(design_of(writer), LOSS)
    assert chosen[("sigmoid",)].setting == (1e-3,)


def test_what_tuning_says_is_of_the_seeds_that_settings_were_compared_on(writer: Writer) -> None:
    """Seed 2 is missing for 3e-3 and lucky for 1e-3, so means and sensitivity use only seeds 0 and 1."""
    luck = (0.0, 0.0, -1.0)
    for rate, worse in ((1e-3, 0.0), (3e-3, 0.1)):
        for seed in range(3):
            if (rate, seed) != (3e-3, 2):
                writer.run(
                    {"optimizer.learning_rate": rate, "backend.theta": 10.0, "seed": seed}, 2.0 + worse + luck[seed]
                )
                keys = {"optimizer.learning_rate": rate, "backend.theta": 100.0, "seed": seed}
                writer.run(keys, 3.0 + worse + luck[seed])
    design = design_of(writer)
    for cell, each in choose(design, LOSS).items():
        assert (each.setting, each.shared) == ((1e-3,), {0, 1})
        assert each.best.mean(each.shared) == (2.0 if cell == (10.0,) else 3.0)
        assert sensitivity(each, design.runs[cell]) == pytest.approx(0.05)


def test_effects_are_averaged_over_the_other_factor_and_interactions_are_what_is_left(writer: Writer) -> None:
    table = {("softmax", "none"): 2.0, ("softmax", "swish"): 1.9, ("sigmoid", "none"): 2.2, ("sigmoid", "swish"): 2.4}
    for (arm, pre), loss in table.items():
        for seed in range(3):
            jitter = 0.01 * seed if arm == "sigmoid" and pre == "swish" else 0.0
            writer.run(
                {"backend.activation": arm, "backend.qk_pre_activation": pre, "seed": seed}, loss + seed + jitter
            )
    by_factor = {effect.factor: effect.paired.difference for effect in effects_of(writer)}
    assert by_factor["backend.activation"] == pytest.approx((0.2 + 0.5) / 2 + 0.005)
    assert by_factor["backend.qk_pre_activation"] == pytest.approx((-0.1 + 0.2) / 2 + 0.005)
    design = design_of(writer)
    (both,) = interactions(design, choose(design, LOSS), LOSS)
    assert both.arm == ("sigmoid", "swish")
    assert both.paired.difference == pytest.approx(0.2 + 0.1 + 0.01)


def test_one_factor_at_a_time_is_compared_at_the_others_baseline(writer: Writer) -> None:
    for arm, theta, loss in (("softmax", 10000.0, 2.0), ("sigmoid", 10000.0, 2.1), ("softmax", 100.0, 1.9)):
        for seed in range(3):
            writer.run({"backend.activation": arm, "backend.theta": theta, "seed": seed}, loss + seed * loss / 100)
    effects = {effect.factor: effect for effect in effects_of(writer)}
    assert effects["backend.activation"].paired.difference == pytest.approx(0.1 * 1.01)
    assert effects["backend.theta"].paired.difference == pytest.approx(-0.1 * 1.01)
    assert effects["backend.theta"].cells == 1


# ---- simulated studies -----------------------------------------------------------------------------------------------


def test_every_promise_is_kept_in_simulation() -> None:
    measured = promises(repetitions=1000)
    assert len(measured) == 30
    assert [promise for promise in measured if not promise.kept] == []
    for baseline, said in (("chosen too", "96.6% 98.2%"), ("fixed", "93.2% 94.5%")):  # as the page says
        same = [p.measured for p in measured if "same runs" in p.name and p.name.endswith(baseline)]
        assert len(same) == 3
        assert f"{min(same):.1%} {max(same):.1%}" == said


def test_holm_rejects_some_where_its_first_step_does() -> None:
    p_values = np.random.default_rng(0).uniform(size=(8, 3)) ** 3
    some = [min(p for p in holm(list(row)) if p is not None) <= 0.05 for row in p_values]
    assert some_rejected(p_values).tolist() == some
    assert 0 < sum(some) < 8
