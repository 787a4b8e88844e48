"""A claim that an experiment states: how runs form its contrasts, and what the verdict on it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from scipy import stats

import xattn.config
from xattn.cli import main
from xattn.errors import BadInput
from xattn.report.answer import Question
from xattn.report.claim import Finding, finding_of
from xattn.report.config import threshold
from xattn.report.judge import judge
from xattn.report.read import read_study

from .folders import Writer

SIGMOID = {"backend.activation": "sigmoid"}
SOFTMAX = {"backend.activation": "softmax"}
RATE = "optimizer.learning_rate"


def contrast(**keys: Any) -> dict[str, Any]:
    return {"name": "d", "of": SIGMOID, "minus": SOFTMAX, "shown": "> 0.01", "contradicted": "< 0"} | keys


def stated(*contrasts: dict[str, Any], claim: str = "sigmoid is worse") -> dict[str, Any]:
    return {f"finding.{key}": value for key, value in of(*contrasts, claim=claim).items()}


def of(*contrasts: dict[str, Any], claim: str = "sigmoid is worse") -> dict[str, Any]:
    return {"claim": claim, "source": "a paper", "contrasts": list(contrasts)}


def found(writer: Writer) -> Finding:
    finding = finding_of(read_study(writer.folder).runs)
    assert finding is not None
    return finding


def write(writer: Writer, losses: dict[str, list[float]], *contrasts: dict[str, Any], **keys: Any) -> None:
    """Write the runs of each arm, with one loss per seed."""
    for arm, of_seeds in losses.items():
        for seed, loss in enumerate(of_seeds):
            writer.run(
                {"backend.activation": arm, "seed": seed, **stated(*(contrasts or (contrast(),))), **keys},
                loss,
                name=f"{arm}-{seed}-{'-'.join(map(str, keys.values()))}",
            )


@pytest.mark.parametrize(
    ("shown", "contradicted", "says"),
    [
        ("> 0.01", "< 0", "shown"),
        ("< 0", "> 0.01", "contradicted"),
        ("> 0.0495", "< 0", "undecided"),
        ("within 0.06", "beyond 0.06", "shown"),
        ("within 0.01", "beyond 0.01", "contradicted"),
        ("beyond 0.049", "within 0.049", "undecided"),
        ("<-1e-3", "> 1.5", "undecided"),
    ],
)
def test_the_whole_interval_decides(writer: Writer, shown: str, contradicted: str, says: str) -> None:
    """The differences are 0.049, 0.05 and 0.051, and their interval is [0.0475, 0.0525]."""
    losses = {"softmax": [2.0, 2.1, 2.2], "sigmoid": [2.049, 2.15, 2.251]}
    write(writer, losses, contrast(shown=shown, contradicted=contradicted))
    finding = found(writer)
    (decided,) = finding.contrasts
    expected = stats.ttest_1samp([0.049, 0.05, 0.051], 0).confidence_interval(0.95)
    np.testing.assert_allclose([decided.ci_low, decided.ci_high], [expected.low, expected.high], rtol=1e-9)
    assert (finding.says, decided.seeds) == (says, 3)


def test_several_contrasts_hold_at_once_and_the_claim_is_all_of_them(writer: Writer) -> None:
    losses = {"softmax": [2.0, 2.1, 2.2], "sigmoid": [2.049, 2.15, 2.251]}
    level = {"name": "level", "of": SOFTMAX, "shown": "> 3", "contradicted": "< 1"}
    write(writer, losses, contrast(), level)
    finding = found(writer)
    expected = stats.ttest_1samp([0.049, 0.05, 0.051], 0).confidence_interval(0.975)
    assert finding.contrasts[0].ci_low == pytest.approx(expected.low)
    assert [each.says for each in finding.contrasts] == ["shown", "undecided"]
    assert finding.says == "undecided"
    assert "is undecided: d +0.0500 [" in finding.sentence


def test_one_contradicted_contrast_contradicts_the_claim(writer: Writer) -> None:
    losses = {"softmax": [2.0, 2.1, 2.2], "sigmoid": [2.049, 2.15, 2.251]}
    level = {"name": "level", "of": SOFTMAX, "shown": "< 0", "contradicted": "> 1"}
    write(writer, losses, contrast(), level)
    assert found(writer).says == "contradicted"


def test_a_key_is_reduced_to_its_range_or_its_best_value(writer: Writer) -> None:
    """Checked by hand: softmax at three rates has ranges 0.5 and 0.7 for the two seeds. Of the means 2.4, 2.05 and 2.6,
    the second is best. It is taken for both seeds, although the first seed's own best is another."""
    of_rate = {1e-3: [2.3, 2.5], 1e-2: [2.1, 2.0], 1e-1: [2.6, 2.6]}
    kinds = [
        {"name": "range", "of": SOFTMAX, "over": RATE, "reduced": "range", "shown": "> 0", "contradicted": "< 0"},
        {"name": "best", "of": SOFTMAX, "over": RATE, "reduced": "best", "shown": "> 0", "contradicted": "< 0"},
        {"name": "mean", "of": SOFTMAX, "shown": "> 0", "contradicted": "< 0"},
        {"name": "two", "of": SOFTMAX | {RATE: [1e-3, 1e-2]}, "shown": "> 0", "contradicted": "< 0"},
    ]
    of_rate[1e-2][0], of_rate[1e-3][0] = 2.35, 2.3
    for rate, losses in of_rate.items():
        write(writer, {"softmax": losses}, *kinds, **{RATE: rate})
    means = {each.contrast.name: each.mean for each in found(writer).contrasts}
    assert means == pytest.approx(
        {"range": (0.3 + 0.6) / 2, "best": (2.35 + 2.0) / 2, "mean": np.mean([*of_rate.values()]), "two": 2.2875}
    )


