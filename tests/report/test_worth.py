"""What an arm is worth in the baseline's steps: the law, its interval, and when no worth is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from xattn.report.answer import Answer, Comparison, Question
from xattn.report.command import _figures_of, texts, write as write_to
from xattn.report.judge import judge
from xattn.report.law import Interval, Law, fit, interval, resampled
from xattn.report.read import read_study
from xattn.report.statistics import Effect, paired
from xattn.report.verdict import verdict_of
from xattn.report.words import verdict
from xattn.report.worth import Worth, laws, log_steps

from .folders import Writer

LAW = Law(np.array([1.2]), np.array([12.0]), np.array([0.4]))
LENGTHS = (125, 250, 500)


def loss_at(steps: float) -> float:
    return float(LAW.loss(steps)[0])


def study(
    writer: Writer,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    arm_lengths: tuple[int, ...] = (250,),
    worth: float = 1.2,
    seeds: int = 5,
    noise: float = 0.002,
    step_cost: float = 1.0,
    **how: Any,
) -> Writer:
    """Write softmax at these lengths, and sigmoid, whose steps count ``worth`` times. Speeds have 1 % noise."""
    rng = np.random.default_rng(3)
    common = 0.02 * rng.standard_normal(seeds)
    for arm, times, at in (("softmax", 1.0, lengths), ("sigmoid", worth, arm_lengths)):
        for steps in at:
            for seed in range(seeds):
                loss = loss_at(steps * times) + float(common[seed] + noise * rng.standard_normal())
                cost = (step_cost if arm == "sigmoid" else 1.0) * float(np.exp(0.01 * rng.standard_normal()))
                keys = {"backend.activation": arm, "trainer.steps": steps, "seed": seed}
                writer.run(keys, loss, rows=4, summary={"tokens_per_second": 40000.0 / cost}, **how)
    return writer


def judged(writer: Writer, **asked: Any) -> Answer:
    return judge(read_study(writer.folder), Question(**asked))


def compared(writer: Writer, **asked: Any) -> Comparison:
    (comparison,) = judged(writer, **asked).comparisons
    return comparison


def effect_of(writer: Writer, **asked: Any) -> Effect:
    (effect,) = (each for each in compared(writer, **asked).effects if each.factor == "backend.activation")
    return effect


def worth_of(writer: Writer, **asked: Any) -> Worth:
    found = effect_of(writer, **asked).worth
    assert found is not None
    return found


def why_not(writer: Writer, **asked: Any) -> str:
    found = worth_of(writer, **asked)
    assert (found.steps, found.step_cost, found.net) == (None, None, None)
    assert f"Its worth in the baseline's steps is not given: {found.why_not}." in verdict(effect_of(writer, **asked))
    return found.why_not


# ---- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, (500, 125, 250), (10, 100, 10_000, 1_000_000)])
@pytest.mark.parametrize(("e", "a", "b"), [(1.2, 12.0, 0.4), (0.0, 3.0, 0.05), (-1.0, 900.0, 2.0)])
def test_a_law_is_found_again_from_its_own_losses(lengths: tuple[int, ...], e: float, a: float, b: float) -> None:
    truth = Law(*np.array([[e], [a], [b]]))
    found = fit(lengths, np.array([truth.loss(steps)[0] for steps in lengths])[None])
    np.testing.assert_allclose([found.e, found.a, found.b], [[e], [a], [b]], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.log_steps(truth.loss(200.0)), np.log(200), atol=1e-6)


def test_a_law_by_hand() -> None:
    """The law goes through 3, 2.5, 2.3 at 1, 2, 4. Each doubling has 0.2/0.5 of the previous fall, so 2^(−b) = 0.4, and
    the rest of the fall is 0.2 · (0.4 + 0.4² + …) = 0.1333."""
    found = fit([1, 2, 4], np.array([[3, 2.5, 2.3]]))
    assert found.b[0] == pytest.approx(np.log2(2.5), abs=1e-6)
    assert found.e[0] == pytest.approx(2.3 - 0.4 / 3, abs=1e-6)
    assert found.a[0] == pytest.approx(3 - found.e[0], abs=1e-6)


@pytest.mark.parametrize(
    "losses", [(3.0, 2.5, 2.0), (3.0, 2.6, 2.0), (2.0, 2.5, 2.6), (3.0, 2.5, 2.5), (3.0, 3.0, 3.0)]
)
def test_losses_that_do_not_fall_ever_more_slowly_have_no_law(losses: tuple[float, ...]) -> None:
    found = fit(LENGTHS, np.array([losses, [loss_at(steps) for steps in LENGTHS]]))
    assert np.isnan([found.e[0], found.a[0], found.b[0], found.log_steps(np.array([2.5, 2.5]))[0]]).all()
    assert found.b[1] == pytest.approx(0.4, abs=1e-5)


def test_more_than_three_lengths_are_fitted_by_least_squares() -> None:
    lengths = (100, 200, 400, 800)
    losses = LAW.loss(np.array(lengths)) + np.array([0.01, -0.02, 0.01, 0.0])
    found = fit(lengths, losses[None])

    def squares(e: float, a: float, b: float) -> float:
        return float(((losses - e - a * np.array(lengths) ** -b) ** 2).sum())

    least = squares(found.e[0], found.a[0], found.b[0])
    assert 1e-6 < least < squares(1.2, 12.0, 0.4)
    for i in range(3):
        for factor in (0.999, 1.001):
            moved = [found.e[0], found.a[0], found.b[0]]
            moved[i] *= factor
            assert squares(*moved) > least


def test_a_loss_that_the_law_never_reaches_takes_infinitely_many_steps() -> None:
    assert LAW.log_steps(np.array([1.2, 1.0])).tolist() == [np.inf, np.inf]


# ---- the interval ----------------------------------------------------------------------------------------------------


def test_of_a_difference_of_means_the_bootstrap_gives_students_interval() -> None:
    """This holds for three seeds too, where plain resampling covers 77 %, and for columns with other seeds."""
    rng = np.random.default_rng(0)
    for n in (3, 6):
        ours, theirs = rng.standard_normal((2, n))
        rows = resampled([dict(enumerate(ours)), dict(enumerate(theirs))], 40_000)
        expected = paired(ours - theirs)
        d = rows[:, 0] - rows[:, 1]
        assert d[0] == pytest.approx(expected.difference)
        half = (expected.ci_high - expected.ci_low) / 2  # type: ignore[operator]
        assert np.quantile(d[1:], [0.025, 0.975]) == pytest.approx([expected.ci_low, expected.ci_high], abs=0.06 * half)
    rows = resampled([{0: 1.0, 1: 2.0, 2: 4.0}, {1: 1.0, 2: 2.0, 3: 2.0, 4: 5.0}])
    assert rows[0].tolist() == pytest.approx([7 / 3, 2.5])
    assert 0 < np.corrcoef(rows[1:].T)[0, 1] < 0.9


def test_resamples_without_a_law_count_against_both_ends() -> None:
    logs = np.concatenate([[0.0], np.linspace(-1, 1, 400)])
    plain = interval(logs)
    assert isinstance(plain, Interval)
    assert plain.value == 1
    logs[[200, 201, 202]] = np.nan
    wider = interval(logs)
    assert isinstance(wider, Interval)
    assert wider.low < plain.low
    assert wider.high > plain.high
    logs[100:110] = np.nan
    assert interval(logs) == "no E + a·C^(−b) with a, b > 0 fits 3% of the resamples of its seeds"


def test_an_interval_without_an_upper_end_is_none() -> None:
    logs = np.concatenate([np.linspace(0, 1, 380), np.full(21, np.inf)])
    assert "the baseline never reaches the arm's loss" in str(interval(logs))


# ---- a study ---------------------------------------------------------------------------------------------------------


def test_an_arm_is_told_in_steps_in_cost_and_net(writer: Writer) -> None:
    found = worth_of(study(writer, step_cost=1.1))
    assert found.steps is not None
    assert found.step_cost is not None
    assert found.net is not None
    assert found.why_not == ""
    assert found.steps.low < 1.2 < found.steps.high < found.steps.low + 0.1
    assert found.step_cost.low < 1.1 < found.step_cost.high < found.step_cost.low + 0.1
    assert found.net.value == pytest.approx(found.steps.value / found.step_cost.value)
    assert found.net.low < 1.2 / 1.1 < found.net.high
    assert found.net.high - found.net.low > found.steps.high - found.steps.low


def test_the_cost_of_a_step_has_students_interval_of_the_log_ratios(writer: Writer) -> None:
    study(writer, step_cost=1.1)
    runs = read_study(writer.folder).runs
    speed = {
        (run.config["backend.activation"], run.seed): run.summary["tokens_per_second"]
        for run in runs
        if run.config["trainer.steps"] == 250
    }
    logs = paired([np.log(speed["softmax", seed] / speed["sigmoid", seed]) for seed in range(5)])
    found = worth_of(writer).step_cost
    assert found is not None
    assert np.log([found.value, found.low, found.high]) == pytest.approx([logs.difference, logs.ci_low, logs.ci_high])


def test_a_step_of_more_tokens_costs_more_at_the_same_speed(writer: Writer) -> None:
    for batch, at in ((16, LENGTHS), (32, (250,))):
        for steps in at:
            for seed in range(3):
                keys = {"trainer.batch_size": batch, "trainer.steps": steps, "seed": seed}
                writer.run(keys, loss_at(steps * batch**0.5 / 4) + 0.001 * seed * (batch - 10), rows=4)
    (effect,) = (each for each in compared(writer).effects if each.factor == "trainer.batch_size")
    assert effect.worth is not None
    assert effect.worth.step_cost == Interval(*[pytest.approx(2.0)] * 3)


def test_the_sentence_is_the_one_of_the_contract(writer: Writer) -> None:
    ratios = Interval(1.18, 1.05, 1.3149), Interval(1.07, 1.04, 1.1), Interval(1.1, 0.97, 1.25)
    effect = effect_of(study(writer, seeds=3))
    told = verdict(_with(effect, Worth(*ratios)))
    assert told.endswith(
        ". It is equal to 1.18 × the baseline's steps [1.05, 1.31]; a step costs 1.07 × [1.04, 1.10]; net 1.10 × "
        "[0.97, 1.25]."
    )
    told = verdict(_with(effect, Worth(ratios[0], why_not="the runs differ in host")))
    assert told.endswith(
        ". It is equal to 1.18 × the baseline's steps [1.05, 1.31]; the cost of a step is not given: the runs "
        "differ in host."
    )
    assert "baseline's steps" not in verdict(_with(effect, None))


def _with(effect: Effect, worth: Worth | None) -> Effect:
    return Effect(**{**vars(effect), "worth": worth})


def test_the_page_has_the_sentence_the_law_and_its_figure(writer: Writer) -> None:
    found = judged(study(writer))
    page = texts(found, {"worth": "caption"}, {"worth": "<svg/>"}, writer.folder / "report")
    assert page["report.md"].count("equal to 1.2") == 2  # at the top and in the statistics
    assert "## Worth in steps\n" in page["report.md"]
    assert "| activation softmax | 1." in page["report.md"]
    assert "![worth](worth.svg)" in page["report.md"]
    assert "the baseline&#x27;s steps [" in page["report.html"]
    assert "worth" in [name for name, _, _ in _figures_of(found.comparisons[0])]


def test_programs_get_the_same_numbers(writer: Writer) -> None:
    found = judged(study(writer, step_cost=1.1))
    effects = {each.factor: each for each in verdict_of(found).effects}
    worth = effects["backend.activation"].worth
    assert worth is not None
    of_effect = vars(worth_of(writer))
    assert worth.model_dump() == {name: vars(of_effect[name]) for name in ("steps", "step_cost", "net")} | {
        "why_not": ""
    }
    assert effects["trainer.steps"].worth is None


def test_a_page_without_lengths_says_nothing_of_worth_and_an_old_figure_goes(writer: Writer) -> None:
    found = judged(study(writer, lengths=(250,)))
    assert effect_of(writer).worth is None
    folder = writer.folder / "report"
    folder.mkdir()
    for name in ("report.html", "worth.svg"):
        (folder / name).touch()
    write_to(found, folder)
    assert "baseline's steps" not in (folder / "report.md").read_text()
    assert not (folder / "worth.svg").exists()


def test_steps_themselves_have_no_worth(writer: Writer) -> None:
    assert [each.worth for each in compared(study(writer)).effects if each.factor == "trainer.steps"] == [None, None]


def test_of_several_lengths_those_between_the_ends_count(writer: Writer) -> None:
    """At 1000 steps, the longest length, a better arm is below everything that the baseline reached."""
    lengths = (125, 250, 500, 1000)
    comparison = compared(study(writer, lengths=lengths, arm_lengths=lengths))
    (law,) = laws(comparison)
    assert [steps for steps, _ in law.arms["activation sigmoid"]] == [250, 500]
    (effect,) = (each for each in comparison.effects if each.factor == "backend.activation")
    assert effect.worth is not None
    assert effect.worth.steps is not None
    columns = [*law.losses, *(loss for _, loss in law.arms["activation sigmoid"])]
    by_hand = law.law.log_steps(np.array(columns[-2:])) - np.log([250, 500])
    assert effect.worth.steps.value == pytest.approx(np.exp(by_hand.mean()))


def test_each_combination_of_the_other_factors_has_its_own_law(writer: Writer) -> None:
    for theta, shift in ((10000.0, 0.0), (100.0, 0.5)):
        for arm, times, at in (("softmax", 1.0, LENGTHS), ("sigmoid", 1.2, (250,))):
            for steps in at:
                for seed in range(3):
                    keys = {"backend.theta": theta, "backend.activation": arm, "trainer.steps": steps, "seed": seed}
                    noise = 0.001 * (seed + steps % 7 * seed**2)
                    writer.run(keys, loss_at(steps * times) + shift + noise, rows=4)
    comparison = compared(writer)
    found = {effect.factor: effect.worth for effect in comparison.effects}
    assert (activation := found["backend.activation"]) is not None
    assert activation.steps is not None
    assert activation.steps.value == pytest.approx(1.2, abs=0.02)
    labels = ["activation softmax, theta 10000", "activation softmax, theta 100"]
    assert [law.label for law in laws(comparison)] == labels
    theta = found["backend.theta"]
    assert theta is not None
    assert "theta" not in theta.why_not
    assert "lies above those of the baseline" in theta.why_not


def test_all_seeds_count_where_the_lengths_have_fewer(writer: Writer) -> None:
    """Seeds on demand add seeds at one length. The interval is then narrower than with the first seeds alone."""
    study(writer, seeds=12, noise=0.01)
    few = worth_of(writer, seeds=["0", "1", "2", "3"]).steps
    for run in read_study(writer.folder).runs:
        if run.seed > 3 and run.config["trainer.steps"] != 250:
            (run.folder / "config.yaml").unlink()
    many = worth_of(writer).steps
    assert few is not None
    assert many is not None
    assert many.high - many.low < 0.7 * (few.high - few.low)


# ---- where nothing is said -------------------------------------------------------------------------------------------


def test_two_lengths_are_too_few(writer: Writer) -> None:
    assert why_not(study(writer, lengths=(125, 250))) == "the baseline has runs of 2 lengths, but the law needs 3"


def test_two_seeds_are_too_few(writer: Writer) -> None:
    assert why_not(study(writer, seeds=2)) == "3 seeds are needed, but the baseline has 2 at 125 steps"


def test_seeds_that_the_lengths_do_not_share_are_too_few(writer: Writer) -> None:
    study(writer, seeds=6)
    for run in read_study(writer.folder).runs:
        if run.config["trainer.steps"] == 500 and run.seed < 4:
            (run.folder / "config.yaml").unlink()
    assert why_not(writer) == "3 seeds are needed, but the baseline has 2 at 500 steps that the baseline has at 125 too"


def test_a_metric_that_is_no_loss_has_no_law(writer: Writer) -> None:
    said = why_not(study(writer), metric="num_params")
    assert said == "the law is of a loss (val_loss or val_bpb), which num_params is not"
    assert worth_of(writer, metric="val_bpb").steps is not None


def test_an_arm_outside_of_the_law_is_not_extrapolated(writer: Writer) -> None:
    said = why_not(study(writer, worth=2.5))
    assert "the arm's loss at 250 steps" in said
    assert "lies below those of the baseline" in said
    assert said.endswith("run a longer baseline")


def test_an_arm_above_the_law_is_not_extrapolated(writer: Writer) -> None:
    said = why_not(study(writer, worth=0.3))
    assert "lies above those of the baseline" in said
    assert said.endswith("run a shorter baseline")


def test_losses_through_which_no_law_goes_are_named(writer: Writer) -> None:
    for steps, loss in ((125, 3.0), (250, 2.6), (500, 2.0)):
        for seed in range(3):
            for arm in ("softmax", "sigmoid") if steps == 250 else ("softmax",):
                keys = {"backend.activation": arm, "trainer.steps": steps, "seed": seed}
                writer.run(keys, loss + 0.001 * seed - 0.002 * (seed == 1 and arm == "sigmoid"), rows=4)
    said = (
        "no E + a·C^(−b) with a, b > 0 fits the baseline's losses (3.0010 at 125, 2.6010 at 250, 2.0010 at 500 steps)"
    )
    assert why_not(writer) == said


def test_a_fit_that_misses_by_more_than_seeds_explain_is_refused() -> None:
    """The second of five lengths has a kink of 0.03, with noise of 0.002 and then of 0.05."""
    lengths = (100, 200, 400, 800, 1600)
    truth = LAW.loss(np.array([*lengths, 480])) + np.array([0, 0.03, 0, 0, 0, 0])
    rng = np.random.default_rng(0)
    for noise, is_refused in ((0.002, True), (0.05, False)):
        losses = truth[:, None] + noise * rng.standard_normal((6, 8))
        found = log_steps([(lengths, [400])], resampled([dict(enumerate(each)) for each in losses]))
        assert isinstance(found, str) == is_refused
    found = log_steps(
        [(lengths, [400])], resampled([dict(enumerate(row)) for row in truth[:, None] + 0.002 * np.eye(6, 8)])
    )
    assert "by more than seeds explain, p 0.00" in str(found)


def test_a_law_that_few_seeds_hardly_know_is_refused(writer: Writer) -> None:
    assert "of the resamples of its seeds" in why_not(study(writer, seeds=3, noise=0.03))


def test_diverged_runs_leave_the_worth_unsaid(writer: Writer) -> None:
    study(writer)
    keys = {"backend.activation": "sigmoid", "trainer.steps": 250, "seed": 5}
    writer.run(keys, None, status="diverged")
    assert why_not(writer) == "runs of the arm diverged at 250 steps, so its mean covers only the others"


def test_seeds_that_all_say_the_same_give_no_interval(writer: Writer) -> None:
    for arm, at in (("softmax", LENGTHS), ("sigmoid", (250,))):
        for steps in at:
            for seed in range(3):
                keys = {"backend.activation": arm, "trainer.steps": steps, "seed": seed}
                writer.run(keys, loss_at(steps) - 0.01 * (arm == "sigmoid") + 0.01 * seed, rows=4)
    assert why_not(writer) == "all seeds have exactly the same differences"


def test_a_step_has_no_cost_where_speeds_are_not_comparable(writer: Writer) -> None:
    study(writer)
    keys = {"backend.activation": "sigmoid", "trainer.steps": 250, "seed": 5}
    writer.run(keys, loss_at(300), provenance={"host": "elsewhere"})
    found = worth_of(writer)
    assert found.steps is not None
    assert (found.step_cost, found.net, found.why_not) == (None, None, "the runs differ in host")


def test_a_step_has_no_cost_where_the_baseline_has_not_the_arms_length(writer: Writer) -> None:
    """Another arm, none, connects the two, since it has both lengths."""
    study(writer, arm_lengths=(300,))
    for steps in (250, 300):
        for seed in range(3):
            writer.run({"backend.activation": "none", "trainer.steps": steps, "seed": seed}, 2.5 + 0.01 * seed, rows=4)
    (found,) = (each.worth for each in compared(writer).effects if each.arm == "sigmoid")
    assert found is not None
    assert found.steps is not None
    assert (found.step_cost, found.why_not) == (None, "the baseline has no runs of the arm's length")
