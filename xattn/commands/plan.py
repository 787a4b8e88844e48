"""``xattn plan``: the cost of a run before anything is compiled, on the devices here or on others.

    xattn plan model=gpt2 trainer.batch_size=512 parallel.fsdp=null --device h100 --devices 8 --vocab-size 50304

Parameters and optimizer state are counted exactly. FLOPs are those of the matrix products, by formula. Memory and time
are estimates: docs/cost.md has the formulas, and their errors where they could be measured.

Shape letters: B batch, NH heads, S sequence, D embedding, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from xattn.backend.dispatch import target
from xattn.config import Config, compose, sized
from xattn.data.corpus_tokenizer import vocab_size as vocab_size_of
from xattn.model.config import BackendConfig, ModelConfig
from xattn.model.loss import MOST_LOGITS
from xattn.model.pattern import layers_of
from xattn.model.size import matmul_flops_per_token
from xattn.model.transformer import LanguageModel, init_params
from xattn.system.arguments import Parser, whole
from xattn.system.hardware import HARDWARE, NETWORK, Hardware, hardware_of, measured_peak
from xattn.tracking.display import Screen
from xattn.training.attention_choice import choose_attention
from xattn.training.memory import available_bytes, what_helps
from xattn.training.optimizer import OptimizerHyperparameters, optimizer
from xattn.training.sharding import check_mesh, mesh_sizes

# The share of a device's peak that large models reach over whole training steps, without the time spent waiting.
EFFICIENCY = 0.45


@dataclass(frozen=True)
class Plan:
    """The cost of one update, per device unless noted."""

    mesh: dict[str, int]
    """The size of each axis."""
    parameters: int
    """Of the whole model."""
    flops_per_step: int
    """Of the whole batch."""
    tokens_per_step: int
    memory: dict[str, int]
    """Bytes, by purpose."""
    communication: dict[str, int]
    """Bytes that a device sends, by axis."""
    compute_seconds: float
    communication_seconds: float
    """Adds to compute_seconds, unless it is hidden behind the computation."""

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


def plan(config: Config, vocab_size: int, hardware: Hardware, mesh: dict[str, int]) -> Plan:
    """Return the cost of a training step on this mesh. Raises :class:`xattn.errors.BadInput` if it cannot run there."""
    choices = choose_attention(config, context=mesh["context"], devices=math.prod(mesh.values()), hardware=hardware)
    layers = layers_of(config.backend, config.model.num_layers)
    attention = [(config.backend.kinds[kind], choices[kind].name) for kind, those in layers.items() for _ in those]
    parameters, optimizer_state = _state_sizes(config, vocab_size)
    tokens = config.trainer.batch_size * config.backend.context_length
    flops = 3 * tokens * matmul_flops_per_token(config.model, config.backend, vocab_size=vocab_size)
    again = 4 / 3 if config.model.remat == "full" else 1.0
    memory = _memory(config, vocab_size, parameters, optimizer_state, mesh, attention)
    sent = _communication(config, parameters, mesh, [name for _, name in attention])
    peak = EFFICIENCY * hardware.peak(config.model.factor_dtype)
    # Each update reads parameters, gradient and optimizer state once, and writes all but the gradient once.
    passes = 2 * (memory["parameters"] + memory["optimizer state"]) + memory["gradient"]
    return Plan(
        mesh=mesh,
        parameters=parameters,
        flops_per_step=flops,
        tokens_per_step=tokens,
        memory=memory,
        communication=sent,
        compute_seconds=again * flops / math.prod(mesh.values()) / peak + passes / hardware.bandwidth,
        communication_seconds=sum(amount / _speed(axis, mesh, hardware) for axis, amount in sent.items()),
    )


def _state_sizes(config: Config, vocab_size: int) -> tuple[int, int]:
    """Count the numbers in the parameters and in the optimizer's state."""
    model = LanguageModel(config.model, config.backend, vocab_size)
    params: Any = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    state = jax.eval_shape(optimizer(config.optimizer, OptimizerHyperparameters(1.0, 0.0, 1.0)).init, params)
    return tuple(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, state))


