"""Twenty seeded random kills over single runs and sweeps; and proof that the soak would notice what it looks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .soak import Kind, prepare, soak

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def kinds(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Kind]:
    return prepare(command, tmp_path_factory.mktemp("untouched"))


def test_twenty_random_kills_and_no_hard_failure(kinds: list[Kind], cwd: Path) -> None:
    score = soak(kinds, cwd, kills=20, seed=13)
    print(score)
    assert score.kills == 20
    assert score.hard == [], str(score)


@pytest.mark.parametrize(
    ("mutation", "noticed"),
    [
        ("mutate-rename", "checkpoint"),
        ("mutate-step", "other bits|is missing"),  # or it sets the checkpoint aside from which it came
        ("mutate-optimizer-state", "other bits"),
        ("mutate-batch", "other bits"),
        ("mutate-rng", "other bits"),
    ],
)
def test_the_soak_fails_where_the_product_is_broken_on_purpose(
    mutation: str, noticed: str, kinds: list[Kind], cwd: Path
) -> None:
    """The rename, the step, the optimizer's state, the batch's and the dropout's dependence on the step."""
    score = soak(kinds[:1] * 2, cwd, kills=40, seed=7, points=[mutation])
    assert any(re.search(noticed, failure) for failure in score.hard), str(score)
