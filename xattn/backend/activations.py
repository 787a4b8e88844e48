"""The table of activations: the step from an attention logit to a weight.

A new activation is one row of ``_TABLE``, or, outside the package, one function under :func:`register_activation`.
Configs, messages, implementations, decoding and dispatch all ask the row. Importing this module imports no jax, so that
a config can be checked without it; the rows' functions import it.
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
"""(float32 logits of any shape, n) → weights of that shape; n is context_length, or S where none is configured."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """One row of the table.

    With ``weight`` it is *pointwise*: W_ts = weight(A_ts, n). Without it is *normalised*:
    W_ts = e^{A_ts} / Σ_u e^{A_tu} over the keys u that t may attend to.
    """

    name: str
    formula: str
    """For people; A is the logit."""
    weight: Pointwise | None = None
    slope: Pointwise | None = None
    """(logits, n) → d weight / d logit. None: as jax differentiates ``weight``."""
    takes_bias: bool = False
    """Whether a bias b is added to the logits: −log n unless the caller gives another."""
    is_linear: bool = False
    """Whether the weight is the logit: attention is then a sum of outer products, with a state."""
    blockwise_from: int = 512
    """Shortest sequence for which auto takes tiles: measured for the package's own, two CPU cores; else sigmoid's."""
    file: Path | None = None
    """The user's file that registered it; None for one of the package's own."""

    @property
    def is_normalised(self) -> bool:
        return self.weight is None

    @property
    def uses_n(self) -> bool:
        """Whether the weights may depend on n, by themselves or by the default bias."""
        return not self.is_normalised and not self.is_linear

    def __call__(self, logits: jax.Array, n: int) -> jax.Array:
        """The weights of a pointwise activation, differentiated by ``slope`` where that is given."""
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
    """The values of ``backend.activation``: the package's own, then what was registered."""
    return tuple(_TABLE)


def rows() -> tuple[Activation, ...]:
    """All activations, in the order of :func:`names`."""
    return tuple(_TABLE.values())


def activation(name: str) -> Activation:
    """The activation of that name; a ValueError for an unknown one lists the choices."""
    if name not in _TABLE:
        raise ValueError(f"unknown activation_function {name!r}; choices: {', '.join(_TABLE)}")
    return _TABLE[name]


def register_activation(
    name: str, *, formula: str = "", slope: Pointwise | None = None, takes_bias: bool = False
) -> Callable[[Pointwise], Pointwise]:
    """Decorator: makes a function (logits, n) → weights the pointwise activation ``name`` in this process.

    The function is applied to float32 logits of any shape, whole rows or tiles, under jit, vmap and grad; where a token
    may not attend the weight is 0 whatever it returns. See ``examples/own_activation.py``.

    Args:
        name: the value for ``backend.activation``; one that is no name, or the package's own, is a ValueError.
        formula, slope, takes_bias: as in :class:`Activation`; formula is by default the function's name.
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
    """Puts a user's row into the table of this process."""
    if row.weight is not None:
        registry.note(registry.Addition("activation", row.name, row, row.weight, partial(add, row)))
    _TABLE[row.name] = row
