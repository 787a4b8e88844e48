"""The compiled step: what shares one program, what it computes, and how it treats values that are not finite."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quick import composed
from xattn.config import Config, pack_key, program_key
from xattn.data.batches import Batch, Batching, HeldOutBatches
from xattn.model.loss import next_token_losses
from xattn.training.optimizer import learning_rate_factor
from xattn.training.programs import Programs, TrainState, hyperparameters, programs

TINY = [
    "backend=sigmoid",
    "backend.context_length=8",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.embedding_dim=8",
    "model.mlp_dim=8",
    "trainer.batch_size=4",
    "trainer.steps=40",
    "optimizer=sgd",
    "optimizer.momentum=0",
    "optimizer.clip_norm=null",
]
TEXT = np.frombuffer(b"to be or not to be, that is the question: " * 20, np.uint8)
TOKENS = np.stack([TEXT[i : i + 9] for i in (0, 5, 11, 17)]).astype(np.int32)
BATCH = Batch(TOKENS, np.ones((4, 8), np.float32))


def config_of(*overrides: str) -> Config:
    return composed(*TINY, *overrides)


@pytest.fixture(scope="module")
def tiny() -> Programs:
    return programs(config_of(), 256)[0]


@pytest.fixture(scope="module")
def skipping() -> Programs:
    return programs(config_of("trainer.nonfinite=skip"), 256)[0]


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """A list that gets an entry for each XLA compilation during a test."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def fresh(compiled: Programs, *overrides: str) -> TrainState:
    return compiled.init(hyperparameters(config_of(*overrides)))


def copied(state: TrainState) -> TrainState:
    """Copy the state, since the step uses up the one it gets."""
    return jax.tree.map(jnp.array, state)


def with_theta(state: TrainState, theta: float) -> TrainState:
    hyper = state.hyperparameters
    return state._replace(hyperparameters=hyper._replace(model=hyper.model._replace(theta=jnp.float32(theta))))


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# ---- one program for all numbers -------------------------------------------------------------------------------------

NUMBERS = [
    "optimizer.learning_rate=0.3",
    "optimizer.weight_decay=0.7",
    "optimizer.clip_norm=0.001",
    "backend.theta=3",
    "backend.sigmoid_bias=1.5",
    "seed=5",
]


def test_numbers_do_not_compile_again(tiny: Programs, compilations: list[str]) -> None:
    """One program reads learning rate, decay, clip, theta, bias and seed, and each of them has an effect."""
    batch = HeldOutBatches([(TEXT, 1.0)], Batching(context_length=8, batch_size=4, sequences=4, seed=0))[0]

    def after_two_updates(*overrides: str) -> tuple[list[float], float]:
        compiled, compiled_now = programs(config_of(*overrides), 256)
        assert compiled is tiny
        assert not compiled_now
        state = compiled.init(hyperparameters(config_of(*overrides)))
        state, first = compiled.step(state, BATCH)
        state, second = compiled.step(state, BATCH)
        score, _ = compiled.score(state.params, state.hyperparameters.model, batch)
        return [first.train_loss.item(), second.train_loss.item(), second.param_norm.item()], score.item()

    base = after_two_updates()
    del compilations[:]
    assert after_two_updates() == base
    for override in NUMBERS:
        assert after_two_updates(override)[0] != base[0], override
    assert compilations == []
    keys = ["trainer.log_every=3", "trainer.eval_every=3", "evaluation.sequences=3", "data.validation_fraction=0.5"]
    for override in [*keys, "study=another", "tracking.wandb.mode=disabled", "resume=never"]:
        assert programs(config_of(override), 256) == (tiny, False)


def test_what_shapes_the_program_compiles_again(tiny: Programs, compilations: list[str]) -> None:
    other, compiled_now = programs(config_of("backend.activation=softmax"), 256)
    assert other is not tiny
    assert compiled_now
    assert compilations
    assert other.compile_seconds > 0


def test_the_numbers_of_a_config_are_those_of_the_state() -> None:
    auto = hyperparameters(config_of("backend.theta=500", "seed=4294967295", "optimizer.clip_norm=2"))
    assert auto.model.theta == np.float32(500)
    assert auto.model.sigmoid_bias == np.float32(-np.log(8))
    assert (auto.optimizer.learning_rate, auto.optimizer.clip_norm) == (np.float32(0.1), np.float32(2))
    assert auto.seed == np.uint32(4294967295)
    given = hyperparameters(config_of("backend.sigmoid_bias=-3.5", "optimizer.weight_decay=0.25"))
    assert given.model.sigmoid_bias == np.float32(-3.5)
    assert given.optimizer.weight_decay == np.float32(0.25)
    assert given.optimizer.clip_norm == np.inf
    leaves = [leaf for leaf in jax.tree.leaves(given) if leaf is not given.seed]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


# ---- layers of two kinds ---------------------------------------------------------------------------------------------

MIXED = ("backend=none", "model.num_layers=3", "backend.every=2")


def mixed_of(theta: float, then_theta: float, *more: str) -> Config:
    return config_of(
        *MIXED, f"backend.theta={theta}", f"backend.then={{activation: softmax, theta: {then_theta}}}", *more
    )


