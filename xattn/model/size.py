"""The size of a model and the work per token, computed from the config alone. Importing this does not import jax.

Shape letters: NH query heads, NKV key/value heads, DH head width, S sequence, D embedding, V vocabulary.
"""

from __future__ import annotations

from xattn.backend import activations
from xattn.errors import BadInput
from xattn.model.config import BackendConfig, ModelConfig


def num_params(model: ModelConfig, backend: BackendConfig, *, vocab_size: int) -> int:
    """Return the number of parameters that :func:`xattn.model.transformer.init_params` creates."""
    d = model.embedding_dim
    embeddings = (1 if model.embeddings == "tied" else 2) * vocab_size * d
    layers = sum(_weights(model, kind) + _others(model, kind) for kind in _layers(model, backend))
    return embeddings + layers + d  # d: the scale of the last norm


def mlp_dim_for(parameters: int, model: ModelConfig, backend: BackendConfig, *, vocab_size: int) -> int:
    """Return the mlp_dim ≥ 1 with the number of parameters nearest to the target; of two equally near, the larger.

    Raises:
        BadInput: the model has more parameters even with an mlp_dim of 1.
    """
    smallest = num_params(model.model_copy(update={"mlp_dim": 1}), backend, vocab_size=vocab_size)
    if parameters < smallest:
        raise BadInput(
            f"model.parameters = {parameters}: must be at least {smallest}, the parameters of this model with an "
            "mlp_dim of 1"
        )
    each = model.num_layers * _mlp_matrices(model) * model.embedding_dim
    return 1 + (2 * (parameters - smallest) + each) // (2 * each)


def matmul_flops_per_token(model: ModelConfig, backend: BackendConfig, *, vocab_size: int) -> int:
    """Count the floating-point operations of the forward pass's products, for one token of a full sequence.

    Each weight that multiplies the token counts 2: in projections, gates, convolutions and the output embedding, but
    not in the embedding look-up. In causal attention a token attends to S/2 positions on average. The two products,
    2 · D · S/2 each, add up to 2 · S · D per layer, whatever the activation or window. A training step costs three
    times this.
    """
    d = model.embedding_dim
    attention = 2 * backend.context_length * d
    layers = sum(2 * _weights(model, kind) + attention for kind in _layers(model, backend))
    return layers + 2 * d * vocab_size


def _layers(model: ModelConfig, backend: BackendConfig) -> list[BackendConfig]:
    kinds = backend.kinds
    return [kinds[backend.kind_of(layer)] for layer in range(model.num_layers)]


def _mlp_matrices(model: ModelConfig) -> int:
    return 3 if model.mlp == "swiglu" else 2


def _weights(model: ModelConfig, layer: BackendConfig) -> int:
    """Count a layer's weights that multiply each token: matrices, and the taps of convolutions."""
    d, kv = model.embedding_dim, model.kv_heads * model.head_dim
    found = 2 * d * d + 2 * d * kv + _mlp_matrices(model) * d * model.mlp_dim
    found += d * model.kv_heads * ((layer.decay == "input") + (layer.input_gate == "sigmoid"))
    found += (model.conv or 0) * (d + 2 * kv)
    return found + d * {"none": 0, "head": model.num_heads, "channel": d}[model.output_gate]


def _others(model: ModelConfig, layer: BackendConfig) -> int:
    """Count a layer's parameters outside products: scales, biases, sinks and the mix of values."""
    d = model.embedding_dim
    found = (3 if model.norm_placement == "hybrid" else 2) * d
    found += 2 * model.head_dim if model.qk_norm == "rmsnorm" else 0
    found += 2 * d if model.layer_scale is not None else 0
    found += model.head_dim if model.output_norm == "rmsnorm" else 0
    found += 2 if model.value_residual == "first" else 0
    found += model.kv_heads * ((layer.decay in ("learned", "input")) + (layer.input_gate == "sigmoid"))
    found += model.num_heads if layer.sink == "learned" else 0
    has_learned_bias = layer.sigmoid_bias == "learned" and activations.activation(layer.activation).takes_bias
    return found + (model.num_heads if has_learned_bias else 0)
