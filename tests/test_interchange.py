"""Interchange: a run's parameters as a Llama, against Llama's formula in NumPy, and against transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from xattn.config import Config, compose
from xattn.errors import BadInput
from xattn.interchange import _flat, _write, from_llama, llama_config, to_llama
from xattn.model.transformer import LanguageModel, LayerHyperparameters

V, S = 19, 9
LLAMA = [
    *("model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.embedding_dim=24", "model.mlp_dim=10"),
    *("model.norm_placement=pre", "model.qk_norm=none", "model.layers=scanned", "backend.theta=50"),
    f"backend.context_length={S}",
]
TOKENS = np.random.default_rng(0).integers(0, V, (2, S))


def exported(folder: Path, *overrides: str) -> tuple[Config, Any, np.ndarray]:
    """A model with every parameter away from its initial value, written to a folder; its parameters and logits."""
    config = compose([*LLAMA, *overrides])
    model = LanguageModel(config.model, config.backend, V)
    hyper = LayerHyperparameters(jnp.float32(config.backend.theta), jnp.float32(0))
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS, hyper)["params"]
    params = jax.tree.map(lambda leaf: (0.5 * random.standard_normal(leaf.shape) + 0.1).astype(np.float32), shapes)
    logits = jax.jit(lambda params: model.apply({"params": params}, TOKENS, hyper))(params)
    _write(folder, llama_config(config, V), to_llama(dict(_flat(params)), config))
    return config, params, np.asarray(logits)


def llama(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Touvron et al., arXiv 2302.13971, with rotate_half, from the files alone, in float64."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    heads, kv_heads, width = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    length = tokens.shape[1]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T

    angles = np.arange(length)[:, None] * config["rope_theta"] ** (-2 * np.arange(width // 2) / width)
    cos, sin = np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)

    def rope(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        return x * cos + np.concatenate([-second, first], axis=-1) * sin

    def split(x: np.ndarray, number: int) -> np.ndarray:
        x = x.reshape(*x.shape[:2], number, width).swapaxes(1, 2)
        return np.repeat(x, heads // number, axis=1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm")
        q = rope(split(linear(h, f"{at}.self_attn.q_proj"), heads))
        k = rope(split(linear(h, f"{at}.self_attn.k_proj"), kv_heads))
        v = split(linear(h, f"{at}.self_attn.v_proj"), kv_heads)
        scores = np.where(np.tri(length, dtype=bool), q @ k.swapaxes(-1, -2) / np.sqrt(width), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = (p / p.sum(-1, keepdims=True)) @ v
        x = x + linear(out.swapaxes(1, 2).reshape(x.shape), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        gate = linear(h, f"{at}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return linear(norm(x, "model.norm"), head)


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_a_llama_of_the_files_computes_our_logits(tmp_path: Path, embeddings: str) -> None:
    config, params, logits = exported(tmp_path / "llama", f"model.embeddings={embeddings}")
    np.testing.assert_allclose(llama(tmp_path / "llama", TOKENS), logits, rtol=1e-4, atol=1e-4)
    overrides, back = from_llama(tmp_path / "llama")
    assert overrides.pop("vocab_size") == V
    typed = [f"{key}={value}" for key, value in overrides.items()]
    assert compose([*typed, "model.layers=scanned"]) == config
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_transformers_computes_our_logits(tmp_path: Path) -> None:
    """Where torch and transformers are installed; the test above is the same everywhere, from the formula."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip("torch and transformers are not installed")
    import torch
    from transformers import LlamaForCausalLM

    _, _, logits = exported(tmp_path / "llama")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.as_tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(theirs, logits, rtol=1e-4, atol=1e-4)


def test_layers_of_two_kinds_are_no_llama() -> None:
    with pytest.raises(BadInput, match=r"no Llama computes this model: backend.every = 2"):
        llama_config(compose([*LLAMA, "backend.every=2", "backend.then={window: 3}"]), V)


def test_what_is_no_llama_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no Llama computes this model: backend\.activation = sigmoid, model\.qk_norm"):
        llama_config(compose([*LLAMA, "backend=sigmoid", "model.qk_norm=rmsnorm"]), V)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="is not a new or empty folder"):
        _write(tmp_path, {}, {})
    with pytest.raises(BadInput, match="not a Llama folder"):
        from_llama(tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = gelu; ours is silu"),
        ({"head_dim": 2}, "head_dim = 2; ours is"),
        ({"vocab_size": 999}, r"weight is of shape .*; its config\.json says \(999"),
        ({"num_hidden_layers": 9}, "it lacks 'model.layers"),
        ({"rms_norm_eps": 1e-2}, "rms_norm_eps = 0.01"),
        ({"attention_bias": True}, "only a plain Llama"),
    ],
)
def test_a_llama_that_ours_does_not_compute_is_refused(changed: dict[str, object], told: str, tmp_path: Path) -> None:
    exported(tmp_path / "llama")
    file = tmp_path / "llama" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(BadInput, match=told):
        from_llama(str(tmp_path / "llama"))


def test_half_a_llama_is_refused(tmp_path: Path) -> None:
    exported(tmp_path / "llama")
    weights = tmp_path / "llama" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, match="not a Llama folder"):
        from_llama(tmp_path / "llama")
