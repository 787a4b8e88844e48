"""A study's verdict in machine-readable form: verdict.json, its schema, and the exit codes of ``xattn verdict``."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest

from xattn import cli
from xattn.config import compose
from xattn.report import command, decide
from xattn.report.answer import Answer, Question
from xattn.report.judge import judge
from xattn.report.read import read_study
from xattn.report.verdict import Range, Verdict, Worth, effect_of, verdict_of
from xattn.report.words import Outcome, outcome
from xattn.runs import run_folder

from .folders import Writer

ROOT = Path(cli.__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SCHEMA = DOCS / "verdict.schema.json"
RENEW = "python -m xattn.report.verdict > docs/verdict.schema.json"


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, which take longer than all the rest."""
    monkeypatch.setattr(command, "_figures", lambda found: iter(()))


def judged(writer: Writer, **asked: Any) -> Answer:
    return judge(read_study(writer.folder), Question(**asked))


def as_json(found: Answer) -> dict[str, Any]:
    """Return verdict.json, checked against the published schema. NaN and infinity are not JSON."""
    loaded: dict[str, Any] = json.loads(run_folder.to_json(verdict_of(found).model_dump()), parse_constant=pytest.fail)
    check(loaded)
    return loaded


def check(value: object, of: str | None = None) -> None:
    """Validate a verdict, or one of its parts."""
    schema = json.loads(SCHEMA.read_text("utf-8"))
    if of is not None:
        schema = {"$defs": schema["$defs"], "$ref": f"#/$defs/{of}"}
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


def gate(
    writer: Writer,
    difference: float,
    seeds: int = 6,
    key: str = "model.output_gate",
    also: Mapping[str, Any] | None = None,
) -> Writer:
    """Write runs of none and of channel, whose losses differ by this much, give or take a thousandth."""
    for seed in range(seeds):
        for arm, loss in (("none", 2.0 + seed / 100), ("channel", 2.0 + seed / 100 + difference + seed % 3 / 1000)):
            writer.run({"model.output_gate": arm, "seed": seed, **(also or {})}, loss)
    return writer


def verdict(writer: Writer, *options: str, better: str = "model.output_gate=channel") -> int:
    return cli.main(["verdict", str(writer.folder), "--better", better, *options])


# ---- the schema ------------------------------------------------------------------------------------------------------


def test_the_published_schema_is_current() -> None:
    assert json.loads(SCHEMA.read_text("utf-8")) == Verdict.model_json_schema(), f"renew it: {RENEW}"
    assert RENEW in " ".join((ROOT / "xattn" / "report" / "verdict.py").read_text("utf-8").split())


def test_every_field_is_documented() -> None:
    schema = json.loads(SCHEMA.read_text("utf-8"))
    names = {name for each in (schema, *schema["$defs"].values()) for name in each["properties"]}
    told = set(re.findall(r"`(\w+)`", (DOCS / "report.md").read_text("utf-8").partition("## For programs")[2]))
    assert names - told == set()
    assert set(Outcome.__args__) <= told  # type: ignore[attr-defined]


def test_a_study_of_one_factor(writer: Writer) -> None:
    found = as_json(judged(gate(writer, -0.05)))
    assert (found["schema_version"], found["study"], found["metrics"]) == (1, "study", ["val_loss"])
    (factor,), (effect,) = found["factors"], found["effects"]
    assert factor | {"where": {}} == factor
    assert (factor["key"], factor["baseline"], factor["arms"]) == ("model.output_gate", "none", ["none", "channel"])
    assert (effect["factor"], effect["arm"], effect["baseline"]) == ("model.output_gate", "channel", "none")
    assert (effect["verdict"], effect["seeds"], effect["two_stage"], effect["worth"]) == ("better", 6, None, None)
    assert effect["ci_low"] < effect["difference"] < effect["ci_high"] < 0
    assert effect["sentence"].startswith("channel is better than none: val_loss −0.0490")
    assert (found["counts"], found["warnings"], found["not_compared"]) == ({"done": 12}, [], 0)


def test_a_study_of_several_comparisons(writer: Writer) -> None:
    for context, steps in ((64, 100), (128, 200)):
        gate(writer, 0.05, seeds=2, also={"backend.context_length": context, "trainer.steps": steps})
    writer.run({"backend.context_length": 256, "trainer.steps": 1, "model.output_gate": "head"}, 2.0)
    found = as_json(judged(writer))
    assert [factor["comparison"] for factor in found["factors"]] == [1, 2]
    assert [effect["where"]["backend.context_length"] for effect in found["effects"]] == ["128", "64"]
    assert found["not_compared"] == 1


