"""Tests for eight devices; test_sharding.py runs them in a process that has eight."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.quick import composed
from xattn.config import CONF, Config
from xattn.data.batches import Batching, HeldOutBatches, TrainingBatches
from xattn.model.loss import MOST_LOGITS
from xattn.model.transformer import LanguageModel, LayerHyperparameters
from xattn.training.checkpoint import Checkpoints
from xattn.training.programs import Programs, TrainState, hyperparameters, programs
from xattn.training.sharding import layout_of, on_one_device
from xattn.training.state_hash import state_sha256

STEPS = 20
TINY = [
    "backend.context_length=16",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.embedding_dim=16",
    "model.mlp_dim=24",
    "model.layers=scanned",
    "trainer.batch_size=8",
    f"trainer.steps={STEPS}",
]
TEXT = np.frombuffer(b"to be or not to be, that is the question: " * 40, np.uint8)
BATCHING = Batching(context_length=16, batch_size=8, sequences="all", seed=0)
BATCHES = TrainingBatches([(TEXT, 1.0)], BATCHING)
HELD_OUT = HeldOutBatches([(TEXT[:200], 1.0)], BATCHING)
MIXED = ("parallel.data=2", "parallel.fsdp=2", "parallel.tensor=2")


def config_of(*overrides: str) -> Config:
    return composed(*TINY, *overrides)


def compiled(*overrides: str) -> Programs:
    return programs(config_of(*overrides), 256)[0]


def trained(run: Programs, state: TrainState, first: int, last: int) -> tuple[TrainState, list[float]]:
    losses = []
    for step in range(first, last):
        state, metrics = run.step(state, BATCHES(step))
        losses.append(metrics.train_loss)
    return state, [float(loss) for loss in losses]


@cache
def alone(*overrides: str) -> tuple[list[float], TrainState]:
    """Return one device's loss at each step, and its state at the end."""
    run = compiled(*overrides)
    state, losses = trained(run, run.init(hyperparameters(config_of(*overrides))), 0, STEPS)
    return losses, state


def score(run: Programs, state: TrainState) -> float:
    return sum(float(run.score(state.params, state.hyperparameters.model, batch)[0]) for batch in HELD_OUT)


def shards(leaf: Any) -> int:
    return round(leaf.size / leaf.addressable_shards[0].data.size)


def test_the_loss_is_one_devices_at_each_step() -> None:
    assert jax.device_count() == 8
    one, end = alone("backend=sigmoid")
    run = compiled("backend=sigmoid", *MIXED)
    state, losses = trained(run, run.init(hyperparameters(config_of("backend=sigmoid"))), 0, STEPS)
    np.testing.assert_allclose(losses, one, rtol=1e-5)
    assert one[-1] < one[0] - 0.5  # it learns: two constant losses would agree anyway
    np.testing.assert_allclose(score(run, state), score(compiled("backend=sigmoid"), end), rtol=1e-5)


def test_state_is_made_and_stays_split_as_the_table_says() -> None:
    run = compiled("backend=sigmoid", *MIXED)
    state = run.init(hyperparameters(config_of("backend=sigmoid")))
    after, _ = trained(run, state, 0, 1)
    for now in (run.init(hyperparameters(config_of("backend=sigmoid"))), after):
        for tree in (now.params, now.opt_state[1].mu):
            layer = tree["layers"]
            assert shards(layer["attention"]["query"]["kernel"]) == 4
            assert shards(layer["mlp"]["down"]["kernel"]) == 4
            assert shards(tree["token_embedding"]["embedding"]) == 4
            assert shards(layer["attention_norm"]["scale"]) == 1


def test_initial_parameters_are_one_devices_to_the_bit() -> None:
    """If random numbers depended on the mesh, it would be another run."""
    hyper = hyperparameters(config_of())
    one, spread = compiled("backend=sigmoid").init(hyper), compiled("backend=sigmoid", *MIXED).init(hyper)
    assert state_sha256(one.params, one.opt_state) == state_sha256(spread.params, spread.opt_state)


