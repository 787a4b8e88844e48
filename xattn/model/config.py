"""What a person chooses about the language model and its layers' attention. Importing this module imports no jax."""

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
    """The values of ``model.output_norm``: the package's own, then what was registered."""
    return (*_OWN_NORMS, *registered_norms)


def register_output_norm(name: str) -> Callable[[OutputNorm], OutputNorm]:
    """Decorator: makes a function of each head's output a choice of ``model.output_norm`` in this process.

    The function takes y (B, NH, S, DHV), float32, and returns as much; it is called under jit, vmap and grad, and one
    token may not depend on another. A name that is no name, or the package's own, is a ValueError.
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
    """The group ``model``: a decoder whose blocks are attention and an MLP, each on a residual branch."""

    num_layers: PositiveInt
    """Number of layers."""
    num_heads: PositiveInt
    """Query heads of a layer. A head is embedding_dim / num_heads channels wide."""
    num_kv_heads: PositiveInt | None
    """Key and value heads, a divisor of num_heads; null means num_heads."""
    embedding_dim: PositiveInt
    """Width D of the residual stream."""
    mlp: Literal["gelu", "swiglu"]
    """``gelu`` has two matrices, ``swiglu`` three."""
    mlp_dim: PositiveInt
    """Hidden width of the MLP."""
    norm: Literal["rmsnorm", "layernorm"]
    """Which norm stands before, and with ``hybrid`` also after, attention; neither has a bias."""
    norm_eps: float
    """Added to the mean square, or the variance, under the root of every norm."""
    norm_placement: Literal["pre", "hybrid"]
    """``pre`` is x + attn(LN(x)); ``hybrid`` is x + LN₂(attn(LN₁(x))). The MLP's norm always comes before it."""
    qk_norm: Literal["none", "rmsnorm"]
    """``rmsnorm`` normalises each query and key head before the pre-activation."""
    layer_scale: PositiveFloat | None
    """Initial value of a learned factor per channel on each residual branch; null means no factor."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability with which an element of each residual branch is dropped in training."""
    embeddings: Literal["tied", "untied"]
    """``tied`` uses the token embedding as the output projection, ``untied`` has a separate one."""
    layers: Literal["scanned", "unrolled"]
    """``scanned`` compiles one layer and loops over it, ``unrolled`` compiles each. Parameters and results are the
    same.
    """
    remat: Literal["none", "full", "dots"]
    """What the backward pass computes again to save memory: ``full`` is all of a layer but its input; ``dots`` is all
    but its projections. The layers are then looped over in any case, since XLA may undo it in unrolled ones.
    """
    dtype: Literal["float32", "bfloat16"]
    """Type of the activations and of attention's products. Parameters, norm statistics, attention weights and the loss
    are float32.
    """
    matmul_precision: Literal["default", "bfloat16"]
    """Precision of the projections and their gradients. ``default`` multiplies as the device does in dtype, which for
    float32 is TF32 on NVIDIA and bfloat16 on a TPU; ``bfloat16`` rounds the factors to it and sums in float32.
    """
    init_from: Initial | None
    """A Llama folder (config.json, .safetensors) whose weights the run starts from; null means random weights."""
    conv: Annotated[int, Field(ge=2)] | None
    """Width of a causal depthwise convolution on queries, keys and values, before their norm; null means none."""
    value_residual: Literal["none", "first"]
    """``first`` mixes the first layer's values into those of each later layer: v ← λ v + μ v¹ with learned λ and μ
    (arXiv 2410.17897).
    """
    exclusive: bool
    """Whether the part along the token's own value is removed from each head's output (arXiv 2603.09078)."""
    output_norm: Annotated[str, OneOf(output_norms)]
    """``rmsnorm`` normalises each head's output; others are those that a script has registered."""
    output_gate: Literal["none", "head", "channel"]
    """Multiplies the heads' output by σ(W x): ``head`` has one number per head, ``channel`` one per channel (arXiv
    2505.06708).
    """
    parameters: PositiveInt | None
    """Number of parameters to choose mlp_dim for, whatever mlp_dim says; null keeps mlp_dim."""

    @field_validator("init_from", mode="before", json_schema_input_type=str | Initial | None)
    @classmethod
    def _of_a_path(cls, value: Any) -> Any:
        """What a person types is a path; config.yaml has what became of it."""
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
        """What the factors of the projections are in."""
        return "bfloat16" if "bfloat16" in (self.dtype, self.matmul_precision) else "float32"

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


