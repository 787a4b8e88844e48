"""The specification: attention as its formula, with all S×S weights. Tests hold the other implementations to it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xattn.backend import formula
from xattn.backend.spec import AttentionSpec, prepare, product


def reference(
    q: Float[Array, "B NH S DHQK"], k: Float[Array, "B NKV S DHQK"], v: Float[Array, "B NKV S DHV"], spec: AttentionSpec
) -> Float[Array, "B NH S DHV"]:
    """Return weights · v, with the weights defined by :func:`xattn.backend.api.attention`.

    A weight is 0 where a token may not attend, so a row that may attend to nothing is 0. Query head h reads key/value
    head ⌊h · NKV / NH⌋. q, k, v and the output share one dtype. Logits and weights are float32. The weights are rounded
    to v's dtype before the product with v, and that product also accumulates in float32.
    """
    weights = attended(q, k, spec).weights
    v = jnp.repeat(v, q.shape[1] // v.shape[1], axis=1)
    return product("bhts,bhsd->bhtd", weights.astype(v.dtype), v).astype(v.dtype)


class Attended(NamedTuple):
    """What rows attend to: the scores A before any additive term, the mask (True = attend), and the weights."""

    scores: Float[Array, "B NH T S"]
    keep: Bool[Array, "#B T S"]
    weights: Float[Array, "B NH T S"]


def attended(
    q: Float[Array, "B NH S DHQK"],
    k: Float[Array, "B NKV S DHQK"],
    spec: AttentionSpec,
    rows: Int[Array, " T"] | None = None,
) -> Attended:
    """Return what each query attends to, or only those at positions ``rows``."""
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
