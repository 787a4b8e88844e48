"""Which code computes a call: a table of implementations, each with its reasons for not serving.

A new implementation is a module with a function of its name, and a row of ``TABLE``; the contract suite runs over the
rows. Importing this module imports no jax, so that a name can be judged without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xattn.backend.activations import Activation
from xattn.backend.hopper.tuning import WIDTHS

if TYPE_CHECKING:
    import jax

    from xattn.backend.spec import AttentionSpec

AUTO = "auto"


def platform() -> str:
    """The default device's platform, as :class:`Call` names it; asking starts jax's backend."""
    import jax

    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.local_devices()[0].client.platform_version else "cuda"


def compute_capability() -> str:
    """The first CUDA device's, such as 9.0."""
    import jax

    return str(jax.local_devices()[0].compute_capability)


def context_devices() -> int:
    """:func:`xattn.backend.mesh.context_devices`."""
    from xattn.backend import mesh

    return mesh.context_devices()


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is known of a call before anything is compiled; what an implementation's refusal may depend on."""

    activation: Activation
    dtype: str
    batch: int
    num_heads: int
    num_kv_heads: int
    sequence: int
    head_dim_qk: int
    head_dim_v: int
    window: int | None = None
    has_mask: bool = False
    has_segment_ids: bool = False
    platform: str = field(default_factory=lambda: platform())
    """cpu, cuda, rocm, tpu, …: where it will run."""
    compute_capability: str | None = None
    """That of the CUDA device where it will run, such as 9.0; None is the first one here, asked when it matters."""
    context: int = field(default_factory=lambda: context_devices())
    """Devices over which the mesh splits the sequence."""

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> Call:
        """The facts of checked arrays (B, NH or NKV, S, ·); they may be traced."""
        return cls(
            activation=spec.activation,
            dtype=q.dtype.name,
            batch=q.shape[0],
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            sequence=q.shape[2],
            head_dim_qk=q.shape[3],
            head_dim_v=v.shape[3],
            window=spec.window,
            has_mask=spec.mask is not None,
            has_segment_ids=spec.segment_ids is not None,
        )

    @property
    def capability(self) -> str:
        return self.compute_capability or compute_capability()


Reason = Callable[[Call], str | None]


@dataclass(frozen=True)
class Implementation:
    """A row of the table."""

    name: str
    """Of its module in this package, and of the function there."""
    unsupported: Reason
    """What of the call it does not support besides the activation, or None: then it takes the call when named."""
    unfavourable: Reason
    """Why ``auto`` should rather pass it over though it could serve, or None."""
    vmaps: bool
    """Whether vmap transforms it, forward and backward: only then do runs that take it train as one program."""
    activations: tuple[str, ...] | None = None
    """Those it serves. None: every one, since it asks :mod:`xattn.backend.formula`."""
    why: str = ""
    """Why no others."""

    @property
    def function(self) -> Callable[[jax.Array, jax.Array, jax.Array, AttentionSpec], jax.Array]:
        """(q, k, v, spec) → out, as :func:`xattn.backend.reference.reference` specifies it."""
        function: Any = getattr(import_module(f"xattn.backend.{self.name}"), self.name)
        return function

    def refusal(self, call: Call) -> str | None:
        """What of the call it does not support, or None."""
        if self.activations is not None and call.activation.name not in self.activations:
            return f"{call.activation.name}: it serves {' and '.join(self.activations)} only, {self.why}"
        return self.unsupported(call)


@dataclass(frozen=True)
class Choice:
    """The implementation that serves a call, and why those before it in the table were passed over by ``auto``.

    ``dataclasses.asdict`` of it is plain data, for a log or a JSON file.
    """

    name: str
    passed_over: dict[str, str]


def _never(call: Call) -> None:
    """No reason against it."""


def _not_cudnn(call: Call) -> str | None:
    if call.platform != "cuda":
        return f"the platform {call.platform}: it needs a CUDA device"
    if call.dtype not in ("bfloat16", "float16"):
        return f"{call.dtype}: cuDNN takes bfloat16 and float16"
    if call.has_mask or call.has_segment_ids:
        return "a given mask or segment_ids: it would need an S×S bias"
    if call.context > 1:
        return "a split sequence: jax does not take its kernels apart along it"
    if float(call.capability) < 8:
        return f"compute capability {call.capability}: it needs 8.0"
    widest = 256 if float(call.capability) >= 9 else 128
    if call.head_dim_qk != call.head_dim_v or call.head_dim_qk % 8 or call.head_dim_qk > widest:
        return f"the head widths {call.head_dim_qk} and {call.head_dim_v}: equal, a multiple of 8, at most {widest}"
    return None


