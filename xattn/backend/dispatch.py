"""Which code computes a call: a table of implementations, each with its reasons to refuse a call.

To add an implementation, write a module with a function of the same name, and add a row to ``TABLE``. The contract
suite runs over all rows. Importing this module does not import jax, so a name can be checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from xattn.backend import proven
from xattn.backend.activations import Activation
from xattn.backend.hopper.sizes import ACTIVATIONS, WIDTHS
from xattn.backend.proven import Proof

if TYPE_CHECKING:
    from xattn.backend.spec import AttentionSpec, Keys, Output, Queries, Values

AUTO = "auto"


@dataclass(frozen=True)
class Target:
    """A device that programs are compiled for, perhaps one that this machine does not have."""

    platform: str
    """As in :class:`Call`."""
    compute_capability: str
    """Such as 9.0; empty for other devices than CUDA's."""
    device_kind: str
    """Such as NVIDIA H100 80GB HBM3."""


_target: ContextVar[Target | None] = ContextVar("target", default=None)


@contextmanager
def compiling_for(device: Target) -> Iterator[None]:
    """Compile whatever is traced inside this context for that device instead of a local one."""
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)


def target() -> Target:
    """Return the device of :func:`compiling_for`, or else the first local one. This starts jax's backend."""
    if (given := _target.get()) is not None:
        return given
    import jax

    device, platform = jax.local_devices()[0], jax.default_backend()
    if platform == "gpu":
        platform = "rocm" if "rocm" in device.client.platform_version else "cuda"
    return Target(platform, str(getattr(device, "compute_capability", "")), device.device_kind)


@dataclass(frozen=True, kw_only=True)
class Call:
    """Everything about a call that a refusal may depend on, known before anything is compiled."""

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
    has_decay: bool = False
    has_input_gate: bool = False
    has_sink: bool = False
    platform: str = field(default_factory=lambda: target().platform)
    """Where the call will run: cpu, cuda, rocm, tpu, …"""
    compute_capability: str | None = None
    """Compute capability of that CUDA device, such as 9.0; None asks the first local device, if it matters."""
    context: int = field(default_factory=lambda: import_module("xattn.backend.mesh").context_devices())
    """Number of devices over which the mesh splits the sequence."""
    devices: int = field(default_factory=lambda: import_module("xattn.backend.mesh").devices())
    """All devices of the mesh."""

    @classmethod
    def of(cls, q: Queries, k: Keys, v: Values, spec: AttentionSpec) -> Call:
        """Describe a call with these checked arrays, which may be traced."""
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
            has_decay=spec.log_decay is not None,
            has_input_gate=spec.log_input_gate is not None,
            has_sink=spec.sink is not None,
        )

    @property
    def capability(self) -> str:
        return self.compute_capability or target().compute_capability


Reason = Callable[[Call], str | None]


def _never(call: Call) -> None:
    """Give no reason."""


@dataclass(frozen=True)
class Implementation:
    """A row of the table."""

    name: str
    """Name of its module in this package, and of the function in that module."""
    unsupported: Reason = _never
    """Gives what it does not support about the call, besides the activation, or None."""
    unfavourable: Reason = _never
    """Gives why ``auto`` should pass it over although it could serve the call, or None."""
    proof: Callable[[Call], Proof | str | None] = _never
    """What shows that ``auto`` may take it, or why nothing does; None where it needs no proof."""
    vmaps: bool = True
    """Whether vmap works on it, forward and backward. If not, runs that use it can't train as one program."""
    activations: tuple[str, ...] | None = None
    """Activations it serves. None means all: it takes them from :mod:`xattn.backend.formula`."""
    why: str = ""
    """Why it serves no others."""

    @property
    def function(self) -> Callable[[Queries, Keys, Values, AttentionSpec], Output]:
        """The function (q, k, v, spec) → out, as :func:`xattn.backend.reference.reference` specifies it."""
        return getattr(import_module(f"xattn.backend.{self.name}"), self.name)

    def refusal(self, call: Call) -> str | None:
        """Return what it does not support about the call, or None."""
        if self.activations is not None and call.activation.name not in self.activations:
            return f"{call.activation.name}: it supports {' and '.join(self.activations)} only, {self.why}"
        return self.unsupported(call)


@dataclass(frozen=True)
class Choice:
    """The implementation that serves a call."""

    name: str
    passed_over: dict[str, str]
    """Implementations that ``auto`` passed over, each with the reason; empty if one was named."""
    proof: Proof | None = None
    """What shows that ``auto`` may take it, where the implementation needs that."""


def _first(*reasons: tuple[bool, str]) -> str | None:
    """Return the first reason that holds, or None."""
    return next((reason for holds, reason in reasons if holds), None)


def _not_on_cuda(call: Call) -> str | None:
    return _first(
        (call.platform != "cuda", f"the platform {call.platform}: it needs a CUDA device"),
        (call.dtype not in ("bfloat16", "float16"), f"{call.dtype}: its kernels take bfloat16 and float16"),
        (call.has_mask or call.has_segment_ids, "a mask or segment_ids (S×S): its kernels are causal only"),
        (call.has_decay or call.has_input_gate, "a decay or an input gate: its kernels add no array to the logits"),
        (call.has_sink, "a sink: its kernels have no logit without a key"),
        (call.context > 1, "a split sequence: its kernels run on one device"),
    )


