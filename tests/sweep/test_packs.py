"""Packs: each run gives the same result as if it trained alone, and keeps its own folder and end."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import xattn.config
from tests.quick import composed
from xattn.errors import ExitCode
from xattn.runs import run_folder
from xattn.runs.desk import run_pack
from xattn.runs.job import Job
from xattn.sweep import packing
from xattn.sweep.packing import pack_size, take_pack

STEPS = 200


def job(outputs: Path, *overrides: str) -> Job:
    config = composed(*overrides)
    return Job(config, outputs / xattn.config.run_name(config), overrides)


def train(jobs: Sequence[Job]) -> list[ExitCode]:
    return run_pack(jobs, stop=lambda: False, quiet=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run_folder.METRICS).read_text("utf-8").splitlines()]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_in_a_pack_is_the_run_alone(tiny: list[str], tmp_path: Path) -> None:
    """Over 200 steps in float32 every loss agrees within 1e-4, and steps and files are the same. A member that diverges
    is masked, and reports the same update."""
    long = [*tiny, f"trainer.steps={STEPS}", "trainer.log_every=20", "trainer.eval_every=100"]
    long.append("trainer.attention_stats_every=100")
    numbers = [
        ["optimizer.learning_rate=3e-3", "seed=0"],
        ["optimizer.learning_rate=1e-2", "seed=1", "optimizer.clip_norm=null", "backend.theta=100"],
        ["optimizer.learning_rate=1e30", "seed=2"],
    ]
    packed = [job(tmp_path / "packed", *long, *each) for each in numbers]
    alone = [job(tmp_path / "alone", *long, *each) for each in numbers]
    codes = [ExitCode.DONE, ExitCode.DONE, ExitCode.DIVERGED]
    assert train(packed) == codes
    assert [train([each])[0] for each in alone] == codes
    for one, other in zip(packed, alone, strict=True):
        in_pack, by_itself = run_folder.read_summary(one.folder), run_folder.read_summary(other.folder)
        assert in_pack is not None
        assert by_itself is not None
        assert (in_pack["packed_with"], by_itself["packed_with"]) == (3, 1)
        assert (in_pack["status"], in_pack["step"]) == (by_itself["status"], by_itself["step"])
        for key in ("val_loss", "train_loss", "best_val_loss") if in_pack["status"] == "done" else ():
            assert in_pack[key] == pytest.approx(by_itself[key], rel=1e-4), key
        for row, expected in zip(rows(one.folder), rows(other.folder), strict=True):
            assert row.keys() == expected.keys()
            assert {key: row[key] for key in row if key != "tokens_per_second"} == pytest.approx(
                {key: expected[key] for key in row if key != "tokens_per_second"}, rel=1e-3
            )
        assert {name for name in names(other.folder) if "checkpoints" not in name} == {
            name for name in names(one.folder) if "checkpoints" not in name
        }
        recorded = run_folder.read_provenance(one.folder)
        assert recorded is not None
        assert recorded["pack"] == [each.folder.name for each in packed]
    losses = [summary["val_loss"] for each in packed if (summary := run_folder.read_summary(each.folder))]
    assert len(set(losses)) == 3  # the members are three different runs


@pytest.mark.slow
def test_one_that_is_pruned_ends_and_the_others_go_on(tiny: list[str], tmp_path: Path) -> None:
    """This uses the programs of the test above: packs of three, and one run alone."""
    asked: list[int] = []

    def prune(row: Any) -> bool:
        asked.append(row["step"])
        return row["step"] == 100

    long = [*tiny, f"trainer.steps={STEPS}", "trainer.log_every=20", "trainer.eval_every=50"]
    first, second, third = (job(tmp_path, *long, f"seed={seed}") for seed in range(3))
    pruned = Job(first.config, first.folder, first.overrides, prune=prune)
    assert train([pruned, second, third]) == [ExitCode.DONE] * 3
    one, other = run_folder.read_summary(first.folder), run_folder.read_summary(second.folder)
    assert one is not None
    assert other is not None
    assert (one["status"], one["step"], one["committed_step"]) == ("pruned", 100, 100)
    assert (other["status"], other["step"]) == ("done", STEPS)
    assert asked == [50, 100]
    assert rows(first.folder)[-1]["step"] == 100
    assert train([first]) == [ExitCode.DONE]  # it continues alone, and records that it left the pack
    again = run_folder.read_summary(first.folder)
    assert again is not None
    assert (again["status"], again["step"], again["packed_with"]) == ("done", STEPS, 1)
    origin = run_folder.read_provenance(first.folder)
    assert origin is not None
    assert [list(change) for change in origin["resumed_with"]] == [["pack", "started_at", "command"]]


# ---- which runs ------------------------------------------------------------------------------------------------------


def begun(each: Job, pack: Sequence[Job], status: str = "running") -> None:
    each.folder.mkdir(parents=True)
    run_folder.write_summary(each.folder, {"status": status, "committed_step": 4})
    origin = {"pack": [other.folder.name for other in pack]}
    (each.folder / run_folder.PROVENANCE).write_text(json.dumps(origin))


def test_runs_of_one_program_data_and_pace_are_packed_as_many_as_asked_for(tiny: list[str], tmp_path: Path) -> None:
    asked = [*tiny, "sweep.pack=2"]
    same = [job(tmp_path, *asked, f"seed={seed}", f"optimizer.learning_rate={seed + 1}e-3") for seed in range(3)]
    others = [
        job(tmp_path, *asked, override)
        for override in ("backend=none", "trainer.log_every=3", "evaluation.sequences=4", "trainer.nonfinite=rollback")
    ]
    jobs = [same[0], *others, *same[1:]]
    queue = deque(jobs)
    packs = []
    while queue:
        packs.append(take_pack(queue, jobs))
    assert packs == [[same[0], same[1]], *([each] for each in others), [same[2]]]


def test_a_pack_that_was_begun_goes_on_with_the_same_members_in_their_places(tiny: list[str], tmp_path: Path) -> None:
    jobs = [job(tmp_path, *tiny, "sweep.pack=8", f"seed={seed}") for seed in range(4)]
    pack = [jobs[2], jobs[0], jobs[1]]
    for each in pack:
        begun(each, pack, "diverged" if each is jobs[0] else "running")
    queue = deque([jobs[3], jobs[1], jobs[2]])
    assert take_pack(queue, jobs) == [jobs[3]]  # not a member of the pack
    assert take_pack(queue, jobs) == pack
    assert not queue
    # A run trains alone if that is asked for, or if a member is not in this study or has left the pack.
    off = [job(tmp_path, *tiny, "sweep.pack=off", f"seed={seed}") for seed in range(4)]
    assert take_pack(deque([off[1], off[2]]), off) == [off[1]]
    assert take_pack(deque([jobs[1], jobs[2]]), jobs[1:]) == [jobs[1]]
    left = run_folder.read_provenance(jobs[2].folder)
    assert left is not None
    (jobs[2].folder / run_folder.PROVENANCE).write_text(json.dumps(left | {"resumed_with": [{"pack": None}]}))
    assert take_pack(deque([jobs[1], jobs[2]]), jobs) == [jobs[1]]


def chosen(*names: str) -> Callable[..., dict[str, Any]]:
    return lambda config, context: {name: SimpleNamespace(name=name) for name in names}


def test_auto_never_packs_on_a_cpu_and_on_a_gpu_small_models(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["model.num_layers=4", "model.embedding_dim=128", "backend.context_length=64", "trainer.batch_size=12"]
    assert pack_size(xattn.config.compose([])) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(packing, "choose_attention", chosen("reference"))
    assert pack_size(xattn.config.compose(small)) in (16, 32)  # the measured throughput levels off here
    assert pack_size(xattn.config.compose([*small, "backend.context_length=256", "trainer.batch_size=32"])) == 1
    assert pack_size(xattn.config.compose(["model=gpt2"])) == 1
    monkeypatch.undo()
    unavailable = ["model.num_layers=4", "backend.implementation=hopper", "sweep.pack=2"]
    assert pack_size(xattn.config.compose(unavailable)) == 1  # its start reports why
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(packing, "choose_attention", chosen("reference"))
    assert pack_size(xattn.config.compose([*small, "sweep.pack=off"])) == 1
    for name, packs in (("hopper", True), ("cudnn", False)):  # the vmap of cudnn is broken in releases of JAX
        monkeypatch.setattr(packing, "choose_attention", chosen("reference", name))
        assert (pack_size(xattn.config.compose(small)) > 1) is packs
