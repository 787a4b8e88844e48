"""The calls that the contract suite checks. A case describes a call, and ``inputs`` makes its arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xattn.backend import blockwise, linear, reference, ring
from xattn.backend.activations import Activation, QKPreActivation, activation
from xattn.backend.arguments import checked_spec
from xattn.backend.decay import LEAST
from xattn.backend.dispatch import Call, row
from xattn.backend.rope import rotary_tables
from xattn.backend.spec import AttentionSpec
from xattn.testing import oracle

Function = Callable[[jax.Array, jax.Array, jax.Array, AttentionSpec], jax.Array]

# Distinct sizes, so that swapped axes show, and primes where possible (DHQK must be even, and heads come in groups).
BATCH, HEADS, LENGTH, WIDTH_QK, WIDTH_V = 2, 3, 13, 10, 7
THETA = 100.0

# Activations with a formula in the oracle; for any other one it calls the activation's function.
OWN_FORMULAS = ("softmax", "sigmoid", "none")

MASKS = ("default", "causal", "arbitrary", "empty rows", "window", "segments", "documents", "everything")

Decay = Literal["none", "zeros", "mild", "resets", "hard", "shut"]
"""zeros: ℓ = 0. mild: half-lives from 2 to S over the heads. resets: mild, but ℓ = −1e4 at 2 % of the tokens and at the
middle one. hard: ℓ = −5 × a lognormal number. shut: ℓ = −1e4 everywhere."""
DECAYS: tuple[Decay, ...] = ("none", "zeros", "mild", "resets", "hard")

Sink = Literal["none", "zero", "learned"]
"""learned: a different number for each head."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A point of the grid over which the checks run."""

    activation: str
    pre_activation: QKPreActivation = "none"
    mask: str = "default"
    """One of MASKS, or "borders", where every token is a document."""
    dtype: str = "float32"
    heads: int = HEADS
    kv_heads: int = HEADS
    length: int = LENGTH
    context_length: int | None = None
    bias_step: float = 0.0
    """Increment of sigmoid's bias from one head to the next; it starts at −log n."""
    decay: Decay = "none"
    input_gate: bool = False
    sink: Sink = "none"
    rotary_fraction: float = 1.0
    logit_scale: float = 1.0
    width: int | None = None
    """DHQK = DHV, for an implementation with few allowed widths; None means WIDTH_QK and WIDTH_V."""
    platform: str = "cpu"

    @property
    def widths(self) -> tuple[int, int]:
        """(DHQK, DHV)."""
        return (WIDTH_QK, WIDTH_V) if self.width is None else (self.width, self.width)

    @property
    def turning(self) -> int:
        """Number of channels that RoPE rotates."""
        return 2 * round(self.rotary_fraction * self.widths[0] / 2)

    def call(self) -> Call:
        """Return the case as the dispatch table sees it, without making arrays."""
        return Call(
            activation=activation(self.activation),
            dtype=self.dtype,
            batch=BATCH,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            sequence=self.length,
            head_dim_qk=self.widths[0],
            head_dim_v=self.widths[1],
            window={"window": 4, "everything": 6}.get(self.mask),
            has_mask=self.mask in ("causal", "arbitrary", "empty rows", "everything"),
            has_segment_ids=self.mask in ("segments", "documents", "borders", "everything"),
            has_decay=self.decay != "none",
            has_input_gate=self.input_gate,
            has_sink=self.sink != "none",
            platform=self.platform,
            compute_capability="9.0",
        )

    def __str__(self) -> str:
        parts = [
            self.activation + ("+swish" if self.pre_activation == "swish" else ""),
            self.mask,
            self.dtype,
            f"S{self.length}",
            f"{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else "",
            f"n{self.context_length}" if self.context_length is not None else "",
            "biases" if self.bias_step else "",
            f"decay={self.decay}" if self.decay != "none" else "",
            "gate" if self.input_gate else "",
            f"sink={self.sink}" if self.sink != "none" else "",
            f"rotary={self.rotary_fraction}" if self.rotary_fraction != 1 else "",
            f"scale={self.logit_scale}" if self.logit_scale != 1 else "",
        ]
        return "-".join(filter(None, parts))


@dataclass(frozen=True)
class Subject:
    """An implementation with its work cut into small pieces: LENGTH needs several and is not a multiple of one."""

    name: str
    implementation: str
    function: Function

    def serves(self, case: Case) -> bool:
        return row(self.implementation).refusal(case.call()) is None


SUBJECTS = (
    Subject("reference", "reference", reference.reference),
    Subject("blockwise", "blockwise", partial(blockwise.blockwise, tile=4)),
    # Without a mesh that splits the sequence it is blockwise.
    Subject("ring", "ring", partial(ring.ring, tile=4)),
    Subject("linear", "linear", partial(linear.linear, chunks=linear.Chunks(3))),
    Subject("linear2x2", "linear", partial(linear.linear, chunks=linear.Chunks(2, concurrent=2))),
)


@dataclass(frozen=True)
class Inputs:
    """The arrays of a case, in the form of the implementation and in that of the oracle."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    spec: AttentionSpec
    terms: dict[str, jax.Array | None]
    """The spec's arrays that have a gradient; log_decay before clipping."""
    problem: oracle.Problem


def with_terms(spec: AttentionSpec, terms: dict[str, jax.Array | None]) -> AttentionSpec:
    """Return the spec that :func:`~xattn.backend.arguments.checked_spec` makes of these arrays, which may be traced."""
    decay = terms["log_decay"]
    return replace(spec, **terms | {"log_decay": None if decay is None else jnp.maximum(decay, LEAST)})  # type: ignore[arg-type]