def _memory(
    config: Config,
    vocab_size: int,
    parameters: int,
    optimizer_state: int,
    mesh: dict[str, int],
    attention: Sequence[tuple[BackendConfig, str]],
) -> dict[str, int]:
    """Estimate memory in bytes, by purpose; attention: for each layer, its keys and its implementation."""
    model, shards = config.model, mesh["fsdp"] * mesh["tensor"]
    narrow = 2 if model.dtype == "bfloat16" else 4
    rows = config.trainer.batch_size / (mesh["data"] * mesh["fsdp"] * config.trainer.gradient_accumulation)
    tokens = rows * config.backend.context_length / mesh["context"]
    everything = [tokens * _kept_by_a_layer(model, layer, name) * narrow / mesh["tensor"] for layer, name in attention]
    stream = tokens * model.embedding_dim * narrow
    match model.remat:
        case "none":
            kept = sum(everything)
        case "dots":
            projections = sum(_projections(model, layer) for layer, _ in attention)
            kept = model.num_layers * stream + tokens * projections * narrow / mesh["tensor"]
        case "full":
            kept = model.num_layers * stream
    # While a layer's gradient is computed: its inputs and outputs, or all its activations again.
    working = 2 * max(everything)
    logits = min(tokens * vocab_size * narrow / mesh["tensor"], MOST_LOGITS[model.dtype])
    sums = 2 if config.trainer.gradient_accumulation > 1 else 1
    cast = 0 if narrow == 4 else 2
    return {
        "parameters": (4 + cast) * parameters // shards,
        "optimizer state": 4 * optimizer_state // shards,
        "gradient": 4 * sums * parameters // shards,
        "activations": int(kept + working),
        "logits": int(2 * logits),
    }


def _projections(model: ModelConfig, layer: BackendConfig) -> int:
    """Count the numbers per token that the projections of a layer produce."""
    d, kv = model.embedding_dim, model.kv_heads * model.head_dim
    gates = model.kv_heads * ((layer.decay == "input") + (layer.input_gate == "sigmoid"))
    gates += {"none": 0, "head": model.num_heads, "channel": d}[model.output_gate]
    return 3 * d + 2 * kv + (3 if model.mlp == "swiglu" else 1) * model.mlp_dim + gates


def _kept_by_a_layer(model: ModelConfig, layer: BackendConfig, attention: str) -> float:
    """Count numbers per token, in the model's dtype, kept for backward: inputs of norms, products and functions."""
    d, kv = model.embedding_dim, model.kv_heads * model.head_dim
    projected = d + 2 * kv
    rotated = d + kv
    normed = d + kv if model.qk_norm == "rmsnorm" else 0
    kept = 3 * d + projected + normed + rotated  # the stream, its norm, the output before its projection
    if model.norm_placement == "hybrid":
        kept += d
    if attention == "reference":
        kept += 2 * model.num_heads * layer.context_length
    kept += 2 * d + (4 if model.mlp == "swiglu" else 3) * model.mlp_dim
    # The terms around attention, its decay and its gate.
    in_float32 = 2 if model.dtype == "bfloat16" else 1
    taps = (model.conv or 0) * (d + 2 * kv)  # what each tap multiplies
    gates = {"none": 0, "head": d + model.num_heads, "channel": 2 * d}[model.output_gate]  # both factors
    outputs = d * (model.exclusive + (model.output_norm != "none")) + gates
    of_heads = 2 * model.kv_heads * ((layer.decay in ("learned", "input")) + (layer.input_gate == "sigmoid"))
    values = 2 * kv if model.value_residual == "first" else 0
    return kept + in_float32 * (taps + outputs + of_heads) + values


def _communication(config: Config, parameters: int, mesh: dict[str, int], attention: Sequence[str]) -> dict[str, int]:
    """Return the bytes that a device sends in an update, by axis; attention: its implementation in each layer.

    Among n devices, a gather or a scatter sends (n − 1)/n of the gathered array; an all-reduce is one of each.
    """
    model, parts = config.model, config.trainer.gradient_accumulation
    narrow = 2 if model.dtype == "bfloat16" else 4
    rows = config.trainer.batch_size / (mesh["data"] * mesh["fsdp"])
    tokens = rows * config.backend.context_length / mesh["context"]
    share = {axis: (size - 1) / size for axis, size in mesh.items()}
    keys_values = 2 * rows * config.backend.context_length * model.kv_heads * model.head_dim * narrow / mesh["tensor"]
    states = mesh["context"] * rows * model.kv_heads * model.head_dim**2 * 4 / mesh["tensor"]
    of_layer = {
        # Keys and values, forward and backward; their gradients in float32, all the way round.
        "ring": (2 * share["context"] + 4 / narrow) * keys_values,
        # Each device's state forward, and its gradient backward.
        "linear": 2 * share["context"] * states,
    }
    # The others: keys and values, forward and backward, and the reduce-scatter of their gradients.
    exchanged = sum(of_layer.get(each, 3 * share["context"] * keys_values) for each in attention)
    volumes = {
        # For each part of a batch: the all-reduce of the gradients.
        "data": parts * 2 * share["data"] * 4 * parameters / (mesh["fsdp"] * mesh["tensor"]),
        # For each part: the parameters forward and backward, and the reduce-scatter of the gradients.
        "fsdp": parts * 3 * share["fsdp"] * 4 * parameters / mesh["tensor"],
        # What attention exchanges in each layer; and for each part, the all-reduce of the gradients.
        "context": (mesh["context"] > 1) * exchanged
        + parts * 2 * share["context"] * 4 * parameters / (mesh["fsdp"] * mesh["tensor"]),
        # Two all-reduces of the stream per layer, forward and backward.
        "tensor": 8 * share["tensor"] * model.num_layers * tokens * model.embedding_dim * narrow,
    }
    return {axis: round(volume) for axis, volume in volumes.items() if volume}


