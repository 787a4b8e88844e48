"""The table of activations. An activation turns an attention logit into a weight.

A new activation is one row of ``_TABLE`` or, outside the package, one function under :func:`register_activation`.
Configs, messages, implementations, decoding and dispatch all read the row. Importing this module does not import jax,
so a config can be checked without it; the functions in the rows import it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xattn import registry

if TYPE_CHECKING:
    import jax

QKPreActivation = Literal["none", "swish"]
Pointwise = Callable[["jax.Array", int], "jax.Array"]
"""(float32 logits of any shape, n) → weights of that shape; n is context_length, or S if that is not configured."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A row of the table: a *pointwise* activation if it has a ``weight``, otherwise a *normalised* one."""

    name: str
    formula: str
    """The formula as users read it; A is the logit."""
    weight: Pointwise | None = None
    """W_ts = weight(A_ts, n). None means W_ts = e^{A_ts} / Σ_u e^{A_tu} over the keys u that t may attend to."""
    slope: Pointwise | None = None
    """(logits, n) → d weight / d logit. None means that jax differentiates ``weight``."""
    takes_bias: bool = False
    """Whether a bias b is added to the logits; −log n unless the caller gives another."""
    is_linear: bool = False
    """Whether the weight is the logit itself. Attention is then a sum of outer products, and has a state."""
    blockwise_from: int = 512
    """Shortest sequence for which ``auto`` uses tiles. Measured on two CPU cores; registered ones share sigmoid's."""
    file: Path | None = None
    """The user's file that registered it; None for a built-in activation."""

    @property
    def is_normalised(self) -> bool:
        return self.weight is None

    @property
    def uses_n(self) -> bool:
        """Whether the weights may depend on n, directly or through the default bias."""
        return not self.is_normalised and not self.is_linear

    def __call__(self, logits: jax.Array, n: int) -> jax.Array:
        """Compute the weights of a pointwise activation. ``slope``, if given, is their derivative."""
        assert self.weight is not None
        if self.slope is None:
            return self.weight(logits, n)
        import jax

        weight, slope = self.weight, self.slope
        function = jax.custom_jvp(lambda logits: weight(logits, n))
        function.defjvp(lambda at, along: (weight(at[0], n), slope(at[0], n) * along[0]))
        return function(logits)


def _sigmoid(logits: jax.Array, n: int) -> jax.Array:
    import jax

    return jax.nn.sigmoid(logits)


_TABLE = {
    row.name: row
    for row in (
        Activation(name="softmax", formula="e^A / Σ e^A", blockwise_from=256),
        Activation(name="sigmoid", formula="σ(A + b)", weight=_sigmoid, takes_bias=True),  # arXiv 2409.04431
        Activation(name="none", formula="A", weight=lambda logits, n: logits, is_linear=True, blockwise_from=1024),
    )
}


def names() -> tuple[str, ...]:
    """Return the values of ``backend.activation``: built-in ones, then registered ones."""
    return tuple(_TABLE)


def activation(name: str) -> Activation:
    """Return the activation of that name. Raise ValueError, listing the choices, if there is none."""
    if name not in _TABLE:
        raise ValueError(f"unknown activation_function {name!r}; choices: {', '.join(_TABLE)}")
    return _TABLE[name]


def register_activation(
    name: str, *, formula: str = "", slope: Pointwise | None = None, takes_bias: bool = False
) -> Callable[[Pointwise], Pointwise]:
    """Register the decorated function (logits, n) → weights as the pointwise activation ``name`` in this process.

    The function is applied to float32 logits of any shape, whole rows or tiles, under jit, vmap and grad. Where a token
    may not attend, the weight is 0 whatever the function returns. See ``examples/own_activation.py``.

    Args:
        name: the value for ``backend.activation``. An invalid name, or that of a built-in activation, is a ValueError.
        formula, slope, takes_bias: as in :class:`Activation`; ``formula`` defaults to the name of the function.
    """
    registry.check_name("activation", name, name in _TABLE and _TABLE[name].file is None)

    def register(weight: Pointwise) -> Pointwise:
        registry.check_function("activation", name, weight, "logits, n")
        code = inspect.unwrap(weight).__code__
        text, file = formula or code.co_name, Path(code.co_filename)
        add(Activation(name=name, formula=text, weight=weight, slope=slope, takes_bias=takes_bias, file=file))
        return weight

    return register


def add(row: Activation) -> None:
    """Add a user's row to the table in this process."""
    if row.weight is not None:
        registry.note(registry.Addition("activation", row.name, row, row.weight, partial(add, row)))
    _TABLE[row.name] = row
