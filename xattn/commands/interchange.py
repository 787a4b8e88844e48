"""``xattn export``: write a run's parameters as safetensors, or as a Llama folder for Hugging Face transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xattn.config import Config, hashed_values
from xattn.errors import BadInput, ExitCode, needs_extra, writing
from xattn.keys import flatten
from xattn.model.initial import WEIGHTS
from xattn.runs import run_folder
from xattn.runs.loaded_run import load
from xattn.system.arguments import Parser
from xattn.system.screen import say
from xattn.training.llama import (
    CONFIG,
    EMBEDDING,
    HEAD,
    LAST_NORM,
    MATRICES,
    NORMS,
    PLAIN,
    ROTATED,
    Arrays,
    from_llama as from_llama,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write a run's model as model.safetensors and config.json into a new or empty folder."""
    parser = Parser(prog="xattn export", description=main.__doc__)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("folder", type=Path, help="the folder to write to")
    parser.add_argument("--format", choices=("xattn", "llama"), default="xattn")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    asked = parser.parse_args(argv)
    _numpy_safetensors()
    run = load(asked.run, checkpoint=asked.checkpoint)
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(run.params)}
    vocab_size = run.model.vocab_size
    if asked.format == "llama":
        config, arrays = llama_config(run.config, vocab_size), to_llama(arrays, run.config)
    else:
        config = {"format": "xattn", "step": run.step, "vocab_size": vocab_size}
        config |= {group: getattr(run.config, group).model_dump(mode="json") for group in ("model", "backend")}
    _write(asked.folder, config, arrays)
    size = sum(array.size for array in arrays.values())
    say(f"{size:,} parameters in", run_folder.shown(asked.folder.absolute()))
    return ExitCode.DONE


def llama_config(config: Config, vocab_size: int) -> dict[str, Any]:
    """Return the config.json of a ``LlamaForCausalLM``. Raises :class:`BadInput` if the model is not a Llama."""
    model, backend = config.model, config.backend
    values = hashed_values(config)
    if other := [f"{key} = {values[key]}" for key, wanted in PLAIN.items() if values[key] != wanted]:
        raise BadInput(f"a Llama cannot express this model: {', '.join(other)}; use --format xattn")
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


def to_llama(arrays: Mapping[str, np.ndarray], config: Config) -> Arrays:
    """Convert our parameters, by dotted name, to the names and layout of ``LlamaForCausalLM``."""
    model = config.model
    order = np.concatenate([np.arange(0, model.head_dim, 2), np.arange(1, model.head_dim, 2)])
    found = {EMBEDDING: arrays["token_embedding.embedding"]}
    for layer in range(model.num_layers):
        for ours, theirs in MATRICES.items():
            matrix = arrays[f"layers.{ours}.kernel"][layer].T
            if ours in ROTATED:
                matrix = matrix.reshape(-1, model.head_dim, matrix.shape[1])[:, order].reshape(matrix.shape)
            found[f"model.layers.{layer}.{theirs}.weight"] = matrix
        for ours, theirs in NORMS.items():
            found[f"model.layers.{layer}.{theirs}.weight"] = arrays[f"layers.{ours}.scale"][layer]
    found[LAST_NORM] = arrays["final_norm.scale"]
    if model.embeddings == "untied":
        found[HEAD] = arrays["output_embedding.embedding"]
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def _write(folder: Path, config: Mapping[str, Any], arrays: Arrays) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: must be a new or empty folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / WEIGHTS
        weights.touch()
        mode = weights.stat().st_mode  # from the umask; safetensors replaces the file by one only the owner can read
        _numpy_safetensors().save_file(arrays, weights, metadata={"format": "pt"})
        weights.chmod(mode)
        run_folder.write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _numpy_safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise needs_extra("xattn export", "hf", error) from error
    return safetensors.numpy