def _not_hopper(call: Call) -> str | None:
    if call.platform != "cuda":
        return f"the platform {call.platform}: it needs a CUDA device"
    if call.dtype not in ("bfloat16", "float16"):
        return f"{call.dtype}: its kernels take bfloat16 and float16"
    if call.head_dim_qk != call.head_dim_v or call.head_dim_qk not in WIDTHS:
        return f"the head widths {call.head_dim_qk} and {call.head_dim_v}: equal, {' or '.join(map(str, WIDTHS))}"
    if call.has_mask or call.has_segment_ids or call.window is not None:
        return "a given mask, segment_ids or a window: its kernels are causal and no more"
    if call.context > 1:
        return "a split sequence: its kernels see one device"
    if call.capability != "9.0":
        return f"compute capability {call.capability}: its instructions are those of 9.0 alone"
    return None


def _unmeasured(call: Call) -> str:
    return "not measured yet, nor run on a GPU: name it to take it"


def _not_linear(call: Call) -> str | None:
    if call.has_mask:
        return "a given mask: its state is a sum over all earlier tokens"
    if call.window is not None:
        return "a window: a sum can't forget"
    if call.has_segment_ids:
        return "segment_ids: a sum can't forget"
    return None


def _not_ring(call: Call) -> str | None:
    if call.has_mask:
        return "a given mask: no device has more than a stretch of the sequence"
    if call.sequence % call.context:
        return f"S = {call.sequence} on {call.context} devices: it must be a multiple"
    return None


def _no_ring(call: Call) -> str | None:
    """Below these lengths the reference, which gathers K and V, is as fast."""
    return "the mesh has no context axis" if call.context == 1 else _short(call, call.activation.blockwise_from)


def _no_blockwise(call: Call) -> str | None:
    if call.context > 1:
        return "a split sequence: each device would go through all of it"
    return _short(call, call.activation.blockwise_from)


def _no_linear(call: Call) -> str | None:
    return _short(call, 256)


def _short(call: Call, length: int) -> str | None:
    """Against calls below a length where the reference was measured to be at least as fast (two CPU cores, forward and
    backward)."""
    return f"no faster than the reference below S = {length}" if call.sequence < length else None


# In the order in which auto tries them. The last serves every call.
TABLE: tuple[Implementation, ...] = (
    # JAX's rule for its backward takes operands that vmap leaves whole for mapped ones (jax issue 38495).
    Implementation("cudnn", _not_cudnn, _never, False, ("softmax",), "as cuDNN does"),
    Implementation("hopper", _not_hopper, _unmeasured, True, ("sigmoid", "none"), "its kernels know no other"),
    Implementation(
        "linear", _not_linear, _no_linear, True, ("none",), "since only logits as weights are a sum of outer products"
    ),
    # Runs that train as one program have one device; ring is blockwise there.
    Implementation("ring", _not_ring, _no_ring, vmaps=True),
    Implementation("blockwise", _never, _no_blockwise, vmaps=True),
    Implementation("reference", _never, _never, vmaps=True),
)


def names() -> tuple[str, ...]:
    """What a person may choose: ``auto`` and the table's rows."""
    return (AUTO, *(row.name for row in TABLE))


def row(name: str) -> Implementation:
    """The table's row of that name.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    for candidate in TABLE:
        if candidate.name == name:
            return candidate
    raise ValueError(f"unknown attention implementation {name!r}; choices: {', '.join(names())}")


def choose(call: Call, implementation: str = AUTO) -> Choice:
    """The implementation that will serve the call: the named one, or for ``auto`` the first with no reason against it.

    Raises:
        ValueError: the name is unknown, or the named implementation does not support the call; the message says why.
    """
    if implementation != AUTO:
        if reason := row(implementation).refusal(call):
            raise ValueError(f"attention implementation {implementation!r} does not support {reason}")
        return Choice(implementation, {})
    passed_over: dict[str, str] = {}
    for candidate in TABLE:
        if missing := candidate.refusal(call):
            passed_over[candidate.name] = f"does not support {missing}"
        elif reason := candidate.unfavourable(call):
            passed_over[candidate.name] = reason
        else:
            return Choice(candidate.name, passed_over)
    raise AssertionError("the last row of the table serves every call")


def compute(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, implementation: str = AUTO) -> jax.Array:
    """Attention of checked arrays by the implementation that :func:`choose` names: (B, NH, S, DHV) in v's dtype."""
    choice = choose(Call.of(q, k, v, spec), implementation)
    return row(choice.name).function(q, k, v, spec)
