"""What the checks measure and conclude, as far as that can be shown without a GPU."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from xattn.backend.hopper.sizes import WIDTHS, Tiles
from xattn.backend.proven import LENGTHS, PASSES, Accuracy, TileTimes, Times
from xattn.bench import kernel_accuracy, kernel_times, sweep, train
from xattn.bench.gpu import environment, kernels, runs, training
from xattn.bench.gpu.checks import CHECKS, Settings
from xattn.bench.gpu.record import Device, Finding
from xattn.config import compose
from xattn.errors import XattnError

CPU = Device(platform="cpu", kind="cpu", count=1)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, CPU)


def rows(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": i + 1, "train_loss": loss} for i, loss in enumerate(losses)]


# ---- runs


@pytest.mark.parametrize(
    ("here", "there", "holds"),
    [
        (rows(3.0, 2.0), rows(3.0, 2.001), True),
        (rows(3.0, 2.0), rows(3.0, 2.2), False),
        (rows(3.0, None), rows(3.0, 2.0), False),
        (rows(3.0), rows(3.0, 2.0), False),
        (rows(), rows(), False),
        ([{"step": 1, "train_loss": 3.0, "val_loss": 1.0}], [{"step": 1, "train_loss": 3.0, "val_loss": 9.0}], False),
    ],
)
def test_curves_agree_where_every_loss_is_there_and_near(here: list, there: list, holds: bool) -> None:
    assert runs._beside(here, there, 1e-2).holds is holds


@pytest.mark.parametrize(
    ("losses", "holds"), [((3.0, 2.0), True), ((3.0, 3.5), False), ((3.0, None), False), ((3.0,), False)]
)
def test_a_loss_has_to_be_finite_and_to_fall(losses: tuple, holds: bool) -> None:
    assert runs._falls(rows(*losses)).holds is holds


class FakeRun:
    """What a run leaves, without the run."""

    made: list[FakeRun]
    off = 0.0

    def __init__(self, folder: Path, overrides: list[str], *, on_cpu: bool = False):
        FakeRun.made.append(self)
        self.folder, self.overrides, self.on_cpu = folder, overrides, on_cpu

    def finish(self) -> FakeRun:
        return self

    def rows(self) -> list[dict[str, Any]]:
        return rows(3.0, 2.0 + (0.0 if self.on_cpu else FakeRun.off))

    def summary(self) -> dict[str, Any]:
        different = FakeRun.off and self.folder.name == "second"
        return {"implementation": "reference", "passed_over": {}, "state_sha256": "b" if different else "a"}


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> type[FakeRun]:
    FakeRun.made, FakeRun.off = [], 0.0
    monkeypatch.setattr(runs, "Run", FakeRun)
    return FakeRun


@pytest.mark.parametrize(("off", "good"), [(0.0, True), (0.5, False)])
def test_a_gpus_curve_is_compared_with_a_cpus(off: float, good: bool, tmp_path: Path, fake_runs: Any) -> None:
    fake_runs.off = off
    gpu = Settings(tmp_path, Device(platform="cuda", kind="NVIDIA A100", count=1, compute_capability="8.0"))
    found = list(runs.compare_with_cpu(gpu, ["model.dtype=bfloat16"]))
    assert [run.on_cpu for run in fake_runs.made] == [True, False]
    assert found[-1].what == "losses off the CPU's"
    assert found[-1].holds is good
    assert found[-1].bar == f"≤ {runs.TOLERANCE['bfloat16']:g}"


def test_on_a_cpu_there_is_nothing_to_compare(settings: Settings, fake_runs: Any) -> None:
    found = list(runs.compare_with_cpu(settings, []))
    assert len(fake_runs.made) == 1
    assert [each.what for each in found] == ["attention by", "loss"]


@pytest.mark.parametrize(("off", "good"), [(0.0, True), (0.5, False)])
def test_bits_are_compared(off: float, good: bool, settings: Settings, fake_runs: Any) -> None:
    fake_runs.off = off
    (found,) = runs.deterministic(settings)
    assert found.holds is good


def test_the_overrides_of_every_run_are_valid() -> None:
    for check in CHECKS:
        if check.function == "runs.compare_with_cpu":
            compose([*check.arguments["overrides"], *runs._DEBUG])


@pytest.mark.slow
def test_a_run_that_fails_says_why(settings: Settings) -> None:
    with pytest.raises(XattnError, match=r"run exited with 2: .*model\.num_layers = 0"):
        runs.Run(settings.scratch / "run", ["model.num_layers=0"]).finish()


@pytest.mark.slow
def test_a_run_that_is_killed_is_resumed_to_the_same_bits(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ["model.num_layers=1", "model.num_heads=2", "model.embedding_dim=8", "model.mlp_dim=8"]
    monkeypatch.setattr(runs, "_DEBUG", [*runs._DEBUG, *tiny, "backend.context_length=8"])
    found = {each.what: each for each in runs.kill_and_resume(settings)}
    assert all(each.holds for each in found.values()), found


# ---- kernels


def test_accuracy_is_evidence_and_fails_where_it_is_off(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(function: Any, activation: str, dtype: str, width: int, length: int, *, causal: bool) -> Any:
        errors = dict.fromkeys(kernel_accuracy.RESULTS, 2e-3 if width == 64 else math.nan)
        floors = dict.fromkeys(kernel_accuracy.RESULTS, 2e-3)
        return kernel_accuracy.Accuracy(activation, dtype, width, length, errors, floors)

    monkeypatch.setattr(kernel_accuracy, "measure", measure)
    good, bad = kernels.accuracy(settings, "sigmoid", 128)
    assert (good.value, good.holds, good.required) == (1.0, True, True)
    assert (bad.value, bad.holds) == (None, False)
    assert isinstance(good.evidence, Accuracy)
    assert (good.evidence.tiles, good.evidence.length) == (Tiles(), 128)
    assert isinstance(bad.evidence, Accuracy)
    assert not bad.evidence.holds
    assert {each.arguments["length"] for each in CHECKS if each.function == "kernels.accuracy"} >= {*LENGTHS}


def _timing(name: str, activation: str, passes: str, seconds: float, bar: float | None = None) -> Any:
    spread = (seconds, seconds, seconds)
    return kernel_times.Timing(name, activation, passes, 64, 4096, *spread, 1.0, 1.0 / seconds, bar)


def test_times_are_beside_rivals_and_softmax(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def side_by_side(bench: Any, width: int, length: int, passes: str) -> list[Any]:
        if passes == PASSES[1]:
            bench.record["failures"] |= {f"hopper, {passes}": "RuntimeError: no", "reference, …": "too large"}
            return [_timing("cudnn", "softmax", passes, 1.0)]
        ours = [_timing("hopper", "sigmoid", passes, 0.9, 1.15), _timing("hopper+RoPE", "sigmoid", passes, 1.0)]
        return [_timing("cudnn", "softmax", passes, 1.0), *ours, _timing("blockwise", "sigmoid", passes, 3.0)]

    monkeypatch.setattr(kernels, "side_by_side", side_by_side)
    found = {each.what: each for each in kernels.times(settings, "sigmoid", 64, 4096)}
    speed = found["hopper over cuDNN's softmax, forward"]
    assert (round(speed.value, 3), speed.bar, speed.holds, speed.required) == (1.111, "≥ 1.15", False, False)
    rival = found["hopper+RoPE over blockwise, forward"]
    assert (rival.value, rival.holds) == (3.0, True)
    assert isinstance(rival.evidence, Times)
    assert (rival.evidence.others, rival.evidence.seconds) == ({"blockwise": 3.0}, 1.0)
    assert found["hopper, forward+backward"].holds is False
    assert found["reference, …"].holds is None


def test_tiles_that_are_quicker_stay_and_the_best_are_proven(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interleaved(runs: dict[Any, Any], arrays: Any, repeats: int) -> dict[Any, list[float]]:
        quick = ("form='split'", "keys=64,")
        return {key: [1.0 - 0.1 * sum(word in key[0] for word in quick)] * 3 for key in runs}

    lowered = SimpleNamespace(lower=lambda *arrays: SimpleNamespace(compile=lambda: lambda *arrays: 0))
    monkeypatch.setattr(kernels.jax, "jit", lambda function: lowered)
    monkeypatch.setattr(kernels, "interleaved", interleaved)
    monkeypatch.setattr(kernels, "random_arrays", lambda *given: ())
    made: list[tuple[int, Tiles]] = []

    def accuracy(activation: str, width: int, length: int, tiles: Tiles, *, required: bool = True) -> Finding:
        made.append((length, tiles))
        assert not required
        return Finding(what="error", value=1.0)

    monkeypatch.setattr(kernels, "_accuracy", accuracy)
    found = list(kernels.tiles(settings, "sigmoid", 64))
    best = Tiles(form="split", keys=64)
    (proof,) = (each.evidence for each in found if each.evidence is not None)
    assert isinstance(proof, TileTimes)
    assert (proof.tiles, round(proof.seconds, 3), proof.default_seconds) == (best, 0.8, 1.0)
    assert made == [(length, best) for length in (*LENGTHS, 32768)]


def test_all_tiles_that_are_tried_are_other_ones() -> None:
    for step in kernels._STEPS:
        assert Tiles(**step) != Tiles()
    assert {each.arguments["width"] for each in CHECKS if each.function == "kernels.tiles"} == {*WIDTHS}


# ---- training


@pytest.mark.parametrize("check", [check for check in CHECKS if check.function.startswith("training.")], ids=str)
def test_benches_are_asked_in_words_that_they_know(
    check: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(command: list[str], **how: Any) -> Any:
        assert command[2:4] == ["xattn.cli", "bench"]
        part, arguments = command[4], command[5:]
        parser = {"train": train._parser, "sweep": sweep._parser}[part]()
        options = parser.parse_intermixed_args(arguments)
        compose(options.overrides)
        asked.append(options)
        row = {"runs": 4, "steps_per_second": 1e3, "times_one": 2.0}
        result = {"median_seconds": 0.1, "tokens_per_second": 1e5, "mfu": 0.4, "memory_bytes": 1e9}
        found = {"packs": [row]} if part == "sweep" else {"results": [result], "peer": None}
        name = "packs" if part == "sweep" else "train"
        (options.output / f"{name}.json").write_text(json.dumps(found))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(training.subprocess, "run", run)
    assert list(check.load()(settings, **check.arguments))
    assert len(asked) == 1


def test_a_bench_without_memory_is_out_of_memory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nmore\nxattn: left\n"
    monkeypatch.setattr(training.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout=said))
    with pytest.raises(XattnError, match="RESOURCE_EXHAUSTED"):
        list(training.packs(settings))


def test_the_environment_is_what_is_here(settings: Settings) -> None:
    found = {each.what: each for each in environment.look(settings)}
    device = Device(**found["device"].details)
    assert device.kind == jax.local_devices()[0].device_kind
    assert found["jax"].value == jax.__version__
    assert found["sum of a product"].holds
