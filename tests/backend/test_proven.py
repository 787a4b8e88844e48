"""Records of what was measured: ``auto`` takes the Hopper kernels with a whole one of here, and with no other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from xattn.backend import dispatch, hopper, proven
from xattn.backend.activations import activation
from xattn.backend.dispatch import Call, choose
from xattn.backend.hopper.sizes import Tiles
from xattn.backend.proven import LENGTHS, PASSES, RESULTS, Accuracy, Evidence, Record, TileTimes, Times
from xattn.bench.gpu.keep import keep
from xattn.config import compose
from xattn.training.attention_choice import choose_attention

KIND = "NVIDIA H100 80GB HBM3"
CALL = Call(
    activation=activation("sigmoid"),
    dtype="bfloat16",
    batch=2,
    num_heads=4,
    num_kv_heads=4,
    sequence=4096,
    head_dim_qk=64,
    head_dim_v=64,
    platform="cuda",
)
SPLIT = Tiles(form="split")
OF: dict[str, Any] = {"activation": "sigmoid", "dtype": "bfloat16", "width": 64}


@pytest.fixture(autouse=True)
def _on_an_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("cpu", "9.0", KIND))
    proven.read.cache_clear()
    yield
    proven.read.cache_clear()


def accuracy(length: int, *, error: float = 1.0, tiles: Tiles | None = None, leave_out: str | None = None) -> Accuracy:
    errors, floors = dict.fromkeys(RESULTS, 2e-3), dict.fromkeys(RESULTS, 2e-3)
    errors["dk"] *= error
    errors = {name: value for name, value in errors.items() if name != leave_out}
    return Accuracy(**OF, length=length, tiles=tiles or Tiles(), errors=errors, floors=floors)


def times(length: int, passes: Any, *, seconds: float = 1.0, others: dict[str, float] | None = None) -> Times:
    others = {"blockwise": 2.0, "reference": 3.0} if others is None else others
    return Times(**OF, length=length, tiles=Tiles(), passes=passes, seconds=seconds, others=others)


def whole() -> list[Evidence]:
    """What proves the kernels from S = 1024 to 16384."""
    measured = [times(length, passes) for length in (1024, 4096, 16384) for passes in PASSES]
    return [*(accuracy(length) for length in (*LENGTHS, 32768)), *measured]


def test_a_whole_record_of_here_is_what_auto_takes_and_names() -> None:
    path = keep(KIND, whole(), made_at="2026-12-01T00:00:00+00:00")
    choice = choose(CALL)
    assert choice.name == "hopper"
    assert choice.proof is not None
    assert choice.proof.record == path.stem
    assert path.stem.startswith("hopper-nvidia-h100-80gb-hbm3-jax-")
    assert path.stat().st_mode & 0o777 == 0o600
    assert choose(CALL, "hopper").proof is None, "a name needs no record"


def test_without_one_the_reason_is_the_command_that_makes_it() -> None:
    choice = choose(CALL)
    assert choice.name == "blockwise"
    assert choice.proof is None
    reason = choice.passed_over["hopper"]
    assert f"not proven on {KIND}" in reason
    assert "`xattn bench gpu --keep` measures it there" in reason


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sequence": 3000}, None),
        ({"sequence": 16384}, None),
        ({"sequence": 512}, "its time at S = 512 was not measured"),
        ({"sequence": 20000}, "its time at S = 20000 was not measured"),
        ({"sequence": 65536}, "its accuracy at S = 65536 was not measured"),
        ({"dtype": "float16"}, "its accuracy at S = 4096 was not measured"),
        ({"head_dim_qk": 128, "head_dim_v": 128}, "its accuracy at S = 4096 was not measured"),
        ({"activation": activation("none")}, "its accuracy at S = 4096 was not measured"),
        ({"devices": 4}, "a mesh of 4 devices: it was measured on one"),
    ],
)
def test_it_proves_what_it_measured_and_nothing_else(change: dict[str, Any], why: str | None) -> None:
    keep(KIND, whole(), made_at="")
    choice = choose(replace(CALL, **change))
    assert (choice.name == "hopper") == (why is None)
    assert why is None or why in choice.passed_over["hopper"]


def without(found: list[Evidence], *indices: int) -> list[Evidence]:
    return [each for i, each in enumerate(found) if i not in indices]


@pytest.mark.parametrize(
    ("evidence", "why"),
    [
        ([], "its accuracy at S = 4096 was not measured"),
        (whole()[:5], "its time at S = 4096 was not measured"),
        (whole()[5:], "its accuracy"),
        (without(whole(), 1), "its accuracy"),
        (without(whole(), 8), "its time at S = 4096 was not measured"),
        ([*whole(), accuracy(2048, error=1.3)], "inaccurate at S = 2048: 1.30 times its dtype's error"),
        ([*whole(), accuracy(2048, leave_out="dk")], "inaccurate at S = 2048"),
        ([*whole(), accuracy(2048, error=-1.0)], "inaccurate at S = 2048"),
        ([*whole(), times(4096, "forward", seconds=2.1)], "no faster than blockwise at S = 4096, forward"),
        ([*whole(), times(4096, "forward", seconds=0.0)], "no faster than blockwise"),
        ([*whole(), times(4096, "forward", others={"reference": 9.0})], "no faster than blockwise"),
        ([*whole(), times(4096, "forward", others={})], "no faster than blockwise"),
    ],
    ids=range(12),
)
def test_a_partial_record_or_one_of_failures_chooses_nothing(evidence: list[Evidence], why: str) -> None:
    keep(KIND, evidence, made_at="")
    choice = choose(CALL)
    assert choice.name == "blockwise"
    assert why in choice.passed_over["hopper"]


def test_a_figure_that_is_no_number_is_no_evidence() -> None:
    for figure in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="finite number"):
            accuracy(128, error=figure)


def _replaced(path: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool = False) -> None:
    loaded = json.loads(path.read_text())
    change(loaded["record"])
    if sealed:  # by someone who knows how
        loaded["sha256"] = proven._digest(loaded["record"])
    path.write_text(json.dumps(loaded))


FORGERIES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "empty": lambda path: path.write_bytes(b""),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "another JSON": lambda path: path.write_text("[1, 2]"),
    "deeply nested": lambda path: path.write_text("[" * 100_000),
    "a quicker time": lambda path: _replaced(path, lambda r: r["evidence"][-1].update(seconds=0.1)),
    "a field too many": lambda path: _replaced(path, lambda r: r.update(verdict="take it"), sealed=True),
    "a field too few": lambda path: _replaced(path, lambda r: r["evidence"][-1].pop("others"), sealed=True),
    "words for a number": lambda path: _replaced(path, lambda r: r["evidence"][-1].update(seconds="1"), sealed=True),
    "another device": lambda path: _replaced(path, lambda r: r.update(device_kind="NVIDIA H200"), sealed=True),
    "another jaxlib": lambda path: _replaced(path, lambda r: r.update(jaxlib="0.9.0"), sealed=True),
    "another source": lambda path: _replaced(path, lambda r: r.update(source_sha256="0" * 64), sealed=True),
    "another schema": lambda path: _replaced(path, lambda r: r.update(schema_version=2), sealed=True),
    "writable by all": lambda path: path.chmod(0o666),
    "writable by the group": lambda path: path.chmod(0o660),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", FORGERIES)
def test_a_forged_or_stale_record_chooses_nothing(how: str) -> None:
    path = keep(KIND, whole(), made_at="")
    assert choose(CALL).name == "hopper"
    FORGERIES[how](path)
    proven.read.cache_clear()
    choice = choose(CALL)
    assert choice.name == "blockwise"
    assert f"not proven on {KIND}" in choice.passed_over["hopper"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_record_of_another_user_chooses_nothing() -> None:
    path = keep(KIND, whole(), made_at="")
    os.chown(path, 12345, -1)
    proven.read.cache_clear()
    assert "users other than its owner" in choose(CALL).passed_over["hopper"]


def test_records_of_other_versions_and_devices_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(KIND, whole(), made_at="")
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("cpu", "9.0", "NVIDIA H200"))
    assert "(no record)" in choose(CALL).passed_over["hopper"]
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("cpu", "9.0", KIND))
    monkeypatch.setattr(proven, "source_sha256", lambda: "1" * 64)
    assert "(no record)" in choose(CALL).passed_over["hopper"]


def test_the_source_is_that_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = proven.source_sha256.__wrapped__()
    assert proven.source_sha256() == before
    (tmp_path / "hopper").mkdir()
    for file in Path(hopper.__file__).parent.glob("*.py"):
        (tmp_path / "hopper" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(proven, "__file__", str(tmp_path / "proven.py"))
    assert proven.source_sha256.__wrapped__() == before
    (tmp_path / "hopper" / "tile.py").write_text("# changed")
    assert proven.source_sha256.__wrapped__() != before


def tile_times(tiles: Tiles, seconds: float) -> TileTimes:
    return TileTimes(**OF, length=4096, tiles=tiles, seconds=seconds, default_seconds=1.0)


@pytest.mark.parametrize(
    ("more", "taken"),
    [
        ([tile_times(SPLIT, 0.8), *(accuracy(length, tiles=SPLIT) for length in LENGTHS)], SPLIT),
        ([tile_times(SPLIT, 1.2), *(accuracy(length, tiles=SPLIT) for length in LENGTHS)], Tiles()),
        ([tile_times(SPLIT, 0.8)], Tiles()),
        ([tile_times(SPLIT, 0.8), *(accuracy(length, tiles=SPLIT, error=1.3) for length in LENGTHS)], Tiles()),
        ([tile_times(SPLIT, 0.8), *(accuracy(length, tiles=SPLIT) for length in LENGTHS[:-1])], Tiles()),
    ],
)
def test_the_quickest_tiles_that_are_as_accurate_are_taken(
    more: list[Evidence], taken: Tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(KIND, [*whole(), *more], made_at="")
    proof = choose(CALL).proof
    assert proof is not None
    assert proof.tiles == taken
    given = []

    def kernels(q: Any, k: Any, v: Any, spec: Any, tiles: Tiles | None = None) -> Any:
        given.append(tiles)
        return v

    monkeypatch.setattr(hopper, "hopper", kernels)
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("cuda", "9.0", KIND))
    from xattn.backend import attention

    q = jnp.zeros((1, 1, 4096, 64), jnp.bfloat16)
    attention(q, q, q, activation_function="sigmoid")
    attention(q, q, q, activation_function="sigmoid", implementation="hopper")
    assert given == [taken, None], "auto takes the record's tiles, a name the default one"


def test_a_process_sees_one_state_of_the_record() -> None:
    """What is compiled is what was chosen, noted and written into summary.json."""
    path = keep(KIND, whole(), made_at="")
    assert choose(CALL).name == "hopper"
    path.unlink()
    assert choose(CALL).name == "hopper"


def test_a_run_is_chosen_its_kernels_by_the_same_record() -> None:
    keep(KIND, whole(), made_at="")
    keys = ["backend=sigmoid", "backend.context_length=4096", "model.dtype=bfloat16"]
    config = compose([*keys, "model.embedding_dim=128", "model.num_heads=2"])
    where = type("Hardware", (), {"platform": "cuda", "compute_capability": "9.0"})()
    assert choose_attention(config, context=1, hardware=where)["backend"].name == "hopper"
    split = choose_attention(config, context=1, devices=2, hardware=where)["backend"]
    assert "a mesh of 2 devices" in split.passed_over["hopper"]


def test_a_record_survives_being_written_and_read() -> None:
    keep(KIND, [*whole(), tile_times(SPLIT, 0.5)], made_at="now")
    found = proven.read(proven.identity(KIND))
    assert isinstance(found, Record)
    assert found.evidence == (*whole(), tile_times(SPLIT, 0.5))
