"""The plan of a run compared with its compiled step: parameters, FLOPs and memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.quick import composed
from xattn.cli import main
from xattn.commands.plan import Plan, _in_units, plan
from xattn.config import Config, compose
from xattn.errors import BadInput
from xattn.system.hardware import HARDWARE, hardware_of
from xattn.training.programs import hyperparameters, num_params, programs

ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
SMALL = [
    *("model.num_layers=3", "model.num_heads=2", "model.embedding_dim=64", "model.mlp_dim=160"),
    *("backend.context_length=128", "trainer.batch_size=8", "model.layers=scanned"),
]


# What the terms are compared with; the sequence is long enough that blocks save memory.
BLOCKWISE = ("backend.context_length=256", "backend.implementation=blockwise")


def config_of(*overrides: str) -> Config:
    return composed(*SMALL, *overrides)


def planned(config: Config, mesh: dict[str, int] = ONE, vocab_size: int = 256) -> Plan:
    return plan(config, vocab_size, HARDWARE["h100"], mesh)


@pytest.mark.parametrize(
    "overrides",
    [
        BLOCKWISE,
        ["model.remat=full"],
        ["trainer.gradient_accumulation=4", "optimizer=muon"],
        ["model.mlp=gelu", "model.norm_placement=pre", "model.qk_norm=none", "backend.implementation=reference"],
    ],
)
def test_it_is_what_the_compiled_step_needs(overrides: Sequence[str]) -> None:
    config = config_of(*overrides)
    compiled, _ = programs(config, 256)
    found = planned(config)
    assert found.parameters == num_params(jax.eval_shape(compiled.init, hyperparameters(config)))
    assert found.flops_per_step == compiled.flops_per_step
    assert compiled.peak_memory_bytes / 2 < found.memory_bytes < compiled.peak_memory_bytes * 2


PATTERN = ("backend=sigmoid", "backend.sigmoid_bias=learned", "backend.every=2")


def test_of_two_kinds_of_layers_it_is_what_the_compiled_step_needs() -> None:
    """Parameters that one kind alone has included: of three layers two have a bias."""
    config = config_of(*PATTERN, "backend.then={activation: none}")
    compiled, _ = programs(config, 256)
    found = planned(config)
    params = jax.eval_shape(compiled.init, hyperparameters(config)).params
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found.parameters == planned(config_of("backend=none")).parameters + 2 * 2
    assert found.flops_per_step == compiled.flops_per_step
    assert found.flops_per_step == planned(config_of("backend=none")).flops_per_step
    assert compiled.peak_memory_bytes / 2 < found.memory_bytes < compiled.peak_memory_bytes * 2


TERMS = [
    *("model.conv=3", "model.value_residual=first", "model.exclusive=true", "model.output_norm=rmsnorm"),
    "model.output_gate=channel",
]


def test_what_the_terms_around_attention_need_is_what_the_compiled_step_needs_more() -> None:
    def needed(*overrides: str) -> tuple[int, int]:
        config = config_of(*BLOCKWISE, *overrides)
        compiled, _ = programs(config, 256)
        found = planned(config)
        assert found.flops_per_step == compiled.flops_per_step
        return found.memory_bytes, compiled.peak_memory_bytes

    (plain, compiled_plain), (with_terms, compiled_with_terms) = needed(), needed(*TERMS)
    assert 0.5 < (compiled_with_terms - compiled_plain) / (with_terms - plain) < 2


@pytest.mark.parametrize(
    ("keys", "then", "more"),
    [
        (["model.output_gate=channel", "model.conv=3"], "{theta: 500}", 3 * (2 * 64 * 64 + 2 * 3 * 3 * 64)),
        (["backend.decay=input"], "{decay: none}", 2 * (2 * 64 * 2)),
        (["backend.decay=none"], "{decay: input, input_gate: sigmoid}", 1 * (2 * 64 * 2 + 2 * 64 * 2)),
    ],
)
def test_a_term_costs_in_the_layers_that_have_it(keys: list[str], then: str, more: int) -> None:
    """Of three layers of width 64 and two heads the second is ``then``. more: FLOPs of a token's forward pass."""
    plain, mixed = planned(config_of()), planned(config_of(*keys, "backend.every=2", f"backend.then={then}"))
    assert mixed.flops_per_step - plain.flops_per_step == 3 * (8 * 128) * more
    assert mixed.memory["activations"] > plain.memory["activations"]


