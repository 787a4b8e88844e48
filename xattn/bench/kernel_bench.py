"""What the stages of ``xattn bench kernels`` share: the record, the isolation of failures, and what is measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from xattn.backend.hopper.sizes import Tiles
from xattn.tracking.display import Screen

PASSES = ("forward", "forward+backward")

Function = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(q, k, v, bias) → out; bias is (NH,), all others are (B, NH, S, D)."""


class Bench:
    """Options, the screen, and the record."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.console = Screen()
        self.record: dict[str, Any] = {
            "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
            "jax": jax.__version__,
            "failures": {},
        }

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Isolate one configuration: any error of compiler, library or device is recorded, and the others continue."""
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.record["failures"][what] = f"{type(error).__name__}: {lines[0][:300]}"
            self.console.print(
                f"failed: {what}: {type(error).__name__}: {lines[0][:300]}", markup=False, soft_wrap=True
            )

    def table(self, title: str, *columns: str) -> Table:
        table = Table(*columns, title=title, title_justify="left")
        for column in table.columns:
            column.no_wrap = True
        return table

    def save(self) -> Path:
        self.options.output.mkdir(parents=True, exist_ok=True)
        path: Path = self.options.output / "kernels.json"
        path.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        return path


def kernel(activation: str, tiles: Tiles, *, causal: bool = True) -> Function:
    """Return the kernels alone, which take q and k as already rotated."""
    from xattn.backend.hopper.fused import fused
    from xattn.backend.hopper.kernels import Meaning

    def run(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
        meaning = Meaning(sigmoid=activation == "sigmoid", causal=causal)
        return fused(q, k, v, jnp.broadcast_to(bias, q.shape[:2]), meaning, tiles)

    return run


def program(function: Function, passes: str) -> Callable[..., Any]:
    """Return (q, k, v, bias, g) → out, or (out, gradients of all four)."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, g: jax.Array) -> Any:
        if passes == "forward":
            return function(q, k, v, bias)
        out, vjp = jax.vjp(function, q, k, v, bias)
        return out, vjp(g)

    return run
