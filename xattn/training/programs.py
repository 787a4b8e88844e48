"""The compiled programs of a run, and the state that they work on.

What shapes a program is static: a :class:`Config` in which every swept number is replaced by a fixed value. The numbers
themselves are arrays in the train state, where the programs read them. Runs that differ only in these numbers therefore
share one compiled step, within a process through the cache of :func:`programs`. Several of them can also train as one
*pack*: the same step under ``vmap``, where every leaf of the state has a leading axis, the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xattn import registry
from xattn.backend import xla_cpu
from xattn.config import Config, shaping
from xattn.data.batches import Batch
from xattn.evaluation.attention import AttentionStatisticsOf, attention_statistics
from xattn.evaluation.loss import ScoreBatch, score_batch
from xattn.evaluation.probes import TokenScoresOf, token_scores_of
from xattn.model.config import BackendConfig
from xattn.model.hyperparameters import LayerHyperparameters, ModelHyperparameters
from xattn.model.size import matmul_flops_per_token
from xattn.model.transformer import LanguageModel, init_params
from xattn.system.device import compiled_once
from xattn.training.gradients import loss_and_gradient
from xattn.training.optimizer import OptimizerHyperparameters, global_norm, learning_rate_factor, optimizer
from xattn.training.sharding import Layout, layout_of

# ``trainer.nonfinite=skip`` leaves out at most this many updates in a row, then gives up.
MAX_SKIPPED_IN_A_ROW = 10


class Hyperparameters(NamedTuple):
    """Every swept number of a run as a float32 scalar, and the seed as a uint32 scalar."""

    model: ModelHyperparameters
    optimizer: OptimizerHyperparameters
    seed: jax.Array | int


class TrainState(NamedTuple):
    """Everything that a training step reads and writes."""

    step: jax.Array
    """int32: updates tried."""
    params: Any
    opt_state: Any
    hyperparameters: Hyperparameters
    skipped: jax.Array
    """int32: updates left out in a row."""
    halted_at: jax.Array
    """int32: the update whose loss or gradient froze the state, −1 if there is none."""


class StepMetrics(NamedTuple):
    """Metrics of one update: float32 scalars, and the state's halted_at. The loss and the gradient belong to the
    parameters before the update, param_norm to those after it."""

    train_loss: jax.Array
    grad_norm: jax.Array
    param_norm: jax.Array
    learning_rate: jax.Array
    halted_at: jax.Array


Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def hyperparameters(config: Config) -> Hyperparameters:
    """Return the config's swept numbers as the arrays that the programs read."""
    chosen = config.optimizer
    of_kinds = {kind: _of_kind(backend) for kind, backend in config.backend.kinds.items()}
    clip_norm = math.inf if chosen.clip_norm is None else chosen.clip_norm
    return Hyperparameters(
        of_kinds if len(of_kinds) > 1 else of_kinds["backend"],
        OptimizerHyperparameters(
            jnp.float32(chosen.learning_rate), jnp.float32(chosen.weight_decay), jnp.float32(clip_norm)
        ),
        jnp.uint32(config.seed),
    )


def _of_kind(backend: BackendConfig) -> LayerHyperparameters:
    bias = -math.log(backend.context_length) if isinstance(backend.sigmoid_bias, str) else backend.sigmoid_bias
    return LayerHyperparameters(jnp.float32(backend.theta), jnp.float32(bias), jnp.float32(backend.logit_scale))


