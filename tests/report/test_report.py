"""The report's files: what they say, that they are self-contained, and that nothing odd in a study stops them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests import processes
from xattn.errors import BadInput, ExitCode
from xattn.keys import show
from xattn.report import figures
from xattn.report.answer import Answer, Comparison, Question
from xattn.report.command import _figures_of, main, panels_of, texts, write as write_to
from xattn.report.content import page_of
from xattn.report.cost import loss_spikes, why_speeds_differ
from xattn.report.curves import loss_curves
from xattn.report.figures import learning_curves
from xattn.report.judge import judge
from xattn.report.read import read_run, read_study
from xattn.report.tables import EFFECT_COLUMNS
from xattn.report.words import signflip_note, verdict

from .folders import Writer

FILES = {"report.html", "report.md", "table.tex", "results.csv", "effects.csv", "verdict.json"}


def judged(writer: Writer, metric: str | None = None, **asked: object) -> Answer:
    return judge(read_study(writer.folder), Question(metric=metric, **asked))  # type: ignore[arg-type]


def compared(writer: Writer) -> Comparison:
    """Return the study's only comparison."""
    (comparison,) = judged(writer).comparisons
    return comparison


def write(found: Answer) -> Path:
    folder = found.study.folder / "report"
    write_to(found, folder)
    return folder


def odd(writer: Writer) -> str:
    return "\n".join(judged(writer).odd)


def written(writer: Writer) -> dict[str, str]:
    """Return the text files. Figures are left out, since they take longer than all the rest."""
    return texts(judged(writer), {}, {}, writer.folder / "report")


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def small(writer: Writer, seeds: int = 2) -> Writer:
    for arm, loss in (("softmax", 2.0), ("sigmoid", 2.1)):
        for seed in range(seeds):
            keys = {"backend.activation": arm, "seed": seed}
            writer.run(keys, loss + 0.1 * seed * loss, name=f"{arm}{seed}")
    return writer


# ---- the files -------------------------------------------------------------------------------------------------------


