"""The plan of a run against what its compiled step says: parameters, FLOPs and memory."""

from __future__ import annotations

import json
from typing import Any

import jax
import pytest

from xattn.cli import main
from xattn.config import Config, compose
from xattn.errors import BadInput
from xattn.hardware import HARDWARE, hardware_of
from xattn.plan import Plan, plan
from xattn.training.programs import hyperparameters, num_params, programs

ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
SMALL = [
    *("model.num_layers=3", "model.num_heads=2", "model.embedding_dim=64", "model.mlp_dim=160"),
    *("backend.context_length=128", "trainer.batch_size=8", "model.layers=scanned"),
]


def planned(config: Config, mesh: dict[str, int] = ONE, vocab_size: int = 256) -> Plan:
    return plan(config, vocab_size, HARDWARE["h100"], mesh)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.remat=full"],
        ["trainer.gradient_accumulation=4", "optimizer=muon"],
        ["model.mlp=gelu", "model.norm_placement=pre", "model.qk_norm=none", "backend.implementation=reference"],
    ],
)
def test_it_is_what_the_compiled_step_needs(overrides: list[str]) -> None:
    config = compose([*SMALL, *overrides])
    compiled, _ = programs(config, 256)
    found = planned(config)
    assert found.parameters == num_params(jax.eval_shape(compiled.init, hyperparameters(config)))
    assert found.flops_per_step == compiled.flops_per_step
    assert compiled.peak_memory_bytes / 2 < found.memory_bytes < compiled.peak_memory_bytes * 2


PATTERN = ("backend=sigmoid", "backend.sigmoid_bias=learned", "backend.every=2")


def test_of_two_kinds_of_layers_it_is_what_the_compiled_step_needs() -> None:
    """Parameters that one kind alone has included: of three layers two have a bias."""
    config = compose([*SMALL, *PATTERN, "backend.then={activation: none}"])
    compiled, _ = programs(config, 256)
    found = planned(config)
    params = jax.eval_shape(compiled.init, hyperparameters(config)).params
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found.parameters == planned(compose([*SMALL, "backend=none"])).parameters + 2 * 2
    assert found.flops_per_step == compiled.flops_per_step
    assert found.flops_per_step == planned(compose([*SMALL, "backend=none"])).flops_per_step
    assert compiled.peak_memory_bytes / 2 < found.memory_bytes < compiled.peak_memory_bytes * 2


@pytest.mark.parametrize(("layers", "every", "of_reference"), [(4, 2, 2), (5, 2, 2), (6, 3, 2), (5, 5, 1)])
def test_each_layer_keeps_what_its_kinds_attention_keeps(layers: int, every: int, of_reference: int) -> None:
    """S×S weights in the layers alone that are computed by the reference."""

    def activations(*overrides: str) -> dict[str, int]:
        config = [*SMALL, "backend.context_length=2048", f"model.num_layers={layers}", *overrides]
        return planned(compose(config)).memory

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
        config = compose([*SMALL, "backend.context_length=1024", *overrides])
        return planned(config, ONE | {"context": 4}).communication["context"]

    states, ring = sent("backend=none"), sent("backend=softmax")
    mixed = sent("backend=none", "backend.every=2", "backend.then={activation: softmax}")
    assert mixed - states == pytest.approx((ring - states) / 3)  # one of three layers


def test_the_kind_that_cannot_be_computed_is_named() -> None:
    config = compose([*SMALL, "backend.every=2", "backend.then={activation: sigmoid, implementation: cudnn}"])
    with pytest.raises(BadInput, match=r"^backend\.then\.implementation: .*'cudnn' does not support"):
        planned(config)


def test_the_flops_are_those_that_xla_counts() -> None:
    """In the program as it is before XLA optimises it, attention over all of S×S: within a quarter."""
    config = compose([*SMALL, "backend.implementation=reference", "model.layers=unrolled"])
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
    config = compose([*SMALL, "trainer.batch_size=32"])
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
    in_parts = compose([*SMALL, "trainer.batch_size=32", "trainer.gradient_accumulation=2"])
    for mesh, at_once in (({"data": 4}, data), ({"fsdp": 4}, fsdp)):
        sent = planned(in_parts, ONE | mesh).communication
        assert sent == {axis: 2 * amount for axis, amount in at_once.communication.items()}
    split = [planned(some, ONE | {"context": 4}).communication["context"] for some in (config, in_parts)]
    assert split[1] - split[0] == data.communication["data"]  # attention's is of the rows
    rounded = planned(compose([*SMALL, "trainer.batch_size=32", "model.matmul_precision=bfloat16"]))
    assert rounded.compute_seconds < one.compute_seconds
    assert data.compute_seconds < one.compute_seconds
    assert data.communication_seconds == pytest.approx(data.communication["data"] / HARDWARE["h100"].link)
    far = planned(compose([*SMALL, "trainer.batch_size=32"]), ONE | {"data": 16})
    assert far.communication_seconds > data.communication_seconds * 8  # between machines


def test_a_split_sequence_sends_what_its_implementation_exchanges() -> None:
    def sent(*overrides: str, length: int) -> float:
        config = compose([*SMALL, f"backend.context_length={length}", *overrides])
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


def test_packed_documents_go_round_the_ring_as_they_would_in_the_run() -> None:
    config = [*SMALL, "backend=none", "backend.context_length=4096"]
    joined, packed = (
        planned(compose([*config, f"data.documents={documents}"]), ONE | {"context": 4}).communication["context"]
        for documents in ("joined", "packed")
    )
    assert packed > 2 * joined  # a state a device, or all keys and values


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
    ):
        assert main(["plan", *SMALL, *where, *words]) == 2
        assert told in capsys.readouterr().err


def test_devices_are_known_by_what_jax_calls_them() -> None:
    assert hardware_of("NVIDIA H100 80GB HBM3") == HARDWARE["h100"]
    assert hardware_of("TPU v5 lite") == HARDWARE["tpu-v5e"]
    assert hardware_of("TPU v5p") == HARDWARE["tpu-v5p"]
    assert hardware_of("cpu") is None