def inputs(case: Case) -> Inputs:
    """Return deterministic arrays, rounded to the case's dtype before implementation and oracle get them."""
    return _inputs(case, activation(case.activation))


@cache
def _inputs(case: Case, row: Activation) -> Inputs:
    rng = np.random.default_rng(20240904)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((BATCH, heads, case.length, width)), case.dtype)
        for heads, width in (
            (case.heads, case.widths[0]),
            (case.kv_heads, case.widths[0]),
            (case.kv_heads, case.widths[1]),
            (case.heads, case.widths[1]),
        )
    )
    restrictions = _restrictions(case.mask, case.length, rng)
    bias = -np.log(case.context_length or case.length) + case.bias_step * np.arange(case.heads)
    decay, gate, sink = _decay(case, rng), _gate(case, rng), _sink(case, rng)
    spec = checked_spec(
        batch=BATCH,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        length=case.length,
        activation_function=case.activation,
        qk_pre_activation_function=case.pre_activation,
        theta=THETA,
        context_length=case.context_length,
        sigmoid_bias=jnp.asarray(bias, jnp.float32) if case.bias_step and row.takes_bias else None,
        attention_mask=restrictions.get("mask"),
        segment_ids=restrictions.get("segments"),
        window=restrictions.get("window"),
        log_decay=decay,
        log_input_gate=gate,
        sink=sink,
        rotary_fraction=case.rotary_fraction,
        logit_scale=case.logit_scale,
        segments_are_runs=case.mask in ("documents", "borders"),
    )
    sin, cos = rotary_tables(jnp.arange(case.length), case.turning, THETA)
    problem = oracle.Problem(
        q=f64(q),
        k=f64(k),
        v=f64(v),
        activation=case.activation,
        swish=case.pre_activation == "swish",
        sin=f64(sin),
        cos=f64(cos),
        keep=oracle.keep_of(BATCH, case.length, **restrictions, causal=decay is not None),
        bias=bias if row.takes_bias else None,
        pointwise=None if row.name in OWN_FORMULAS or row.is_normalised else _in_float64(row, spec.n),
        sink=None if sink is None else f64(sink),
        log_decay=None if decay is None else f64(decay),
        log_input_gate=None if gate is None else f64(gate),
        logit_scale=float(np.float32(case.logit_scale)),
    )
    terms = {"theta": spec.theta, "logit_scale": spec.logit_scale, "bias": spec.bias, "sink": sink}
    return Inputs(q, k, v, g, spec, terms | {"log_decay": decay, "log_input_gate": gate}, problem)


def _in_float64(row: Activation, n: int) -> tuple[oracle.Function, oracle.Function]:
    """Return an activation without a formula in the oracle, and its slope, both by its own function in float64."""

    def of(function: Any) -> oracle.Function:
        def run(logits: oracle.F64) -> oracle.F64:
            with jax.enable_x64(True):
                return np.asarray(function(jnp.asarray(logits, jnp.float64)))

        return run

    weight = partial(row.__call__, n=n)
    return of(weight), of(lambda logits: jax.vjp(weight, logits)[1](jnp.ones_like(logits))[0])


def _restrictions(mask: str, length: int, rng: np.random.Generator) -> dict[str, Any]:
    arbitrary = rng.random((length, length)) < 0.6
    empty = arbitrary & (np.arange(length) % 3 != 1)[:, None]
    # Segment ids that return, and segments that end within blocks: the id must decide, not the border.
    segments = np.stack([(np.arange(length) // 5) % 2, np.arange(length) // 7]).astype(np.int32)
    documents = np.cumsum(rng.random((BATCH, length)) < 0.2, axis=1).astype(np.int32)
    return {
        "default": {},
        "causal": {"mask": np.tri(length, dtype=bool)},
        "arbitrary": {"mask": arbitrary},
        "empty rows": {"mask": empty},
        "window": {"window": 4},
        "segments": {"segments": segments},
        "documents": {"segments": documents},
        "borders": {"segments": np.tile(np.arange(length, dtype=np.int32), (BATCH, 1))},
        "everything": {"mask": empty, "window": 6, "segments": segments},
    }[mask]


def _decay(case: Case, rng: np.random.Generator) -> jax.Array | None:
    shape = (BATCH, case.kv_heads, case.length)
    half_lives = np.geomspace(2, max(2, case.length), case.kv_heads)[:, None]
    mild = -np.log(2) / half_lives * rng.uniform(0.5, 1.5, shape)
    hard = -5 * rng.lognormal(size=shape)
    reset = rng.random(shape) < 0.02
    reset[:, :, case.length // 2] = True
    kinds = {
        "zeros": np.zeros(shape),
        "mild": mild,
        "resets": np.where(reset, -1e4, mild),
        "hard": hard,
        "shut": np.full(shape, -1e4),
    }
    return None if case.decay == "none" else jnp.asarray(kinds[case.decay], jnp.float32)


def _gate(case: Case, rng: np.random.Generator) -> jax.Array | None:
    """Return log σ of normal numbers."""
    x = rng.standard_normal((BATCH, case.kv_heads, case.length))
    return jnp.asarray(-np.log1p(np.exp(-x)), jnp.float32) if case.input_gate else None


def _sink(case: Case, rng: np.random.Generator) -> jax.Array | None:
    x = rng.standard_normal(case.heads)
    return None if case.sink == "none" else jnp.asarray(x if case.sink == "learned" else 0 * x, jnp.float32)


def f64(x: jax.Array) -> oracle.F64:
    return np.asarray(x).astype(np.float64)