def test_a_study_is_reported(write_study: Callable[..., Writer], capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study().folder
    assert main([str(folder)]) == ExitCode.DONE
    names = {path.name for path in (folder / "report").iterdir()}
    drawn = {
        "effects",
        "differences",
        "tuning-learning_rate",
        "curves-steps",
        "curves-tokens",
        "curves-seconds",
        "stability",
    }
    assert names == FILES | {f"{name}.{suffix}" for name in drawn for suffix in ("svg", "pdf")}
    said = capsys.readouterr().out
    assert "backend.activation: none is worse than softmax: val_loss +0.19" in said
    assert "report.html" in said
    page = (folder / "report" / "report.md").read_text()
    for words in (
        "with 3 seeds no p below 0.25 can be reached",
        "Against softmax; each row uses its own pairs.",
        "27 runs (27 done)",
        "over the same runs that it is judged by",
        "`backend.activation=none optimizer.learning_rate=0.001 seed=2`",
        "0123456789",
        "Sensitivity",
    ):
        assert words in page


def test_effects_csv_has_the_columns_of_the_contract(write_study: Callable[..., Writer]) -> None:
    writer = write_study(arms=("softmax", "sigmoid"))
    writer.run({"backend.activation": "none", "optimizer.learning_rate": 1e-3, "seed": 0}, 2.3)
    names = "factor,arm,baseline,metric,seeds,difference,ci_low,ci_high,p,p_holm,p_signflip"
    assert ",".join(EFFECT_COLUMNS).startswith(f"{names},")
    none, sigmoid = rows_of(written(writer)["effects.csv"])
    assert tuple(none) == EFFECT_COLUMNS
    assert (none["arm"], none["seeds"]) == ("none", "1")
    assert {none[key] for key in ("ci_low", "ci_high", "p", "p_holm", "p_signflip")} == {""}
    assert (sigmoid["factor"], sigmoid["arm"], sigmoid["baseline"]) == ("backend.activation", "sigmoid", "softmax")
    assert float(sigmoid["ci_low"]) < float(sigmoid["difference"]) < float(sigmoid["ci_high"])
    assert (sigmoid["p"], sigmoid["p_signflip"]) == (sigmoid["p_holm"], "0.25")


def test_results_csv_has_a_row_a_run(write_study: Callable[..., Writer]) -> None:
    rows = rows_of(written(write_study())["results.csv"])
    assert len(rows) == 27
    assert sum(row["judged"] == "true" for row in rows) == 9
    assert {row["optimizer.learning_rate"] for row in rows if row["judged"] == "true"} == {"0.001"}
    assert all(row["command"].startswith("python train.py backend.activation=") for row in rows)


def test_the_page_stands_alone(write_study: Callable[..., Writer]) -> None:
    folder = write(judged(write_study()))
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 7
    assert not re.search(r"https?:|//[a-z]|<script [^>]|<link|<img|@import|url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert "currentColor" in page
    assert "#010203" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_names_are_escaped(writer: Writer) -> None:
    for seed in range(2):
        writer.run({"data.name": "<b>&|", "seed": seed}, 2.0 + seed, name=f"a{seed}")
        writer.run({"data.name": "b_%", "seed": seed}, 2.1 + 2 * seed, name=f"b{seed}")
    files = written(writer)
    assert "<b>" not in files["report.html"]
    assert "<b>&\\|" in files["report.md"]
    assert "b\\_\\%" in files["table.tex"]


@pytest.mark.usefixtures("fonts_of_reports")
def test_the_same_study_makes_the_same_files(write_study: Callable[..., Writer]) -> None:
    """In a PDF, fonts are embedded as TrueType: conferences reject Type 3."""
    writer = write_study()
    first = {path.name: path.read_bytes() for path in write(judged(writer)).iterdir()}
    again = {path.name: path.read_bytes() for path in write(judged(writer)).iterdir()}
    assert again == first
    assert b"/CIDFontType2" in first["effects.pdf"]
    assert b"/Type3" not in first["effects.pdf"]


def test_another_metric(writer: Writer) -> None:
    for arm, accuracy in (("softmax", 0.9), ("none", 0.4)):
        for seed in range(3):
            keys = {"backend.activation": arm, "seed": seed}
            writer.run(keys, 2.0, summary={"probe/recall/accuracy": accuracy - seed * accuracy / 100})
    (effect,) = judged(writer, "probe/recall/accuracy").effects
    assert effect.paired.difference == pytest.approx(-0.5 * 0.99)
    assert verdict(effect).startswith("none is lower than softmax: probe/recall/accuracy −0.4950")
    with pytest.raises(BadInput, match=r"did you mean probe/recall/accuracy\?"):
        judged(writer, "probe/recall/acuracy")


# ---- what is missing or odd ------------------------------------------------------------------------------------------


def test_nothing_odd_is_found_where_nothing_is(writer: Writer) -> None:
    assert judged(small(writer)).odd == []


def test_seeds_that_nobody_asked_for_are_not_missing(writer: Writer) -> None:
    """``sweep.half_width`` gives an arm the seeds of its comparison, and a losing rate only those of the choice."""
    for arm, seeds in (("softmax", (0, 1, 2, 3)), ("sigmoid", (0, 1)), ("none", (0, 2))):
        for seed in seeds:
            keys = {"backend.activation": arm, "seed": seed, "sweep.half_width": 0.01, "sweep.pilot_seeds": 4}
            writer.run(keys, 2.0 + 0.01 * seed)
    missing = [said for said in judged(writer).odd if said.startswith("Missing seeds")]
    assert missing == ["Missing seeds: none has no run with seed 1."]


def test_a_missing_a_diverged_a_running_and_a_foreign_folder_are_said(writer: Writer) -> None:
    small(writer, seeds=3)
    for path in (writer.folder / "sigmoid2").iterdir():
        path.unlink()
    writer.run({"backend.activation": "none", "seed": 0}, None, name="none0", status="diverged")
    writer.run({"backend.activation": "none", "seed": 1}, 2.0, name="none1", status="running")
    writer.run({"backend.activation": "none", "seed": 2}, 2.0, name="none2", status="failed")
    (writer.folder / "none1" / ".lock").touch()
    (writer.folder / "none2" / "metrics.jsonl").unlink()
    found = judged(writer)
    said = "\n".join(found.odd)
    assert "Skipped, since these are not runs: sigmoid2." in said
    assert "1 run killed or left without an end, and not judged: none1." in said
    assert "1 run failed, and not judged: none2." in said
    assert "Missing seeds: sigmoid has no run with seed 2." in said
    assert "Diverged: 1 of 1 runs of backend.activation = none and 0 of 3 of softmax that ended" in said
    write(found)
    none = next(effect for effect in found.effects if effect.arm == "none")
    assert verdict(none) == (
        "none cannot be compared with softmax: no seed finished in both arms. "
        "Of the runs that ended, 1 of 1 of none diverged, and 0 of 3 of softmax."
    )


def test_a_run_that_the_tuner_stopped_is_said(writer: Writer) -> None:
    small(writer)
    writer.run({"backend.activation": "sigmoid", "seed": 2}, 2.0, name="sigmoid2", status="pruned")
    found = judged(writer)
    assert "1 run stopped early by the tuner, and not judged: sigmoid2." in found.odd
    assert found.effects[0].paired.seeds == 2


def test_a_study_in_which_nothing_has_ended_is_reported(writer: Writer) -> None:
    for arm in ("softmax", "sigmoid"):
        writer.run({"backend.activation": arm, "seed": 0}, status="preempted", rows=1)
    write(judged(writer))
    assert "sigmoid cannot be compared with softmax" in written(writer)["report.md"]
    assert rows_of(written(writer)["effects.csv"])[0]["difference"] == ""


def test_one_run_alone_is_reported(writer: Writer) -> None:
    writer.run({"seed": 0}, 2.0)
    page = written(writer)["report.md"]
    assert "Nothing differs between the runs but the seed." in page
    assert "There is nothing to compare." in page


def test_damaged_runs_are_said(writer: Writer) -> None:
    small(writer)
    (writer.folder / "softmax0" / "config.yaml").write_text("[")
    (writer.folder / "softmax1" / "summary.json").write_text("{")
    said = odd(writer)
    assert "softmax0: config.yaml is not readable." in said
    assert "softmax1: summary.json is not readable." in said
    written(writer)


def test_files_that_are_missing_are_said(writer: Writer) -> None:
    small(writer)
    for name in ("metrics.jsonl", "provenance.json", "overrides.yaml"):
        (writer.folder / "softmax0" / name).unlink()
    found = judged(writer)
    for name in ("metrics.jsonl", "provenance.json", "overrides.yaml"):
        assert f"softmax0: {name} is missing." in found.odd
    assert found.effects[0].paired.seeds == 2
    written(writer)


def test_a_report_that_cannot_be_written_is_bad_input(writer: Writer) -> None:
    small(writer)
    (writer.folder / "report").write_text("a file")
    with pytest.raises(BadInput, match="report: cannot be written"):
        main([str(writer.folder)])


def test_the_best_rate_at_the_edge_of_the_grid_is_said(writer: Writer) -> None:
    for arm, best in (("softmax", 1e-3), ("sigmoid", 3e-3)):
        for rate in (3e-4, 1e-3, 3e-3):
            keys = {"backend.activation": arm, "optimizer.learning_rate": rate, "seed": 0}
            writer.run(keys, 2.0 + abs(np.log(rate / best)))
    said = odd(writer)
    assert "the best optimizer.learning_rate of sigmoid is 0.003, the last one tried" in said
    assert "of softmax" not in said


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data_sha256", "e" * 64, "Different data"),
        ("source_sha256", "6" * 64, "Different source versions"),
        ("git_commit", "f" * 40, "Different commits"),
        ("versions", {"jax": "0.12.0", "python": "3.11.7"}, "Different versions of jax: 0.10.2, 0.12.0."),
        ("device_kind", "NVIDIA H100", "Different device kinds: cpu (4 runs), NVIDIA H100 (1 run)"),
        ("device_count", 2, "Different numbers of devices"),
        ("git_dirty", True, "Source with uncommitted changes (git_dirty): 1 run."),
    ],
)
def test_runs_made_elsewhere_or_from_other_things_are_said(writer: Writer, key: str, value: object, words: str) -> None:
    small(writer)
    writer.run({"backend.activation": "sigmoid", "seed": 2}, 2.0, provenance={key: value})
    assert words in odd(writer)


