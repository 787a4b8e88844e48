"""``--like RUN``: a run's own overrides, and what replaces them."""

from __future__ import annotations

from pathlib import Path

import pytest

import xattn.config
from xattn.commands.like import expanded
from xattn.errors import BadInput
from xattn.runs import run_folder


def run_of(folder: Path, *overrides: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / run_folder.CONFIG).write_text(xattn.config.save(xattn.config.compose(overrides)))
    (folder / run_folder.OVERRIDES).write_text(xattn.config.to_yaml(list(overrides)))
    return str(folder)


@pytest.mark.parametrize(
    ("own", "typed", "expected"),
    [
        (["trainer=debug", "seed=3"], ["trainer.steps=7"], ["trainer=debug", "seed=3", "trainer.steps=7"]),
        (["trainer=debug", "seed=3"], ["seed=4"], ["trainer=debug", "seed=4"]),
        (["backend=fox", "backend.theta=5.0"], ["backend=alibi"], ["backend=alibi"]),
        (["backend=fox", "backend.theta=5.0"], ["backend.theta=7.0"], ["backend=fox", "backend.theta=7.0"]),
        (["seed=3", "resume=never"], [], ["seed=3"]),
        (["study=first"], ["-m", "seed=0,1"], ["-m", "study=first", "seed=0,1"]),
        (["++seed=3"], ["seed=4"], ["seed=4"]),
        (["experiment=verdict", "sweep.half_width=0.01"], [], ["experiment=verdict", "sweep.half_width=null"]),
        (["sweep.half_width=0.01"], ["-m", "seed=5"], ["-m", "sweep.half_width=0.01", "seed=5"]),
        (["sweep.half_width=0.01"], ["sweep.half_width=0.02"], ["sweep.half_width=0.02"]),
    ],
)
def test_what_is_typed_takes_the_place_of_the_runs_own(
    own: list[str], typed: list[str], expected: list[str], tmp_path: Path
) -> None:
    run = run_of(tmp_path, *own)
    assert expanded([*typed, "--like", run]) == expected
    assert expanded([f"--like={run}", *typed]) == expected


def test_without_the_flag_the_arguments_are_as_they_were() -> None:
    assert expanded(["-m", "seed=0,1", "--cfg", "job"]) == ["-m", "seed=0,1", "--cfg", "job"]


def test_the_same_run_is_composed_again(tmp_path: Path) -> None:
    own = ["trainer=debug", "backend.every=2", "backend.then={activation: softmax, theta: 500}", "data=mqar"]
    run = run_of(tmp_path, *own)
    assert xattn.config.compose(expanded(["--like", run])) == xattn.config.compose(own)
    longer = xattn.config.compose(expanded(["--like", run, "trainer.steps=77"]))
    assert [*xattn.config.differences(xattn.config.compose(own), longer)] == ["trainer.steps"]


@pytest.mark.parametrize("overrides", [None, "{", "a: 1", "- 1"])
def test_a_folder_that_is_no_run_is_refused(overrides: str | None, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"not a run folder: it has no config\.yaml"):
        expanded(["--like", str(tmp_path)])
    run = run_of(tmp_path)
    (tmp_path / run_folder.OVERRIDES).unlink()
    if overrides is not None:
        (tmp_path / run_folder.OVERRIDES).write_text(overrides)
    with pytest.raises(BadInput, match=r"its overrides\.yaml (is not a list|cannot be read)"):
        expanded(["--like", run])
    for bad in (["--like"], ["--like", run, f"--like={run}"]):
        with pytest.raises(BadInput, match="--like"):
            expanded(bad)
