"""Schedules at their ends, and optimizers that depend on a parameter's role, never on its number of axes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.quick import composed
from xattn.config import Config
from xattn.training.optimizer import OptimizerHyperparameters, learning_rate_factor, optimizer

NAMES = ["adamw", "sgd", "lion", "muon"]
LAYERS = 3


def tree(seed: int) -> dict[str, Any]:
    """Return parameters (or gradients) of every role, stacked over three layers like the model's."""
    random = np.random.default_rng(seed)

    def array(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    return {
        "token_embedding": {"embedding": array(11, 8)},
        "final_norm": {"scale": array(8)},
        "layers": {
            "attention": {"query": {"kernel": array(LAYERS, 8, 20)}, "sigmoid_bias": array(LAYERS, 2)},
            "attention_norm": {"scale": array(LAYERS, 8)},
            "mlp": {"down": {"kernel": array(LAYERS, 20, 8)}},
        },
    }


def config_of(*overrides: str) -> Config:
    return composed(*overrides)


@partial(jax.jit, static_argnums=0)
def initial_state(name: str, numbers: OptimizerHyperparameters, params: Any) -> Any:
    return optimizer(config_of(f"optimizer={name}").optimizer, numbers).init(params)


@partial(jax.jit, static_argnums=0)
def update(name: str, numbers: OptimizerHyperparameters, gradient: Any, state: Any, params: Any) -> Any:
    return optimizer(config_of(f"optimizer={name}").optimizer, numbers).update(gradient, state, params)


def updates_of(
    name: str, params: Any, gradients: list[Any], rate: float = 0.5, decay: float = 0.0, clip: float = math.inf
) -> list[Any]:
    numbers = OptimizerHyperparameters(*(np.float32(x) for x in (rate, decay, clip)))
    state, found = initial_state(name, numbers, params), []
    for gradient in gradients:
        updates, state = update(name, numbers, gradient, state, params)
        found.append(jax.device_get(updates))
    return found


# ---- schedules -------------------------------------------------------------------------------------------------------


def factors(name: str, steps: int, warmup: float = 0.1, decay: float = 0.2, final: float = 0.1) -> list[float]:
    fractions = [f"schedule.warmup_fraction={warmup}", f"schedule.decay_fraction={decay}"]
    config = config_of(f"schedule={name}", *fractions, f"schedule.final_fraction={final}").schedule
    return [float(x) for x in np.asarray(jax.jit(jax.vmap(learning_rate_factor(config, steps)))(np.arange(steps + 1)))]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("constant", {10: 1, 50: 1, 99: 1, 100: 1}),
        ("linear", {10: 1, 11: 1 - 0.9 / 90, 55: 0.55, 100: 0.1}),
        ("cosine", {10: 1, 25: 0.55 + 0.45 * math.cos(math.pi / 6), 55: 0.55, 100: 0.1}),
        ("wsd", {10: 1, 50: 1, 80: 1, 81: 1 - 0.9 / 20, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules_at_known_places(name: str, known: dict[int, float]) -> None:
    """Of a hundred updates ten are warm-up; the first has 1/11 of the peak."""
    found = factors(name, 100)
    assert found[:10] == pytest.approx([(k + 1) / 11 for k in range(10)], rel=1e-5)
    for step, factor in known.items():
        assert found[step] == pytest.approx(factor, rel=1e-5), step


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize(
    "fractions", [(0.05, 0.2, 0.1), (0.0, 1.0, 0.0), (0.5, 0.5, 0.0), (0.8, 0.2, 1.0), (0.0, 0.0, 0.0)]
)
def test_any_number_of_steps_has_a_schedule(name: str, fractions: tuple[float, float, float]) -> None:
    """Each update has a rate above 0 and at most the peak, even in a run of one update."""
    config = config_of(f"schedule={name}").schedule
    fields = dict(zip(("warmup_fraction", "decay_fraction", "final_fraction"), fractions, strict=True))
    lengths = (1, 2, 3, 5, 7, 20)
    schedules = [learning_rate_factor(config.model_copy(update=fields), steps) for steps in lengths]
    of_schedules = jax.jit(jax.vmap(lambda step: [schedule(step) for schedule in schedules]))(np.arange(20))
    for steps, of_schedule in zip(lengths, of_schedules, strict=True):
        found = np.asarray(of_schedule)[:steps]
        assert (found > 0).all(), (steps, found)
        assert (found <= 1 + 1e-6).all(), (steps, found)


# ---- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_and_embeddings_decay(name: str) -> None:
    """With a zero gradient, the update is −rate · decay · parameter, or zero."""
    params = tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    (updates,) = updates_of(name, params, [zeros], decay=0.25)
    decays = {"kernel": 0.125, "embedding": 0.125, "scale": 0.0, "sigmoid_bias": 0.0}
    for (path, update), param in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(update, -decays[path[-1].key] * param, rtol=1e-6, atol=1e-7, err_msg=str(path))


@pytest.mark.usefixtures("emitters_of_runs")
@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_take_the_update_of_each_layer_alone(name: str) -> None:
    params, gradients = tree(0), [tree(seed) for seed in (1, 2, 3)]
    stacked = updates_of(name, params["layers"], [gradient["layers"] for gradient in gradients], decay=0.1)
    for number in range(LAYERS):
        alone = updates_of(
            name,
            jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"]),
            [jax.tree.map(lambda leaf, number=number: leaf[number], gradient["layers"]) for gradient in gradients],
            decay=0.1,
        )
        for together, single in zip(stacked, alone, strict=True):
            for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(single), strict=True):
                np.testing.assert_allclose(a[number], b, rtol=1e-4, atol=1e-6)


def test_muon_orthogonalises_matrices_and_nothing_else() -> None:
    params, gradient = tree(0), tree(1)
    (muon,) = updates_of("muon", params, [gradient], rate=1.0)
    (adam,) = updates_of("adamw", params, [gradient], rate=1.0)
    for path, update in jax.tree_util.tree_leaves_with_path(muon):
        same = np.allclose(update, dict(jax.tree_util.tree_leaves_with_path(adam))[path])
        assert same == (path[-1].key != "kernel"), path
    for kernel in (muon["layers"]["attention"]["query"]["kernel"], muon["layers"]["mlp"]["down"]["kernel"]):
        for layer in np.asarray(kernel):
            values = np.linalg.svd(layer / (0.2 * math.sqrt(20)), compute_uv=False)
            assert (values > 0.6).all()
            assert (values < 1.3).all()
            assert np.sqrt((layer**2).mean()) == pytest.approx(0.2, rel=0.25)


def keller_jordans(gradients: list[np.ndarray], *, corrected: bool) -> list[np.ndarray]:
    """Return the updates of github.com/KellerJordan/Muon's ``muon_update`` for a matrix (out, in), but in float64.

    With ``corrected``, momentum and gradient are corrected for Adam's bias, as in optax.
    """
    momentum, found = np.zeros_like(gradients[0]), []
    for t, gradient in enumerate(gradients, start=1):
        momentum = 0.95 * momentum + 0.05 * gradient
        slow, fast = (1 - 0.95 ** (t + 1), 1 - 0.95**t) if corrected else (1.0, 1.0)
        mixed = 0.95 * momentum / slow + 0.05 * gradient / fast
        x = mixed.T if (tall := mixed.shape[0] > mixed.shape[1]) else mixed
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        found.append((x.T if tall else x) * max(1.0, gradient.shape[0] / gradient.shape[1]) ** 0.5)
    return found


def test_muon_differs_from_keller_jordans_as_its_docstring_says() -> None:
    """Only the scale, a correction of the first updates, bfloat16 and eps differ."""
    gradients = [tree(seed) for seed in (1, 2, 3)]
    ours = updates_of("muon", tree(0), gradients, rate=1.0)
    for part, name in (("attention", "query"), ("mlp", "down")):
        each = [np.asarray(g["layers"][part][name]["kernel"][0], np.float64).T for g in gradients]
        out, inner = each[0].shape
        scale = 0.2 * math.sqrt(max(inner, out)) / math.sqrt(max(1.0, out / inner))
        found = [-np.asarray(u["layers"][part][name]["kernel"][0]).T / scale for u in ours]
        np.testing.assert_allclose(found, keller_jordans(each, corrected=True), atol=1e-4)
        plain = keller_jordans(each, corrected=False)
        np.testing.assert_allclose(found[0], plain[0], atol=1e-4)  # after one gradient, only the length differs
        assert np.abs(found[1] - plain[1]).max() > 1e-3


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_the_first_updates_are_the_formulas() -> None:
    params, one, two = tree(0), tree(1), tree(2)
    g1, g2 = np.asarray(one["final_norm"]["scale"], np.float64), np.asarray(two["final_norm"]["scale"], np.float64)

    def found(name: str) -> list[Any]:
        return [update["final_norm"]["scale"] for update in updates_of(name, params, [one, two])]

    np.testing.assert_allclose(found("sgd"), [-0.5 * g1, -0.5 * (g2 + 0.9 * g1)], rtol=1e-5)
    np.testing.assert_array_equal(
        np.stack(found("lion")), [-0.5 * np.sign(g1), -0.5 * np.sign(0.1 * g2 + 0.9 * 0.01 * g1)]
    )
    mean, square = 0.9 * 0.1 * g1 + 0.1 * g2, 0.95 * 0.05 * g1**2 + 0.05 * g2**2
    second = (mean / (1 - 0.9**2)) / (np.sqrt(square / (1 - 0.95**2)) + 1e-8)
    np.testing.assert_allclose(found("adamw"), [-0.5 * np.sign(g1), -0.5 * second], rtol=1e-4)


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 1.0), (1e6, None), (math.inf, None)])
def test_the_gradient_is_clipped_to_its_global_norm(clip: float, expected: float | None) -> None:
    gradient = tree(1)
    norm = float(optax.tree.norm(gradient))
    (updates,) = updates_of("sgd", tree(0), [gradient], clip=clip)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5 * (expected or norm), rel=1e-5)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, -0.5 * b * ((expected or norm) / norm), rtol=1e-4, atol=1e-7)