def test_different_budgets_are_said(writer: Writer) -> None:
    small(writer)
    writer.run({"backend.activation": "softmax", "seed": 0, "trainer.steps": 400}, 2.0)
    said = [line for line in odd(writer).splitlines() if "Different budgets" in line]
    assert said == [
        "Different budgets between the arms of trainer.steps, in training tokens: 400: 819,200 against 409,600."
    ]


def test_different_numbers_of_settings_are_said(writer: Writer) -> None:
    for arm, rates in (("softmax", (1e-3,)), ("sigmoid", (3e-4, 1e-3, 3e-3))):
        for rate in rates:
            writer.run({"backend.activation": arm, "optimizer.learning_rate": rate, "seed": 0}, 2.0)
    assert "in tuning settings tried: softmax: 1; sigmoid: 3" in odd(writer)


def test_a_config_that_was_run_twice_is_said(writer: Writer) -> None:
    small(writer)
    writer.run({"backend.activation": "softmax", "seed": 0}, 9.0, name="z")
    found = judged(writer)
    assert "had the same training: z." in "\n".join(found.odd)
    assert found.effects[0].paired.seeds == 2


def test_too_few_seeds_for_an_interval_are_said(writer: Writer) -> None:
    for arm in ("softmax", "none"):
        for rate in (1e-3, 3e-3):
            for seed in range(2):
                keys = {"backend.activation": arm, "optimizer.learning_rate": rate, "seed": seed}
                writer.run(keys, 2.0 + seed)
    study = read_study(writer.folder)
    held_out = judge(study, Question(selection="heldout"))
    assert "Too few seeds for an interval: 1 to judge by; held-out selection needs three." in held_out.odd
    assert held_out.effects[0].paired.seeds == 1
    assert not any("Too few" in each for each in judged(writer).odd)