def _not_cudnn(call: Call) -> str | None:
    if refused := _not_on_cuda(call):
        return refused
    width, widest = call.head_dim_qk, 256 if float(call.capability) >= 9 else 128
    fits = width == call.head_dim_v and width % 8 == 0 and width <= widest
    return _first(
        (float(call.capability) < 8, f"compute capability {call.capability}: it needs 8.0"),
        (not fits, f"the head widths {width} and {call.head_dim_v}: must be equal, a multiple of 8, at most {widest}"),
    )


def _not_hopper(call: Call) -> str | None:
    if refused := _not_on_cuda(call):
        return refused
    width, widths = call.head_dim_qk, " or ".join(map(str, WIDTHS))
    fits = width == call.head_dim_v and width in WIDTHS
    return _first(
        (not fits, f"the head widths {width} and {call.head_dim_v}: must be equal, and {widths}"),
        (call.window is not None, "a window: its kernels are causal only"),
    ) or _first((call.capability != "9.0", f"compute capability {call.capability}: its instructions need exactly 9.0"))


def _not_linear(call: Call) -> str | None:
    return _first(
        (call.has_mask, "a mask: its state is a sum over all earlier tokens"),
        (call.window is not None, "a window: its state cannot drop single tokens"),
    )


def _not_ring(call: Call) -> str | None:
    return _first(
        (call.has_mask, "a mask: each device holds only a part of the sequence"),
        (call.sequence % call.context != 0, f"S = {call.sequence} on {call.context} devices: S must be a multiple"),
    )


def _proof_of_hopper(call: Call) -> Proof | str:
    """No user waits for another's measurements, and nothing unproven is chosen."""
    if call.devices > 1:
        return f"a mesh of {call.devices} devices: it was measured on one only"
    behind = TABLE[TABLE.index(row("hopper")) + 1 :]
    return proven.proof(
        proven.identity(target().device_kind),
        activation=call.activation.name,
        dtype=call.dtype,
        width=call.head_dim_qk,
        length=call.sequence,
        rival=lambda length: _first_that_serves(replace(call, sequence=length), behind).name,
    )


def _short(call: Call, length: int | None = None) -> str | None:
    """Give a reason against lengths at which the reference measured at least as fast, forward and backward on two CPU
    cores. The default is blockwise's length."""
    length = length or call.activation.blockwise_from
    return f"no faster than the reference below S = {length}" if call.sequence < length else None


def _unfavourable_ring(call: Call) -> str | None:
    """Give a reason against ring: below blockwise's lengths the reference, which gathers K and V, is as fast."""
    return "the mesh has no context axis" if call.context == 1 else _short(call)


def _unfavourable_blockwise(call: Call) -> str | None:
    return "a split sequence: each device would process all of it" if call.context > 1 else _short(call)


# ``auto`` tries them in this order. The last one serves every call.
TABLE: tuple[Implementation, ...] = (
    # JAX's batching rule for the backward treats unmapped operands as mapped (jax issue 38495).
    Implementation("cudnn", _not_cudnn, vmaps=False, activations=("softmax",), why="as cuDNN does"),
    Implementation("hopper", _not_hopper, proof=_proof_of_hopper, activations=ACTIVATIONS, why="as its kernels do"),
    Implementation(
        "linear", _not_linear, partial(_short, length=256), activations=("none",), why="by a sum of outer products"
    ),
    # Runs that train as one program have one device; ring is blockwise there.
    Implementation("ring", _not_ring, _unfavourable_ring),
    Implementation("blockwise", unfavourable=_unfavourable_blockwise),
    Implementation("reference"),
)


def names() -> tuple[str, ...]:
    """Return the names a user may choose: ``auto`` and the table's rows."""
    return (AUTO, *(row.name for row in TABLE))


def row(name: str) -> Implementation:
    """Return the table's row of that name. Raise ValueError, listing the choices, if there is none."""
    for candidate in TABLE:
        if candidate.name == name:
            return candidate
    raise ValueError(f"unknown attention implementation {name!r}; choices: {', '.join(names())}")


def choose(call: Call, implementation: str = AUTO) -> Choice:
    """Choose the implementation for a call: the named one, or for ``auto`` the first with no reason against it.

    Raises:
        ValueError: the name is unknown, or the named implementation does not support the call; the message says why.
    """
    if implementation != AUTO:
        if reason := row(implementation).refusal(call):
            raise ValueError(f"attention implementation {implementation!r} does not support {reason}")
        return Choice(implementation, {})
    return _first_that_serves(call, TABLE)


def _first_that_serves(call: Call, rows: Sequence[Implementation]) -> Choice:
    passed_over: dict[str, str] = {}
    for candidate in rows:
        if missing := candidate.refusal(call):
            passed_over[candidate.name] = f"does not support {missing}"
        elif reason := candidate.unfavourable(call):
            passed_over[candidate.name] = reason
        elif isinstance(found := candidate.proof(call), str):
            passed_over[candidate.name] = found
        else:
            return Choice(candidate.name, passed_over, found)
    raise AssertionError("the last row of the table serves every call")


def compute(q: Queries, k: Keys, v: Values, spec: AttentionSpec, implementation: str = AUTO) -> Output:
    """Compute attention of checked arrays, in v's dtype, with the implementation that :func:`choose` picks."""
    choice = choose(Call.of(q, k, v, spec), implementation)
    function: Callable[..., Output] = row(choice.name).function
    return function(q, k, v, spec) if choice.proof is None else function(q, k, v, spec, choice.proof.tiles)