@pytest.mark.parametrize("order", [((), MIXED), (MIXED, ())], ids=["1 to 8", "8 to 1"])
def test_a_checkpoint_goes_on_another_mesh(order: tuple[tuple[str, ...], ...], tmp_path: Path) -> None:
    one, _ = alone("backend=sigmoid")
    before, after = (compiled("backend=sigmoid", *mesh) for mesh in order)
    state, _ = trained(before, before.init(hyperparameters(config_of("backend=sigmoid"))), 0, 10)
    saved = state_sha256(state.params, state.opt_state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, state, {}, val_loss=None)
        checkpoints.wait()
        restored = checkpoints.restore_state(after.init(hyperparameters(config_of("backend=sigmoid"))))
    assert restored is not None
    assert state_sha256(restored.tree.params, restored.tree.opt_state) == saved
    _, losses = trained(after, restored.tree, 10, STEPS)
    np.testing.assert_allclose(losses, one[10:], rtol=1e-5)


def test_a_tree_is_brought_together_for_programs_that_know_no_mesh() -> None:
    state = compiled("backend=sigmoid", *MIXED).init(hyperparameters(config_of("backend=sigmoid")))
    whole = on_one_device(state.params)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(whole))
    assert state_sha256(whole, None) == state_sha256(state.params, None)


@pytest.mark.parametrize("mesh", [MIXED, ("parallel=context", "parallel.data=2")], ids=["mixed", "context"])
def test_products_of_bfloat16_are_one_devices_but_for_their_sums_order(mesh: tuple[str, ...]) -> None:
    """The context mesh rounds differently. The losses of float32 are further away."""
    one, _ = alone("backend=sigmoid", "model.matmul_precision=bfloat16")
    run = compiled("backend=sigmoid", "model.matmul_precision=bfloat16", *mesh)
    _, losses = trained(run, run.init(hyperparameters(config_of("backend=sigmoid"))), 0, STEPS)
    np.testing.assert_allclose(losses, one, rtol=1e-4)
    assert not np.allclose(losses, alone("backend=sigmoid")[0], rtol=1e-4)


