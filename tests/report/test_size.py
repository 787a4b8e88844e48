"""The report's warnings on arms that are unfairly larger than their baseline, or compute more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.quick import composed
from xattn.data.corpus_tokenizer import vocab_size
from xattn.model.size import matmul_flops_per_token, num_params
from xattn.report.answer import Answer, Question
from xattn.report.command import texts
from xattn.report.judge import judge
from xattn.report.read import read_study
from xattn.report.size import unfair

from .folders import Writer

DECAY = "backend.decay"


def run(
    writer: Writer, overrides: Mapping[str, Any], *, parameters: float = 1.0, flops: float = 1.0, **of: Any
) -> None:
    """Write a run with these multiples of the others' parameters and FLOPs per step."""
    sizes = {"num_params": round(900_000 * parameters), "flops_per_step": round(4_096_000_000 * flops)}
    writer.run(overrides, 2.0 + 0.01 * overrides["seed"], summary=sizes, **of)


def judged(writer: Writer) -> Answer:
    return judge(read_study(writer.folder), Question())


def warnings(writer: Writer) -> list[str]:
    (comparison,) = judged(writer).comparisons
    return unfair(comparison)


@pytest.mark.parametrize(
    ("parameters", "flops", "told"),
    [
        (1.0, 1.0, ""),
        (1.0099, 1.0199, ""),
        (1 / 1.01, 1 / 1.02, ""),
        (1.0101, 1.0, "input: 909,090 parameters against 900,000 (+1.0 %)"),
        (0.9899, 1.0, "input: 890,910 parameters against 900,000 (−1.0 %)"),
        (1.0, 1.03, "input: 2,060,000 FLOPs per token against 2,000,000 (+3.0 %)"),
        (1.0, 0.97, "input: 1,940,000 FLOPs per token against 2,000,000 (−3.0 %)"),
        (
            *(1.1, 1.08),
            "input: 990,000 parameters against 900,000 (+10.0 %) and "
            "2,160,000 FLOPs per token against 2,000,000 (+8.0 %)",
        ),
    ],
)
def test_arms_of_other_sizes_are_named(writer: Writer, parameters: float, flops: float, told: str) -> None:
    for seed in range(2):
        run(writer, {DECAY: "none", "seed": seed})
        run(writer, {DECAY: "input", "seed": seed}, parameters=parameters, flops=flops)
    said = warnings(writer)
    assert bool(said) == bool(told)
    if told:
        assert said[0].startswith(f"Different sizes between the arms of backend.decay: {told}. model.parameters=")
        key = re.search(r"model\.parameters=(\d+)", said[0])
        assert key is not None
        # It is the baseline's size, or, if only the work differs, the size at which the arm computes as much.
        wanted = 900_000 if abs(parameters - 1) > 0.01 else 900_000 - (flops - 1) * 2_000_000 / 6
        assert int(key[1]) == round(wanted)


def test_every_format_of_the_report_says_so(writer: Writer) -> None:
    for seed in range(2):
        run(writer, {DECAY: "none", "seed": seed})
        run(writer, {DECAY: "input", "seed": seed}, parameters=1.1)
    found = judged(writer)
    files = texts(found, {}, {}, writer.folder / "report")
    for name in ("report.html", "report.md", "table.tex"):
        plain = files[name].replace("\\", "")
        assert "Different sizes between the arms of backend.decay: input: 990,000 parameters" in plain
        assert "model.parameters=900000 for all" in plain
    rows = files["table.tex"].splitlines()
    assert rows[-3].startswith("\\multicolumn{9}{p{\\linewidth}}{\\footnotesize Different sizes")
    assert rows[-3].endswith("} \\\\")


def test_a_study_of_equal_arms_says_nothing_in_any_format(writer: Writer) -> None:
    for seed in range(2):
        run(writer, {DECAY: "none", "seed": seed})
        run(writer, {DECAY: "input", "seed": seed}, parameters=1.005)
    for text in texts(judged(writer), {}, {}, writer.folder / "report").values():
        assert "Different sizes" not in text
        assert "multicolumn" not in text


@pytest.mark.parametrize("key", ["model.mlp_dim", "model.parameters"])
def test_where_the_size_is_the_question_no_key_is_named(writer: Writer, key: str) -> None:
    for seed in range(2):
        run(writer, {key: 100, "seed": seed})
        run(writer, {key: 200, "seed": seed}, parameters=2.0)
    (said,) = warnings(writer)
    assert said.endswith(f"(+100.0 %). That is what {key} sets.")