def three_updates(compiled: Programs, configs: list[Config]) -> list[list[tuple[float, float, float]]]:
    """Return the loss, gradient norm and parameter norm at each update, for each run of a pack."""
    state = compiled.stack([compiled.init(hyperparameters(config)) for config in configs])
    found: list[list[tuple[float, float, float]]] = [[] for _ in configs]
    for _ in range(3):
        state, metrics = compiled.step(state, compiled.stack_batches([BATCH] * len(configs)))
        for run, each in zip(found, compiled.split_metrics(metrics), strict=True):
            run.append((each.train_loss, each.grad_norm, each.param_norm))
    return found


def test_numbers_of_either_kind_do_not_compile_again(compilations: list[str]) -> None:
    """Runs that differ in a kind's theta or bias share the program, and each kind's number has an effect."""
    base = mixed_of(10000, 10000, "seed=3")
    compiled, _ = programs(base, 256)
    alone = three_updates(compiled, [base])
    assert three_updates(compiled, [base]) == alone
    del compilations[:]
    for other in (mixed_of(10000, 3, "seed=3"), mixed_of(3, 10000, "seed=3")):
        assert program_key(other) == program_key(base)
        assert pack_key(other) == pack_key(base)
        assert programs(other, 256) == (compiled, False)
        assert three_updates(compiled, [other])[0][0] != alone[0][0]
    assert compilations == []
    biased = [
        config_of(*MIXED, f"backend.then={{activation: sigmoid, sigmoid_bias: {bias}}}") for bias in ("auto", "-1.5")
    ]
    assert len({program_key(config) for config in biased}) == 1
    assert program_key(biased[0]) != program_key(base)


def test_runs_of_a_pack_with_two_kinds_are_those_runs_alone() -> None:
    """Each run has its own theta in each kind."""
    configs = [mixed_of(10000, 500), mixed_of(3, 20, "seed=1")]
    alone, _ = programs(configs[0], 256)
    pack, _ = programs(configs[0], 256, size=2)
    expected = [three_updates(alone, [config])[0] for config in configs]
    np.testing.assert_allclose(three_updates(pack, configs), expected, rtol=1e-5)
    swapped = [mixed_of(500, 10000), mixed_of(20, 3, "seed=1")]  # each kind has its own numbers
    assert np.abs(np.subtract(three_updates(pack, swapped), expected)).max(-1).min() > 1e-4


# ---- what a step computes --------------------------------------------------------------------------------------------


WEIGHTS = np.random.default_rng(2).integers(0, 3, (4, 8)).astype(np.float32)
SEGMENTS = np.arange(8, dtype=np.int32) // 3 + np.zeros((4, 1), np.int32)
ANSWERS = np.random.default_rng(3).integers(0, 256, (4, 8), dtype=np.int32)
OTHER = Batch(TOKENS, WEIGHTS, SEGMENTS, ANSWERS)
MOST = (WEIGHTS > 0).sum(axis=1).max()
PLACES = np.sort(np.argsort(-WEIGHTS, axis=1)[:, :MOST]).astype(np.int32)


@pytest.mark.parametrize(
    ("batch", "targets"),
    [(BATCH, TOKENS[:, 1:]), (OTHER, ANSWERS), (OTHER._replace(places=PLACES), ANSWERS)],
    ids=["next tokens", "segments and answers", "everything optional"],
)
def test_a_step_is_the_gradient_of_the_mean_loss(batch: Batch, targets: np.ndarray) -> None:
    """For SGD without momentum or clip it is parameters − rate · gradient. The metrics are those of that update."""
    tiny, _ = programs(config_of(), 256, optional=batch.optional)
    state = fresh(tiny, "optimizer.learning_rate=0.5")

    def loss(params: Any) -> jax.Array:
        logits = tiny.model.apply(
            {"params": params}, TOKENS[:, :-1], state.hyperparameters.model, segment_ids=batch.segment_ids
        )
        return jnp.average(next_token_losses(logits, targets), weights=batch.weights)

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
    new, metrics = tiny.step(copied(state), batch)
    rate = 0.5 * float(learning_rate_factor(config_of().schedule, 40)(0))
    assert rate == pytest.approx(0.5 / 3)
    assert metrics.learning_rate.item() == pytest.approx(rate, rel=1e-6)
    assert metrics.train_loss.item() == pytest.approx(value.item(), rel=1e-5)
    norm = np.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(gradient)))
    assert metrics.grad_norm.item() == pytest.approx(norm, rel=1e-4)
    for a, b, g in zip(*(jax.tree.leaves(t) for t in (new.params, state.params, gradient)), strict=True):
        np.testing.assert_allclose(a, b - rate * g, rtol=1e-4, atol=1e-6)
    norm = np.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(new.params)))
    assert metrics.param_norm.item() == pytest.approx(norm, rel=1e-5)
    assert int(new.step) == 1
    assert int(new.halted_at) == -1