def test_a_crossing_with_holes_is_said(writer: Writer) -> None:
    small(writer)
    writer.run({"backend.activation": "softmax", "backend.theta": 10.0, "seed": 0})
    assert "3 of 4 combinations were run; missing: activation sigmoid, theta 10." in odd(writer)


@pytest.mark.parametrize(
    ("value", "shown"), [(10000.0, "10000"), (3e-4, "0.0003"), (123456.75, "123456.75"), (None, "null")]
)
def test_an_arm_is_the_bare_value(value: float | None, shown: str) -> None:
    assert show(value) == shown


# ---- words, cost, stability ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        (3, "with 3 seeds no p below 0.25 can be reached"),
        (5, "with 5 seeds no p below 0.0625 can be reached"),
        (6, None),
    ],
)
def test_the_limit_of_a_signflip_test_is_said(seeds: int, words: str | None) -> None:
    note = signflip_note(seeds)
    assert note is None if words is None else words in (note or "")


def test_an_arm_that_diverged_is_not_called_better(writer: Writer) -> None:
    for seed in range(6):
        writer.run({"backend.activation": "softmax", "seed": seed}, 2.0)
        lost = seed == 5
        keys = {"backend.activation": "none", "seed": seed}
        writer.run(keys, None if lost else 1.5 + seed / 1000, status="diverged" if lost else "done")
    (effect,) = judged(writer).effects
    assert verdict(effect).startswith("none is lower where it did not diverge, but less stable, than softmax: ")
    assert verdict(effect).endswith(
        "Of the runs that ended, 1 of 6 of none diverged, and 0 of 6 of softmax; the difference is over the others."
    )


def test_stability_is_compared_by_shares_of_the_runs_that_ended(writer: Writer) -> None:
    """2 of 5 are more than 3 of 10. Killed runs count on neither side."""
    for seed in range(10):
        lost = seed >= 7
        keys = {"backend.activation": "softmax", "seed": seed}
        writer.run(keys, None if lost else 2.0, status="diverged" if lost else "done")
        lost = seed in (3, 4)
        status = "killed" if seed >= 5 else "diverged" if lost else "done"
        keys = {"backend.activation": "none", "seed": seed}
        writer.run(keys, None if seed >= 3 else 1.5 + seed / 1000, status=status)
    (effect,) = judged(writer).effects
    assert verdict(effect).startswith("none is lower where it did not diverge, but less stable, than softmax: ")
    assert "2 of 5 of none diverged, and 3 of 10 of softmax" in verdict(effect)


def test_the_table_for_a_paper_says_what_diverged(writer: Writer) -> None:
    small(writer)
    writer.run({"backend.activation": "sigmoid", "seed": 2}, None, status="diverged")
    writer.run({"backend.activation": "sigmoid", "seed": 3}, None, status="failed")
    lines = written(writer)["table.tex"].splitlines()
    assert "& seeds & left out & diverged" in lines[4]
    assert lines[6].split(" & ")[-1] == "1 of 3 \\\\"
    columns = re.search(r"\{(l+r+)\}", lines[2])
    assert columns is not None
    assert {len(line.split(" & ")) for line in (lines[4], lines[6])} == {len(columns[1])}


def test_no_difference_shown_says_what_would_have_been_found(writer: Writer) -> None:
    for seed, difference in enumerate((-0.01, 0.01, 0.02)):
        writer.run({"backend.activation": "softmax", "seed": seed}, 2.0)
        writer.run({"backend.activation": "sigmoid", "seed": seed}, 2.0 + difference)
    (effect,) = judged(writer).effects
    assert verdict(effect).startswith("No difference between sigmoid and softmax is shown: val_loss +0.0067")
    assert verdict(effect).endswith(
        "If seeds vary as much as these did, such a study detects a difference of 0.05 four times in five."
    )
    assert "alone" not in verdict(effect)