def test_of_an_accuracy_the_best_is_the_greatest(writer: Writer) -> None:
    metric = "probe/mqar/accuracy"
    best = {"name": "a", "metric": metric, "of": SOFTMAX, "over": RATE, "reduced": "best"}
    for rate, accuracy in ((1e-3, 0.5), (1e-2, 0.9)):
        for seed in range(2):
            keys = {**SOFTMAX, RATE: rate, "seed": seed, **stated(best | {"shown": "> 0.8", "contradicted": "< 0.8"})}
            writer.run(keys, name=f"{rate}-{seed}", summary={metric: accuracy})
    (decided,) = found(writer).contrasts
    assert (decided.mean, decided.says) == (0.9, "shown")


def test_a_seed_without_all_its_runs_is_left_out(writer: Writer) -> None:
    """With ``at_most``, a diverged or worse run counts as that loss. Without it, a diverged run's seed is left out."""
    losses = {"softmax": [2.0, 2.1, 2.2, 2.3], "sigmoid": [2.05, 2.15, 2.25]}
    counted = contrast(name="counted", at_most=2.3)
    write(writer, losses, contrast(), counted)
    writer.run({**SIGMOID, "seed": 3, **stated(contrast(), counted)}, None, name="diverged", status="diverged")
    for arm, loss in ((SOFTMAX, 2.0), (SIGMOID, 9.0)):
        writer.run({**arm, "seed": 4, **stated(contrast(), counted)}, loss, name=f"{loss}")
    left_out, taken = found(writer).contrasts
    assert (left_out.seeds, left_out.mean) == (4, pytest.approx((0.15 + 7) / 4))
    assert (taken.seeds, taken.mean) == (5, pytest.approx((0.15 + 0 + 0.3) / 5))


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ({"softmax": [2.0, 2.1]}, "no run is done that has backend.activation=sigmoid"),
        ({"softmax": [2.0, 2.1], "sigmoid": [2.0]}, "1 seed with all runs of this contrast"),
    ],
)
def test_what_is_missing_is_said(writer: Writer, losses: dict[str, list[float]], why: str) -> None:
    write(writer, losses)
    (decided,) = found(writer).contrasts
    assert (decided.says, decided.words) == ("undecided", why)


def test_numbers_of_different_texts_are_not_subtracted(writer: Writer) -> None:
    write(writer, {"sigmoid": [2.0, 2.1]})
    for seed in range(2):
        keys = {**SOFTMAX, "seed": seed, "data.name": "text", **stated(contrast())}
        writer.run(keys, name=f"other-{seed}", provenance={"data_sha256": "e" * 64})
    assert found(writer).contrasts[0].why_not == "they are of different texts"


def test_the_claim_that_was_stated_first_counts(writer: Writer) -> None:
    """A claim that was changed after a look at the results is reported."""
    write(writer, {"softmax": [2.0, 2.1], "sigmoid": [2.049, 2.151]})
    later = {**SOFTMAX, "seed": 7, **stated(contrast(shown="> 9"), claim="another")}
    writer.run(later, 2.0, name="later", provenance={"started_at": "2026-02-01T00:00:00+00:00"})
    finding = found(writer)
    assert (finding.stated.claim, finding.otherwise) == ("sigmoid is worse", 1)
    assert "1 run of the study stated another claim, or none." in finding.sentence


