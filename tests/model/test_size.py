"""Parameters and operations by formula: against the model's own tree, what XLA counts, and what is published."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.quick import composed
from xattn.config import compose
from xattn.errors import BadInput
from xattn.model.size import matmul_flops_per_token, mlp_dim_for, num_params
from xattn.model.transformer import LanguageModel, init_params
from xattn.training.programs import hyperparameters

# Sizes that differ, so that one taken for another shows: S 7, D 12, heads 6 of width 2 on 2 key/value heads, MLP 10.
SMALL = [
    *("backend.context_length=7", "model.num_layers=5", "model.num_heads=6", "model.num_kv_heads=2"),
    *("model.embedding_dim=12", "model.mlp_dim=10", "model.layers=scanned"),
]
V = 23
PLAIN = ["model.norm_placement=pre", "model.qk_norm=none", "model.mlp=gelu", "model.embeddings=tied"]
EVERY_TERM = [
    *("backend.decay=input", "backend.input_gate=sigmoid", "backend.sink=learned", "model.conv=3"),
    *("model.value_residual=first", "model.exclusive=true", "model.output_norm=rmsnorm", "model.output_gate=channel"),
    "model.layer_scale=0.1",
]
ONE_KIND = [
    [],
    PLAIN,
    ["model.num_kv_heads=null", "model.layer_scale=0.1", "model.norm=layernorm"],
    ["backend=sigmoid", "backend.sigmoid_bias=learned"],
    ["backend.decay=alibi", "backend.sink=zero", "backend.rotary_fraction=0.5", "model.exclusive=true"],
    ["backend.decay=learned"],
    ["backend.decay=input"],
    ["backend.input_gate=sigmoid"],
    ["backend.sink=learned"],
    ["model.conv=3"],
    ["model.value_residual=first"],
    ["model.output_norm=rmsnorm"],
    ["model.output_gate=head"],
    ["model.output_gate=channel"],
    EVERY_TERM,
]
# Of five layers two are ``then``, or with every=3 one.
PATTERNS = [
    ["backend=sigmoid", "backend.sigmoid_bias=learned", "backend.every=2", "backend.then={activation: softmax}"],
    ["backend.every=2", "backend.then={activation: none, decay: input}"],
    ["backend.decay=input", "backend.every=3", "backend.then={decay: learned}"],
    ["backend=none", "backend.input_gate=sigmoid", "backend.every=2", "backend.then={input_gate: none}"],
    ["backend=none", "backend.every=3", "backend.then={activation: softmax, sink: learned}"],
    [*EVERY_TERM, "backend.every=2", "backend.then={activation: none, decay: retnet}"],
]


@pytest.mark.parametrize("overrides", [*ONE_KIND, *PATTERNS], ids=" ".join)
def test_as_many_parameters_as_the_model_has(overrides: list[str]) -> None:
    config = composed(*SMALL, *overrides)
    model = LanguageModel(config.model, config.backend, V)
    tree = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    counted = num_params(config.model, config.backend, vocab_size=V)
    assert counted == sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("model", "vocab_size", "about"), [("nano", 256, 0.86e6), ("small", 256, 10.8e6), ("gpt2", 50257, 124e6)]
)
def test_the_models_of_conf_are_as_large_as_they_say(model: str, vocab_size: int, about: float) -> None:
    config = compose([f"model={model}"])
    assert num_params(config.model, config.backend, vocab_size=vocab_size) == pytest.approx(about, rel=0.01)


@pytest.mark.parametrize("overrides", [[], PLAIN, EVERY_TERM, PATTERNS[-1]], ids=" ".join)
def test_no_other_mlp_dim_comes_nearer(overrides: list[str]) -> None:
    config = composed(*SMALL, *overrides)

    def size(mlp_dim: int) -> int:
        model = config.model.model_copy(update={"mlp_dim": mlp_dim})
        return num_params(model, config.backend, vocab_size=V)

    for asked in range(size(1), size(3), 7):
        chosen = mlp_dim_for(asked, config.model, config.backend, vocab_size=V)
        others = range(1, chosen + 3)
        assert abs(size(chosen) - asked) == min(abs(size(each) - asked) for each in others)
    for exact in (1, 2, 9, 344):
        assert mlp_dim_for(size(exact), config.model, config.backend, vocab_size=V) == exact


def test_a_model_that_cannot_be_that_small_says_how_small_it_can_be() -> None:
    config = compose(SMALL)
    smallest = num_params(config.model.model_copy(update={"mlp_dim": 1}), config.backend, vocab_size=V)
    assert mlp_dim_for(smallest, config.model, config.backend, vocab_size=V) == 1
    with pytest.raises(BadInput, match=rf"^model\.parameters = {smallest - 1}: must be at least {smallest}, "):
        mlp_dim_for(smallest - 1, config.model, config.backend, vocab_size=V)


# ---- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        (["backend.decay=input"], 5 * 2 * 12 * 2),
        (["backend.decay=learned"], 0),
        (["backend.input_gate=sigmoid"], 5 * 2 * 12 * 2),
        (["model.output_gate=head"], 5 * 2 * 12 * 6),
        (["model.output_gate=channel"], 5 * 2 * 12 * 6 * 2),
        (["model.conv=3"], 5 * 2 * 3 * (6 + 2 * 2) * 2),
        (["model.value_residual=first", "model.output_norm=rmsnorm", "model.exclusive=true"], 0),
        (["backend.every=2", "backend.then={decay: input}"], 2 * 2 * 12 * 2),
        (["backend.decay=input", "backend.every=2", "backend.then={decay: none, input_gate: sigmoid}"], 5 * 2 * 12 * 2),
        (["backend.input_gate=sigmoid", "backend.every=3", "backend.then={input_gate: none}"], 4 * 2 * 12 * 2),
    ],
)
def test_what_a_term_adds_to_the_operations(overrides: list[str], more: int) -> None:
    """decay and input gate 2·D·NKV, gates 2·D·NH or 2·D·NH·DH, a convolution 2·width·(NH + 2·NKV)·DH, in the layers
    that have them: here 5 layers, D 12, NH 6, NKV 2, DH 2."""

    def counted(*overrides: str) -> int:
        config = composed(*SMALL, *overrides)
        return matmul_flops_per_token(config.model, config.backend, vocab_size=V)

    assert counted(*overrides) - counted() == more


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.mlp=gelu", "model.num_kv_heads=1", "model.num_layers=3"],
        ["backend.decay=input", "backend.input_gate=sigmoid", "model.output_gate=channel"],
    ],
)
def test_operations_are_counted_as_xla_counts_them(overrides: list[str]) -> None:
    """The reference computes all S² pairs, twice those that the formula counts; the rest is not in matrix products."""
    wide = ["model.embedding_dim=64", "model.mlp_dim=160", "backend.context_length=96", "model.layers=unrolled"]
    heads = ["model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=2"]
    config = compose([*heads, *wide, "backend.implementation=reference", *overrides])
    model = LanguageModel(config.model, config.backend, 256)
    tokens = jax.ShapeDtypeStruct((2, 96), jnp.int32)
    hyper = hyperparameters(config).model
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, hyper)
    cost: Any = jax.jit(model.apply).lower(shapes, tokens, hyper).compile().cost_analysis()
    counted = matmul_flops_per_token(config.model, config.backend, vocab_size=256)
    skipped = config.model.num_layers * 2 * 96 * 64
    assert cost["flops"] / (2 * 96) == pytest.approx(counted + skipped, rel=0.12)


def test_operations_differ_from_nanogpts_as_the_documentation_says() -> None:
    """Half of its attention, and no scales of norms; docs/cost.md has the share for GPT-2 124M."""
    layers, d, length, vocab = 12, 768, 1024, 50304
    keys = [f"model.num_layers={layers}", f"model.embedding_dim={d}", "model.num_heads=12", "model.num_kv_heads=12"]
    config = compose([*keys, "model.mlp=gelu", f"model.mlp_dim={4 * d}", f"backend.context_length={length}"])
    ours = 3 * matmul_flops_per_token(config.model, config.backend, vocab_size=vocab)
    norms = (2 * layers + 1) * d
    parameters = layers * 12 * d * d + vocab * d + norms
    nanogpts = 6 * parameters + 12 * layers * d * length  # estimate_mfu in its model.py
    assert nanogpts - ours == 6 * layers * d * length + 6 * norms
    assert 1 - ours / nanogpts == pytest.approx(0.066, abs=0.0005)
