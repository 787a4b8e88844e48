"""Presets against the formulas of their papers: as they train, two in a pack, and as they decode."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xattn.config
from xattn.config import Config, compose
from xattn.model.generation import empty_caches
from xattn.model.pattern import layers_of
from xattn.model.transformer import LanguageModel, init_params
from xattn.training.programs import hyperparameters

from . import papers
from .papers import PAPERS, Paper

# Three heads, since ALiBi has a rule of its own for what is no power of two; of a head's 8 channels a quarter is one
# pair.
SMALL = [
    *("backend.context_length=7", "model.num_heads=3", "model.embedding_dim=24", "model.mlp_dim=10"),
    *("model.layers=scanned", "model.num_layers=2"),
]
# Of this many layers the last is of the second kind. The small models have one layer of each kind.
PERIODS = {"gpt_oss": 2, "smollm3": 4, "hybrid": 4, "qwen3_next_like": 4, "gemma3": 6}
WINDOWS = {"gpt_oss": 3, "gemma3": 4}
V = 17
TOKENS = np.random.default_rng(0).integers(V, size=(2, 13))
TRAINED = TOKENS[:, :8]  # decoding goes on past these
FORMULAS = [pytest.param(name, each, id=each.__name__) for name, several in PAPERS.items() for each in several]


class Preset(NamedTuple):
    """A preset in a small model, and the parameters of a pack of two runs."""

    name: str
    config: Config
    model: LanguageModel
    params: list[Any]

    def oracle(self, paper: Paper, params: Any, tokens: np.ndarray) -> np.ndarray:
        """Logits by the paper's formula."""
        config, window = self.model.config, self.model.backend.window
        layers = dict(zip((1, PERIODS.get(self.name, 2)), self.layers(params), strict=True))
        return papers.model(paper, params, layers, tokens, config.num_heads, window)

    def layers(self, params: Any) -> Iterator[Any]:
        """The parameters of each layer, in their order."""
        places = layers_of(self.model.backend, self.model.config.num_layers)
        for number in range(self.model.config.num_layers):
            layer = jax.tree.map(lambda leaf, row=number: leaf[row], params["layers"])
            for kind, numbers in places.items():
                if f"{kind}_layers" in params and number in numbers:
                    row = numbers.index(number)
                    own = jax.tree.map(lambda leaf, row=row: leaf[row], params[f"{kind}_layers"])
                    layer = layer | {"attention": layer["attention"] | own["attention"]}
            yield layer


def chosen(name: str) -> str:
    return f"{next(xattn.config.CONF.glob(f'*/{name}.yaml')).parent.name}={name}"


@cache
def preset(name: str) -> Preset:
    """Parameters are away from their initial values, where scales of 1 would hide mistakes."""
    window = [f"backend.window={WINDOWS[name]}"] if name in WINDOWS else []
    config = compose([chosen(name), *SMALL, *(["backend.every=2"] if name in PERIODS else []), *window])
    model = LanguageModel(config.model, config.backend, V)
    random = np.random.default_rng(7)
    shapes: Any = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = [jax.tree.map(lambda leaf: random.normal(0.1, 0.5, leaf.shape), shapes) for _ in range(2)]
    return Preset(name, config, model, params)


# ---- training --------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def losses_and_gradients(model: LanguageModel, params: Any, hyper: Any) -> Any:
    """(loss, gradient) of the runs of a pack."""
    tokens = jnp.asarray(TRAINED, jnp.int32)

    def loss(params: Any, hyper: Any) -> Any:
        losses: Any = model.apply({"params": params}, tokens[:, :-1], hyper, tokens[:, 1:], train=True, method="losses")
        return losses.mean()

    return jax.vmap(jax.value_and_grad(loss))(params, hyper)


