"""What is compared with what: pairs and their means, groups of runs, and numbers that are comparable."""

from __future__ import annotations

import csv
import html
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from xattn.errors import BadInput
from xattn.keys import changes_training
from xattn.report.answer import Answer, Comparison, Question
from xattn.report.command import main, texts, write
from xattn.report.curves import difference_curve, loss_curves
from xattn.report.figures import rates
from xattn.report.judge import judge
from xattn.report.read import read_study
from xattn.report.statistics import Effect, Paired, matched
from xattn.report.words import sentence, verdict

from .folders import Writer


def found(writer: Writer, **asked: Any) -> Answer:
    return judge(read_study(writer.folder), Question(**asked))


def only(writer: Writer, **asked: Any) -> Comparison:
    (comparison,) = found(writer, **asked).comparisons
    return comparison


def files(writer: Writer) -> dict[str, str]:
    return texts(found(writer), {}, {}, writer.folder / "report")


# ---- the numbers of one comparison agree, in every file --------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One arm as a file prints it."""

    arm: str
    mean: float
    baseline_mean: float
    difference: float
    seeds: int
    left_out: int
    baseline_left_out: int


def _line(cells: list[str]) -> Line:
    arm, mean, baseline, difference, seeds, left_out = (cell.replace("−", "-").replace("{,}", "") for cell in cells)
    ours, theirs = (int(part) for part in left_out.split(" + "))
    return Line(arm, float(mean), float(baseline), float(difference.split(" [")[0]), int(seeds), ours, theirs)