def test_an_interval_that_the_verdict_seems_to_contradict_is_explained(writer: Writer) -> None:
    """p = 0.038 alone, but 0.076 among two: the interval excludes zero, but nothing is shown."""
    for seed, own in enumerate((0.01, 0.02, 0.02)):
        writer.run({"backend.activation": "softmax", "seed": seed}, 2.0)
        writer.run({"backend.activation": "sigmoid", "seed": seed}, 2.0 + own)
        writer.run({"backend.activation": "none", "seed": seed}, 2.0 + own - 0.015)
    sigmoid = next(effect for effect in judged(writer).effects if effect.arm == "sigmoid")
    assert sigmoid.paired.ci_low is not None
    assert sigmoid.paired.ci_low > 0
    assert verdict(sigmoid).startswith("No difference between sigmoid and softmax is shown")
    assert "The interval is for this arm alone; Holm corrects p for 2 arms." in verdict(sigmoid)
    assert re.search(r"p 0\.07\d after Holm over 2 arms, 0\.03\d before\.", verdict(sigmoid))


def test_speeds_stand_side_by_side_only_under_equal_circumstances(writer: Writer) -> None:
    small(writer)
    assert why_speeds_differ(compared(writer).chosen.values()) is None
    assert "tokens/s" in written(writer)["report.md"]
    writer.run({"backend.activation": "none", "seed": 0}, 2.0, summary={"packed_with": 4})
    page = written(writer)["report.md"]
    assert "| tokens/s |" not in page
    assert "Speeds are not compared: the runs differ in packed_with. They" in page
    assert not (write(judged(writer)) / "curves-seconds.svg").exists()


def test_no_verdict_on_speeds_is_given_under_other_circumstances(writer: Writer) -> None:
    small(writer)
    assert "tokens_per_second" in verdict(judged(writer, "tokens_per_second").effects[0])
    writer.run({"backend.activation": "sigmoid", "seed": 2}, 2.0, provenance={"device_kind": "NVIDIA H100"})
    for metric in ("tokens_per_second", "compile_seconds"):
        with pytest.raises(BadInput, match=f"--metric {metric}: no verdict on speeds, because the runs differ in dev"):
            judged(writer, metric)


def test_a_busy_machine_shows_in_runs_of_one_arm(writer: Writer) -> None:
    small(writer)
    writer.run({"backend.activation": "softmax", "seed": 3}, 2.0, summary={"tokens_per_second": 1.0})
    with pytest.raises(BadInput, match="because runs of one arm differ in speed by more than 25%"):
        judged(writer, "tokens_per_second")


def test_a_key_that_no_run_has_was_not_tuned(writer: Writer) -> None:
    small(writer)
    with pytest.raises(BadInput, match=r"--tuned backend\.thta: no run's config has it \(did you mean backend\.theta"):
        judged(writer, tuned=["backend.thta"])
    assert judged(writer, "num_params").effects


def test_speeds_of_one_program_that_differ_show_another_load(writer: Writer) -> None:
    small(writer)
    assert "| tokens/s |" in written(writer)["report.md"]
    writer.run({"backend.activation": "sigmoid", "seed": 2}, 2.0, summary={"tokens_per_second": 30_000.0})
    assert "so the machine's load was not equal" in written(writer)["report.md"]


def test_a_figure_by_itself_is_read_on_white_and_on_black(writer: Writer) -> None:
    """Every text colour has a WCAG contrast of at least 4 on both."""
    folder = write(judged(small(writer)))
    svg = (folder / "effects.svg").read_text()
    assert "#010203" not in svg
    colours = set(re.findall(r"fill: (#[0-9a-f]{6})", re.sub(r"<path[^>]*>|<use[^>]*>", "", svg)))
    assert colours
    for colour in colours:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05) > 4


def test_figures_of_an_earlier_report_do_not_stay(writer: Writer) -> None:
    folder = write(judged(small(writer)))
    assert (folder / "curves-seconds.svg").exists()
    (folder / "notes.svg").write_text("somebody's")
    writer.run({"backend.activation": "none", "seed": 0}, 2.0, summary={"packed_with": 4})
    write(judged(writer))
    assert not (folder / "curves-seconds.svg").exists()
    assert (folder / "notes.svg").exists()


def test_a_curve_of_two_points_is_seen(writer: Writer) -> None:
    for seed in range(2):
        writer.run({"seed": seed}, 2.0, rows=2)
    found = compared(writer)
    curves = loss_curves(found.chosen)
    figure = learning_curves(found.design, curves, "steps")
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    (curve,) = curves.values()
    assert low < curve.mean.min() < curve.mean.max() < high