def test_a_study_with_nothing_to_compare(writer: Writer) -> None:
    writer.run({"seed": 0}, 2.0)
    found = as_json(judged(writer))
    assert (found["factors"], found["effects"], found["metrics"]) == ([], [], ["val_loss"])


def test_a_study_of_runs_that_diverged_or_never_ended(writer: Writer) -> None:
    gate(writer, -0.05, seeds=2)
    writer.run({"model.output_gate": "channel", "seed": 2}, None, status="diverged")
    writer.run({"model.output_gate": "head", "seed": 0}, None, status="failed")
    found = as_json(judged(writer))
    assert found["counts"] == {"diverged": 1, "done": 4, "failed": 1}
    channel = next(effect for effect in found["effects"] if effect["arm"] == "channel")
    assert (channel["diverged"], channel["ended"], channel["baseline_diverged"]) == (1, 3, 0)
    assert any("1 run failed" in warning for warning in found["warnings"])


def test_what_is_not_finite_is_null(writer: Writer) -> None:
    writer.run({"model.output_gate": "none"}, float("nan"), name="a")
    writer.run({"model.output_gate": "channel"}, float("inf"), name="b")
    found = judged(writer)
    (effect,) = as_json(found)["effects"]
    assert (effect["difference"], effect["verdict"], effect["seeds"]) == (None, "nothing", 0)
    (comparison,) = found.comparisons
    odd = replace(comparison.effects[0], p_holm=float("nan"), arm_mean=-float("inf"), detectable=float("inf"))
    (effect,) = as_json(replace(found, comparisons=[replace(comparison, effects=[odd])]))["effects"]
    assert (effect["p_holm"], effect["arm_mean"], effect["detectable"]) == (None, None, None)


def test_the_study_of_the_readme(writer: Writer) -> None:
    """It has two factors, tuned rates, three seeds and a probe, like experiment=study_activation."""
    rng = np.random.default_rng(0)
    for arm, pre, rate, seed in product(("softmax", "sigmoid", "none"), ("none", "swish"), (1e-3, 3e-3), range(3)):
        loss = 2.0 + 0.1 * (arm == "none") + 0.07 * (pre == "swish") + rate + 0.01 * float(rng.standard_normal())
        keys = {"backend.activation": arm, "backend.qk_pre_activation": pre, "optimizer.learning_rate": rate}
        summary = {"probe/in_context/loss_64": loss / 2}
        writer.run({**keys, "seed": seed}, loss, rows=2, summary=summary)
    found = as_json(judged(writer))
    assert [factor["arms"] for factor in found["factors"]] == [["softmax", "none", "sigmoid"], ["none", "swish"]]
    assert len(found["effects"]) == len(found["probes"]) == 3
    assert {effect["metric"] for effect in found["probes"]} == {"probe/in_context/loss_64"}
    assert found["counts"] == {"done": 36}


def test_a_study_of_seeds_on_demand(writer: Writer) -> None:
    gate(writer, 0.05, seeds=8, also={"sweep.half_width": 0.01, "sweep.pilot_seeds": 8})
    (effect,) = as_json(judged(writer))["effects"]
    stage = effect["two_stage"]
    assert (stage["pilot"], stage["pairs"], stage["half_widths"], stage["needed"]) == (8, 8, [0.01], 8)
    assert effect["verdict"] == "worse"


def test_what_an_arm_is_worth_has_its_place(writer: Writer) -> None:
    found = judged(gate(writer, 0.05, seeds=2))
    steps = Range(value=1.18, low=1.05, high=1.31)
    worth = Worth(steps=steps, step_cost=None, net=None, why_not="the runs differ in host")
    (comparison,) = found.comparisons
    effect = effect_of(1, comparison, comparison.effects[0])
    check(effect.model_copy(update={"worth": worth}).model_dump(mode="json"), "Effect")


def test_a_name_that_is_no_text_is_escaped(writer: Writer) -> None:
    gate(writer, 0.05, seeds=2)
    (writer.folder / os.fsdecode(b"\xff")).mkdir()
    assert any("\\udcff" in warning for warning in as_json(judged(writer))["warnings"])