class Programs(NamedTuple):
    """What runs call on the device. init, step and score take batches from the host and place them."""

    model: LanguageModel
    init: Any
    """Hyperparameters → TrainState of one run, seeded by them."""
    score: ScoreBatch
    """Evaluation: score, attention_statistics and token_scores take one run's state, also in a pack."""
    attention_statistics: AttentionStatisticsOf
    token_scores: TokenScoresOf
    size: int
    """Number of runs in the pack, n."""
    step: Any
    """(TrainState, Batch) → (TrainState, StepMetrics), with a leading axis n if n > 1; may consume its state."""
    stack: Callable[[Sequence[TrainState]], TrainState]
    """n TrainStates → the step's."""
    take: Callable[[TrainState, int], TrainState]
    """(the step's TrainState, i) → the TrainState of run i."""
    compile_seconds: float
    """Time to lower and compile the step."""
    peak_memory_bytes: int
    """Size of the step's arguments, results and temporaries."""
    flops_per_step: int
    """Work of one run's matrix products, by formula."""
    layout: Layout
    """How state and batches lie on the devices."""

    def stack_batches(self, batches: Sequence[Batch]) -> Batch:
        """Return the batch for a step of all runs."""
        return batches[0] if self.size == 1 else jax.tree.map(lambda *arrays: np.stack(arrays), *batches)

    def split_metrics(self, metrics: StepMetrics) -> list[StepMetrics]:
        """Return each run's metrics as Python numbers. Waits for the device."""
        columns = [np.atleast_1d(value).tolist() for value in jax.device_get(metrics)]
        return [StepMetrics(*values) for values in zip(*columns, strict=True)]


def programs(
    config: Config, vocab_size: int, *, optional: tuple[tuple[str, int], ...] = (), size: int = 1
) -> tuple[Programs, bool]:
    """Return the programs of a config, and whether this call had to compile them. ``optional`` gives names and widths
    of the batch's optional arrays, ``size`` the number of runs in the pack, which is on one device."""
    before = _compile.cache_info().misses
    compiled = _compile(shaping(config), vocab_size, optional, layout_of(config), size)
    return compiled, _compile.cache_info().misses > before


class OneRun(NamedTuple):
    """What packs of every size share: functions of one run."""

    model: LanguageModel
    init: Any
    score: ScoreBatch
    attention_statistics: AttentionStatisticsOf
    token_scores: TokenScoresOf
    step: Step
    """It is not compiled."""
    shapes: TrainState
    """Shapes of the state."""


@lru_cache(maxsize=8)
def _one_run(config: Config, vocab_size: int, layout: Layout) -> OneRun:
    model = LanguageModel(config.model, config.backend, vocab_size)
    schedule = learning_rate_factor(config.schedule, config.trainer.steps)

    def init(hyper: Hyperparameters) -> TrainState:
        key = jax.random.fold_in(jax.random.key(hyper.seed), 0)
        params = init_params(model, key)
        opt_state = optimizer(config.optimizer, hyper.optimizer).init(params)
        return TrainState(jnp.int32(0), params, opt_state, hyper, jnp.int32(0), jnp.int32(-1))

    def summed_loss(hyper: Hyperparameters, params: Any, batch: Batch, dropout: jax.Array) -> jax.Array:
        losses: Any = model.apply(
            {"params": params},
            *(batch.inputs, hyper.model, batch.targets),
            segment_ids=batch.segment_ids,
            places=batch.places,
            train=True,
            rngs={"dropout": dropout},
            method="losses",
        )
        return jnp.sum(losses * batch.weights)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        hyper = state.hyperparameters
        dropout = jax.random.fold_in(jax.random.fold_in(jax.random.key(hyper.seed), 1), state.step)
        loss, gradient = loss_and_gradient(
            partial(summed_loss, hyper), state.params, batch, dropout, parts=config.trainer.gradient_accumulation
        )
        grad_norm = global_norm(gradient)
        learning_rate = jnp.asarray(hyper.optimizer.learning_rate * schedule(state.step))
        transformation = optimizer(config.optimizer, hyper.optimizer._replace(learning_rate=learning_rate))
        updates, opt_state = transformation.update(gradient, state.opt_state, state.params)

        # Non-finite values must not touch the state. Select, do not multiply: 0 · NaN is NaN.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        running = state.halted_at < 0
        skipped = jnp.where(finite, 0, state.skipped + 1)
        allowed = MAX_SKIPPED_IN_A_ROW if config.trainer.nonfinite == "skip" else 0
        halts = running & (skipped > allowed)
        moved = state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        tried = _select(finite, moved, state)._replace(step=state.step + 1, skipped=skipped)
        new = _select(running & ~halts, tried, state)
        new = new._replace(halted_at=jnp.where(halts, state.step + 1, state.halted_at))
        return new, StepMetrics(loss, grad_norm, global_norm(new.params), learning_rate, new.halted_at)

    shapes = jax.eval_shape(init, jax.eval_shape(lambda: hyperparameters(config)))
    score, scores = layout.score(score_batch(model, layout.results())), layout.score(token_scores_of(model))
    statistics = attention_statistics(model, layout.results())
    return OneRun(model, layout.init(init, shapes), score, statistics, scores, step, shapes)