def test_the_loss_falls(tiny: Programs) -> None:
    state, losses = fresh(tiny, "optimizer.learning_rate=1.0"), []
    for _ in range(40):
        state, metrics = tiny.step(state, BATCH)
        losses.append(metrics.train_loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("narrow", ["model.matmul_precision=bfloat16", "model.dtype=bfloat16"])
@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_in_bfloat16_a_step_is_that_of_float32_but_for_rounding(
    narrow: str, embeddings: str, request: pytest.FixtureRequest
) -> None:
    """In bfloat16 the optimisations are on: they once made products that XLA:CPU has no kernel for. The vocabulary and
    the MLP are wider than the model, which changes what is transposed. A CPU uses YNNPACK's kernels in bfloat16; in
    float32 they are turned off."""
    overrides = [f"model.embeddings={embeddings}", "model.mlp_dim=24", "optimizer.learning_rate=0.5"]
    exact, _ = programs(config_of(*overrides), 257)
    state, steps = fresh(exact, *overrides), []
    request.getfixturevalue("optimised")
    for more in ([], [narrow]):
        compiled, _ = programs(config_of(*overrides, *more), 257)
        moved, metrics = compiled.step(copied(state), BATCH)
        steps.append((metrics, jax.tree.map(lambda new, old: new - old, moved.params, state.params)))
        if jax.default_backend() == "cpu" and platform.machine() == "x86_64":
            assert ("ynn_fusion" in compiled.step.as_text()) == bool(more)
    (metrics, expected), (ours_metrics, ours) = steps
    assert ours_metrics.train_loss.item() == pytest.approx(metrics.train_loss.item(), rel=1e-2)
    assert ours_metrics.train_loss.item() != metrics.train_loss.item()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.1 * np.abs(b).max())


# ---- numbers that are not finite -------------------------------------------------------------------------------------


def test_a_nan_stops_the_run_at_its_update_and_changes_nothing(tiny: Programs) -> None:
    """This holds even if it is noticed later: the state keeps the exact update, and later steps change nothing."""
    state = fresh(tiny)
    for _ in range(3):
        state, _ = tiny.step(state, BATCH)
    before = copied(state)
    state, metrics = tiny.step(with_theta(state, float("nan")), BATCH)
    assert not np.isfinite(metrics.train_loss.item())
    assert metrics.halted_at.item() == 4
    for _ in range(3):
        state, metrics = tiny.step(with_theta(state, 100.0), BATCH)  # finite again
        assert np.isfinite(metrics.train_loss.item())
        assert metrics.halted_at.item() == 4
    assert same_bits((state.params, state.opt_state), (before.params, before.opt_state))
    assert int(state.step) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_an_overflow_is_caught_at_the_first_update_that_is_not_finite(tiny: Programs) -> None:
    state = fresh(tiny, "optimizer.learning_rate=1e30")
    for step in range(1, 10):
        before = copied(state.params)
        state, metrics = tiny.step(state, BATCH)
        if metrics.halted_at.item() >= 0:
            assert metrics.halted_at.item() == step
            assert same_bits(state.params, before)
            break
        assert np.isfinite([metrics.train_loss.item(), metrics.grad_norm.item()]).all()
    else:
        raise AssertionError("never halted")


def test_skip_leaves_an_update_out_and_goes_on(skipping: Programs) -> None:
    """The next update's rate is that of its own number, and its metrics say so."""
    state, _ = skipping.step(fresh(skipping, "trainer.nonfinite=skip"), BATCH)
    before = copied(state)
    state, metrics = skipping.step(with_theta(state, float("nan")), BATCH)
    assert metrics.halted_at.item() == -1
    assert same_bits((state.params, state.opt_state), (before.params, before.opt_state))
    assert (int(state.step), int(state.skipped)) == (2, 1)

    state = with_theta(state, 10000.0)
    params = copied(state.params)
    state, metrics = skipping.step(state, BATCH)
    assert int(state.skipped) == 0
    factor = float(learning_rate_factor(config_of().schedule, 40)(2))
    rate = float(state.hyperparameters.optimizer.learning_rate) * factor
    assert metrics.learning_rate.item() == pytest.approx(rate, rel=1e-6)
    moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), state.params, params)
    distance = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(moved)))
    assert distance == pytest.approx(rate * metrics.grad_norm.item(), rel=1e-3)


def test_skip_gives_up_after_ten_in_a_row(skipping: Programs) -> None:
    state = fresh(skipping, "trainer.nonfinite=skip")
    start = copied(state.params)
    for _ in range(9):
        state, _ = skipping.step(with_theta(state, float("nan")), BATCH)
    state, _ = skipping.step(with_theta(state, 100.0), BATCH)  # a finite update resets the count
    assert not same_bits(state.params, start)
    assert int(state.skipped) == 0
    kept = copied(state.params)
    for _ in range(10):
        state, metrics = skipping.step(with_theta(state, float("nan")), BATCH)
        assert metrics.halted_at.item() == -1
    state, metrics = skipping.step(with_theta(state, float("nan")), BATCH)
    assert metrics.halted_at.item() == 21
    state, metrics = skipping.step(with_theta(state, 100.0), BATCH)
    assert metrics.halted_at.item() == 21
    assert same_bits(state.params, kept)
