"""The specification: attention as its formula, S×S weights and all. Other implementations are tested to equal it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xattn.backend import formula
from xattn.backend.spec import AttentionSpec, prepare, product


def reference(
    q: Float[Array, "B NH S DHQK"], k: Float[Array, "B NKV S DHQK"], v: Float[Array, "B NKV S DHV"], spec: AttentionSpec
) -> Float[Array, "B NH S DHV"]:
    """out = weights · v, with the weights as :func:`xattn.backend.api.attention` states them.

    Where a token may not attend they are 0. Query head h reads key/value head ⌊h · NKV / NH⌋. q, k, v and the
    output have one dtype. Logits and weights are float32; the weights are rounded to v's dtype before they meet v, and
    that product too is accumulated in float32. A row that may attend to nothing is 0.
    """
    weights = attended(q, k, spec).weights
    v = jnp.repeat(v, q.shape[1] // v.shape[1], axis=1)
    return product("bhts,bhsd->bhtd", weights.astype(v.dtype), v).astype(v.dtype)


class Attended(NamedTuple):
    """What rows attend to: the scores A before any additive term, who may attend, and the weights."""

    scores: Float[Array, "B NH T S"]
    keep: Bool[Array, "#B T S"]
    weights: Float[Array, "B NH T S"]


def attended(
    q: Float[Array, "B NH S DHQK"],
    k: Float[Array, "B NKV S DHQK"],
    spec: AttentionSpec,
    rows: Int[Array, " T"] | None = None,
) -> Attended:
    """What each query attends to, or only the queries at the positions ``rows``."""
    q, k = prepare(q, k, spec)
    k = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)
    every = jnp.arange(k.shape[2])
    segments, mask = spec.segment_ids, spec.mask
    columns = asked = formula.Tokens(every, segments)
    if rows is not None:
        q, mask = q[..., rows, :], None if mask is None else mask[rows]
        asked = formula.Tokens(rows, None if segments is None else segments[:, rows])
    keep = formula.may_attend(asked, columns, spec, mask)
    scores = formula.scores(q, k)
    logits = formula.logits(scores, spec, formula.terms(spec, asked.positions))
    return Attended(scores, keep, formula.weights(logits, keep, spec))