def lines_of_markdown(text: str) -> Iterator[Line]:
    for table in re.findall(r"^\| \S+ \| mean \S+ \| baseline.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE):
        for row in table.splitlines():
            cells = [cell.strip() for cell in row.strip("|").split(" | ")]
            yield _line([*cells[:4], cells[8], cells[9]])


def lines_of_html(text: str) -> Iterator[Line]:
    for table in re.findall(r"<table>.*?</table>", text, re.DOTALL):
        head = re.findall(r"<th[^>]*>(.*?)</th>", table)
        if "baseline&#x27;s mean" in head and head[0] != "measure":
            for row in re.findall(r"<tr>(<td.*?)</tr>", table):
                cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
                yield _line([*cells[:4], cells[8], cells[9]])


def lines_of_tex(text: str) -> Iterator[Line]:
    for row in text.splitlines():
        cells = [cell.strip(" \\").strip("$") for cell in row.split(" & ")]
        if len(cells) == 9 and cells[0] != "factor":
            yield _line([cells[1], *cells[2:5], cells[6], cells[7]])


def lines_of_csv(text: str) -> Iterator[Line]:
    for row in csv.DictReader(text.splitlines()):
        if row["difference"]:
            numbers = (float(row[key]) for key in ("arm_mean", "baseline_mean", "difference"))
            counts = (int(row[key]) for key in ("seeds", "left_out", "baseline_left_out"))
            yield Line(row["arm"], *numbers, *counts)


def check_that_all_agree(writer: Writer) -> None:
    """Check that all files agree, and that in each the difference is mean − baseline's mean: to one unit of the last
    digit if the numbers are rounded, and otherwise to the bit."""
    written = files(writer)
    exact = list(lines_of_csv(written["effects.csv"]))
    for line in exact:
        assert line.difference == line.mean - line.baseline_mean
    for name, read in (("report.md", lines_of_markdown), ("report.html", lines_of_html), ("table.tex", lines_of_tex)):
        rounded = list(read(re.sub(r"\$?--\$?|–", "nan", written[name])))
        rounded = [line for line in rounded if not np.isnan(line.difference)]
        assert [line.arm for line in rounded] == [line.arm for line in exact], name
        for line, true in zip(rounded, exact, strict=True):
            assert abs(line.mean - line.baseline_mean - line.difference) < 1.5e-4
            for key in ("mean", "baseline_mean", "difference"):
                assert abs(getattr(line, key) - getattr(true, key)) <= 0.5001e-4
            counts = ("seeds", "left_out", "baseline_left_out")
            assert [getattr(line, key) for key in counts] == [getattr(true, key) for key in counts]


def test_a_longer_run_of_one_setting_contradicts_nothing(writer: Writer) -> None:
    """It once printed softmax 2.8486, sigmoid 2.8466, difference −0.0528: only softmax's mean had the longer run."""
    losses = {"softmax": (2.90, 2.91, 2.92), "sigmoid": (2.84, 2.86, 2.8717)}
    for arm, of_seeds in losses.items():
        for seed, loss in enumerate(of_seeds):
            writer.run({"backend.activation": arm, "trainer.steps": 250, "seed": seed}, loss)
    writer.run({"backend.activation": "softmax", "trainer.steps": 500, "seed": 0}, 2.78)
    check_that_all_agree(writer)
    activation, _ = found(writer).effects
    assert activation.arm_mean == pytest.approx(np.mean(losses["sigmoid"]))
    assert activation.baseline_mean == pytest.approx(np.mean(losses["softmax"]))
    assert (activation.left_out, activation.baseline_left_out) == (0, 1)


def test_an_arm_with_one_seed_contradicts_nothing(writer: Writer) -> None:
    """It once printed none 3.5067, softmax 2.8993, difference +0.4006: the one seed of none is a bad one."""
    for seed, loss in enumerate((3.1061, 2.80, 2.7918)):
        writer.run({"backend.activation": "softmax", "seed": seed}, loss)
        writer.run({"backend.activation": "sigmoid", "seed": seed}, loss + 0.01 * (1 + seed))
    writer.run({"backend.activation": "none", "seed": 0}, 3.5067)
    check_that_all_agree(writer)
    none = next(effect for effect in found(writer).effects if effect.arm == "none")
    assert (none.arm_mean, none.baseline_mean) == (3.5067, 3.1061)
    assert (none.paired.seeds, none.left_out, none.baseline_left_out) == (1, 0, 2)


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_printed_of_any_design_agrees(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Designs are random crossings of up to three factors and a tuned rate, with holes, diverged runs and killed
    runs."""
    writer = Writer(tmp_path_factory.mktemp("study") / "study")
    choices: dict[str, list[Any]] = {
        "backend.activation": ["softmax", "sigmoid", "none"][: data.draw(st.integers(1, 3))],
        "backend.theta": [10000.0, 100.0][: data.draw(st.integers(1, 2))],
        "trainer.steps": [200, 400][: data.draw(st.integers(1, 2))],
        "optimizer.learning_rate": [3e-3, 1e-3][: data.draw(st.integers(1, 2))],
        "seed": list(range(data.draw(st.integers(1, 4)))),
    }
    runs: list[dict[str, Any]] = [{}]
    for key, values in choices.items():
        runs = [run | {key: value} for run in runs for value in values]
    for i, run in enumerate(runs):
        fate = data.draw(st.sampled_from(["done"] * 6 + ["hole", "diverged", "killed"]))
        if fate != "hole":
            loss = data.draw(st.floats(0.5, 9.0)) if fate == "done" else None
            writer.run(run, loss, name=f"run{i}", status=fate, rows=2)
    if any(writer.folder.iterdir()):
        check_that_all_agree(writer)


def test_pairs_are_those_that_every_combination_has(writer: Writer) -> None:
    """theta 10000 has three seeds on both sides, and theta 100 has one. Three pairs are more than two, so theta 100 is
    left out, and counted as such."""
    for theta, seeds in ((10000.0, 3), (100.0, 1)):
        for arm, worse in (("softmax", 0.0), ("sigmoid", 0.1)):
            for seed in range(seeds):
                keys = {"backend.activation": arm, "backend.theta": theta, "seed": seed}
                writer.run(keys, 2.0 + worse + seed / 10 * (1 + worse) + (theta < 1000))
    (effect,) = only(writer).of(only(writer).design.factors[0])
    assert (effect.paired.seeds, effect.cells, effect.cells_left_out) == (3, 1, 1)
    assert (effect.left_out, effect.baseline_left_out) == (1, 1)
    assert effect.paired.difference == pytest.approx(0.11)
    check_that_all_agree(writer)


def test_combinations_without_a_common_seed_still_have_pairs(writer: Writer) -> None:
    for theta, seed in ((10000.0, 0), (100.0, 1)):
        for arm, loss in (("softmax", 2.0), ("sigmoid", 2.1)):
            writer.run({"backend.activation": arm, "backend.theta": theta, "seed": seed}, loss)
    activation = next(effect for effect in found(writer).effects if effect.factor == "backend.activation")
    assert activation.paired.difference == pytest.approx(0.1)


# ---- a study is not a heap -------------------------------------------------------------------------------------------

HEAP: Mapping[str, dict[str, Any]] = {
    "default": {},
    "sigmoid": {"backend.activation": "sigmoid"},
    "debug": {"backend.context_length": 32, "trainer.steps": 20, "trainer.batch_size": 8},
}


def test_runs_that_differ_in_more_than_one_choice_are_not_compared(writer: Writer) -> None:
    """The report once printed "context_length 32 against 128: +2.2537 (1 seed)"."""
    for name, keys in HEAP.items():
        writer.run(keys, 4.4 if name == "debug" else 2.1, name=name)
    findings = found(writer)
    (comparison,) = findings.comparisons
    assert [factor.key for factor in comparison.design.factors] == ["backend.activation"]
    assert comparison.group.where == {"backend.context_length": 128, "trainer.steps": 200, "trainer.batch_size": 16}
    (alone,) = findings.alone
    assert [run.name for run in alone.runs] == ["debug"]
    page = files(writer)["report.md"]
    assert "| activation softmax, context_length 32, steps 20, batch_size 8 | 1 | val_loss 4.4000 | 1 |" in page
    check_that_all_agree(writer)


def test_each_question_has_its_own_comparison(writer: Writer) -> None:
    for steps, size, worse in ((200, 16, 0.1), (20, 8, 0.3)):
        for arm in ("softmax", "sigmoid"):
            for seed in range(3):
                loss = 2.0 + seed / 100 + (worse + seed / 1000 if arm == "sigmoid" else 0.0)
                length = 128 if steps == 200 else 32
                keys = {"trainer.steps": steps, "trainer.batch_size": size, "backend.context_length": length}
                writer.run(keys | {"backend.activation": arm, "seed": seed}, loss)
    findings = found(writer)
    assert [effect.paired.difference for effect in findings.effects] == pytest.approx([0.301, 0.101])
    assert [dict(each.group.where)["trainer.steps"] for each in findings.comparisons] == [20, 200]
    page = files(writer)["report.md"]
    assert "## Verdict 1: context_length 32, steps 20, batch_size 8" in page
    assert (
        "\\multicolumn{9}{l}{1. val\\_loss: context\\_length 32, steps 20, batch\\_size 8}"
        in files(writer)["table.tex"]
    )
    rows = list(csv.DictReader(files(writer)["results.csv"].splitlines()))
    assert {(row["trainer.steps"], row["comparison"]) for row in rows} == {("20", "1"), ("200", "2")}
    check_that_all_agree(writer)


def test_one_setting_further_is_a_question_of_its_own(writer: Writer) -> None:
    """Factors need not be crossed: each is judged where the others are equal."""
    keys: list[dict[str, Any]] = [
        {},
        {"backend.activation": "sigmoid"},
        {"model.qk_norm": True},
        {"model.qk_norm": True, "optimizer.weight_decay": 0.0},
    ]
    for i, each in enumerate(keys):
        (writer.run({"model.qk_norm": False, **each}, 2.0 + i / 10, name=f"run{i}"))
    effects = {effect.factor: effect.paired.difference for effect in found(writer).effects}
    assert effects["backend.activation"] == pytest.approx(0.1)
    assert effects["model.qk_norm"] == pytest.approx(0.2)
    assert effects["optimizer.weight_decay"] == pytest.approx(0.1)


def test_runs_can_be_chosen(writer: Writer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for theta in (100.0, 10000.0):
        for arm in ("softmax", "sigmoid"):
            for seed in range(4):
                writer.run({"backend.theta": theta, "backend.activation": arm, "seed": seed}, 2.0 + seed / 10)
    (effect,) = found(writer, where={"backend.theta": ["100"]}, seeds=["0", "2"]).effects
    assert (effect.factor, effect.paired.seeds) == ("backend.activation", 2)
    turned = found(writer, baselines={"backend.activation": "sigmoid"}).effects[0]
    assert (turned.arm, turned.baseline) == ("softmax", "sigmoid")
    out = tmp_path / "elsewhere" / "page"
    assert main([str(writer.folder), "--where", "backend.theta=100,10000", "--seeds", "0,1", "--out", str(out)]) == 0
    assert (out / "report.html").is_file()
    assert not (writer.folder / "report").exists()
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "backend.thta=1"], r"--where backend\.thta: no run's config has it \(did you mean backend\.theta"),
        (["--where", "backend.theta=7"], "--where backend.theta=7: no run has it; the values are 10000"),
        (["--where", "backend.theta"], "--where backend.theta: must be KEY=VALUE"),
        (
            ["--baseline", "backend.activation=none"],
            "backend.activation=none: no run has it; the values are sigmoid, soft",
        ),
        (["--baseline", "backend.theta=10000"], "^backend.theta: is not a factor here; the factors are backend.act"),
        (["--seeds", "0,7"], "--seeds 7: no run has it; the seeds are 0, 1"),
        (["--metric", "val_lss"], r"--metric val_lss: .* \(did you mean val_loss\?\)"),
    ],
)
def test_a_typo_in_what_is_chosen_is_told(writer: Writer, options: list[str], message: str) -> None:
    for arm in ("softmax", "sigmoid"):
        for seed in range(2):
            writer.run({"backend.activation": arm, "seed": seed})
    with pytest.raises(BadInput, match=message):
        main([str(writer.folder), *options])


# ---- what changes no bit of training ---------------------------------------------------------------------------------


def test_what_is_only_looked_at_is_no_factor(writer: Writer) -> None:
    """The report once asked "What does trainer.log_every do to val_loss?"."""
    for seed in range(2):
        writer.run({"backend.activation": "softmax", "seed": seed}, 2.0, name=f"a{seed}")
        writer.run({"backend.activation": "softmax", "trainer.log_every": 5, "seed": seed}, 2.0, name=f"b{seed}")
        writer.run(
            {"backend.activation": "none", "trainer.eval_every": 7, "seed": seed}, 2.1 + seed / 9, name=f"n{seed}"
        )
    findings = found(writer)
    assert [effect.factor for effect in findings.effects] == ["backend.activation"]
    assert "Skipped, since another run had the same training: b0, b1." in findings.odd
    assert findings.effects[0].baseline_left_out == 0


def test_the_best_evaluation_is_a_checkpoint_where_a_run_rolls_back() -> None:
    assert not changes_training("trainer.eval_every", {"trainer.nonfinite": "stop"})
    assert changes_training("trainer.eval_every", {"trainer.nonfinite": "rollback"})
    assert not changes_training("evaluation.sequences", {})


# ---- numbers of the same thing ---------------------------------------------------------------------------------------


def later(path: Path, overrides: list[str], **results: float) -> None:
    """Append a row to evaluations.jsonl."""
    row = {"step": 200, "overrides": overrides, "results": results}
    with (path / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_losses_of_other_tokens_are_compared_by_bits_per_byte(writer: Writer) -> None:
    """The report once printed "bpe is worse than bytes: val_loss +1.35, p < 0.001"."""
    for tokenizer, loss, bits in (("bytes", 1.5, 2.16), ("bpe", 2.85, 1.64)):
        for seed in range(3):
            path = {"data.tokenizer": tokenizer, "seed": seed}
            writer.run(path, loss + seed / 50, summary={"val_bpb": bits + seed / 50 + seed * bits / 1e3})
    (effect,) = found(writer).effects
    assert verdict(effect).startswith(
        "bytes is worse than bpe" if effect.arm == "bytes" else "bpe is better than bytes"
    )
    assert abs(effect.paired.difference or 0.0) == pytest.approx(0.5205, abs=1e-3)
    assert "val_loss is per token, and the runs' tokens differ; they are compared by val_bpb." in found(writer).odd
    (asked,) = found(writer, metric="val_loss").effects
    assert "the values of val_loss are not comparable: they are per token, and their tokens differ" in verdict(asked)
    assert "difference in val_bpb" not in files(writer)["table.tex"]
    check_that_all_agree(writer)


def test_losses_on_other_texts_are_not_compared_but_arms_on_each_are(writer: Writer) -> None:
    for path, easy in (("a.txt", 0.0), ("b.txt", 1.0)):
        for arm, worse in (("softmax", 0.0), ("sigmoid", 0.1)):
            for seed in range(3):
                keys = {"data.name": "text", "data.path": path, "backend.activation": arm, "seed": seed}
                sha = {"data_sha256": path[0] * 64}
                writer.run(keys, 3.0 - easy + worse + seed / 10 * (1 + worse), provenance=sha)
    by_factor = {effect.factor: effect for effect in found(writer).effects}
    assert verdict(by_factor["data.path"]) == (
        "b.txt cannot be compared with a.txt: the values of val_loss are not comparable: they are of different texts."
    )
    assert by_factor["backend.activation"].paired.difference == pytest.approx(0.11)
    assert by_factor["backend.activation"].cells == 2
    check_that_all_agree(writer)


def test_the_same_text_under_another_name_is_the_same_text(writer: Writer) -> None:
    for path, loss in (("a.txt", 2.0), ("/home/a.txt", 2.1)):
        writer.run({"data.name": "text", "data.path": path, "seed": 0}, loss, name=str(loss))
    (effect,) = found(writer).effects
    assert abs(effect.paired.difference or 0.0) == pytest.approx(0.1)


def test_pairs_on_other_data_are_left_out(writer: Writer) -> None:
    """Seed 2 of sigmoid ran on another Python, and so on the text of another standard library."""
    for seed in range(3):
        writer.run({"backend.activation": "softmax", "seed": seed}, 2.0)
        sha = {"data_sha256": ("e" if seed == 2 else "d") * 64}
        writer.run({"backend.activation": "sigmoid", "seed": seed}, 2.1 + (seed == 2), provenance=sha)
    (effect,) = found(writer).effects
    assert (effect.paired.seeds, effect.left_out, effect.baseline_left_out) == (2, 1, 1)
    assert effect.paired.difference == pytest.approx(0.1)
    assert any(
        "some values of val_loss are not comparable: the data differ (data_sha256)" in each
        for each in found(writer).odd
    )


def test_what_was_evaluated_later_stands_in_for_what_a_summary_lacks(writer: Writer) -> None:
    """Softmax trained on 64 sequences and was evaluated on all later; sigmoid had all from the start."""
    for seed in range(2):
        path = writer.run({"backend.activation": "softmax", "evaluation.sequences": 64, "seed": seed}, 1.0)
        later(path, ["evaluation.sequences=all"], val_loss=2.0 + seed / 10)
        writer.run({"backend.activation": "sigmoid", "evaluation.sequences": "all", "seed": seed}, 2.1 + seed / 9)
    (effect,) = found(writer).effects
    assert (effect.arm_mean, effect.baseline_mean) == (pytest.approx(2.1 + 1 / 18), pytest.approx(2.05))


def test_losses_over_other_sequences_are_not_compared(writer: Writer) -> None:
    for seed in range(2):
        writer.run({"backend.activation": "softmax", "evaluation.sequences": 64, "seed": seed}, 1.0)
        for arm in ("sigmoid", "none"):
            writer.run({"backend.activation": arm, "evaluation.sequences": 256, "seed": seed}, 2.1 + seed / 9)
    findings = found(writer)
    assert all(effect.paired.seeds == 0 for effect in findings.effects)
    judged = "Evaluated on other sequences than evaluation.sequences=256, and not judged: "
    assert any(f"{judged}activationsoftmax-sequences64-seed0" in each for each in findings.odd)


def test_probes_that_were_run_later_are_judged(writer: Writer) -> None:
    for arm, accuracy in (("softmax", 0.9), ("none", 0.4)):
        for seed in range(2):
            path = writer.run({"backend.activation": arm, "seed": seed}, 2.0)
            later(path, ["evaluation.probes=[mqar]"], **{"probe/mqar/accuracy": accuracy + seed * accuracy / 100})
    (effect,) = only(writer).probes["probe/mqar/accuracy"]
    assert effect.paired.difference == pytest.approx(-0.5025)


def test_attention_statistics_that_were_measured_later_are_shown(writer: Writer) -> None:
    for arm in ("softmax", "none"):
        path = writer.run({"backend.activation": arm, "seed": 0}, 2.0)
        later(
            path, ["trainer.attention_stats_every=5"], **{"attention/0/0/entropy": 1.5, "attention/0/0/distance_0": 0.5}
        )
        later(path, ["backend.window=4"], **{"attention/0/0/entropy": 9.0})
    page = files(writer)["report.md"]
    assert "| softmax | – | 1.5 | – | – | – | – |" in page
    assert "| softmax | 0.500 |" in page


# ---- when arms part --------------------------------------------------------------------------------------------------


def _difference(writer: Writer) -> Any:
    comparison = only(writer)
    (factor,) = comparison.design.factors
    return difference_curve(matched(comparison.design, comparison.chosen, factor, factor.arms[1], comparison.metric))


def test_the_noise_of_batches_cancels_in_a_paired_difference(writer: Writer) -> None:
    """The fixtures' noise depends only on the seed, like a batch's: it cancels in the difference of two arms."""
    for seed in range(3):
        writer.run({"backend.activation": "softmax", "seed": seed}, 2.0)
        writer.run({"backend.activation": "sigmoid", "seed": seed}, 2.5)
    curve = _difference(writer)
    assert curve.key == "train_loss"
    expected = 0.5 * (1 - np.exp(-6 * np.arange(1, 41) / 40))
    np.testing.assert_allclose(curve.mean, expected, atol=1e-12)
    np.testing.assert_allclose(curve.low, curve.high, atol=1e-12)


def test_other_batches_are_compared_by_their_evaluations(writer: Writer) -> None:
    for seed in range(2):
        for size in (16, 32):
            writer.run({"trainer.batch_size": size, "seed": seed}, 2.0 + size / 100)
    assert _difference(writer).key == "val_loss"


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", ["continuous", "discrete"])
def test_random_trials_over_many_keys_are_judged_in_time(writer: Writer, choices: str) -> None:
    """There are 200 trials over 12 keys. Judging once took exponential time; drawing figures does not grow."""
    rng = np.random.default_rng(0)
    keys = [f"{group}.key{i}" for i in range(4) for group in ("backend", "trainer", "optimizer")]
    for trial in range(200):
        drawn = rng.uniform(size=12) if choices == "continuous" else rng.integers(0, 3, size=12)
        writer.run(dict(zip(keys, map(float, drawn), strict=True)), 2.0 + trial / 1e3, name=f"trial{trial}", rows=1)
    start = time.process_time()
    written = files(writer)
    assert time.process_time() - start < 10
    assert len(written["report.md"]) < 200_000


# ---- evaluations, choices, sentences, figures ------------------------------------------------------------------------


def test_of_several_sequences_that_all_have_the_whole_text_is_taken(writer: Writer) -> None:
    """The page advises this if sequences of different lengths are different samples of the text."""
    for length, whole in ((64, 2.0), (128, 2.3)):
        for seed in range(2):
            keys = {"backend.context_length": length, "evaluation.sequences": 64, "seed": seed}
            path = writer.run(keys, 1.0 + length / 1000)
            later(path, ["evaluation.sequences=all"], val_loss=whole + seed / 10 * whole)
    (effect,) = found(writer).effects
    assert effect.paired.difference == pytest.approx(-0.3 * 1.05)
    assert not any("xattn evaluate" in each for each in found(writer).odd)


def test_runs_of_one_training_pool_what_was_measured_of_them(writer: Writer) -> None:
    for seed in range(2):
        writer.run({"backend.activation": "softmax", "evaluation.sequences": 64, "seed": seed}, 1.0, name=f"a{seed}")
        writer.run({"backend.activation": "softmax", "evaluation.sequences": "all", "seed": seed}, 2.0, name=f"b{seed}")
        keys = {"backend.activation": "sigmoid", "evaluation.sequences": "all", "seed": seed}
        writer.run(keys, 2.1 + seed / 9, name=f"c{seed}")
    (effect,) = found(writer).effects
    assert (effect.paired.seeds, effect.baseline_mean) == (2, 2.0)


def test_an_evaluation_on_another_text_stands_in_for_nothing(writer: Writer) -> None:
    for arm in ("softmax", "sigmoid"):
        for seed in range(2):
            path = writer.run({"backend.activation": arm, "evaluation.sequences": 64, "seed": seed}, None)
            later(path, ["evaluation.sequences=all", "data=text", "data.path=x"], val_loss=9.0 + seed)
            later(path, ["evaluation.sequences=all"], val_loss=2.0 + (arm == "sigmoid") + seed / 10)
            later(path, ["evaluation.sequences=all", "backend.window=3"], val_loss=7.0)
    (effect,) = found(writer).effects
    assert (effect.arm_mean, effect.baseline_mean) == (pytest.approx(3.05), pytest.approx(2.05))


def test_an_evaluation_of_an_earlier_step_is_not_the_runs_result(writer: Writer) -> None:
    for arm in ("softmax", "sigmoid"):
        path = writer.run({"backend.activation": arm, "seed": 0}, 2.0)
        (path / "evaluations.jsonl").write_text(
            '{"step": 7, "overrides": ["evaluation.sequences=all"], "results": {"val_loss": 1}}\n'
        )
    assert only(writer).metric.sequences is None


def test_probes_are_judged_at_the_settings_that_the_loss_chose(writer: Writer) -> None:
    for arm in ("softmax", "none"):
        for rate, loss in ((1e-3, 2.0), (3e-3, 2.5)):
            keys = {"backend.activation": arm, "optimizer.learning_rate": rate, "evaluation.sequences": 64, "seed": 0}
            path = writer.run(keys, loss)
            measured = {"val_loss": 5.0 - loss, "probe/mqar/accuracy": rate * (2 if arm == "none" else 1)}
            later(path, ["evaluation.sequences=all", "evaluation.probes=[mqar]"], **measured)
            if arm == "softmax":
                later(path, ["evaluation.sequences=9"], val_loss=1.0)
    comparison = only(writer, where={"evaluation.sequences": ["64"]})
    chosen = {cell[0]: each.setting for cell, each in comparison.chosen.items()}
    (probe,) = comparison.probes["probe/mqar/accuracy"]
    rates = {"softmax": chosen["softmax"][0], "none": 2 * chosen["none"][0]}
    assert (probe.baseline_mean, probe.arm_mean) == (rates["softmax"], rates["none"])


def test_keys_changed_side_by_side_are_choices_of_their_own(writer: Writer) -> None:
    """README's third command changes two keys, which is not reported as an effect of the activation."""
    writer.run({}, 2.0, name="default")
    writer.run({"backend.activation": "none", "backend.qk_pre_activation": "swish"}, 2.2, name="both")
    writer.run({"backend.activation": "sigmoid"}, 2.1, name="sigmoid")
    findings = found(writer)
    assert [effect.arm for effect in findings.effects] == ["sigmoid"]
    assert [run.name for each in findings.alone for run in each.runs] == ["both"]


def test_a_file_that_was_typed_is_one_choice(writer: Writer) -> None:
    """``model=small`` is one word that changes depth and width together."""
    for size, layers, width in (("nano", 4, 128), ("small", 6, 256)):
        path = writer.run({"model.num_layers": layers, "model.embedding_dim": width}, 2.0 + layers, name=size)
        (path / "overrides.yaml").write_text(f"- model={size}\n")
    (effect,) = found(writer).effects
    assert (effect.factor, effect.paired.difference) == (
        "model.num_layers",
        pytest.approx(2.0 if effect.arm == 6 else -2.0),
    )
    assert "- model.num_layers (and with it embedding_dim): " in files(writer)["report.md"]


def test_the_baseline_may_be_named_by_what_changes_with_it(writer: Writer) -> None:
    """Also, an optimizer without the key is the default baseline if conf's optimizer lacks it."""
    for momentum, name in ((None, "adamw"), (0.9, "muon"), (0.95, "muon")):
        keys: dict[str, Any] = {"optimizer.name": name}
        writer.run(keys if momentum is None else keys | {"optimizer.momentum": momentum}, 2.0, name=f"{name}{momentum}")
    (factor,) = only(writer).design.factors
    assert (factor.key, factor.baseline, factor.baseline_is_given) == ("optimizer.momentum", None, True)
    (factor,) = only(writer, baselines={"optimizer.name": "muon"}).design.factors
    assert factor.baseline in (0.9, 0.95)


def test_numbers_may_be_typed_in_any_spelling(writer: Writer) -> None:
    for theta in (10000.0, 100.0):
        for arm in ("softmax", "sigmoid"):
            writer.run({"backend.theta": theta, "backend.activation": arm, "seed": 0}, 2.0)
    assert len(found(writer, where={"backend.theta": ["1e4"]}).study.runs) == 2
    assert {e.baseline for e in found(writer, baselines={"backend.theta": "1e2"}).effects if "theta" in e.factor} == {
        100
    }


def effect_of(arm: str, d: float, p: float | None, seeds: int = 3, **more: Any) -> Effect:
    found = Paired(seeds, d, d - 0.01, d + 0.01) if seeds > 1 and p is not None else Paired(seeds, d if seeds else None)
    return Effect("backend.activation", arm, "softmax", "val_loss", found, p_holm=p, **more)


@pytest.mark.parametrize(
    ("effects", "words"),
    [
        (
            [effect_of("none", 0.2, 0.01), effect_of("sigmoid", -0.1, 0.02)],
            "none is worse than softmax, val_loss +0.2000 [+0.1900, +0.2100], p 0.010; sigmoid is better than softmax, "
            "val_loss −0.1000 [−0.1100, −0.0900], p 0.020.",
        ),
        (
            [effect_of("none", 0.2, 0.01), effect_of("sigmoid", 0.1, 0.3)],
            "none is worse than softmax, val_loss +0.2000 [+0.1900, +0.2100], p 0.010. No difference in val_loss "
            "between softmax and sigmoid (+0.1000 [+0.0900, +0.1100], p 0.300) is shown.",
        ),
        ([effect_of("none", 0.4, None, 1)], "none against softmax: val_loss +0.4000 from one seed, so no interval."),
        (
            [effect_of("none", 0.4, None, 2)],
            "none against softmax: val_loss +0.4000, exactly the same in all 2 seeds, so no interval.",
        ),
        (
            [effect_of("none", 0.0, None, 0, diverged=6, ended=6, baseline_ended=6)],
            "none against softmax: no seed finished in both arms, 6 of 6 runs diverged, of softmax 0 of 6.",
        ),
        (
            [effect_of("none", 0.2, 0.01, baseline_diverged=2, baseline_ended=6, ended=6)],
            "none is higher where the baseline did not diverge, but more stable, than softmax, val_loss +0.2000 "
            "[+0.1900, +0.2100], p 0.010, 0 of 6 runs diverged, of softmax 2 of 6.",
        ),
    ],
)  # fmt: skip
def test_the_sentence_at_the_top_says_all(effects: list[Effect], words: str) -> None:
    assert sentence(effects) == words


def test_an_interaction_is_the_difference_of_the_two_beside_it(writer: Writer) -> None:
    table = {("softmax", "none"): 2.0, ("softmax", "swish"): 1.9, ("sigmoid", "none"): 2.2, ("sigmoid", "swish"): 2.4}
    for (arm, pre), loss in table.items():
        for seed in range(3):
            keys = {"backend.activation": arm, "backend.qk_pre_activation": pre, "seed": seed}
            writer.run(keys, loss + seed / 10 + (arm == "sigmoid") * seed / 100)
    (both,) = only(writer).interactions
    assert both.arm_mean == pytest.approx(0.5 + 0.01)  # sigmoid − softmax under swish
    assert both.baseline_mean == pytest.approx(0.2 + 0.01)  # sigmoid − softmax under none
    page = files(writer)["report.md"]
    assert "| backend.activation × backend.qk_pre_activation | sigmoid × swish | +0.5100 | +0.2100 | +0.3000 |" in page
    assert "| activation sigmoid, qk_pre_activation swish | 2.5100 | 0.1100 | 3 | 0 |" in page


def test_each_comparison_has_figures_of_its_own(writer: Writer) -> None:
    for steps, size in ((200, 16), (20, 8)):
        for arm in ("softmax", "sigmoid"):
            for seed in range(2):
                keys = {"trainer.steps": steps, "trainer.batch_size": size, "backend.activation": arm, "seed": seed}
                writer.run(keys, 2.0 + seed / 9 + (arm == "sigmoid") * (1 + seed) / steps, rows=10)
    folder = writer.folder / "report"
    write(found(writer), folder)
    page = (folder / "report.md").read_text()
    assert page.index("](effects.svg)") < page.index("## Verdict 2") < page.index("](2-effects.svg)")
    assert {"effects.svg", "2-effects.svg", "differences.svg", "2-differences.svg"} <= {
        p.name for p in folder.iterdir()
    }
    assert (folder / "effects.svg").read_text() != (folder / "2-effects.svg").read_text()


def test_figures_of_others_in_the_folder_of_a_report_stay(writer: Writer, tmp_path: Path) -> None:
    writer.run({"seed": 0})
    (tmp_path / "curves-mine.pdf").touch()
    (tmp_path / "effects.pdf").touch()
    write(found(writer), tmp_path)
    assert (tmp_path / "curves-mine.pdf").exists()
    assert (tmp_path / "effects.pdf").exists()  # it was not a report's folder then
    write(found(writer), tmp_path)
    assert not (tmp_path / "effects.pdf").exists()


def test_results_csv_says_what_enters_the_comparison(writer: Writer) -> None:
    writer.run({"backend.activation": "softmax", "seed": 0}, 2.0, name="in")
    path = writer.run({"backend.activation": "sigmoid", "seed": 0}, 2.0, name="failed", status="failed")
    later(path, ["evaluation.probes=[mqar]"], **{"probe/mqar/accuracy": 0.5})
    later(writer.folder / "in", ["evaluation.probes=[mqar]"], **{"probe/mqar/accuracy": 0.25})
    rows = {row["run"]: row for row in csv.DictReader(files(writer)["results.csv"].splitlines())}
    assert (rows["in"]["judged"], rows["failed"]["judged"]) == ("true", "false")
    assert (rows["in"]["probe/mqar/accuracy"], rows["failed"]["probe/mqar/accuracy"]) == ("0.25", "")


def test_curves_of_other_tokens_are_drawn_in_bits_per_byte(writer: Writer) -> None:
    for size, loss, bits in ((512, 2.0, 3.0), (4096, 3.3, 2.5)):
        for seed in range(2):
            keys = {"data.tokenizer": "bpe", "data.vocab_size": size, "seed": seed}
            writer.run(keys, loss, summary={"val_bpb": bits}, provenance={"data_sha256": str(size)})
    comparison = only(writer)
    assert {curve.key for curve in loss_curves(comparison.chosen).values()} == {"val_bpb"}
    assert _difference(writer).key == "val_bpb"


def test_the_tuning_figure_draws_the_best_of_what_else_was_tuned(writer: Writer) -> None:
    for rate, decay, loss in ((1e-3, 0.1, 4.0), (1e-3, 1.0, 2.0), (3e-3, 0.1, 3.0), (3e-3, 1.0, 2.5)):
        for arm in ("softmax", "sigmoid"):
            keys = {"optimizer.learning_rate": rate, "optimizer.weight_decay": decay, "backend.activation": arm}
            writer.run(keys | {"seed": 0}, loss)
    comparison = only(writer, tuned=["optimizer.weight_decay"])
    figure = rates(comparison.design, comparison.chosen, 0)
    assert figure is not None
    line = figure.axes[0].get_lines()[0]
    assert list(line.get_xdata()) == [1e-3, 3e-3]
    assert list(line.get_ydata()) == [2.0, 2.5]
