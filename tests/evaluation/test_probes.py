"""Probes: what they measure, on models whose answers are known, and that training does not feel them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.config import Config, compose
from xattn.data.batches import Batch, Batching
from xattn.data.config import tasks
from xattn.data.run_data import RunData, load_data
from xattn.errors import BadInput
from xattn.evaluation.probes import Probe, Scene, make_probes, run_probes, token_scores_of
from xattn.model.transformer import LanguageModel, LayerHyperparameters
from xattn.training.programs import hyperparameters

TINY = ["model.num_layers=1", "model.num_heads=2", "model.embedding_dim=8", "model.mlp_dim=8", "trainer.batch_size=4"]
S = 16


def setting(text_file: Any, *overrides: str) -> tuple[Config, RunData]:
    data = (
        [] if any(override.startswith("data=") for override in overrides) else ["data=text", f"data.path={text_file}"]
    )
    config = compose([*TINY, f"backend.context_length={S}", "evaluation.sequences=6", *data, *overrides])
    return config, load_data(config.data, Batching(context_length=S, batch_size=4, sequences=6, seed=0))


def probes_of(config: Config, data: RunData) -> list[Probe]:
    return make_probes(config.evaluation.probes, Scene(config.data, data, config.backend, 4))


def oracle(params: Any, hyperparameters: LayerHyperparameters, batch: Batch) -> Any:
    """A model that looks one token back: it expects a token to come again, and knows what it expects."""
    hit = batch.targets == batch.inputs
    return np.where(hit, 0.25, 4.0).astype(np.float32), hit


def test_places_are_the_losses_and_hits_of_every_target(text_file: Any) -> None:
    config, data = setting(text_file)
    model = LanguageModel(config.model, config.backend, 256)
    hyper = hyperparameters(config).model
    first = data.held_out[0]
    answered = first._replace(answers=np.random.default_rng(0).integers(0, 256, first.weights.shape, np.int32))
    params = jax.jit(model.init)(jax.random.key(0), first.tokens[:, :-1], hyper)["params"]
    params = jax.tree.map(lambda leaf: leaf * 3, params)
    forward = jax.jit(lambda params: model.apply({"params": params}, first.tokens[:, :-1], hyper))
    logits = np.asarray(forward(params), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for batch, targets in ((first, first.tokens[:, 1:]), (answered, answered.answers)):
        losses, correct = token_scores_of(model)(params, hyper, batch)
        expected = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        np.testing.assert_array_equal(correct, logits.argmax(-1) == targets)


def test_in_context_is_late_minus_early(text_file: Any) -> None:
    """A model that loses 1/(t + 1) at place t, in sequences of 16: early is place 1 alone, late are 14 and 15."""
    config, data = setting(text_file, "evaluation.probes=[in_context]")

    def places(params: Any, hyperparameters: Any, batch: Batch) -> Any:
        return np.broadcast_to(1 / np.arange(1, S + 1), batch.weights.shape), np.zeros(batch.weights.shape, bool)

    found = run_probes(places, None, hyperparameters(config).model, probes_of(config, data))
    late = (1 / 15 + 1 / 16) / 2
    assert found == {
        "probe/in_context/score": pytest.approx(late - 1 / 2),
        "probe/in_context/early_loss": pytest.approx(1 / 2),
        "probe/in_context/late_loss": pytest.approx(late),
    }


def test_tasks_are_probes_in_the_runs_vocabulary(text_file: Any) -> None:
    names = ["copying", "induction", "mqar", "passkey", "selective_copying"]
    config, data = setting(text_file, f"evaluation.probes=[{','.join(names)}]")
    probes = probes_of(config, data)
    assert [probe.name for probe in probes] == names
    for probe in probes:
        tokens = np.concatenate([each.tokens for each in probe.batches])
        assert tokens.shape == (64, S + 1)
        assert 100 < tokens.max() < 256
    found = run_probes(oracle, None, hyperparameters(config).model, probes)
    for name in names:
        assert found[f"probe/{name}/accuracy"] < 0.2
        assert found[f"probe/{name}/loss"] > 3
        assert any(key.startswith(f"probe/{name}/accuracy_to_distance_") for key in found)


def test_every_task_is_a_probe_of_its_own() -> None:
    """A task's name without a branch once measured passkey."""
    for name, kind in tasks().items():
        assert kind.as_probe(64, 32).name == name