@pytest.mark.parametrize(("activation", "parts"), [("sigmoid", 1), ("none", 4)])
def test_a_device_has_its_stretch_of_a_split_sequence_and_no_more(
    activation: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for loss and gradient, including projections and logits, even if these are made in parts."""
    monkeypatch.setitem(MOST_LOGITS, "float32", 8 * 1024 * 256 * 4 // parts)
    sizes = ("backend.context_length=1024", "model.embedding_dim=32", "parallel.context=4", "parallel.data=2")
    config = config_of(f"backend={activation}", *sizes)
    layout, model = layout_of(config), LanguageModel(config.model, config.backend, 256)
    hyper, tokens = LayerHyperparameters(1e4, -6.0), jax.ShapeDtypeStruct((8, 1024), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, hyper)["params"]

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        losses: Any = model.apply({"params": params}, tokens, hyper, tokens, method="losses")
        return losses.sum()

    state = layout.state(shapes)
    with layout.tracing():
        program = jax.jit(jax.value_and_grad(loss), in_shardings=(state, layout.rows()), out_shardings=(None, state))
        text = program.lower(shapes, tokens).compile().as_text()
    gathered = re.findall(r"= \(?f32\[([\d,]*)\][^=]*? (?:all-gather|all-to-all)\(", text)
    assert all(math.prod(map(int, shape.split(","))) < 4 * 1024 * 32 / 4 for shape in gathered), gathered


def test_layers_of_two_kinds_are_one_devices_and_go_on_another_mesh(tmp_path: Path) -> None:
    """The run moves from states and a ring over four devices, with split heads, to a mesh that also splits parameters,
    where each device gathers the sequence. On both a batch is in parts. The layers of one kind have a window and learn
    a bias, keys have fewer heads than queries, and one layer follows the last period."""
    meaning = (
        *("backend=sigmoid", "backend.sigmoid_bias=learned", "backend.window=6", "model.num_kv_heads=2"),
        *("backend.every=2", "model.num_layers=3"),
    )
    then = "activation: none, window: null"
    kinds = (*meaning, f"backend.then={{{then}}}")
    split = (
        *(*meaning, "backend.implementation=ring", f"backend.then={{{then}, implementation: linear}}"),
        *("parallel.context=4", "parallel.tensor=2", "trainer.gradient_accumulation=2"),
    )
    gathered = (
        *(*kinds, "backend.implementation=reference", "trainer.gradient_accumulation=2"),
        *("parallel.context=2", "parallel.tensor=2", "parallel.fsdp=2"),
    )
    one, _ = alone(*kinds)
    assert one[-1] < one[0] - 0.5
    before, after = compiled(*split), compiled(*gathered)
    hyper = hyperparameters(config_of(*kinds))
    state, losses = trained(before, before.init(hyper), 0, 10)
    assert shards(state.params["backend_layers"]["attention"]["sigmoid_bias"]) == 2
    assert shards(state.params["layers"]["attention"]["query"]["kernel"]) == 2
    np.testing.assert_allclose(losses, one[:10], rtol=1e-5)
    fresh = after.init(hyper)
    assert state_sha256(fresh.params, None) == state_sha256(before.init(hyper).params, None)
    saved = state_sha256(state.params, state.opt_state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, state, {}, val_loss=None)
        checkpoints.wait()
        restored = checkpoints.restore_state(fresh)
    assert restored is not None
    state = restored.tree
    assert state_sha256(state.params, state.opt_state) == saved
    assert shards(state.params["layers"]["attention"]["query"]["kernel"]) == 4
    _, losses = trained(after, state, 10, STEPS)
    np.testing.assert_allclose(losses, one[10:], rtol=1e-5)


def test_all_terms_are_one_devices_with_rows_sequence_heads_and_parameters_split() -> None:
    """Decaying states pass between devices, a ring has a sink, convolutions cross the borders of stretches, and a layer
    uses the first layer's values. There is no output_norm: what ``exclusive`` leaves can be small, and a norm would
    magnify its rounding."""
    meaning = (
        *("backend=none", "backend.decay=input", "backend.input_gate=sigmoid", "backend.rotary_fraction=0.5"),
        *("model.conv=3", "model.value_residual=first", "model.exclusive=true"),
        *("model.output_gate=channel", "backend.every=2", "backend.logit_scale=1.5"),
    )
    then = "activation: softmax, decay: alibi, input_gate: none, sink: learned"
    kinds = (*meaning, f"backend.then={{{then}}}")
    split = (
        *(*meaning, "backend.implementation=linear", f"backend.then={{{then}, implementation: ring}}"),
        *("parallel.context=2", "parallel.tensor=2", "parallel.fsdp=2"),
    )
    one, end = alone(*kinds)
    assert one[-1] < one[0] - 0.3
    run = compiled(*split)
    state, losses = trained(run, run.init(hyperparameters(config_of(*kinds))), 0, STEPS)
    attention = state.params["layers"]["attention"]
    assert shards(attention["output_gate"]["kernel"]) == 4
    assert shards(attention["value_taps"]) == shards(state.params["then_layers"]["attention"]["sink"]) == 2
    np.testing.assert_allclose(losses, one, rtol=1e-5)
    np.testing.assert_allclose(score(run, state), score(compiled(*kinds), end), rtol=1e-5)


PRESETS = sorted(
    f"{file.parent.name}={file.stem}"
    for folder in ("backend", "experiment")
    for file in (CONF / folder).glob("*.yaml")
    if "# Exact:" in file.read_text("utf-8")
)
LAYERS = {"backend=smollm3": 4, "backend=hybrid": 4, "experiment=qwen3_next_like": 4, "experiment=gemma3": 6}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_steps_are_one_devices(preset: str) -> None:
    """Rows, sequence and heads are split."""
    own = [preset, f"model.num_layers={LAYERS.get(preset, 2)}"]
    if config_of(*own).backend.window is not None:
        own.append("backend.window=6")
    losses = []
    for mesh in ((), ("parallel.data=2", "parallel.context=2", "parallel.tensor=2")):
        run = compiled(*own, *mesh)
        losses.append(trained(run, run.init(hyperparameters(config_of(*own))), 0, 3)[1])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
