"""The noise floor: spreads checked by hand, and how much depends on the sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xattn.report.answer import Answer, Question
from xattn.report.content import page_of
from xattn.report.judge import judge
from xattn.report.noise import Noise, noise_of
from xattn.report.read import read_study
from xattn.report.render import to_markdown
from xattn.runs import run_folder

from .folders import Writer

BASELINE = [2.0, 2.1, 2.3, 2.2]
DIFFERENCES = [0.1, 0.12, 0.08, 0.14]
TOKENS = np.array([64.0] * 99 + [16.0])  # the last sequence is short


def put_losses(run: Path, losses: np.ndarray) -> None:
    (run / run_folder.ARTIFACTS).mkdir()
    np.save(
        run / run_folder.ARTIFACTS / run_folder.SEQUENCE_LOSSES,
        np.stack([losses * TOKENS, TOKENS], 1).astype(np.float32),
    )


def write(writer: Writer, *, own: float, with_losses: bool = True) -> None:
    """Write a study. ``own`` is how much the arm's cost differs between sequences; their shared part is large."""
    rng = np.random.default_rng(0)
    shared, extra = rng.normal(0, 1, TOKENS.size), rng.normal(0, 1, TOKENS.size)
    shared, extra = (each - np.average(each, weights=TOKENS) for each in (shared, extra))
    for seed, (loss, difference) in enumerate(zip(BASELINE, DIFFERENCES, strict=True)):
        for arm, value in (("softmax", loss), ("sigmoid", loss + difference)):
            run = writer.run({"backend.activation": arm, "seed": seed}, value)
            if with_losses:
                put_losses(run, value + shared + own * extra * (arm == "sigmoid"))


def found_in(writer: Writer, metric: str | None = None) -> tuple[Answer, Noise]:
    found = judge(read_study(writer.folder), Question(metric=metric))
    (each,) = found.comparisons
    (effect,) = each.effects
    noise = noise_of(each, each.design.factors[0], effect)
    assert noise is not None
    return found, noise


def test_spreads_are_those_of_the_seeds(writer: Writer) -> None:
    write(writer, own=0.0)
    _, noise = found_in(writer)
    arm = np.add(BASELINE, DIFFERENCES)
    assert noise.baseline == pytest.approx(np.std(BASELINE, ddof=1))
    assert noise.arm == pytest.approx(np.std(arm, ddof=1))
    spread = np.std(DIFFERENCES, ddof=1)
    assert noise.spread == pytest.approx(spread)
    # χ² with 3 degrees of freedom has its 2.5 % and 97.5 % quantiles at 0.2158 and 9.3484.
    assert (noise.low, noise.high) == pytest.approx(
        (spread * (3 / 9.3484) ** 0.5, spread * (3 / 0.2158) ** 0.5), rel=1e-3
    )
    assert noise.correlation == pytest.approx(np.corrcoef(arm, BASELINE)[0, 1])
    assert noise.seeds_half == pytest.approx(3.1824 * spread / 2, rel=1e-4)  # t(0.975, 3)


def test_what_hangs_on_the_sequences_is_of_the_difference_alone(writer: Writer) -> None:
    """What makes a sequence hard in both arms cancels. The arm's cost does not, and is weighted by tokens."""
    write(writer, own=0.5)
    _, noise = found_in(writer)
    rng = np.random.default_rng(0)
    rng.normal(0, 1, TOKENS.size)
    extra = rng.normal(0, 1, TOKENS.size)
    extra = 0.5 * (extra - np.average(extra, weights=TOKENS))
    expected = 1.96 * np.sqrt(np.sum((extra * TOKENS) ** 2)) / TOKENS.sum()
    assert noise.sequences == 100
    assert noise.sequences_half == pytest.approx(expected, rel=0.08)
    _, in_bits = found_in(writer, "val_bpb")
    assert in_bits.sequences_half == pytest.approx(1.44 * expected, rel=0.08)


def test_sequences_that_cost_the_same_everywhere_add_nothing(writer: Writer) -> None:
    write(writer, own=0.0)
    found, noise = found_in(writer)
    assert noise.sequences_half == pytest.approx(0, abs=1e-5)
    assert "Noise floor" in to_markdown(page_of(found, {}))


@pytest.mark.parametrize("damage", ["missing", "no array", "another shape", "other losses", "NaN"])
def test_losses_that_cannot_be_used_are_passed_over(damage: str, writer: Writer) -> None:
    write(writer, own=0.5)
    file = next(writer.folder.glob("*/artifacts")) / run_folder.SEQUENCE_LOSSES
    kept = np.load(file)
    if damage == "missing":
        file.unlink()
    elif damage == "no array":
        file.write_bytes(b"nothing")
    else:
        np.save(file, {"another shape": kept[:, 0], "other losses": kept * [2, 1], "NaN": np.nan * kept}[damage])
    _, noise = found_in(writer)
    assert (noise.sequences, noise.sequences_half) == (0, None)
