"""Implicit promotion of dtypes is an error. Programs of a few tokens compile for longer than they run: they are compiled
with little optimisation."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_and_fast_to_compile() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("strict"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)