def _speed(axis: str, mesh: dict[str, int], hardware: Hardware) -> float:
    """Return bytes per second along an axis: the network's, unless the axis and those inside it fit in one machine."""
    inner = list(mesh)[list(mesh).index(axis) :]
    within = math.prod(mesh[name] for name in inner) <= hardware.per_machine
    return hardware.link if within else NETWORK


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="xattn plan", description="Estimate what a run will cost before it starts.")
    parser.add_argument("overrides", nargs="*", help="overrides of the config, as for train.py")
    parser.add_argument(
        "--config-dir", type=Path, metavar="FOLDER", help="a folder of your own YAML files, laid out like conf/"
    )
    known = ", ".join(sorted(HARDWARE))
    parser.add_argument("--device", choices=HARDWARE, metavar="D", help=f"{known}; default: what is here")
    parser.add_argument(
        "--devices", type=whole(1), metavar="N", help="number of devices; the group `parallel` splits the work"
    )
    parser.add_argument("--vocab-size", type=whole(1), metavar="V", help="default: that of the data's tokenizer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args(argv)
    config = compose(options.overrides, config_dir=options.config_dir)
    vocab_size = options.vocab_size or vocab_size_of(config.data)
    config = sized(config, vocab_size)
    hardware = HARDWARE[options.device] if options.device else _here()
    devices = options.devices or (1 if options.device else jax.device_count())
    sizes = mesh_sizes(config.parallel, devices)
    check_mesh(config, sizes)
    found = plan(config, vocab_size, hardware, sizes)
    if options.json:
        print(json.dumps(asdict(found) | {"vocab_size": vocab_size, "device_memory": hardware.memory}, indent=1))
        return 0
    idle = devices - math.prod(found.mesh.values())
    _print(found, config, hardware, options.device or jax.local_devices()[0].device_kind, idle)
    return 0


def _here() -> Hardware:
    kind = jax.local_devices()[0].device_kind
    if (known := hardware_of(kind)) is not None:
        return known
    peaks = measured_peak("bfloat16"), measured_peak("float32")
    # A CPU: the bandwidths of its memory and between its devices are guesses that matter little.
    return Hardware(kind, *peaks, available_bytes(), 20e9, 10e9, 64, target().platform)


def _print(found: Plan, config: Config, hardware: Hardware, device: str, idle: int) -> None:
    console = Screen()
    devices = math.prod(found.mesh.values())
    axes = " × ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1)
    console.say(f"{devices} × {device}" + (f" ({axes})" if axes else ""))
    if idle:
        console.say(f"{idle} more stay idle: parallel=data, fsdp, context or tensor uses all of them")
    console.say(
        f"parameters    {found.parameters:,}\n"
        f"per update    {found.flops_per_step:.3g} FLOPs, {found.tokens_per_step:,} tokens"
    )
    table = Table("on each device", "GB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, amount in found.memory.items():
        table.add_row(name, f"{amount / 1e9:.3f}")
    for axis, amount in found.communication.items():
        table.add_row(f"sent along {axis}", f"{amount / 1e9:.3f}")
    console.print_table(table)
    fits = found.memory_bytes <= hardware.memory
    console.say(
        f"memory        {found.memory_bytes / 1e9:.2f} GB of {hardware.memory / 1e9:.1f}"
        + ("" if fits else f": does not fit; what helps: {what_helps(config, hardware.platform)}")
    )
    least, most = found.compute_seconds, found.compute_seconds + found.communication_seconds
    update = f"{least * 1e3:.2f} ms per update"
    if least != most:
        update = f"{least * 1e3:.2f} to {most * 1e3:.2f} ms per update, by how far communication overlaps computation"
    console.say(f"time          {update}")
    rate, in_all = found.tokens_per_step / most, _in_units(config.trainer.steps * most)
    console.say(f"              {rate:,.0f} tokens/s, {in_all} for {config.trainer.steps:,} updates")


def _in_units(seconds: float) -> str:
    """Return the time with three digits, in the unit that suits it."""
    unit, size = next(((unit, size) for unit, size in (("h", 3600), ("min", 60)) if seconds >= 2 * size), ("s", 1))
    return f"{seconds / size:#.3g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
