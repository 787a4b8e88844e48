"""Reads Llama folders, as Hugging Face's transformers writes them, into our keys and parameters.

A Llama is the same function as a run with softmax, no pre-activation, no window, RMSNorm only before each branch, no QK
norm, SwiGLU and no layer scale. One thing differs in the layout: our RoPE rotates the pairs (2i, 2i + 1) of a head,
theirs (i, i + DH/2). So the rows of q and k are reordered, evens first; the scores stay the same, because both change.

Importing this module imports no jax.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

import xattn.config
from xattn.config import Config, hashed_values
from xattn.errors import BadInput, IntegrityError
from xattn.model.initial import TensorHead, opened, read_json, some_of, tensor_heads, weights_sha256
from xattn.section import Section

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
CONFIG = "config.json"

# A Llama's function in our keys. Add every new key that changes the function.
PLAIN: dict[str, Any] = {
    "backend.activation": "softmax",
    "backend.qk_pre_activation": "none",
    "backend.window": None,
    "backend.every": None,
    "model.norm": "rmsnorm",
    "model.norm_placement": "pre",
    "model.qk_norm": "none",
    "model.mlp": "swiglu",
    "model.layer_scale": None,
    "backend.decay": "none",
    "backend.input_gate": "none",
    "backend.rotary_fraction": 1.0,
    "backend.sink": "none",
    "backend.logit_scale": 1.0,
    "model.conv": None,
    "model.value_residual": "none",
    "model.exclusive": False,
    "model.output_norm": "none",
    "model.output_gate": "none",
}

# Our names → theirs, for the matrices and norms of a layer.
MATRICES = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
ROTATED = ("attention.query", "attention.key")
EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_FREQUENCIES = ".rotary_emb.inv_freq"  # old versions of transformers saved them; theta determines them
_DTYPES = ("F32", "F16", "BF16")


class _Rope(Section, extra="allow"):
    """``rope_parameters`` of transformers 5, ``rope_scaling`` of 4. Any further key belongs to a scaled RoPE."""

    rope_type: str = "default"
    type: str = "default"
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: float | None = None

    @property
    def is_plain(self) -> bool:
        plain = self.rope_type == self.type == "default" and self.partial_rotary_factor in (None, 1)
        return plain and not self.model_extra


class _LlamaConfig(Section, extra="ignore"):
    """The keys of a config.json that determine the model's function. A missing key takes transformers' default."""

    model_type: Literal["llama"]
    architectures: list[Literal["LlamaForCausalLM"]] | None = None
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: Annotated[int, Field(gt=0, le=10_000)]
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt = 2048
    hidden_act: Literal["silu", "swish"] = "silu"
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    partial_rotary_factor: float | None = None
    attention_bias: Literal[False] | None = None
    mlp_bias: Literal[False] | None = None
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    quantization_config: Any = None

    @property
    def kv_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def thetas(self) -> set[float]:
        ropes = [rope for rope in (self.rope_parameters, self.rope_scaling) if rope is not None]
        given = [self.rope_theta, *(rope.rope_theta for rope in ropes)]
        return {float(theta) for theta in given if theta is not None} or {10000.0}

    def problem(self) -> str | None:
        """Return what is inconsistent, or not what our model computes."""
        for name, rope in (("rope_parameters", self.rope_parameters), ("rope_scaling", self.rope_scaling)):
            if rope is not None and not rope.is_plain:
                given = rope.model_dump(exclude_unset=True)
                return f"{name} = {given}; scaled or partial RoPE is not supported"
        if self.partial_rotary_factor not in (None, 1):
            return f"partial_rotary_factor = {self.partial_rotary_factor}; must be 1"
        if self.quantization_config is not None:
            return "has a quantization_config; quantised weights are not supported"
        if self.sliding_window is not None:
            return f"sliding_window = {self.sliding_window}; a Llama has none"
        heads, width = self.num_attention_heads, self.hidden_size
        if width % heads or self.head_dim not in (None, width // heads):
            return f"head_dim = {self.head_dim}; must be hidden_size / num_attention_heads = {width} / {heads}"
        if self.head_width % 2:
            return f"hidden_size / num_attention_heads = {self.head_width} is odd, and RoPE rotates pairs"
        if heads % self.kv_heads:
            return f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {self.kv_heads}"
        if len(self.thetas()) > 1:
            return f"rope_theta is {' and '.join(map(str, sorted(self.thetas())))}; must be one value"
        return None

    def shapes(self) -> Shapes:
        """Return the shape of every tensor of the model. A tied model has no lm_head."""
        width, kv_width, hidden = self.hidden_size, self.kv_heads * self.head_width, self.intermediate_size
        of_layer: Shapes = {f"{name}.weight": (width,) for name in NORMS.values()} | {
            "self_attn.q_proj.weight": (width, width),
            "self_attn.k_proj.weight": (kv_width, width),
            "self_attn.v_proj.weight": (kv_width, width),
            "self_attn.o_proj.weight": (width, width),
            "mlp.gate_proj.weight": (hidden, width),
            "mlp.up_proj.weight": (hidden, width),
            "mlp.down_proj.weight": (width, hidden),
        }
        found: Shapes = {EMBEDDING: (self.vocab_size, width), LAST_NORM: (width,)}
        if not self.tie_word_embeddings:
            found[HEAD] = (self.vocab_size, width)
        for layer in range(self.num_hidden_layers):
            found |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
        return found


class LlamaFolder:
    """A Llama folder that our model can compute, judged by config.json and by the tensors' names, shapes and dtypes.

    Raises :class:`BadInput` otherwise: scaled or partial RoPE, biases, another activation, heads of another width,
    quantised weights, a tensor that is unknown, missing or of another shape, an lm_head that differs from the embedding
    it is tied to.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        given = read_json(folder / CONFIG)
        try:
            self._config = xattn.config.section(_LlamaConfig, given, at=CONFIG)
        except BadInput as error:
            raise self._refusal(str(error)) from error
        if problem := self._config.problem():
            raise self._refusal(f"{CONFIG}: {problem}")
        heads = tensor_heads(folder)
        self._file_of = {name: head.file for name, head in heads.items()}
        self._judge(heads)

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of ``model`` and ``backend`` that make our model this function, and their values."""
        theirs = self._config
        (theta,) = theirs.thetas()
        return PLAIN | {
            "model.num_layers": theirs.num_hidden_layers,
            "model.num_heads": theirs.num_attention_heads,
            "model.num_kv_heads": theirs.kv_heads,
            "model.embedding_dim": theirs.hidden_size,
            "model.mlp_dim": theirs.intermediate_size,
            "model.norm_eps": float(theirs.rms_norm_eps),
            "model.embeddings": "tied" if theirs.tie_word_embeddings else "untied",
            "backend.theta": theta,
        }

    @property
    def context_length(self) -> int:
        return self._config.max_position_embeddings

    def params(self) -> dict[str, Any]:
        """Return float32 NumPy parameters for :class:`xattn.model.transformer.LanguageModel`. Raises :class:`BadInput`
        if one is not finite."""
        theirs = self._config
        width, layers, head_width = theirs.hidden_size, theirs.num_hidden_layers, theirs.head_width
        weights = self._read(theirs.shapes())
        if odd := [name for name, array in weights.items() if not np.isfinite(array).all()]:
            raise self._refusal(f"not finite: {some_of(odd)}")
        found: dict[str, Any] = {
            "token_embedding": {"embedding": weights[EMBEDDING]},
            "final_norm": {"scale": weights[LAST_NORM]},
            "layers": {"attention": {}, "mlp": {}},
        }
        if not theirs.tie_word_embeddings:
            found["output_embedding"] = {"embedding": weights[HEAD]}
        order = np.argsort(np.concatenate([np.arange(0, head_width, 2), np.arange(1, head_width, 2)]))
        for ours, name in MATRICES.items():
            stacked = np.stack([weights.pop(f"model.layers.{layer}.{name}.weight") for layer in range(layers)])
            if ours in ROTATED:
                stacked = stacked.reshape(layers, -1, head_width, width)[:, :, order].reshape(stacked.shape)
            module, leaf = ours.split(".")
            found["layers"][module][leaf] = {"kernel": np.ascontiguousarray(stacked.swapaxes(1, 2))}
        for ours, name in NORMS.items():
            scales = [weights[f"model.layers.{layer}.{name}.weight"] for layer in range(layers)]
            found["layers"][ours] = {"scale": np.stack(scales)}
        return found

    def _judge(self, heads: Mapping[str, TensorHead]) -> None:
        expected = self._config.shapes()
        if missing := expected.keys() - heads.keys():
            raise self._refusal(f"missing: {some_of(missing)}")
        for name, head in heads.items():
            if head.dtype not in _DTYPES:
                raise self._refusal(f"{name} is {head.dtype}; allowed: {', '.join(_DTYPES)}")
            if (wanted := expected.get(name, head.shape)) != head.shape:
                raise self._refusal(f"{name} has shape {head.shape}; by {CONFIG} it must be {wanted}")
        others = heads.keys() - expected.keys()
        if unknown := [name for name in others if not self._says_nothing_new(name)]:
            raise self._refusal(f"unknown tensors: {some_of(unknown)}")

    def _says_nothing_new(self, name: str) -> bool:
        """Return whether an extra tensor is redundant: the tied embedding, or RoPE's frequencies."""
        if name.endswith(_FREQUENCIES):
            (theta,) = self._config.thetas()
            width = self._config.head_width
            (given,) = self._read([name]).values()
            known = theta ** (-np.arange(0, width, 2) / width)
            return given.shape == known.shape and bool(np.allclose(given, known, rtol=1e-2, atol=0))
        if name != HEAD:
            return False
        read = self._read([HEAD, EMBEDDING])
        if not np.array_equal(read[HEAD], read[EMBEDDING]):
            raise self._refusal(f"{HEAD} differs from {EMBEDDING}, but {CONFIG} has tie_word_embeddings = true")
        return True

    def _read(self, names: Iterable[str]) -> Arrays:
        """Return the tensors of these names, as float32."""
        names, found = list(names), Arrays()
        for path in sorted({self._file_of[name] for name in names}):
            with opened(path) as file:
                found |= {n: file.get_tensor(n).astype(np.float32) for n in names if self._file_of[n] == path}
        return found

    def _refusal(self, reason: str) -> BadInput:
        return BadInput(f"{self.folder}: not a Llama that xattn supports: {reason}")


