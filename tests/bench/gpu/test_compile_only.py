"""Programs for a GPU that is not here: which are compiled, how they are traced, what is read of what XLA dumps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import pytest

from xattn.backend import dispatch
from xattn.bench import ptxas
from xattn.bench.gpu import command, compile_only
from xattn.bench.gpu.checks import Settings
from xattn.bench.gpu.compiled import checks
from xattn.config import compose, config_type, sized
from xattn.section import CONF
from xattn.training.attention_choice import choose_attention

TINY = ["model.num_layers=1", "model.embedding_dim=128", "model.num_heads=2", "model.mlp_dim=8"]
SHORT = ["backend.context_length=8", "trainer.batch_size=2"]

BUFFERS = """
BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}:
 value: <11 p @0> (size=4096,offset=0): f32[1024]{0}
allocation 1: size 900, preallocated-temp:
 value: <12 fusion.1 @0> (size=512,offset=0): bf16[2,8,16]{2,1,0}
 value: <13 dot @0> (size=800,offset=64): f32[200]{0}
allocation 2: size 4, output shape is |f32[]|, maybe-live-out:
 value: <14 add @0> (size=4,offset=0): f32[]
"""


def test_the_rows_are_whole_and_their_configs_are_valid() -> None:
    rows = {check.name: check for check in checks()}
    presets = {path.stem for path in (CONF / "backend").glob("*.yaml")}
    assert {name.removeprefix("preset-") for name in rows if name.startswith("preset-")} | {
        "softmax",
        "sigmoid",
        "none",
    } == presets
    for kind in ("step", "evaluation", "decode", "pack"):
        assert sum(name.startswith(f"{kind}-") for name in rows) == 6, "three activations, two dtypes"
    assert {"gpt2-softmax", "gpt2-hopper", "remat-full", "remat-dots", "hopper-sigmoid"} <= rows.keys()
    for check in rows.values():
        if check.function == "compile_only.program":
            config = sized(compose([*check.arguments["overrides"], "data=python_stdlib"]), 256)
            assert isinstance(config, config_type())


def test_within_a_target_the_table_is_asked_for_it() -> None:
    """And nothing of it is left behind."""
    before = dispatch.target().platform
    with dispatch.compiling_for(compile_only.H100):
        assert (dispatch.target().platform, dispatch.target().compute_capability) == ("cuda", "9.0")
        choice = choose_attention(compose(["model.dtype=bfloat16"]), context=1)["backend"]
        assert choice.name == "cudnn"
        passed_over = choose_attention(compose(["backend=sigmoid", "model.dtype=bfloat16"]), context=1)["backend"]
        assert "does not support the head widths" in passed_over.passed_over["hopper"]
        with pytest.raises(RuntimeError), dispatch.compiling_for(dispatch.Target("tpu", "", "TPU v5")):
            raise RuntimeError
        assert dispatch.target().platform == "cuda"
    assert dispatch.target().platform == before


@pytest.mark.parametrize("kind", ["step", "evaluation", "decode"])
@pytest.mark.parametrize("size", [1, 2])
def test_each_program_is_lowered_from_shapes_alone(kind: str, size: int) -> None:
    if size > 1 and kind != "step":
        pytest.skip("only steps are packed")
    lowered = compile_only._lowered(kind, [*TINY, *SHORT, "backend=gla"], 16, size, lambda tree: tree)
    assert lowered.out_info is not None


def test_the_largest_temporary_is_read_and_is_no_argument_or_result(tmp_path: Path) -> None:
    assert compile_only.largest_temporary(tmp_path) is None
    (tmp_path / "module_0001.jit_step-buffer-assignment.txt").write_text(BUFFERS)
    (tmp_path / "module_0000.small-buffer-assignment.txt").write_text("allocation 0: size 4, preallocated-temp:")
    assert compile_only.largest_temporary(tmp_path) == compile_only.Temporary(800, "f32[200]")


def test_spills_are_the_assemblers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    said = (
        "ptxas info    : Compiling entry function 'fusion_1' for 'sm_90a'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 28 bytes spill loads\n"
        "ptxas info    : Used 255 registers\n"
        "ptxas info    : Compiling entry function 'fusion_2' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 25 registers\n"
    )
    (tmp_path / "said").write_text(said)
    assembler = tmp_path / "bin" / "ptxas"
    assembler.write_text(f"#!/bin/sh\nbasename $3 >> {tmp_path / 'asked'}\ncat {tmp_path / 'said'} >&2\n")
    assembler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "module.ptx").write_text(".version 8.8")
    (tmp_path / "without_a_kernel.ptx").write_text("")
    assert compile_only.spills(tmp_path) == {"fusion_1": 12}
    assert (tmp_path / "asked").read_text().split() == ["module.ptx"]
    assembler.write_text("#!/bin/sh\necho 'ptxas fatal: no' >&2; exit 255\n")
    with pytest.raises(RuntimeError, match="ptxas fatal: no"):
        compile_only.spills(tmp_path)


def test_the_command_takes_the_other_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def run_check(check: Any, settings: Any, seconds: float, on_finding: Any) -> Any:
        made.append((check.name, seconds > 3000))
        return command._not_yet(check).model_copy(update={"outcome": "passed"})

    monkeypatch.setattr(command, "run_check", run_check)
    assert command.main(["--compile-only", "h100", "--only", "gpt2", "--output", str(tmp_path)]) == 0
    assert [name for name, _ in made] == ["environment", *(check.name for check in checks() if "gpt2" in check.name)]
    assert all(has_time for _, has_time in made)
    assert (tmp_path / "gpu-h100.json").exists()
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.slow
def test_a_decode_step_is_compiled_for_an_absent_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        ptxas.absent_h100()
    except NotImplementedError:
        pytest.skip("needs jax's CUDA plugin (the extra cuda) and ptxas")
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    jax.clear_caches()
    overrides = [*TINY, *SHORT, "backend=sigmoid"]
    found = {each.what: each.value for each in compile_only.program(Settings(tmp_path, None), "decode", overrides)}
    assert found["arguments"] > 0
    assert found["cuDNN calls"] == 0