def test_one_kinds_terms_are_not_counted_for_the_others_layers() -> None:
    """What each layer keeps, and while a layer's gradient is computed twice that of the greatest."""

    def activations(*overrides: str) -> int:
        config = config_of("model.num_layers=8", "backend.implementation=reference", *overrides)
        return planned(config).memory["activations"]

    none, every = activations(), activations("backend.decay=input")
    one_of_four = activations("backend.every=4", "backend.then={decay: input}")
    assert one_of_four - none == pytest.approx((every - none) * (2 + 2) / (8 + 2), rel=1e-6)


@pytest.mark.parametrize(("layers", "every", "of_reference"), [(5, 2, 2), (6, 3, 2)])
def test_each_layer_keeps_what_its_kinds_attention_keeps(layers: int, every: int, of_reference: int) -> None:
    """S×S weights in the layers alone that are computed by the reference."""

    def activations(*overrides: str) -> dict[str, int]:
        config = config_of("backend.context_length=2048", f"model.num_layers={layers}", *overrides)
        return planned(config).memory

    blockwise = activations("backend.implementation=blockwise")
    reference = activations("backend.implementation=reference")
    pattern = [f"backend.every={every}", "backend.then={implementation: reference}"]
    mixed = activations("backend.implementation=blockwise", *pattern)
    assert blockwise["activations"] < mixed["activations"] < reference["activations"]
    # What each layer keeps, and while a layer's gradient is computed twice that of the greatest.
    weights = (reference["activations"] - blockwise["activations"]) / (layers + 2)
    assert mixed["activations"] - blockwise["activations"] == pytest.approx((of_reference + 2) * weights, rel=1e-6)
    assert {**mixed, "activations": 0} == {**blockwise, "activations": 0}


def test_each_layer_sends_what_its_kinds_attention_exchanges() -> None:
    def sent(*overrides: str) -> int:
        config = config_of("backend.context_length=1024", *overrides)
        return planned(config, ONE | {"context": 4}).communication["context"]

    states, ring = sent("backend=none"), sent("backend=softmax")
    mixed = sent("backend=none", "backend.every=2", "backend.then={activation: softmax}")
    assert mixed - states == pytest.approx((ring - states) / 3)  # one of three layers


def test_the_kind_that_cannot_be_computed_is_named() -> None:
    config = config_of("backend.every=2", "backend.then={activation: sigmoid, implementation: cudnn}")
    with pytest.raises(BadInput, match=r"^backend\.then\.implementation: .*'cudnn' does not support"):
        planned(config)


def test_the_flops_are_those_that_xla_counts() -> None:
    """In the program as it is before XLA optimises it, attention over all of S×S: within a quarter."""
    config = config_of("backend.implementation=reference", "model.layers=unrolled")
    import jax.numpy as jnp

    from xattn.model.transformer import LanguageModel, LayerHyperparameters

    model = LanguageModel(config.model, config.backend, 256)
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    hyper = LayerHyperparameters(1e4, 0.0)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 128), jnp.int32), hyper)["params"])

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        losses: Any = model.apply({"params": params}, tokens, hyper, tokens, method="losses")
        return losses.sum()

    counted = jax.jit(jax.grad(loss)).lower(params, tokens).cost_analysis()["flops"]
    assert 0.75 < counted / planned(config).flops_per_step < 1.25