# ---- the verdict in a word -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "difference", "word"),
    [
        ("val_loss", -0.05, "better"),
        ("val_loss", 0.05, "worse"),
        ("val_loss", -0.001, "undecided"),
        ("probe/recall/accuracy", 0.05, "better"),
        ("probe/recall/accuracy", -0.05, "worse"),
        ("num_params", 0.05, "higher"),
        ("num_params", -0.05, "lower"),
    ],
)
def test_better_is_what_the_metric_says(writer: Writer, metric: str, difference: float, word: str) -> None:
    gate(writer, difference)
    for path in writer.folder.glob("*/summary.json"):
        summary = json.loads(path.read_text())
        path.write_text(json.dumps(summary | {metric: summary["val_loss"]}))
    assert outcome(judged(writer, metric=metric).effects[0]) == word


@pytest.mark.parametrize(
    ("difference", "lost", "word", "code"),
    [
        (-0.05, "channel", "lower", 10),
        (-0.05, "none", "better", 0),
        (0.05, "none", "higher", 10),
        (0.05, "channel", "worse", 11),
    ],
)
def test_an_arm_that_diverged_more_is_not_better(
    writer: Writer, difference: float, lost: str, word: str, code: int
) -> None:
    gate(writer, difference)
    writer.run({"model.output_gate": lost, "seed": 6}, None, status="diverged")
    assert outcome(judged(writer).effects[0]) == word
    assert verdict(writer) == code


@pytest.mark.parametrize("losses", [(), (2.0,), (2.0, 2.5)])
def test_without_an_interval_there_is_nothing(writer: Writer, losses: Sequence[float]) -> None:
    """The cases are no pair, one pair, and pairs that all differ by the same amount."""
    writer.run({"model.output_gate": "channel", "seed": 9}, 2.0)
    writer.run({"model.output_gate": "none", "seed": 8}, 2.0)
    for seed, loss in enumerate(losses):
        writer.run({"model.output_gate": "channel", "seed": seed}, loss)
        writer.run({"model.output_gate": "none", "seed": seed}, loss + 0.5)
    assert outcome(judged(writer).effects[0]) == "nothing"
    assert verdict(writer) == 10