def test_a_run_on_a_task_measures_that_task(text_file: Any) -> None:
    """On its own held-out sequences, once; rows that only fill up a batch count as little as they do in the loss."""
    config, data = setting(text_file, "data=mqar", "data.num_pairs=2", "evaluation.probes=[mqar,induction]")
    own, other = probes_of(config, data)
    assert (own.name, other.name) == ("mqar", "induction")
    for probed, scored in zip(own.batches, data.held_out, strict=True):
        assert probed.optional == scored.optional == (("answers", S), ("places", 2))
        for one, same in zip(probed, scored, strict=True):
            np.testing.assert_array_equal(one, same)
    weights = np.concatenate([each.weights for each in own.batches])
    assert weights.shape == (8, S)
    assert (weights.sum(axis=1) == [2] * 6 + [0] * 2).all()

    def knows_all(params: Any, hyperparameters: Any, batch: Batch) -> Any:
        return np.zeros(batch.weights.shape), batch.weights > 0  # of rows of padding it knows nothing

    found = run_probes(knows_all, None, hyperparameters(config).model, [own])
    assert found["probe/mqar/accuracy"] == found["probe/mqar/exact"] == 1


def test_extrapolation_with_n_fixed_and_with_n_as_long(text_file: Any) -> None:
    """A model whose loss at place t is t, plus 1000 times the bias that it is given."""
    config, data = setting(text_file, "backend=sigmoid", "evaluation.probes=[extrapolation]")
    seen = set()

    def places(params: Any, hyperparameters: Any, batch: Batch) -> Any:
        shape = batch.weights.shape
        seen.add(shape)
        losses = np.broadcast_to(np.arange(shape[1]), shape) + 1000 * float(hyperparameters.sigmoid_bias)
        return losses, np.zeros(shape, bool)

    found = run_probes(places, None, hyperparameters(config).model, probes_of(config, data))
    assert seen == {(1, 32), (1, 64), (1, 128)}
    for end in (16, 32, 64, 128):
        mean = (end / 2 + end - 1) / 2
        key = f"probe/extrapolation/loss_to_{end}"
        assert found.pop(key) == pytest.approx(mean - 1000 * math.log(16), rel=1e-6)
        if end > 16:
            assert found.pop(f"{key}_n_{end}") == pytest.approx(mean - 1000 * math.log(end), rel=1e-6)
    assert found.pop("probe/extrapolation/rise_in_loss") == pytest.approx((64 + 127) / 2 - (8 + 15) / 2, rel=1e-6)
    assert not found

    config, data = setting(text_file, "evaluation.probes=[extrapolation]")
    found = run_probes(places, None, hyperparameters(config).model, probes_of(config, data))
    assert len(found) == 5


def test_what_leaves_no_room_is_refused(text_file: Any, tmp_path: Any) -> None:
    short = tmp_path / "short.txt"
    short.write_text("to be or not to be, that is the question " * 10)
    config, data = setting(short, "evaluation.probes=[extrapolation]")
    with pytest.raises(BadInput, match=r"evaluation\.probes: extrapolation scores sequences of 128 tokens"):
        probes_of(config, data)
    config, _ = setting(text_file, "evaluation.probes=[mqar]")
    backend = config.backend.model_copy(update={"context_length": 3})
    with pytest.raises(BadInput, match=r"evaluation\.probes: mqar does not fit"):
        make_probes(("mqar",), Scene(config.data, data, backend, 4))
    with pytest.raises(BadInput, match=r"evaluation\.probes.*nothing"):
        compose(["evaluation.probes=[nothing]"])
    with pytest.raises(BadInput, match=r"evaluation\.sequences = all: data=mqar is endless"):
        load_data(compose(["data=mqar"]).data, Batching(context_length=64, batch_size=4, sequences="all", seed=0))


def test_an_untrained_model_knows_nothing(text_file: Any) -> None:
    """Through the model itself: its loss on random tokens is ln V."""
    config, data = setting(text_file, "evaluation.probes=[induction,extrapolation]", "backend=none")
    model = LanguageModel(config.model, config.backend, 256)
    hyper = hyperparameters(config).model
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, S), jnp.int32), hyper)["params"]
    found = run_probes(token_scores_of(model), params, hyper, probes_of(config, data))
    assert found["probe/induction/loss"] == pytest.approx(math.log(256), rel=0.02)
    assert found["probe/induction/accuracy"] < 0.1
    assert found["probe/extrapolation/loss_to_128"] == pytest.approx(math.log(256), rel=0.02)


def test_the_sequences_of_a_task_are_scored_wherever_they_ask() -> None:
    """Whole and cut ones: a place without a score would have the loss 0, and ln 64 is what an untrained model has."""
    config, data = setting(
        None, "data=induction", "data.vocab_size=64", "backend=sigmoid", "evaluation.probes=[extrapolation]"
    )
    model = LanguageModel(config.model, config.backend, 64)
    hyper = hyperparameters(config).model
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, S), jnp.int32), hyper)["params"]
    scored = []
    for probe in probes_of(config, data):
        asked = [np.asarray(token_scores_of(model)(params, hyper, each)[0])[each.weights > 0] for each in probe.batches]
        scored.append(len(np.concatenate(asked)))
        np.testing.assert_allclose(np.concatenate(asked), math.log(64), rtol=0.1)
    assert sum(number > 0 for number in scored) >= 3, scored