def test_a_study_without_a_claim_has_no_finding(writer: Writer) -> None:
    writer.run({"seed": 0})
    writer.run({"seed": 1, "finding": None})
    writer.run({"seed": 2, "finding": {"claim": "of a later version", "contrasts": 3}})
    assert finding_of(read_study(writer.folder).runs) is None
    answer = judge(read_study(writer.folder), Question())
    assert answer.finding is None


def test_report_and_table_end_with_the_claim(
    writer: Writer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(writer, {"softmax": [2.0, 2.1, 2.2], "sigmoid": [2.049, 2.15, 2.251]})
    assert main(["report", str(writer.folder)]) == 0
    told = capsys.readouterr().out
    assert "finding: “sigmoid is worse” (a paper) is shown: d +0.0500 [+0.0475, +0.0525]: shown." in told
    page = (writer.folder / "report" / "report.md").read_text("utf-8")
    assert page.rstrip().endswith("(a paper) is shown: d +0.0500 [+0.0475, +0.0525]: shown.")
    stored = json.loads((writer.folder / "report" / "verdict.json").read_text("utf-8"))
    schema = json.loads((Path(__file__).resolve().parents[2] / "docs" / "verdict.schema.json").read_text("utf-8"))
    jsonschema.validate(stored, schema)
    assert (stored["finding"]["verdict"], stored["finding"]["contrasts"][0]["seeds"]) == ("shown", 3)

    monkeypatch.chdir(writer.folder.parent.parent)
    assert main(["findings"]) == 0
    table = capsys.readouterr().out
    assert "study" in table
    assert "sigmoid is worse" in table
    assert "+0.0500 [+0.0475, +0.0525]" in table
    assert main(["findings", "outputs/study", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["findings"]
    assert listed == {"study": "outputs/study", "finding": stored["finding"]}


def test_where_no_study_states_a_claim_the_table_says_so(writer: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    writer.run({"seed": 0})
    assert main(["findings", str(writer.folder.parent)]) == 0
    assert capsys.readouterr().out == "no study here states a claim\n"
    assert main(["findings", "nowhere"]) == 2


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"shown": ">> 1"}, "finding.contrasts[0].shown = '>> 1': must be > x, < x, within x or beyond x, x a number"),
        ({"contradicted": "between 1"}, "contradicted = 'between 1': must be > x"),
        ({"over": RATE}, "over and reduced go together"),
        ({"reduced": "range"}, "over and reduced go together"),
        ({"mins": {}}, "mins"),
        (
            {"minus": {"model.qknorm": "none"}},
            "finding.contrasts[0]: model.qknorm: no such key (did you mean model.qk_norm?)",
        ),
        (
            {"over": "learning_rate", "reduced": "best"},
            "learning_rate: no such key (did you mean optimizer.learning_rate?)",
        ),
    ],
    ids=str,
)
def test_a_claim_that_cannot_be_read_is_refused(keys: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    claim = json.dumps({"finding": of(contrast(**keys))})
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{claim}\n")
    with pytest.raises(BadInput) as refused:
        xattn.config.compose([f"hydra.searchpath=[{tmp_path}]", "experiment=mine"])
    assert told in str(refused.value)


def test_a_claim_changes_no_name_and_is_kept_in_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    of_other_choices = {"optimizer.momentum": 0.9, "backend.then.theta": 100.0}
    claim = json.dumps({"finding": of(contrast(of=SIGMOID | {RATE: [1e-3, 0.1]}, minus=SOFTMAX | of_other_choices))})
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{claim}\n")
    config = xattn.config.compose([f"hydra.searchpath=[{tmp_path}]", "experiment=mine"])
    assert xattn.config.run_hash(config) == xattn.config.run_hash(xattn.config.compose())
    assert xattn.config.program_key(config) == xattn.config.program_key(xattn.config.compose())
    saved = tmp_path / "config.yaml"
    saved.write_text(xattn.config.save(config))
    assert xattn.config.load(saved) == config
    assert config.finding is not None
    assert config.finding.contrasts[0].of[RATE] == [1e-3, 0.1]


@pytest.mark.parametrize("text", ["> 1e-3", "<-.5", "within 2", "beyond +3.25"])
def test_thresholds_are_read(text: str) -> None:
    assert threshold(text).size in (1e-3, -0.5, 2, 3.25)