def test_learning_curves_are_of_one_loss(writer: Writer) -> None:
    """Every panel shows the training loss if an arm was not evaluated on its way, and the page names the loss."""
    small(writer)
    assert {curve.key for curve in loss_curves(compared(writer).chosen).values()} == {"val_loss"}
    for path in writer.folder.glob("sigmoid*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        gone = {"val_loss": None, "val_bpb": None}
        path.write_text("".join(json.dumps(row | gone) + "\n" for row in rows))
    found = compared(writer)
    curves = loss_curves(found.chosen)
    assert [curve.key for curve in curves.values()] == ["train_loss", "train_loss"]
    figure = learning_curves(found.design, curves, "steps")
    assert figure is not None
    assert figure.axes[0].get_ylabel() == "train_loss"
    assert "train_loss against steps: mean over seeds" in (write(judged(writer)) / "report.md").read_text()


def test_every_number_leads_back(writer: Writer) -> None:
    small(writer)
    writer.run({"seed": 2}, 2.0, name="ü 1", provenance={"command": "python train.py -m seed=2"})
    files = written(writer)
    assert "| softmax0 | `backend.activation=softmax seed=0` | done | 2.0000 |" in files["report.md"]
    assert '<a href="../%C3%BC%201/">ü 1</a>' in files["report.html"]
    assert "| 1 | `python train.py -m seed=2` |" in files["report.md"]


def test_what_was_evaluated_later_is_shown(writer: Writer) -> None:
    small(writer)
    row = {"step": 200, "overrides": ["evaluation.sequences=all"], "results": {"val_loss": 1.5}}
    (writer.folder / "softmax0" / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    page = written(writer)["report.md"]
    assert '| softmax0 | 200 | `["evaluation.sequences=all"]` | `{"val_loss": 1.5}` |' in page


def test_loss_spikes_are_counted_and_noise_and_descent_are_not() -> None:
    rng = np.random.default_rng(0)
    smooth = 2 + 3 * np.exp(-np.arange(500) / 80) + 0.02 * rng.standard_normal(500)
    assert loss_spikes(smooth) == 0
    smooth[[100, 101, 300]] += 1.0
    assert loss_spikes(smooth) == 2
    assert loss_spikes(smooth[:10]) == 0


def test_attention_statistics_are_shown(writer: Writer) -> None:
    """They are means over heads and seeds, but the largest for logits. A map of the heads is beside the page."""
    small(writer)
    assert "## Attention" not in written(writer)["report.md"]
    for seed in range(2):
        found = {"0/0/max_logit": 10.0, "1/0/max_logit": 30.0 + seed, "0/0/entropy": 2.0, "1/0/entropy": 4.0 + 2 * seed}
        found |= {"0/0/distance_0": 0.5, "0/0/distance_1": 0.25, "0/0/distance_4": 0.125, "0/0/weight_sum": None}
        summary = {f"attention/{key}": value for key, value in found.items()}
        path = writer.run({"backend.activation": "none", "seed": seed}, 2.0, summary=summary)
        rows = [{"step": step, "attention/0/0/entropy": 1.0, "attention/1/0/entropy": 2.0} for step in (5, 10)]
        (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = written(writer)["report.md"]
    assert "| none | – | 3.5 | 31 | – | – | – |" in page
    assert "| arm | 0 | 1–3 | 4 and more |\n" in page
    assert "| none | 0.500 | 0.250 | 0.125 |" in page
    folder = write(judged(writer))
    assert {"attention-heads.svg", "stability.svg"} < {path.name for path in folder.iterdir()}
    assert list(read_run(path).curves["attention/entropy"]) == [1.5, 1.5]


def test_in_context_measures_are_judged_too(writer: Writer) -> None:
    for arm, accuracy in (("softmax", 0.9), ("none", 0.4)):
        for seed in range(3):
            keys = {"backend.activation": arm, "seed": seed}
            writer.run(keys, 2.0 + seed / 10, summary={"probe/recall/accuracy": accuracy - seed * accuracy / 100})
    files = written(writer)
    said = "| recall/accuracy | activation none against softmax | 0.3960 | 0.8910 | −0.4950 ["
    assert said in files["report.md"]
    loss, recall = rows_of(files["effects.csv"])
    assert (loss["metric"], recall["metric"]) == ("val_loss", "probe/recall/accuracy")
    assert float(recall["difference"]) == pytest.approx(-0.495)


def test_a_pattern_of_layers_leads_what_it_changes(tmp_path: Path) -> None:
    """Layers of two kinds differ in several keys. The verdict names the pattern, not just one kind's activation."""
    writer = Writer(tmp_path / "patterns")
    for every, loss in ((None, 3.0), (4, 2.9), (2, 2.8)):
        for seed in range(2):
            pattern = {"backend.then": {"activation": "softmax"}} if every else {}
            implementation = {"backend": "linear", "then": "reference"} if every else "linear"
            writer.run(
                {"backend.activation": "none", "backend.every": every, "seed": seed, **pattern},
                loss + 0.01 * seed,
                name=f"every{every}-{seed}",
                summary={"implementation": implementation},
            )
    findings = judged(writer)
    (factor,) = findings.comparisons[0].design.factors
    assert (factor.key, factor.arms, factor.also) == ("backend.every", (None, 2, 4), ("backend.then.activation",))
    assert any("attention implementations" in line for line in findings.odd)
    assert "every" in written(writer)["report.md"]


def test_where_every_layer_is_the_other_kind_the_pattern_leads_too(tmp_path: Path) -> None:
    """every=1 is recorded as a plain backend, so even the first kind's activation changes with the pattern."""
    writer = Writer(tmp_path / "patterns")
    for every, first in ((None, "softmax"), (2, "none")):
        for seed in range(2):
            pattern = {"backend.then": {"activation": "softmax"}} if every else {}
            writer.run(
                {"backend.activation": first, "backend.every": every, "seed": seed, **pattern}, name=f"{first}{seed}"
            )
    (factor,) = compared(writer).design.factors
    assert factor.key == "backend.every"
    assert set(factor.also) == {"backend.activation", "backend.then.activation"}


# ---- what other people leave in a folder -----------------------------------------------------------------------------

_OTHER_TYPES = ["null", "[]", "3", '"x"', "true", "{}", "1e999", "[[[]]]", str(10**400), '{"a": {"b": [1]}}', "NaN"]
_JSON_FILES = ("provenance.json", "summary.json", "metrics.jsonl", "evaluations.jsonl")


@pytest.mark.parametrize("content", _OTHER_TYPES)
def test_json_of_another_type_is_never_a_failure(writer: Writer, content: str) -> None:
    """It replaces a whole file, each value in it, and config.yaml, overrides.yaml and their values."""
    small(writer)
    for name in _JSON_FILES:
        (writer.run({"seed": 7}, name=f"whole {name}") / name).write_text(content + "\n")
    path = writer.run({"seed": 8}, name="values", summary={"attention/0/0/entropy": 1.0, "probe/x/accuracy": 0.5})
    (path / "evaluations.jsonl").write_text('{"step": 200, "overrides": [], "results": {"val_loss": 1.0}}\n')
    for file in _JSON_FILES:
        for key in json.loads((path / file).read_text().splitlines()[0]):
            copy = writer.run({"seed": 9}, name=f"{file} {key.replace('/', ' ')}")
            rows = [json.loads(line) for line in (path / file).read_text().splitlines()]
            (copy / file).write_text(
                "".join(
                    re.sub(r'"replace me"', lambda _: content, json.dumps(row | {key: "replace me"})) + "\n"
                    for row in rows
                )
            )
    for key in ("backend.activation", "seed", "trainer.steps", "backend", "data.name", "study"):
        copy = writer.run({}, name=f"config {key}")
        config = yaml.safe_load((copy / "config.yaml").read_text())
        group, _, leaf = key.rpartition(".")
        (config[group] if group else config)[leaf] = "replace me"
        (copy / "config.yaml").write_text(yaml.safe_dump(config).replace("replace me", content))
        (copy / "overrides.yaml").write_text(content)
    (writer.run({}, name="whole config") / "config.yaml").write_text(content)
    sigmoid = [effect for effect in judged(writer).effects if effect.arm == "sigmoid"]
    assert [effect.paired.seeds for effect in sigmoid] == [2]
    written(writer)


def test_dates_and_other_things_of_yaml_are_values(writer: Writer) -> None:
    for i, value in enumerate(("2026-01-01", "2026-99-99", "!!binary aGk=", ".nan", "0x1f")):
        path = writer.run({"data.name": "REPLACE", "seed": 0}, name=str(i))
        (path / "config.yaml").write_text((path / "config.yaml").read_text().replace("REPLACE", value))
    written(writer)


def test_a_table_for_a_paper_escapes_what_tex_reads(writer: Writer) -> None:
    for seed in range(2):
        writer.run({"data.field": "a"}, 2.0 + seed, name=f"a{seed}")
        writer.run({"data.field": r"~^\{}$&%#_"}, 2.1 + seed, name=f"b{seed}")
    table = written(writer)["table.tex"]
    assert r"& \textasciitilde{}\textasciicircum{}\textbackslash{}\{\}\$\&\%\#\_ &" in table


def test_a_name_with_dollars_is_no_mathematics(writer: Writer) -> None:
    for arm in ("$A$", "b"):
        writer.run({"backend.activation": arm, "seed": 0}, 2.0 + len(arm), name=arm.strip("$"))
    drawn = figures.forest(panels_of(compared(writer)), "val_loss")
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] in (["\\$A\\$"], ["b"])
    text = io.StringIO()
    drawn.savefig(text, format="svg")
    assert "$A$" in text.getvalue()


def test_the_title_is_the_folders_own_name(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    small(writer)
    monkeypatch.chdir(writer.folder)
    assert page_of(judge(read_study(Path()), Question()), {}).title == "Study study"


def test_a_run_called_report_is_judged_and_not_written_over(writer: Writer, tmp_path: Path) -> None:
    writer.run({"backend.activation": "softmax", "seed": 0}, 2.0, name="report")
    writer.run({"backend.activation": "sigmoid", "seed": 0}, 2.1)
    assert judged(writer).effects[0].paired.seeds == 1
    with pytest.raises(BadInput, match="report: is a run's folder; choose where to write the report with --out"):
        main([str(writer.folder)])
    assert sorted(path.name for path in (writer.folder / "report").iterdir()) == [
        *("config.yaml", "metrics.jsonl", "overrides.yaml", "provenance.json", "summary.json"),
    ]


def test_several_reports_at_once_are_all_written(writer: Writer) -> None:
    """Two start while a third writes. They unlink each other's figures, but share no temporary file."""
    small(writer)
    code = "import sys; from xattn.report.command import main; raise SystemExit(main(sys.argv[1:]))"
    running = [processes.Process("-c", code, str(writer.folder), cwd=writer.folder) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0], [process.err for process in running]
    names = {path.name for path in (writer.folder / "report").iterdir()}
    assert names >= FILES
    assert not [name for name in names if name.endswith(".tmp")]


def test_links_become_names_where_the_page_has_travelled(writer: Writer) -> None:
    """The page knows where it was written. If it is opened elsewhere, its script turns the links into names."""
    small(writer)
    page = written(writer)["report.html"]
    assert '<a href="../softmax0/">softmax0</a>' in page
    assert 'endsWith("/study/report/report.html")' in page
    assert "](../" not in written(writer)["report.md"]


def test_nothing_is_said_of_logits_that_are_not_drawn(writer: Writer) -> None:
    small(writer)
    captions = {name: caption for name, _, caption in _figures_of(compared(writer))}
    assert captions["stability"] == "Means over seeds."


def test_the_sign_flip_note_stands_under_its_own_factor(writer: Writer) -> None:
    """theta has three seeds and activation six, so only theta's p cannot be small."""
    for seed in range(6):
        for arm in ("softmax", "sigmoid"):
            writer.run({"backend.activation": arm, "seed": seed}, 2.0 + seed / 10 + (arm == "sigmoid") * seed / 50)
        if seed < 3:
            writer.run({"backend.theta": 100.0, "seed": seed}, 2.0 + seed / 9)
    page = written(writer)["report.md"]
    assert page.index("| backend.theta |") < page.index("with 3 seeds no p below 0.25")
    assert page.count("Sign-flip test: with") == 1


@pytest.mark.parametrize(("count", "words"), [(1, "1 thing is missing or odd; the page lists it"), (2, "2 things are")])
def test_one_thing_is_no_things(
    writer: Writer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, count: int, words: str
) -> None:
    small(writer)
    for i in range(count):
        (writer.folder / "softmax0" / ("overrides.yaml", "metrics.jsonl")[i]).unlink()
    monkeypatch.setattr("xattn.report.command.write", lambda found, folder: None)
    main([str(writer.folder)])
    assert words in capsys.readouterr().out


def test_arms_stand_in_the_order_typed(writer: Writer) -> None:
    command = "python train.py -m backend.activation=softmax,sigmoid,none seed=0"
    for arm in ("none", "sigmoid", "softmax"):
        writer.run({"backend.activation": arm, "seed": 0}, 2.0, provenance={"command": command})
    assert [effect.arm for effect in judged(writer).effects] == ["sigmoid", "none"]
