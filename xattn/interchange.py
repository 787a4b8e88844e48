"""``xattn export``: a run's parameters as safetensors, or as a Llama folder that Hugging Face's transformers loads.

A Llama is the same function where a run has softmax, no pre-activation, no window, RMSNorm before each branch alone, no
QK norm, SwiGLU and no layer scale. One thing differs in the layout: our RoPE rotates the pairs (2i, 2i + 1) of a head,
theirs (i, i + DH/2). So the rows of q and k are reordered, evens first; scores do not feel it, since both are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xattn import run_folder
from xattn.arguments import Parser
from xattn.config import Config
from xattn.errors import BadInput, ExitCode, storage_error
from xattn.loaded_run import load

Arrays = dict[str, np.ndarray]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
NORM_EPSILON = 1e-6  # of Flax's RMSNorm


def main(argv: Sequence[str] | None = None) -> int:
    """Writes model.safetensors and config.json of a run into a new or empty folder."""
    parser = Parser(prog="xattn export", description=main.__doc__)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--format", choices=("xattn", "llama"), default="xattn")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    asked = parser.parse_args(argv)
    _numpy_safetensors()
    run = load(asked.run, checkpoint=asked.checkpoint)
    arrays = {name: np.asarray(leaf) for name, leaf in _flat(run.params)}
    vocab_size = run.model.vocab_size
    if asked.format == "llama":
        config, arrays = llama_config(run.config, vocab_size), to_llama(arrays, run.config)
    else:
        config = {"format": "xattn", "step": run.step, "vocab_size": vocab_size}
        config |= {group: getattr(run.config, group).model_dump(mode="json") for group in ("model", "backend")}
    _write(asked.folder, config, arrays)
    print(f"{sum(array.size for array in arrays.values()):,} parameters in {run_folder.shown(asked.folder.absolute())}")
    return ExitCode.DONE


def llama_config(config: Config, vocab_size: int) -> dict[str, Any]:
    """The config.json of a ``LlamaForCausalLM``. Raises :class:`BadInput` where the run's model is not one."""
    model, backend = config.model, config.backend
    needed = {
        "backend.activation": (backend.activation, "softmax"),
        "backend.qk_pre_activation": (backend.qk_pre_activation, "none"),
        "backend.window": (backend.window, None),
        "backend.every": (backend.every, None),
        "model.norm": (model.norm, "rmsnorm"),
        "model.norm_placement": (model.norm_placement, "pre"),
        "model.qk_norm": (model.qk_norm, "none"),
        "model.mlp": (model.mlp, "swiglu"),
        "model.layer_scale": (model.layer_scale, None),
    }
    other = [f"{key} = {value}" for key, (value, wanted) in needed.items() if value != wanted]
    if other:
        raise BadInput(f"no Llama computes this model: {', '.join(other)}; --format xattn takes any")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.embedding_dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": backend.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": backend.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": backend.theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.embeddings == "tied",
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }


# Ours → theirs, of the matrices and norms of a layer.
_MATRICES = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_ROTATED = ("attention.query", "attention.key")