def group_of(kind: str) -> str:
    """The dotted group that the keys of a kind of layer stand in: ``backend`` or ``backend.then``."""
    return "backend" if kind == "backend" else f"backend.{kind}"


class LayerConfig(Section):
    """The keys of ``backend`` that a kind of layer has of its own."""

    activation: Annotated[str, OneOf(activations.names)]
    """Function from attention logits to weights."""
    qk_pre_activation: QKPreActivation
    """Function applied to queries and keys before RoPE; ``silu`` is another name of ``swish``."""
    theta: PositiveFloat
    """RoPE's wavelength base; angle = position · theta^(−2i/DHQK)."""
    sigmoid_bias: Literal["auto", "learned"] | float
    """``auto`` is −log(context_length); a number is itself; ``learned`` is a scalar per head that starts at −log n."""
    window: PositiveInt | None
    """A token attends to itself and to the window − 1 tokens before it; null means to all before it."""
    decay: Literal["none", "alibi", "retnet", "learned", "input"]
    """How the past fades; ℓ is the log of what is left of it after a token, one number per key/value head.

    ``alibi``: ℓ = −m_h, the slopes of arXiv 2108.12409. ``retnet``: ℓ = log(1 − 2^(−5−h)) (arXiv 2307.08621).
    ``learned``: ℓ = log σ(b_h). ``input``: ℓ = log σ(w_h · x + b_h) of the layer's normed input x.
    """
    input_gate: Literal["none", "sigmoid"]
    """How much of a token is written: ``sigmoid`` is log i = log σ(u_h · x + c_h)."""
    rotary_fraction: Annotated[float, Field(ge=0, le=1)]
    """Share of a head's channels that RoPE rotates, the first ones; 0 is NoPE."""
    sink: Literal["none", "zero", "learned"]
    """One more term e^z in softmax's sum, which has no value: z is 0, or a learned scalar per head."""
    logit_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """A factor on the logits, besides 1/√DHQK."""
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
    """The group ``backend``: the layers' attention.

    A pattern that changes no layer, or all of them (k = 1), is read as what it is: a backend of one kind.
    """

    context_length: PositiveInt
    """Sequence length of training, in tokens; also the n of pointwise activations, as in sigmoid's bias −log n."""
    every: PositiveInt | None
    """Layers k, 2k, 3k, … (counted from 1) take the keys of ``then``; null means that all layers are alike."""
    then: LayerConfig | None
    """What those layers have in place of the backend's keys, such as {activation: softmax}; null with no pattern."""

    @property
    def kinds(self) -> dict[str, BackendConfig]:
        """Kind of layer → the backend with all layers of it: ``backend``, and ``then`` where there is a pattern."""
        alone = self.model_copy(update={"every": None, "then": None})
        return {"backend": alone} if self.then is None else {"backend": alone, "then": alone._with(self.then)}

    def _with(self, keys: LayerConfig) -> BackendConfig:
        return self.model_copy(update={key: getattr(keys, key) for key in _KEYS})

    def kind_of(self, layer: int) -> str:
        """The kind of a layer, counted from 0."""
        return "then" if self.every is not None and (layer + 1) % self.every == 0 else "backend"

    @field_validator("then", mode="before")
    @classmethod
    def _inherits(cls, given: Any, info: ValidationInfo) -> Any:
        own = {name: info.data[name] for name in _KEYS if name in info.data}
        if len(own) < len(_KEYS):  # another key of the backend is bad, and its error is reported
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
            raise ValueError("every and then go together: every=4 'then={activation: softmax}'; both are null without")
        if made.then is None or (made.every != 1 and made._what_differs(made.then)):
            return made
        return handler({**values, **dict(made.then), "every": None, "then": None})


def _inherited(own: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """What ``then`` is without its own keys: the backend's, where its activation takes them.

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
