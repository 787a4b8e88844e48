"""The contract suite for your own activation: ``xattn.testing.check_activation("relu")``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import jax

from xattn.backend.activations import activation
from xattn.testing.cases import MASKS, SUBJECTS, Case
from xattn.testing.contract import check_causal, check_decoding, check_theta_gradient, check_values

Check = tuple[str, Callable[[], None]]


def check_activation(name: str) -> None:
    """Check that every implementation of a registered activation computes its formula.

    Outputs and gradients of every implementation that serves it are compared with float64: under every kind of mask, in
    float32 and bfloat16, with grouped heads, and with decay and an input gate. The float64 results use the activation's
    own function, and its own slope if it has one. Further checks cover causality, the gradient of theta, and decoding,
    which must equal the parallel form at every position. The suite takes twenty seconds on two CPU cores.

    Raises:
        ValueError: no activation of that name is registered.
        AssertionError: at least one check fails; the message lists all failures.
    """
    failures = []
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)  # for many tiny programs, optimising costs most
    try:
        for what, check in checks(name):
            try:
                check()
            except AssertionError as error:
                failures.append(f"{what}: {error}")
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    assert not failures, "\n".join([f"{name} fails {len(failures)} checks:", *failures])


def checks(name: str) -> Iterator[Check]:
    """Yield the checks of :func:`check_activation`, each with a description."""
    row = activation(name)
    plain = Case(activation=name)
    cases = [
        *(Case(activation=name, mask=mask) for mask in MASKS),
        *(Case(activation=name, dtype="bfloat16", mask=mask) for mask in ("default", "everything")),
        Case(activation=name, heads=6, kv_heads=2, mask="everything", context_length=5),
        Case(activation=name, pre_activation="swish", length=1),
        Case(activation=name, decay="mild", input_gate=True, heads=6, kv_heads=2),
        *([Case(activation=name, bias_step=0.3, heads=6, kv_heads=2)] if row.takes_bias else []),
        *([Case(activation=name, sink="learned")] if row.is_normalised else []),
    ]
    subjects = [subject for subject in SUBJECTS if subject.name != "ring"]  # without a mesh it is blockwise
    for subject, case in itertools.product(subjects, cases):
        if subject.serves(case):
            yield f"{subject.name} {case}", lambda f=subject.function, c=case: check_values(f, c)  # type: ignore[misc]
    for subject in subjects:
        if subject.serves(plain):
            yield f"{subject.name} causal", lambda f=subject.function: check_causal(f, plain)  # type: ignore[misc]
            if row.slope is None:  # it uses differences, and a registered slope need not be the derivative
                yield f"{subject.name} theta", lambda f=subject.function: check_theta_gradient(f, plain)  # type: ignore[misc]
    for case in (
        Case(activation=name, context_length=5),
        Case(activation=name, context_length=5, mask="window"),
        Case(activation=name, context_length=5, heads=6, kv_heads=2, dtype="bfloat16"),
        Case(activation=name, context_length=5, decay="mild", input_gate=True),
    ):
        for prompt in (0, 7):
            yield f"decoding {case} after {prompt}", lambda c=case, p=prompt: check_decoding(c, prompt=p)  # type: ignore[misc]