def to_llama(arrays: Mapping[str, np.ndarray], config: Config) -> Arrays:
    """Our parameters, by dotted name, in the names and layout of ``LlamaForCausalLM``."""
    model = config.model
    order = np.concatenate([np.arange(0, model.head_dim, 2), np.arange(1, model.head_dim, 2)])
    found = {"model.embed_tokens.weight": arrays["token_embedding.embedding"]}
    for layer in range(model.num_layers):
        for ours, theirs in _MATRICES.items():
            matrix = arrays[f"layers.{ours}.kernel"][layer].T
            if ours in _ROTATED:
                matrix = matrix.reshape(-1, model.head_dim, matrix.shape[1])[:, order].reshape(matrix.shape)
            found[f"model.layers.{layer}.{theirs}.weight"] = matrix
        for ours, theirs in _NORMS.items():
            found[f"model.layers.{layer}.{theirs}.weight"] = arrays[f"layers.{ours}.scale"][layer]
    found["model.norm.weight"] = arrays["final_norm.scale"]
    if model.embeddings == "untied":
        found["lm_head.weight"] = arrays["output_embedding.embedding"]
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def from_llama(folder: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a Llama folder of one model.safetensors: (overrides of the groups ``model`` and ``backend`` by dotted key,
    with ``vocab_size``; parameters as :class:`xattn.model.transformer.LanguageModel` has them).

    Raises :class:`BadInput` where the folder is not one, holds what our model does not compute (biases, scaled RoPE,
    another activation, heads of another width), or weights that its config.json does not tell of.
    """
    folder = Path(folder)
    load_file = _numpy_safetensors().load_file
    from safetensors import SafetensorError

    try:
        theirs = json.loads((folder / CONFIG).read_text("utf-8"))
        weights: Arrays = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"{folder}: not a Llama folder: {error}") from error
    try:
        return _from_llama(folder, theirs, weights)
    except KeyError as error:
        raise BadInput(f"{folder}: not a Llama folder: it lacks {error}") from error


def _from_llama(folder: Path, theirs: dict[str, Any], weights: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    if theirs.get("model_type") != "llama" or theirs.get("attention_bias") or theirs.get("mlp_bias") or scaled:
        raise BadInput(f"{folder}: only a plain Llama without biases and without scaled RoPE can be taken over")
    if not np.isclose(theirs.get("rms_norm_eps", NORM_EPSILON), NORM_EPSILON, rtol=1e-3):
        raise BadInput(f"{folder}: rms_norm_eps = {theirs['rms_norm_eps']}; ours is {NORM_EPSILON}")
    if (act := theirs.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise BadInput(f"{folder}: hidden_act = {act}; ours is silu")
    width, heads, layers = theirs["hidden_size"], theirs["num_attention_heads"], theirs["num_hidden_layers"]
    head_dim, tied = width // heads, bool(theirs.get("tie_word_embeddings"))
    if (theirs.get("head_dim") or head_dim) * heads != width:
        raise BadInput(f"{folder}: head_dim = {theirs['head_dim']}; ours is hidden_size / num_attention_heads")
    kv_width, hidden, vocab_size = (
        theirs.get("num_key_value_heads", heads) * head_dim,
        theirs["intermediate_size"],
        theirs["vocab_size"],
    )
    expected = {
        "embed_tokens": (vocab_size, width),
        "lm_head": (vocab_size, width),
        "q_proj": (width, width),
        "k_proj": (kv_width, width),
        "v_proj": (kv_width, width),
        "o_proj": (width, width),
        "gate_proj": (hidden, width),
        "up_proj": (hidden, width),
        "down_proj": (width, hidden),
    }
    for name, array in weights.items():
        shape = expected.get(name.split(".")[-2], (width,))
        if array.shape != shape:
            raise BadInput(f"{folder}: {name} is of shape {array.shape}; its {CONFIG} says {shape}")
    order = np.argsort(np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)]))
    params: dict[str, Any] = {
        "token_embedding": {"embedding": weights["model.embed_tokens.weight"]},
        "final_norm": {"scale": weights["model.norm.weight"]},
        "layers": {"attention": {}, "mlp": {}},
    }
    if not tied:
        params["output_embedding"] = {"embedding": weights["lm_head.weight"]}
    for ours, name in _MATRICES.items():
        stacked = np.stack([weights[f"model.layers.{layer}.{name}.weight"] for layer in range(layers)])
        if ours in _ROTATED:
            stacked = stacked.reshape(layers, -1, head_dim, width)[:, :, order].reshape(stacked.shape)
        module, leaf = ours.split(".")
        params["layers"][module][leaf] = {"kernel": np.ascontiguousarray(stacked.swapaxes(1, 2))}
    for ours, name in _NORMS.items():
        scales = [weights[f"model.layers.{layer}.{name}.weight"] for layer in range(layers)]
        params["layers"][ours] = {"scale": np.stack(scales)}
    overrides = {
        "model.num_layers": layers,
        "model.num_heads": heads,
        "model.num_kv_heads": kv_width // head_dim,
        "model.embedding_dim": width,
        "model.mlp_dim": hidden,
        "model.mlp": "swiglu",
        "model.norm": "rmsnorm",
        "model.norm_placement": "pre",
        "model.qk_norm": "none",
        "model.embeddings": "tied" if tied else "untied",
        "backend.theta": float(rope.get("rope_theta", theirs.get("rope_theta", 10000.0))),
        "backend.context_length": theirs["max_position_embeddings"],
        "vocab_size": vocab_size,
    }
    return overrides, params


def _write(folder: Path, config: Mapping[str, Any], arrays: Arrays) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: is not a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _numpy_safetensors().save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
        run_folder.write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise storage_error(error, folder) or BadInput(f"{folder}: cannot be written: {error.strerror}") from error


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted name and leaf of each parameter."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found


def _numpy_safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise BadInput("safetensors is not installed: pip install 'xattn[hf]'") from error
    return safetensors.numpy
