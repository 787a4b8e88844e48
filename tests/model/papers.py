"""Published attentions in float64 NumPy, each as its paper writes it, and the small model around them.

A paper's function takes what a layer computes with and returns the heads' output before its projection. Nothing here
is shared with the package, and little among the papers: a slip in one formula must not be a slip in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Layer(NamedTuple):
    """One layer's heads on one sequence of S tokens."""

    q: Array  # (NH, S, D), normalised and not rotated
    k: Array
    v: Array
    x: Array  # (S, width), the layer's normed input
    p: Any  # the parameters of its attention
    number: int  # counted from 1
    first_values: Array  # (NH, S, D), of the first layer
    window: int | None  # tokens, where a preset scales the paper's


Paper = Callable[[Layer], Array]


def σ(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(a: Array) -> Array:
    weights = np.exp(a - a.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def banded(a: Array, window: int | None = None) -> Array:
    """The logits, −∞ for later keys and for those outside of the window."""
    t, s = np.indices(a.shape[-2:])
    keep = (s <= t) & (s > t - (window or a.shape[-1]))
    return np.where(keep, a, -np.inf)


def rope(x: Array, theta: float = 1e4, fraction: float = 1.0) -> Array:
    """Pairs of channels as complex numbers times e^{i t θ_j}, θ_j = theta^(−2j/d) (arXiv 2104.09864)."""
    d = int(x.shape[-1] * fraction)
    z = x[..., 0:d:2] + 1j * x[..., 1:d:2]
    z = z * np.exp(1j * np.arange(x.shape[-2])[:, None] * theta ** (-2 * np.arange(d // 2) / d))
    turned = np.stack([z.real, z.imag], -1).reshape(*x.shape[:-1], d)
    return np.concatenate([turned, x[..., d:]], -1)


def dot(q: Array, k: Array) -> Array:
    return q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])


def transformer(layer: Layer, **of_rope: float) -> Array:
    """Causal softmax attention with RoPE."""
    return softmax(banded(dot(rope(layer.q, **of_rope), rope(layer.k, **of_rope)))) @ layer.v


# ---- positions -------------------------------------------------------------------------------------------------------


def alibi(layer: Layer) -> Array:
    """arXiv 2108.12409, section 3: softmax(q_i Kᵀ + m · [−(i − 1), …, −1, 0])."""

    def slopes(n: int) -> list[float]:
        """2^(−8/n) and its powers; otherwise those of the next lower power of two, and every other one of the next."""
        if math.log2(n).is_integer():
            return [2 ** (-8 / n * power) for power in range(1, n + 1)]
        lower = 2 ** math.floor(math.log2(n))
        return slopes(lower) + slopes(2 * lower)[0::2][: n - lower]

    heads = []
    for q, k, v, m in zip(layer.q, layer.k, layer.v, slopes(len(layer.q)), strict=True):
        for i in range(1, len(q) + 1):
            heads.append(softmax(dot(q[i - 1], k[:i]) + m * np.arange(-(i - 1), 1)) @ v[:i])
    return np.reshape(heads, layer.v.shape)


def nope(layer: Layer) -> Array:
    """arXiv 2305.19466: the transformer's attention, without a positional encoding."""
    return softmax(banded(dot(layer.q, layer.k))) @ layer.v


def partial_rope(layer: Layer) -> Array:
    """GPT-J and GPT-NeoX: rotary_pct = 0.25."""
    return transformer(layer, fraction=0.25)


def smollm3(layer: Layer) -> Array:
    """no_rope_layers: 1, 1, 1, 0, …"""
    return nope(layer) if layer.number % 4 == 0 else transformer(layer)


# ---- gates and decay -------------------------------------------------------------------------------------------------


def products(f: Array) -> Array:
    """F_ij = f_{j+1} f_{j+2} … f_i for j ≤ i, and 0 elsewhere."""
    return np.array([[np.prod(f[j + 1 : i + 1]) if j <= i else 0.0 for j in range(len(f))] for i in range(len(f))])


def gates(layer: Layer, name: str) -> Array:
    """σ(x W + b), (NH, S)."""
    return σ(layer.x @ layer.p[name]["kernel"] + layer.p[name]["bias"]).T


def fox(layer: Layer) -> Array:
    """arXiv 2503.02130, section 3: O = softmax(Q Kᵀ / √d + D) V with D_ij = log F_ij."""
    heads = []
    for q, k, v, f in zip(layer.q, layer.k, layer.v, gates(layer, "decay"), strict=True):
        with np.errstate(divide="ignore"):
            heads.append(softmax(dot(q, k) + np.log(products(f))) @ v)
    return np.stack(heads)


def γ(head: int) -> float:
    return 1 - 2.0 ** (-5 - head)


def complex_pairs(x: Array, *, conjugate: bool = False) -> Array:
    """X ⊙ Θ with Θ_n = e^{inθ}, or with its conjugate, in complex channels."""
    d = x.shape[-1]
    angle = np.arange(len(x))[:, None] * 1e4 ** (-2 * np.arange(d // 2) / d)
    z = x[:, 0::2] + 1j * x[:, 1::2]
    return z.conj() * np.exp(-1j * angle) if conjugate else z * np.exp(1j * angle)


def retnet(layer: Layer) -> Array:
    """arXiv 2307.08621, equation 5: (Q Kᵀ ⊙ D) V, D_nm = γ^{n−m}, Q = X W_Q ⊙ Θ, K = X W_K ⊙ conj(Θ) / √d."""
    heads = []
    for head, (q, k, v) in enumerate(zip(layer.q, layer.k, layer.v, strict=True)):
        n, m = np.indices((len(q), len(q)))
        scores = (complex_pairs(q) @ complex_pairs(k, conjugate=True).T).real / math.sqrt(q.shape[1])
        heads.append((scores * np.where(n >= m, γ(head) ** (n - m), 0.0)) @ v)
    return np.stack(heads)


def retnet_recurrent(layer: Layer) -> Array:
    """Equation 6: S_n = γ S_{n−1} + K_nᵀ V_n and Q_n S_n."""
    heads = []
    for head, (q, k, v) in enumerate(zip(layer.q, layer.k, layer.v, strict=True)):
        queries, keys = complex_pairs(q), complex_pairs(k, conjugate=True) / math.sqrt(q.shape[1])
        state = np.zeros((q.shape[1] // 2, v.shape[1]), complex)
        for n in range(len(q)):
            state = γ(head) * state + np.outer(keys[n], v[n])
            heads.append((queries[n] @ state).real)
    return np.reshape(heads, layer.v.shape)


def gla(layer: Layer) -> Array:
    """arXiv 2312.06635, section 4.1, with one α_t for all channels: ((Q ⊙ B)(K / B)ᵀ ⊙ M) V, B_t = α_1 … α_t."""
    heads = []
    for q, k, v, α in zip(layer.q, layer.k, layer.v, gates(layer, "decay"), strict=True):
        b = np.cumprod(α)[:, None]
        heads.append(np.tril((q * b) @ (k / b).T) @ v / math.sqrt(q.shape[1]))
    return np.stack(heads)


def gla_recurrent(layer: Layer) -> Array:
    """S_t = (α_tᵀ 1) ⊙ S_{t−1} + k_tᵀ v_t and o_t = q_t S_t / √d."""
    heads = []
    for q, k, v, α in zip(layer.q, layer.k, layer.v, gates(layer, "decay"), strict=True):
        state = np.zeros((q.shape[1], v.shape[1]))
        for t in range(len(q)):
            state = np.outer(np.full(q.shape[1], α[t]), np.ones(v.shape[1])) * state + np.outer(k[t], v[t])
            heads.append(q[t] / math.sqrt(q.shape[1]) @ state)
    return np.reshape(heads, layer.v.shape)


def mlstm_sigmoid(layer: Layer) -> Array:
    """arXiv 2503.14376, mLSTMsig in parallel: H = (Q Kᵀ / √d ⊙ F ⊙ σ(ĩ)ᵀ) V."""
    heads = []
    arrays = (layer.q, layer.k, layer.v, gates(layer, "decay"), gates(layer, "input_gate"))
    for q, k, v, f, i in zip(*arrays, strict=True):
        heads.append((dot(q, k) * products(f) * i[None, :]) @ v)
    return np.stack(heads)


def mlstm_sigmoid_recurrent(layer: Layer) -> Array:
    """C_t = σ(f̃_t) C_{t−1} + σ(ĩ_t) k_t v_tᵀ and h_t = C_tᵀ q_t / √d."""
    heads = []
    arrays = (layer.q, layer.k, layer.v, gates(layer, "decay"), gates(layer, "input_gate"))
    for q, k, v, f, i in zip(*arrays, strict=True):
        cell = np.zeros((q.shape[1], v.shape[1]))
        for t in range(len(q)):
            cell = f[t] * cell + i[t] * k[t][:, None] * v[t][None, :]
            heads.append(cell.T @ (q[t] / math.sqrt(q.shape[1])))
    return np.reshape(heads, layer.v.shape)


# ---- sinks, and layers of two kinds ----------------------------------------------------------------------------------


def off_by_one(layer: Layer) -> Array:
    """Evan Miller, 2023: softmax₁(x)_i = e^{x_i} / (1 + Σ_j e^{x_j})."""
    e = np.exp(banded(dot(rope(layer.q), rope(layer.k))))
    return e / (1 + e.sum(-1, keepdims=True)) @ layer.v


def gpt_oss(layer: Layer) -> Array:
    """arXiv 2508.10925, section 2.2: the sink is one more column of the softmax, and odd layers are banded."""
    logits = dot(rope(layer.q, 150000.0), rope(layer.k, 150000.0))
    logits = banded(logits, layer.window if layer.number % 2 == 1 else None)
    sink = np.broadcast_to(layer.p["sink"][:, None, None], (*logits.shape[:-1], 1))
    return softmax(np.concatenate([logits, sink], -1))[..., :-1] @ layer.v


def gemma3(layer: Layer) -> Array:
    """arXiv 2503.19786, section 2: layers 6, 12, … are global, with base 1M; the others are local, with base 10k."""
    is_global = layer.number % 6 == 0
    base = 1e6 if is_global else 1e4
    logits = dot(rope(layer.q, base), rope(layer.k, base))
    return softmax(banded(logits, None if is_global else layer.window)) @ layer.v


def hybrid(layer: Layer) -> Array:
    """Three layers of scalar GLA to one of softmax attention with RoPE."""
    return transformer(layer) if layer.number % 4 == 0 else gla_recurrent(layer)


def qwen3_next_like(layer: Layer) -> Array:
    """Three linear layers with a scalar gate, one softmax layer with a quarter of RoPE, all of them gated."""
    y = transformer(layer, fraction=0.25) if layer.number % 4 == 0 else gla_recurrent(layer)
    return _gated(y, layer)


# ---- on the heads' output --------------------------------------------------------------------------------------------


def _gated(y: Array, layer: Layer) -> Array:
    """Y ⊙ σ(X W): W (width, NH · D), a head's channels side by side."""
    gate = σ(layer.x @ layer.p["output_gate"]["kernel"])
    return y * np.stack(np.split(gate, len(y), axis=-1))


def gated(layer: Layer) -> Array:
    """arXiv 2505.06708, equation 5: elementwise and head-specific, after scaled dot-product attention."""
    return _gated(transformer(layer), layer)


def exclusive(layer: Layer) -> Array:
    """arXiv 2603.09078: z_i = y_i − (y_iᵀ v_i) v_i / ‖v_i‖²."""
    heads = []
    for y, v in zip(transformer(layer), layer.v, strict=True):
        heads.append([y[i] - (y[i] @ v[i]) * v[i] / (v[i] @ v[i]) for i in range(len(y))])
    return np.asarray(heads)


def value_residual(layer: Layer) -> Array:
    """arXiv 2410.17897: U_n = A_n (λ V_n + μ V_1), and the first layer's U_1 = A_1 V_1."""
    λ, μ = (1.0, 0.0) if layer.number == 1 else layer.p["value_mix"]
    return transformer(layer._replace(v=λ * layer.v + μ * layer.first_values))


PAPERS: dict[str, list[Paper]] = {
    "alibi": [alibi],
    "nope": [nope],
    "partial_rope": [partial_rope],
    "smollm3": [smollm3],
    "fox": [fox],
    "retnet": [retnet, retnet_recurrent],
    "gla": [gla, gla_recurrent],
    "mlstm_sigmoid": [mlstm_sigmoid, mlstm_sigmoid_recurrent],
    "off_by_one": [off_by_one],
    "gpt_oss": [gpt_oss],
    "gemma3": [gemma3],
    "hybrid": [hybrid],
    "qwen3_next_like": [qwen3_next_like],
    "gated": [gated],
    "exclusive": [exclusive],
    "value_residual": [value_residual],
}


# ---- the model around them -------------------------------------------------------------------------------------------


def model(
    paper: Paper, params: Any, layers: dict[int, Any], tokens: Array, num_heads: int, window: int | None
) -> Array:
    """Logits (B, S, V) of the default model: RMSNorm before and after attention, normed q and k, SwiGLU.

    layers: the parameters of each, by its number in the paper's model. A convolution of q, k and v stands before their
    norm where the layers have taps.
    """

    def norm(x: Array, p: Any) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]

    def heads(x: Array, p: Any, name: str) -> Array:
        flat = x @ p[name]["kernel"]
        if f"{name}_taps" in p:  # y_t = Σ_j w_j x_{t−j}
            flat = sum(
                np.concatenate([np.zeros((j, flat.shape[1])), flat[: len(flat) - j]]) * w
                for j, w in enumerate(p[f"{name}_taps"])
            )
        return np.stack(np.split(flat, num_heads, axis=-1))

    out = []
    for row in tokens:
        x, first = params["token_embedding"]["embedding"][row], None
        for number, p in layers.items():
            normed, own = norm(x, p["attention_norm"]), p["attention"]
            q, k, v = (heads(normed, own, name) for name in ("query", "key", "value"))
            first = v if first is None else first
            q, k = norm(q, own["query_norm"]), norm(k, own["key_norm"])
            y = paper(Layer(q, k, v, normed, own, number, first, window))
            branch = np.concatenate(list(y), -1) @ own["output"]["kernel"]
            x = x + norm(branch, p["attention_output_norm"])
            normed, own = norm(x, p["mlp_norm"]), p["mlp"]
            gate = normed @ own["gate"]["kernel"]
            x = x + gate * σ(gate) * (normed @ own["up"]["kernel"]) @ own["down"]["kernel"]
        out.append(norm(x, params["final_norm"]) @ params["output_embedding"]["embedding"].T)
    return np.stack(out)