def test_a_mesh_shares_out_what_it_should() -> None:
    config = config_of("trainer.batch_size=32")
    one = planned(config)
    assert one.communication == {}
    fsdp = planned(config, ONE | {"fsdp": 4})
    assert fsdp.memory["parameters"] == one.memory["parameters"] // 4
    assert fsdp.memory["activations"] == one.memory["activations"] // 4
    data = planned(config, ONE | {"data": 4})
    assert data.memory["parameters"] == one.memory["parameters"]
    assert data.memory["activations"] == one.memory["activations"] // 4
    # A sum over n devices sends 2 (n − 1)/n of the gradient; fsdp gathers the parameters twice and scatters the sum.
    assert data.communication == {"data": 2 * 3 * 4 * one.parameters // 4}
    assert fsdp.communication == {"fsdp": 3 * 3 * 4 * one.parameters // 4}
    in_parts = config_of("trainer.batch_size=32", "trainer.gradient_accumulation=2")
    for mesh, at_once in (({"data": 4}, data), ({"fsdp": 4}, fsdp)):
        sent = planned(in_parts, ONE | mesh).communication
        assert sent == {axis: 2 * amount for axis, amount in at_once.communication.items()}
    split = [planned(some, ONE | {"context": 4}).communication["context"] for some in (config, in_parts)]
    assert split[1] - split[0] == data.communication["data"]  # attention's is of the rows
    rounded = planned(config_of("trainer.batch_size=32", "model.matmul_precision=bfloat16"))
    assert rounded.compute_seconds < one.compute_seconds
    assert data.compute_seconds < one.compute_seconds
    assert data.communication_seconds == pytest.approx(data.communication["data"] / HARDWARE["h100"].link)
    far = planned(config_of("trainer.batch_size=32"), ONE | {"data": 16})
    assert far.communication_seconds > data.communication_seconds * 8  # between machines


def test_a_split_sequence_sends_what_its_implementation_exchanges() -> None:
    def sent(*overrides: str, length: int) -> float:
        config = config_of(f"backend.context_length={length}", *overrides)
        found = planned(config, ONE | {"context": 4})
        return found.communication["context"] - 2 * 3 * 4 * found.parameters // 4  # less the sum of the gradients

    rows, layers, width, heads = 8, 3, 64, 2
    keys_values = 2 * 4 * rows * width  # bytes a token
    assert sent("backend=softmax", length=128) == layers * 3 * 3 * keys_values * 128 // 4
    assert sent("backend=softmax", length=1024) == layers * (2 * 3 + 4) * keys_values * 1024 // 4
    states = 4 * 4 * rows * heads * (width // heads) ** 2
    assert sent("backend=none", length=1024) == sent("backend=none", length=4096) == layers * 2 * 3 * states // 4


def test_attention_is_what_it_would_be_on_the_devices_that_are_planned() -> None:
    """Whatever is here: a CPU, most often."""
    gpt2 = ["model=gpt2", "backend.context_length=128", "trainer.batch_size=8"]

    def activations(device: str, *overrides: str) -> int:
        return plan(compose([*gpt2, *overrides]), 256, HARDWARE[device], ONE).memory["activations"]

    # cuDNN keeps no S×S weights; the table's first choice for so short a sequence elsewhere does.
    assert activations("h100") == activations("h100", "backend.implementation=blockwise") < activations("tpu-v4")
    assert activations("tpu-v4") == activations("h100", "backend.implementation=reference")
    hopper = ["backend=sigmoid", "backend.implementation=hopper"]
    assert activations("h200", *hopper) == activations("h200", "backend=sigmoid", "backend.implementation=blockwise")
    with pytest.raises(BadInput, match=r"backend.implementation: .*'hopper' does not support compute capability 8.0"):
        activations("a100", *hopper)
    with pytest.raises(BadInput, match="'cudnn' does not support the platform tpu"):
        activations("tpu-v5p", "backend.implementation=cudnn")


def test_packed_documents_of_linear_attention_send_states_too() -> None:
    config = [*SMALL, "backend=none", "backend.context_length=4096"]
    joined, packed = (
        planned(compose([*config, f"data.documents={documents}"]), ONE | {"context": 4}).communication["context"]
        for documents in ("joined", "packed")
    )
    assert packed == joined  # a state a device; keys and values would be more than twice as much


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--device", "h100", "--devices", "8"]
    assert main(["plan", *SMALL, "parallel=fsdp", *where, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["mesh"]["fsdp"] == 8
    assert record["vocab_size"] >= 256
    assert main(["plan", *SMALL, "trainer.batch_size=1048576", *where, "parallel=data", "--vocab-size", "50304"]) == 0
    printed = capsys.readouterr().out
    assert "8 × h100 (data 8)" in printed
    assert "does not fit; what helps: trainer.gradient_accumulation=2" in printed
    assert "model.dtype=bfloat16" in printed  # it is a GPU's plan, whatever is here
    assert "idle" not in printed
    assert main(["plan", *SMALL, *where]) == 0
    printed = capsys.readouterr().out
    assert "1 × h100\n7 more stay idle: parallel=data, fsdp" in printed
    assert main(["plan", *SMALL, "backend.implementation=cudnn", "--device", "h100"]) == 2
    assert "'cudnn' does not support float32" in capsys.readouterr().err
    assert main(["plan", "--device", "h100", "--devices", "8", "parallel.data=3"]) == 2
    assert "a mesh of 3 devices" in capsys.readouterr().err
    for words, told in (
        (["parallel=tensor", "model.num_heads=4"], "model.num_heads = 4 is not a multiple of tensor = 8"),
        (["parallel=context", "backend.context_length=100"], "backend.context_length = 100 is not a multiple"),
        (["--vocab-size", "0"], "--vocab-size: 0: must be at least 1"),
        (["--config-dir", "gone"], "--config-dir = gone: no such folder"),
    ):
        assert main(["plan", *SMALL, *where, *words]) == 2
        assert told in capsys.readouterr().err


def test_a_number_of_parameters_is_that_of_the_vocabulary_that_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    for size in ([], ["--vocab-size", "5000"]):
        assert main(["plan", *SMALL, "model.parameters=800000", "--device", "h100", *size, "--json"]) == 0
        assert abs(json.loads(capsys.readouterr().out)["parameters"] - 800_000) <= 3 * 3 * 64 / 2
    assert main(["plan", *SMALL, "model.parameters=500000", "--device", "h100", "--vocab-size", "50000"]) == 2
    assert "model.parameters = 500000: must be at least 6" in capsys.readouterr().err


def test_the_vocabulary_of_a_tokenizers_file_is_planned_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """data.vocab_size is another's, of bpe."""
    file = tmp_path / "tokenizer.json"
    typed = ["plan", *SMALL, "data=text", "data.path=nowhere", f"data.tokenizer={file}", "--device", "h100", "--json"]
    assert main(typed) == 2
    assert capsys.readouterr().err.startswith("xattn: data.tokenizer = ")
    assert main([*typed, "--vocab-size", "70"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 70
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(61)}, "unk_token": "w0"}
    file.write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}), "utf-8")
    assert main(typed) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 61


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0123, "0.0123 s"),
        (5.31, "5.31 s"),
        (119.0, "119 s"),
        (120.0, "2.00 min"),
        (7199, "120 min"),
        (9000, "2.50 h"),
    ],
)
def test_a_time_is_shown_in_the_unit_that_suits_it(seconds: float, shown: str) -> None:
    assert _in_units(seconds) == shown


def test_devices_are_known_by_what_jax_calls_them() -> None:
    assert hardware_of("NVIDIA H100 80GB HBM3") == HARDWARE["h100"]
    assert hardware_of("TPU v5 lite") == HARDWARE["tpu-v5e"]
    assert hardware_of("TPU v5p") == HARDWARE["tpu-v5p"]
    assert hardware_of("cpu") is None