@lru_cache(maxsize=8)
def _compile(
    config: Config, vocab_size: int, optional: tuple[tuple[str, int], ...], layout: Layout, size: int
) -> Programs:
    assert size == 1 or layout.mesh is None, "a pack is on one device"
    one = _one_run(config, vocab_size, layout)
    step, state, batch = _packed(one, config, optional, size)
    batch_size, context_length = config.trainer.batch_size, config.backend.context_length
    start = time.perf_counter()
    with layout.tracing():
        lowered = layout.jit_step(step, state).lower(state, batch)
        seconds = time.perf_counter() - start
        with compiled_once(lowered.as_text()):
            start = time.perf_counter()  # after the wait for another process that compiles the same program
            compiled = xla_cpu.compiled(lowered, config.model.factor_dtype)
            seconds += time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    flops = matmul_flops_per_token(config.model, config.backend, vocab_size=vocab_size)
    return Programs(
        model=one.model,
        init=one.init,
        score=one.score,
        attention_statistics=one.attention_statistics,
        token_scores=one.token_scores,
        size=size,
        step=layout.step(compiled, batch_size),
        stack=_stack if size > 1 else lambda states: states[0],
        take=_take if size > 1 else lambda state, index: state,
        compile_seconds=seconds,
        peak_memory_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes  # results that reuse an argument's memory
        + memory.temp_size_in_bytes,
        flops_per_step=3 * flops * batch_size * context_length,
        layout=layout,
    )


def uncompiled(config: Config, vocab_size: int, *, size: int) -> tuple[OneRun, Step, TrainState, Batch]:
    """Return one run's functions, the step of a pack, and the shapes of its state and batch; nothing is compiled."""
    config = shaping(config)
    one = _one_run(config, vocab_size, layout_of(config))
    return one, *_packed(one, config, (), size)


def _packed(
    one: OneRun, config: Config, optional: tuple[tuple[str, int], ...], size: int
) -> tuple[Step, TrainState, Batch]:
    """The step of a pack, and the shapes of its state and batch."""
    batch_size, context_length = config.trainer.batch_size, config.backend.context_length
    tokens: Any = jax.ShapeDtypeStruct((batch_size, context_length + 1), jnp.int32)
    weights: Any = jax.ShapeDtypeStruct((batch_size, context_length), jnp.float32)
    others: dict[str, Any] = {name: jax.ShapeDtypeStruct((batch_size, width), jnp.int32) for name, width in optional}
    batch = Batch(tokens, weights, **others)
    if size == 1:
        return one.step, one.shapes, batch
    return jax.vmap(one.step), _with_runs(one.shapes, size), _with_runs(batch, size)


registry.caches += [_one_run.cache_clear, _compile.cache_clear]


@jax.jit
def _stack(states: Sequence[TrainState]) -> TrainState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@jax.jit
def _take(stacked: TrainState, index: int) -> TrainState:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _with_runs(shapes: Any, size: int) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), shapes)


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def ended(state: TrainState) -> TrainState:
    """Return the state in a form that no step changes."""
    return state._replace(halted_at=jnp.int32(0))


def num_params(state: TrainState) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))
