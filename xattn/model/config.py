"""The config of the language model and of attention in its layers. Importing this module does not import jax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from xattn import registry
from xattn.backend import activations, dispatch
from xattn.backend.activations import QKPreActivation
from xattn.model.initial import Initial, initial
from xattn.section import OneOf, Section

if TYPE_CHECKING:
    import jax

OutputNorm = Callable[["jax.Array"], "jax.Array"]


_OWN_NORMS = ("none", "rmsnorm")
registered_norms: dict[str, OutputNorm] = {}


def output_norms() -> tuple[str, ...]:
    """Return the values of ``model.output_norm``: built-in ones, then registered ones."""
    return (*_OWN_NORMS, *registered_norms)


def register_output_norm(name: str) -> Callable[[OutputNorm], OutputNorm]:
    """Register the decorated function of each head's output as a choice of ``model.output_norm`` in this process.

    The function takes y (B, NH, S, DHV), float32, and returns an array like it. It runs under jit, vmap and grad, and
    no token may depend on another. An invalid name, or that of a built-in norm, is a ValueError.
    """

    def register(function: OutputNorm) -> OutputNorm:
        registry.check_name("output norm", name, name in _OWN_NORMS)
        registry.check_function("output norm", name, function, "y")
        _add_norm(name, function)
        return function

    return register


def _add_norm(name: str, function: OutputNorm) -> None:
    registry.note(registry.Addition("output norm", name, function, function, partial(_add_norm, name, function)))
    registered_norms[name] = function


class ModelConfig(Section):
    """The group ``model``: a decoder of blocks with attention and an MLP, each on a residual branch."""

    num_layers: PositiveInt
    """Number of layers."""
    num_heads: PositiveInt
    """Number of query heads in a layer. Each is embedding_dim / num_heads channels wide."""
    num_kv_heads: PositiveInt | None
    """Number of key/value heads, a divisor of num_heads; null means num_heads."""
    embedding_dim: PositiveInt
    """Width D of the residual stream."""
    mlp: Literal["gelu", "swiglu"]
    """Kind of MLP: ``gelu`` has two matrices, ``swiglu`` three."""
    mlp_dim: PositiveInt
    """Hidden width of the MLP."""
    norm: Literal["rmsnorm", "layernorm"]
    """Kind of all norms other than qk_norm and output_norm; neither kind has a bias."""
    norm_eps: float
    """Added to the mean square or variance inside the square root of every norm."""
    norm_placement: Literal["pre", "hybrid"]
    """``pre`` is x + attn(LN(x)); ``hybrid`` is x + LN₂(attn(LN₁(x))). The MLP's norm always comes before the MLP."""
    qk_norm: Literal["none", "rmsnorm"]
    """``rmsnorm`` normalises each query and key head before the pre-activation."""
    layer_scale: PositiveFloat | None
    """Initial value of a learned per-channel factor on each residual branch; null means no factor."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability of dropping each element of a residual branch in training."""
    embeddings: Literal["tied", "untied"]
    """``tied`` uses the token embedding as the output projection; ``untied`` has a separate one."""
    layers: Literal["scanned", "unrolled"]
    """``scanned`` compiles one layer and loops over it; ``unrolled`` compiles each layer. Parameters and results are
    the same.
    """
    remat: Literal["none", "full", "dots"]
    """What the backward pass recomputes to save memory: ``full`` is everything in a layer except its input; ``dots`` is
    everything except its projections. Both always scan the layers, because XLA may undo remat in unrolled ones.
    """
    dtype: Literal["float32", "bfloat16"]
    """Type of activations and of the products in attention. Parameters, norm statistics, attention weights and the loss
    are float32.
    """
    matmul_precision: Literal["default", "bfloat16"]
    """Precision of the projections and their gradients. ``default`` is the device's own for dtype; for float32, that is
    TF32 on NVIDIA and bfloat16 on a TPU. ``bfloat16`` rounds the factors to bfloat16 and sums in float32.
    """
    init_from: Initial | None
    """Llama folder (config.json, .safetensors) with the weights to start from; null means random weights."""
    conv: Annotated[int, Field(ge=2)] | None
    """Width of a causal depthwise convolution on queries, keys and values, before qk_norm; null means none."""
    value_residual: Literal["none", "first"]
    """``first`` mixes the first layer's values into those of each later layer: v ← λ v + μ v¹ with learned λ and μ
    (arXiv 2410.17897).
    """
    exclusive: bool
    """Whether to remove from each head's output the component along the token's own value (arXiv 2603.09078)."""
    output_norm: Annotated[str, OneOf(output_norms)]
    """``rmsnorm`` normalises each head's output. A script can register other norms."""
    output_gate: Literal["none", "head", "channel"]
    """Multiplies the heads' output by σ(W x): ``head`` has one number per head, ``channel`` one per channel (arXiv
    2505.06708).
    """
    parameters: PositiveInt | None
    """Target number of parameters, from which mlp_dim is chosen, overriding its value; null keeps mlp_dim."""

    @field_validator("init_from", mode="before", json_schema_input_type=str | Initial | None)
    @classmethod
    def _of_a_path(cls, value: Any) -> Any:
        """Accept a path, as users type it, or the resolved value from config.yaml."""
        if not isinstance(value, str | Mapping | Initial | None):
            raise ValueError("the path of a folder, or null")
        return initial(value) if isinstance(value, str) else value

    @field_validator("norm_eps")
    @classmethod
    def _is_positive_in_float32(cls, value: float) -> float:
        if not 1e-30 <= value <= 1e30:
            raise ValueError("a number from 1e-30 to 1e30")
        return value

    @model_validator(mode="after")
    def _widths_fit(self) -> ModelConfig:
        if self.embedding_dim % self.num_heads:
            raise ValueError(f"embedding_dim {self.embedding_dim} is not a multiple of num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"the head width embedding_dim / num_heads = {self.head_dim} is odd, and RoPE rotates pairs"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        return self

    @property
    def head_dim(self) -> int:
        return self.embedding_dim // self.num_heads

    @property
    def factor_dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of the projections' factors."""
        return "bfloat16" if "bfloat16" in (self.dtype, self.matmul_precision) else "float32"

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


def group_of(kind: str) -> str:
    """Return the dotted group with the keys of a kind of layer: ``backend`` or ``backend.then``."""
    return "backend" if kind == "backend" else f"backend.{kind}"


class LayerConfig(Section):
    """The keys of ``backend`` that each kind of layer sets for itself."""

    activation: Annotated[str, OneOf(activations.names)]
    """Function from attention logits to weights."""
    qk_pre_activation: QKPreActivation
    """Function applied to queries and keys before RoPE; ``silu`` is an alias for ``swish``."""
    theta: PositiveFloat
    """RoPE's wavelength base; angle = position · theta^(−2i/DHQK)."""
    sigmoid_bias: Literal["auto", "learned"] | float
    """``auto`` is −log(context_length); a number is used as is; ``learned`` is a scalar per head, initially −log n."""
    window: PositiveInt | None
    """A token attends to itself and the window − 1 tokens before it; null means all tokens before it."""
    decay: Literal["none", "alibi", "retnet", "learned", "input"]
    """How the past fades. ℓ is the log of what is left of it after a token, one number per key/value head.

    ``alibi``: ℓ = −m_h, the slopes of arXiv 2108.12409. ``retnet``: ℓ = log(1 − 2^(−5−h)) (arXiv 2307.08621).
    ``learned``: ℓ = log σ(b_h). ``input``: ℓ = log σ(w_h · x + b_h) of the layer's normed input x.
    """
    input_gate: Literal["none", "sigmoid"]
    """How much of each token is written: ``sigmoid`` is log i = log σ(u_h · x + c_h)."""
    rotary_fraction: Annotated[float, Field(ge=0, le=1)]
    """RoPE rotates this share of a head's channels, counted from the first; 0 is NoPE."""
    sink: Literal["none", "zero", "learned"]
    """An extra term e^z in softmax's sum, without a value; z is 0 or a learned scalar per head."""
    logit_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Factor on the logits, in addition to 1/√DHQK."""
    implementation: Annotated[str, OneOf(dispatch.names)]
    """A row of the dispatch table (xattn/backend/dispatch.py), or ``auto``."""

    @field_validator("qk_pre_activation", mode="before", json_schema_input_type=Literal["none", "swish", "silu"])
    @classmethod
    def _silu_is_swish(cls, value: Any) -> Any:
        return "swish" if value == "silu" else value

    @field_validator("sink")
    @classmethod
    def _has_a_sum_to_sink_in(cls, value: str, info: ValidationInfo) -> str:
        name = info.data.get("activation", "softmax")
        if value != "none" and not activations.activation(name).is_normalised:
            raise ValueError(f"none under {name}: a sink is a term of softmax's sum")
        return value


_KEYS = tuple(LayerConfig.model_fields)


class BackendConfig(LayerConfig):
    """The group ``backend``: attention in the layers.

    A pattern that changes no layer, or all of them (k = 1), is simplified to a backend with one kind of layer.
    """

    context_length: PositiveInt
    """Training sequence length in tokens; also the n of pointwise activations, as in sigmoid's bias −log n."""
    every: PositiveInt | None
    """k: layers k, 2k, 3k, … (counted from 1) take the keys of ``then``; null means that all layers are alike."""
    then: LayerConfig | None
    """Keys that replace the backend's in those layers, such as {activation: softmax}; null means no pattern."""

    @property
    def kinds(self) -> dict[str, BackendConfig]:
        """Kind of layer → a backend with only that kind: ``backend`` and, with a pattern, ``then``."""
        alone = self.model_copy(update={"every": None, "then": None})
        if self.then is None:
            return {"backend": alone}
        return {"backend": alone, "then": alone.model_copy(update={key: getattr(self.then, key) for key in _KEYS})}

    def kind_of(self, layer: int) -> str:
        """Return the kind of a layer, counted from 0."""
        return "then" if self.every is not None and (layer + 1) % self.every == 0 else "backend"

    @field_validator("then", mode="before")
    @classmethod
    def _inherits(cls, given: Any, info: ValidationInfo) -> Any:
        own = {name: info.data[name] for name in _KEYS if name in info.data}
        if len(own) < len(_KEYS):  # another key of the backend is invalid; pydantic reports that one
            return None
        return _inherited(own, given) | dict(given) if isinstance(given, Mapping) else given

    @field_serializer("then")
    def _what_differs(self, then: LayerConfig | None) -> dict[str, Any] | None:
        if then is None:
            return None
        own = {name: getattr(self, name) for name in _KEYS}
        inherited = _inherited(own, {"activation": then.activation})
        return {name: value for name, value in then if value != inherited[name]}

    @model_validator(mode="wrap")
    @classmethod
    def _normalised(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(values)
        if (made.every is None) != (made.then is None):
            raise ValueError("every and then go together, as in every=4 'then={activation: softmax}', or are both null")
        if made.then is None or (made.every != 1 and made._what_differs(made.then)):
            return made
        return handler({**values, **dict(made.then), "every": None, "then": None})


def _inherited(own: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of ``then``: the backend's keys, as far as its activation takes them.

    Raises:
        ValueError: ``then`` has a key that its activation does not take.
    """
    name = then.get("activation", own["activation"])
    if name not in activations.names():
        return dict(own)
    row, found = activations.activation(name), dict(own)
    for key, default, is_taken in (("sigmoid_bias", "auto", row.takes_bias), ("sink", "none", row.is_normalised)):
        if not is_taken:
            if key in then:
                raise ValueError(f"{name} takes no {key}; leave it out")
            found[key] = default
    return found
