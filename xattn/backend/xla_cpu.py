"""Workarounds that only XLA's CPU compiler needs. To understand a GPU run, skip this module and all calls to it."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

F32, BF16, HIGHEST = jnp.float32, jnp.bfloat16, jax.lax.Precision.HIGHEST

# What XLA:CPU hands to YNNPACK. In float32, nothing: on two cores under jax 0.10, a step of trainer=default is 1.13
# times as fast without it. A step of nanoGPT's CPU setting, or one under jax 0.12, is equally fast either way. In
# bfloat16, the products, because XLA has no kernels of its own for them, but not the sums, which YNNPACK slows down.
# Float32 products then go there too, although slower, and cannot be excluded: with Muon, which has some, a bfloat16
# step gains nothing.
_YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
_TAKEN_TO_YNNPACK = {"float32": "", "bfloat16": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def is_used() -> bool:
    """Return whether programs are compiled for a CPU."""
    return jax.default_backend() == "cpu"


def compiled(lowered: jax.stages.Lowered, dtype: str) -> jax.stages.Compiled:
    """Compile a program whose products are mostly of that dtype. Only XLA:CPU is given an option."""
    if is_used():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another jax may not know the option
            return lowered.compile(compiler_options={_YNNPACK: _TAKEN_TO_YNNPACK[dtype]})
    return lowered.compile()


def donated(*arguments: int) -> tuple[int, ...]:
    """Return which of a step's arguments may be overwritten by its results: none on a CPU. To write the new state over
    the old one, XLA:CPU would first copy all of the optimizer's statistics. That costs more than memory for both."""
    return () if is_used() else arguments


def materialised(table: Array) -> Array:
    """Return the same table, bit for bit, but make XLA compute it only once.

    XLA:CPU fuses sine and cosine into the rotation and recomputes them for every batch row and head, at many times the
    cost of the rotation. It drops an optimization_barrier before fusing but keeps a matrix product, and a product with
    the identity in full precision is exact.
    """
    return jnp.matmul(table, jnp.eye(table.shape[-1], dtype=table.dtype), precision=HIGHEST)


def without_token_axis(x: Array) -> Array:
    """Return x (…, 1, D) as (…, D). If a factor has two axes of length 1, XLA:CPU copies the cache that it meets."""
    return x[..., 0, :]


def norm(tree: Any) -> Array:
    """Return √ of the sum of the squares of all entries. Each leaf's squares are summed as its product with itself: at
    262,144 numbers this takes XLA:CPU a third of the time."""
    squares = (jnp.tensordot(leaf, leaf, leaf.ndim, precision=HIGHEST) for leaf in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares))


def product(subscripts: str, x: Array, y: Array) -> Array:
    """Return the einsum, multiplied in float32. XLA:CPU fails on some bfloat16 products with several batch axes:
    "Unsupported element type for DotThunk" (jax 0.10.2 and 0.12.0)."""
    return jnp.einsum(subscripts, x.astype(F32), y.astype(F32), preferred_element_type=F32)


def rounded(x: Array) -> Array:
    """Return x rounded to bfloat16 but kept in its dtype, so that its products are computed in float32."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: Array, kernel: Array, precision: str) -> Array:
    """Compute :func:`xattn.model.functions.projection`, with gradients that XLA:CPU computes fast. They merge batch
    and sequence into one axis, which can't stay split by sequence: each device would gather it."""
    return _project_forward(x, kernel, precision)[0]


def _project_forward(x: Array, kernel: Array, precision: str) -> tuple[Array, tuple[Array, Array]]:
    factors = _factor(x, precision), _factor(kernel, precision)
    return _dot(*factors, axis=0).astype(x.dtype), factors


def _project_backward(precision: str, factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = factors
    factor = _factor(gradient, precision)
    of_x = _dot(factor, kernel, axis=1)
    of_kernel = _of_kernel(x.reshape(-1, x.shape[-1]), factor.reshape(-1, factor.shape[-1]))
    return of_x.astype(gradient.dtype), of_kernel.astype(gradient.dtype)


project.defvjp(_project_forward, _project_backward)


def _of_kernel(x: Array, gradient: Array) -> Array:
    """Return xᵀ · gradient: (T, in), (T, out) → (in, out), float32.

    JAX computes (gradientᵀ · x)ᵀ. For that, XLA:CPU fuses the gradient's elementwise function with writing it out
    transposed, at many times the cost of the function alone. This function transposes the narrower of the two arrays
    and, if that is the gradient, the result as well. The barrier keeps XLA from folding that into the product.
    """
    if x.shape[1] > gradient.shape[1]:
        return jax.lax.optimization_barrier(_of_kernel(gradient, x)).T
    return _dot(_factor(x.T), gradient, axis=0)


def _factor(array: Array, precision: str = "default") -> Array:
    """Return the array in that precision and, in bfloat16, stored in memory in the order it is read.

    XLA:CPU has bfloat16 kernels only for such factors. It picks the kernel before it folds transpositions, even of
    results, into products; a product that then has no kernel fails at run time. It folds nothing through a barrier.
    Without the extra axis it would store a transposed array untransposed, as a layout.
    """
    array = array.astype(BF16) if precision == "bfloat16" else array
    return jax.lax.optimization_barrier(array[None])[0] if array.dtype == BF16 else array


def _dot(a: Array, b: Array, *, axis: int) -> Array:
    """Return a · b over a's last axis and b's axis ``axis``, in float32."""
    product = jnp.tensordot(a, b, (-1, axis), preferred_element_type=F32)
    return jax.lax.optimization_barrier(product) if a.dtype == BF16 else product