@cache
def trained(name: str) -> list[tuple[float, Any]]:
    """(loss, gradient) of each run."""
    one = preset(name)
    runs = [(params, hyperparameters(one.config).model) for params in one.params]
    pack = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *runs)
    losses, gradients = jax.device_get(losses_and_gradients(one.model, *pack))
    return [
        (float(loss), jax.tree.map(lambda leaf, run=run: leaf[run].astype(np.float64), gradients))
        for run, loss in enumerate(losses)
    ]


def mean_loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """−log p of the targets."""
    normaliser = np.log(np.exp(logits).sum(-1))
    return float(np.mean(normaliser - np.take_along_axis(logits, targets[..., None], -1)[..., 0]))


@pytest.mark.parametrize(("name", "paper"), FORMULAS)
def test_a_preset_trains_by_its_papers_formula(name: str, paper: Paper) -> None:
    """Loss and gradients, against float64: of each parameter along its gradient and a random direction."""
    one = preset(name)
    random = np.random.default_rng(3)
    for params, (found, gradient) in zip(one.params, trained(name), strict=True):
        leaves, tree = jax.tree.flatten(params)

        def loss(change: dict[int, np.ndarray], leaves: Any = leaves, tree: Any = tree) -> float:
            moved = [leaf + change[i] if i in change else leaf for i, leaf in enumerate(leaves)]
            return mean_loss(one.oracle(paper, tree.unflatten(moved), TRAINED[:, :-1]), TRAINED[:, 1:])

        np.testing.assert_allclose(found, loss({}), rtol=1e-5)
        for index, (path, slope) in enumerate(jax.tree_util.tree_leaves_with_path(gradient)):
            size = np.linalg.norm(slope)
            assert size > 1e-4, path
            noise = random.standard_normal(slope.shape)
            step = 1e-5 * (slope / size + noise / np.linalg.norm(noise))
            expected = (loss({index: step}) - loss({index: -step})) / 2e-5
            assert abs(np.sum(slope * step) / 1e-5 - expected) < 1e-3 * size, jax.tree_util.keystr(path)


# ---- decoding --------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def decoded(model: LanguageModel, params: Any, hyper: Any) -> Any:
    """The logits after each token from the third on: a padded prompt of three, then one token after the other."""
    tokens = jnp.asarray(TOKENS, jnp.int32)
    caches = empty_caches(model, hyper, batch=2, capacity=TOKENS.shape[1])

    def step(caches: Any, token: Any) -> Any:
        logits, caches = model.apply({"params": params}, token[:, None], hyper, caches, method="decode")
        return caches, logits[:, 0]

    prompt = tokens[:, :4].at[:, 3].set(0)
    first, caches = model.apply({"params": params}, prompt, hyper, caches, length=jnp.int32(3), method="decode")
    _, rest = jax.lax.scan(step, caches, tokens[:, 3:].T)
    return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_decodes_by_its_papers_formula(name: str) -> None:
    """At every position, past context_length and past every window."""
    one = preset(name)
    hyper = hyperparameters(one.config).model
    found = decoded(one.model, jax.tree.map(np.float32, one.params[0]), hyper)
    expected = one.oracle(PAPERS[name][0], one.params[0], TOKENS)
    np.testing.assert_allclose(found, expected[:, 2:], atol=1e-4 * np.abs(expected).max(), rtol=0)
    assert np.abs(expected[:, 1:] - expected[:, :-1]).max((0, 2)).min() > 0.1  # one position is not the next


def test_layers_of_two_kinds_follow_in_the_papers_order() -> None:
    assert {name for name in PAPERS if preset(name).config.backend.then is not None} == set(PERIODS)
    for name, period in PERIODS.items():
        layers = layers_of(compose([chosen(name)]).backend, 12)
        assert layers["then"] == [*range(period - 1, 12, period)], name


def test_every_preset_has_an_oracle() -> None:
    files = [*xattn.config.CONF.glob("backend/*.yaml"), *xattn.config.CONF.glob("experiment/*.yaml")]
    assert {file.stem for file in files if "# Exact:" in file.read_text("utf-8")} == set(PAPERS)