# ---- a run that starts from one --------------------------------------------------------------------------------------


def initial_weights(config: Config) -> LlamaFolder | None:
    """Return the folder of ``model.init_from``; None if the run starts from random weights.

    Raises :class:`BadInput` if the config describes another model than the folder, and :class:`IntegrityError` if the
    weights are not those that the config was made with.
    """
    initial = config.model.init_from
    if initial is None:
        return None
    llama = LlamaFolder(Path(initial.path))
    values = hashed_values(config) | {"model.num_kv_heads": config.model.kv_heads}
    if other := [f"{key}={_typed(value)}" for key, value in llama.keys.items() if values[key] != value]:
        raise BadInput(f"model.init_from = {initial.path}: the config describes another model; give {' '.join(other)}")
    if weights_sha256(llama.folder) != initial.weights_sha256:
        raise IntegrityError(
            f"model.init_from = {initial.path}: the weights there have changed since this run was named"
        )
    return llama


def _typed(value: Any) -> str:
    return "null" if value is None else str(value)


def from_llama(folder: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a Llama folder. Returns (overrides of the groups ``model`` and ``backend`` by dotted key, with
    ``vocab_size``; float32 parameters for :class:`xattn.model.transformer.LanguageModel`).

    Raises :class:`BadInput` as :class:`LlamaFolder` and its ``params`` do.
    """
    llama = LlamaFolder(Path(folder))
    overrides = {key: _typed(value) if value is None else value for key, value in llama.keys.items()}
    others = {"backend.context_length": llama.context_length, "vocab_size": llama.vocab_size}
    return overrides | others, llama.params()