# ---- xattn verdict ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "options", "code", "line"),
    [
        (-0.05, (), 0, "shown: channel is better than none: val_loss −0.0490"),
        (-0.05, ("--metric", "val_bpb"), 0, "shown: channel is better than none: val_bpb −0.07"),
        (-0.001, (), 10, "undecided: No difference between channel and none is shown: val_loss"),
        (-0.05, ("--seeds", "1"), 10, "undecided: channel against none: val_loss"),
        (0.05, (), 11, "the opposite is shown: channel is worse than none: val_loss +0.0510"),
    ],
)
def test_the_exit_code_is_the_answer(
    writer: Writer,
    difference: float,
    options: Sequence[str],
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gate(writer, difference)
    before = sorted(writer.folder.rglob("*"))
    assert verdict(writer, *options) == code
    out, err = capsys.readouterr()
    assert out.startswith(line)
    assert (out.count("\n"), err) == (1, "")
    assert sorted(writer.folder.rglob("*")) == before


def test_another_arm_can_be_the_one_that_is_compared_with(writer: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    gate(writer, -0.05)
    assert verdict(writer, "--than", "channel", better="model.output_gate=none") == 11
    assert capsys.readouterr().out.startswith("the opposite is shown: none is worse than channel")


def test_a_number_is_an_arm_however_it_is_typed(writer: Writer) -> None:
    for seed in range(4):
        writer.run({"backend.theta": 10000.0, "seed": seed}, 2.0 + seed / 1000)
        writer.run({"backend.theta": 100.0, "seed": seed}, 1.9)
    assert verdict(writer, better="backend.theta=1e2") == 0
    assert verdict(writer, "--than", "1e2", better="backend.theta=1e4") == 11


def test_one_of_several_comparisons_is_chosen_by_where(writer: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, context, difference in ((100, 64, 0.05), (200, 128, -0.05)):
        gate(writer, difference, seeds=3, also={"backend.context_length": context, "trainer.steps": steps})
    assert verdict(writer) == 2
    assert "is in 2 comparisons; choose one with --where: context_length" in capsys.readouterr().err
    assert verdict(writer, "--where", "trainer.steps=100") == 11
    assert verdict(writer, "--where", "trainer.steps=200") == 0


@pytest.mark.parametrize(
    ("better", "options", "told"),
    [
        ("model.output_gate", (), "--better model.output_gate: must be KEY=VALUE"),
        ("model.output_gat=channel", (), "--better model.output_gat: no run's config has it (did you mean model.out"),
        ("model.output_gate=head", (), "model.output_gate=head: no run has it; the values are channel, none"),
        ("model.output_gate=none", (), "is the baseline; name another arm with --than: none, channel"),
        (
            "model.output_gate=channel",
            ("--than", "head"),
            "model.output_gate=head: no run has it; the values are channel",
        ),
        ("model.output_gate=channel", ("--than", "channel"), "=channel: is the baseline"),
        (
            "backend.activation=softmax",
            (),
            "--better backend.activation: is not a factor here; the factors are model.output_g",
        ),
        (
            "backend.activation=softmax",
            ("--than", "softmax"),
            "backend.activation: is not a factor here; the factors are model",
        ),
        ("model.output_gate=channel", ("--metric", "num_params"), "--metric num_params: neither more nor less of it"),
        ("model.output_gate=channel", ("--seeds", "7"), "--seeds 7: no run has it; the seeds are 0, 1"),
    ],
)
def test_a_question_that_cannot_be_asked_is_bad_input(
    writer: Writer, better: str, options: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gate(writer, -0.05, seeds=2)
    assert verdict(writer, *options, better=better) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert len(err.splitlines()) == 1


def test_metrics_with_a_direction_are_named(writer: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(gate(writer, -0.05, seeds=2), "--metric", "step") == 2
    assert "choose one of val_bpb, val_loss" in capsys.readouterr().err


def test_a_key_that_changes_with_another_is_asked_by_that(writer: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (name, momentum) in product(range(2), (("adamw", None), ("muon", 0.9))):
        writer.run({"optimizer.name": name, "optimizer.momentum": momentum, "seed": seed}, 2.0 + seed)
    assert verdict(writer, better="optimizer.momentum=0.9") == 2
    assert "changes together with optimizer.name; use that key: adamw, muon" in capsys.readouterr().err


def test_a_folder_that_is_no_study_is_bad_input(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert cli.main(["verdict", str(folder), "--better", "a=b"]) == 2
    assert cli.main(["verdict", str(tmp_path)]) == 2


def test_a_crash_is_no_answer(writer: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(decide, "judge", fail)
    assert verdict(gate(writer, -0.05, seeds=2)) == 1


def test_with_json_the_effect_is_printed_as_in_the_file(writer: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    gate(writer, 0.05)
    assert verdict(writer, "--json") == 11
    found = json.loads(capsys.readouterr().out)
    check(found, "Effect")
    assert [found] == as_json(judged(writer))["effects"]


# ---- standard output -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_figures")
def test_the_object_stands_alone_on_standard_output(writer: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    gate(writer, -0.05, seeds=3)
    (writer.folder / "foreign").mkdir()
    assert cli.main(["report", str(writer.folder), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    check(found)
    assert out.isascii()  # works with any stream's encoding
    assert found == json.loads((writer.folder / "report" / "verdict.json").read_text("utf-8"))
    assert found["command"] == f"xattn report {writer.folder} --json"
    assert found["warnings"] == ["Skipped, since these are not runs: foreign."]
    assert "channel is better than none" in err
    assert "1 thing is missing or odd" in err


@pytest.mark.usefixtures("without_figures")
def test_without_json_the_file_is_written_all_the_same(writer: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(gate(writer, -0.05, seeds=3).folder)]) == 0
    check(json.loads((writer.folder / "report" / "verdict.json").read_text("utf-8")))
    assert "{" not in capsys.readouterr().out


@pytest.mark.parametrize("closed", [">&-", "| true"])
def test_an_answer_that_nobody_reads_keeps_its_exit_code(writer: Writer, closed: str) -> None:
    """With a closed pipe it must exit with 11, not with 0 as other commands do."""
    gate(writer, 0.05)
    words = [sys.executable, "-m", "xattn.cli", "verdict", str(writer.folder), "--better", "model.output_gate=channel"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if closed == ">&-":
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" >&-', "sh", *words], env=environment, stderr=subprocess.PIPE, text=True, timeout=60
        )
    else:
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(words, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
        os.close(writing)
    assert (done.returncode, done.stderr) == (11, "")


def test_no_command_for_programs_imports_jax(writer: Writer) -> None:
    gate(writer, -0.05, seeds=2)
    study = str(writer.folder)
    asked = [
        ["verdict", study, "--better", "model.output_gate=channel"],
        ["report", study, "--json"],
        ["runs", study, "--json"],
        ["compare", *map(str, sorted(writer.folder.iterdir())), "--json"],
    ]
    code = (
        "import json, sys; from xattn import cli; codes = [cli.main(words) for words in json.loads(sys.argv[1])]; "
        "print(codes, sorted({'jax', 'flax', 'wandb'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 0] []"


# ---- docs/agents.md --------------------------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    """Return the command lines in docs/agents.md, split into words."""
    text = (DOCS / "agents.md").read_text("utf-8").replace("\\\n", "")
    return [shlex.split(line) for line in re.findall(r"^    ((?:xattn|python) .*)$", text, re.M)]


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", (DOCS / "agents.md").read_text("utf-8"), re.S)
    assert found
    return found[1]


@pytest.fixture
def gate_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """The study outputs/gate in the current folder, with the metrics and keys that docs/agents.md needs."""
    monkeypatch.chdir(tmp_path)
    return gate(Writer(tmp_path / "outputs" / "gate"), -0.05)


@pytest.mark.usefixtures("without_figures", "gate_study")
def test_the_commands_of_the_page_work(capsys: pytest.CaptureFixture[str]) -> None:
    codes = {" ".join(words): cli.main(words[1:]) for words in commands() if words[0] == "xattn"}
    than = [code for line, code in codes.items() if "--than" in line]
    assert than == [11]
    assert len(codes) == 6
    assert {code for line, code in codes.items() if "--than" not in line} == {0}
    assert capsys.readouterr().err.count("xattn:") == 0


def test_the_sweep_of_the_page_is_valid() -> None:
    (words,) = (words[2:] for words in commands() if words[0] == "python")
    assert words.pop(0) == "-m"
    for values in product(*(value.split(",") for _, value in (word.split("=") for word in words))):
        compose([f"{word.split('=')[0]}={value}" for word, value in zip(words, values, strict=True)])


@pytest.mark.parametrize(
    ("trained", "judged", "code", "said"),
    [
        ("75 75 0", 0, 0, "keep model.output_gate=channel"),
        ("0", 10, 0, "undecided: model.output_gate=channel"),
        ("0", 11, 0, "drop model.output_gate=channel"),
        ("0", 1, 1, ""),
        ("0", 2, 2, ""),
        ("2", 0, 2, ""),
        ("75 1", 0, 1, ""),
    ],
)
def test_the_loop_of_the_page_goes_by_exit_codes(
    tmp_path: Path, trained: str, judged: int, code: int, said: str
) -> None:
    """Stand-ins for the two commands exit with the given codes, and record their arguments."""
    (tmp_path / "codes").write_text(trained.replace(" ", "\n") + "\n")
    stubs = {
        "python": 'echo "python $*" >> calls; code=$(head -n 1 codes); sed -i.old 1d codes; exit $code',
        "xattn": f'echo "xattn $*" >> calls; exit {judged}',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", block("sh")], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (code, said, "")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[: len(trained.split())] == [
        "python train.py -m experiment=verdict study=gate model.output_gate=none,channel sweep.half_width=0.01 "
        "sweep.budget_minutes=30"
    ] * len(trained.split())
    if trained.endswith("0"):
        assert calls[-1] == "xattn verdict outputs/gate --better model.output_gate=channel --than none"


@pytest.mark.usefixtures("without_figures")
def test_the_program_of_the_page_reads_the_object(
    gate_study: Writer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(words: Sequence[str], **_: object) -> SimpleNamespace:
        assert cli.main(words[1:]) == 0
        return SimpleNamespace(stdout=capsys.readouterr().out)

    (gate_study.folder / "foreign").mkdir()
    monkeypatch.setattr(subprocess, "run", run)
    exec(block("python"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"model\.output_gate channel better -0\.04\d+ 0 more seeds", first)
    assert second == "Skipped, since these are not runs: foreign."