def test_the_number_named_is_one_that_every_arm_can_have(writer: Writer) -> None:
    """A model of width 512 has more parameters than the baseline with an mlp_dim of 1."""
    for seed in range(2):
        sizes = {"model.num_layers": 4, "model.mlp": "swiglu", "model.mlp_dim": 344, "seed": seed}
        run(writer, {"model.embedding_dim": 128, **sizes}, name=f"narrow{seed}")
        run(writer, {"model.embedding_dim": 512, **sizes}, parameters=10.0, name=f"wide{seed}")
    (said,) = warnings(writer)
    assert 9_000_000 - 4 * 3 * 512 * 343 > 900_000
    assert "model.parameters=9000000 for all" in said


def test_steps_and_batches_are_no_size(writer: Writer) -> None:
    """They are budgets, and reported as such."""
    for seed in range(2):
        run(writer, {"trainer.batch_size": 16, "seed": seed})
        run(writer, {"trainer.batch_size": 32, "seed": seed}, flops=2.0)
    assert warnings(writer) == []
    assert any(sentence.startswith("Different budgets") for sentence in judged(writer).odd)


def test_of_two_factors_each_is_judged_at_the_same_arm_of_the_other(writer: Writer) -> None:
    for seed in range(2):
        for decay, more in (("none", 0.0), ("input", 0.005)):
            for gate, much in (("none", 0.0), ("channel", 0.1)):
                keys = {DECAY: decay, "model.output_gate": gate, "seed": seed}
                run(writer, keys, parameters=1 + more + much)
    (said,) = warnings(writer)
    assert said.startswith("Different sizes between the arms of model.output_gate: channel: 990,000 parameters")
    assert "; channel: 994,500 parameters against 904,500 (+10.0 %). model.parameters=900000 for all" in said


@pytest.mark.parametrize("missing", [{"num_params": None}, {"flops_per_step": None}, {"num_params": 0}])
def test_a_summary_without_the_numbers_says_nothing(writer: Writer, missing: Mapping[str, Any]) -> None:
    for seed in range(2):
        run(writer, {DECAY: "none", "seed": seed})
        writer.run({DECAY: "input", "seed": seed}, 2.1, summary=missing)
    assert all("FLOPs" not in sentence for sentence in warnings(writer))


# ---- model.parameters in a study -------------------------------------------------------------------------------------


def of_config(writer: Writer, *typed: str, seed: int) -> None:
    """Write the numbers that a run of these overrides leaves for a report."""
    config = composed(*typed, f"seed={seed}")
    values = {f"model.{key}": value for key, value in config.model.model_dump(mode="json").items()}
    values |= {DECAY: config.backend.decay, "seed": seed}
    size = vocab_size(config.data)
    flops = 3 * matmul_flops_per_token(config.model, config.backend, vocab_size=size) * 16 * 128
    counted = {"num_params": num_params(config.model, config.backend, vocab_size=size), "flops_per_step": flops}
    name = "-".join(typed).replace("model.", "").replace("backend.", "")
    writer.run(values, 2.0 + 0.01 * seed, name=f"{name}-seed{seed}", summary=counted)


def test_what_the_warning_names_makes_the_arms_equal_and_their_mlp_dim_is_no_factor(writer: Writer) -> None:
    """All arms of the two factors have their own mlp_dim, so no two runs would differ in only one key."""
    for seed in range(2):
        for gate in ("none", "channel"):
            for decay in ("none", "input"):
                of_config(writer, f"backend.decay={decay}", f"model.output_gate={gate}", seed=seed)
    (said,) = warnings(writer)
    assert said.startswith("Different sizes between the arms of model.output_gate: channel: 923,520 parameters")
    key = re.search(r"model\.parameters=\d+", said)
    assert key is not None

    fair = Writer(writer.folder.with_name("fair"))
    for seed in range(2):
        for gate in ("none", "channel"):
            for decay in ("none", "input"):
                of_config(fair, f"backend.decay={decay}", f"model.output_gate={gate}", key[0], seed=seed)
    (comparison,) = judged(fair).comparisons
    assert {factor.key for factor in comparison.design.factors} == {DECAY, "model.output_gate"}
    assert unfair(comparison) == []
    assert not judged(fair).alone
    # In one study with the unfair arms, model.parameters is a factor, and adds no other.
    for path in fair.folder.iterdir():
        path.rename(writer.folder / path.name)
    (comparison,) = judged(writer).comparisons
    assert {factor.key for factor in comparison.design.factors} == {DECAY, "model.output_gate", "model.parameters"}
    assert len(comparison.runs) == 16
