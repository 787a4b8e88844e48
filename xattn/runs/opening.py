"""How a run of a session begins: read its data and probes, record its devices, and open its files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

import xattn.config
from xattn.backend.dispatch import Choice
from xattn.data.batches import Batches, Prefetch
from xattn.data.run_data import RunData, load_data
from xattn.errors import BadInput
from xattn.evaluation.probes import Probe, Scene, make_probes
from xattn.runs import run_folder
from xattn.runs.record import Run
from xattn.runs.run_folder import shown
from xattn.tracking.tracker import sync_rows
from xattn.training.checkpoint import Checkpoints
from xattn.training.llama import initial_weights
from xattn.training.programs import Programs, TrainState, num_params
from xattn.training.sharding import Layout


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it begins: its data, and the probes made from them."""

    data: RunData
    probes: Sequence[Probe]


@dataclass(frozen=True, eq=False)
class Desk:
    """A run at work: its record, what it reads, its batches, and its open checkpoints."""

    run: Run
    inputs: Inputs
    batch: Batches
    checkpoints: Checkpoints


def read_inputs(run: Run, layout: Layout, stop: Callable[[], bool]) -> Inputs:
    """Read the run's data, and make its probes from them.

    ``stop`` is called while the corpus is tokenised; if it returns True, :class:`Preempted` is raised.
    """
    config = run.config
    with run.as_recorded():
        data = load_data(config.data, config.batching, say=run.display.say, stop=stop)
        rows = layout.sizes["data"] * layout.sizes["fsdp"]
        scene = Scene(config.data, data, config.backend, config.trainer.batch_size, rows)
        probes = make_probes(config.evaluation.probes, scene)
    weights, tokens = initial_weights(config) if run.is_new else None, data.tokenizer.vocab_size
    if weights is not None and weights.vocab_size != tokens:
        raise BadInput(
            f"model.init_from = {weights.folder}: its vocabulary has {weights.vocab_size} tokens, but the data's has "
            f"{tokens}; set data.tokenizer to the tokenizer.json of those weights"
        )
    return Inputs(data, probes)


def begin(
    run: Run, data: RunData, layout: Layout, choices: Mapping[str, Choice], pack: list[str] | None
) -> dict[str, Any]:
    """Make the folder a run's, and show what computes its attention; return provenance.json."""
    devices = {
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "mesh": layout.sizes,
    }
    origin = run.begin(data, devices, pack)
    display, kinds = run.display, run.config.backend.kinds
    display.say(f"run folder  {shown(run.folder.path)}")
    where = {"backend": "", "then": f" every {run.config.backend.every} layers"}
    records = {kind: choice.proof.record for kind, choice in choices.items() if choice.proof is not None}
    by = {kind: f" (record {records[kind]})" if kind in records else "" for kind in kinds}
    computed = (f"{kinds[kind].activation}{where[kind]}, computed by {choices[kind].name}{by[kind]}" for kind in kinds)
    display.say(f"attention   {'; '.join(computed)}")
    if layout.mesh is not None:
        display.say(f"devices     {layout}")
    for kind, choice in choices.items():
        of = f"{kinds[kind].activation} " if len(kinds) > 1 else ""
        for passed_over, reason in choice.passed_over.items():
            display.note(f"            {of}not by {passed_over}: {reason}")
    if pack is not None:
        display.note(f"pack        {len(pack)} runs: {', '.join(pack)}")
    run.summary |= {
        "implementation": _by_kind({kind: choice.name for kind, choice in choices.items()}),
        "passed_over": _by_kind({kind: choice.passed_over for kind, choice in choices.items()}),
        **({"proven_by": _by_kind({kind: records.get(kind) for kind in kinds})} if records else {}),
    }
    run.open_mirror(origin)
    return origin


def _by_kind(values: Mapping[str, Any]) -> Any:
    """Return the value itself if all layers are of one kind, else kind → value."""
    return dict(values) if len(values) > 1 else values["backend"]


@contextlib.contextmanager
def open_desk(run: Run, inputs: Inputs, origin: Mapping[str, Any], layout: Layout) -> Iterator[Desk]:
    """Yield the run's desk, and show its progress. On exit the last save has finished, or raises what went wrong."""
    checkpoints = Checkpoints(
        run.folder / run_folder.CHECKPOINTS,
        belongs_to={
            "config": xattn.config.run_hash(run.config),
            "data_sha256": origin["data_sha256"],
            "versions": origin["versions"],
        },
        before_commit=partial(sync_rows, run.folder / run_folder.METRICS),
        on_commit=run.committed,
        say=run.display.warn,
    )
    rows = layout.rows_here(run.config.trainer.batch_size)
    with run.display.progress, checkpoints, Prefetch(inputs.data.batch) as batch:
        yield Desk(run, inputs, partial(batch, rows=rows), checkpoints)


def describe(desk: Desk, compiled: Programs, state: TrainState, *, compile_seconds: float | None) -> None:
    """Record and show what is known of the programs."""
    params = num_params(state)
    desk.run.display.say(f"model       {params:,} parameters, {desk.inputs.data.description}")
    desk.run.summary |= {
        "num_params": params,
        "flops_per_step": compiled.flops_per_step,
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": compiled.peak_memory_bytes,
        "packed_with": compiled.size,
    }
