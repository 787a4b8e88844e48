"""The rows of ``xattn bench gpu --compile-only``: programs of every kind that a run has. This module imports no jax."""

from __future__ import annotations

from itertools import product

from xattn.bench.gpu.checks import ACTIVATIONS, ENVIRONMENT, POINTWISE, Check
from xattn.section import CONF

DEVICES = ("h100",)

# Heads of width 64, which the kernels take, and else as small as every preset allows: the whole table takes minutes.
_SMALL = (
    *("model.num_layers=4", "model.embedding_dim=256", "model.num_heads=4", "model.layers=scanned"),
    *("backend.context_length=128", "trainer.batch_size=8"),
)
_GPT2 = ("model=gpt2", "backend.context_length=1024", "trainer.batch_size=2")
_GPT2_VOCABULARY = 50304
_DTYPES = ("float32", "bfloat16")
_LIMIT = 300.0


def checks() -> tuple[Check, ...]:
    """Return the rows: what every machine runs first, then the whole, the presets, and what large runs are made of."""
    presets = sorted(path.stem for path in (CONF / "backend").glob("*.yaml"))
    kinds = (("step", 1), ("evaluation", 1), ("decode", 1), ("pack", 16))
    return (
        ENVIRONMENT,
        *(
            _row(f"{kind}-{name}-{dtype}", kind, [*_SMALL, f"backend={name}", f"model.dtype={dtype}"], size=size)
            for (kind, size), dtype, name in product(kinds, _DTYPES, ACTIVATIONS)
        ),
        *(_row(f"hopper-{name}", "step", [*_SMALL, *_hopper(name)]) for name in POINTWISE),
        *(
            _row(f"preset-{name}", "step", [*_SMALL, f"backend={name}", "model.dtype=bfloat16"])
            for name in presets
            if name not in ACTIVATIONS
        ),
        *(
            _row(f"remat-{remat}", "step", [*_SMALL, "backend=sigmoid", "model.dtype=bfloat16", f"model.remat={remat}"])
            for remat in ("full", "dots")
        ),
        *(
            _row(f"gpt2-{name}", "step", [*_GPT2, *chosen], vocab_size=_GPT2_VOCABULARY)
            for name, chosen in (
                *((name, [f"backend={name}"]) for name in ACTIVATIONS),
                ("hopper", _hopper("sigmoid")),
                ("remat", ["backend=sigmoid", "model.remat=full"]),
            )
        ),
    )


def _hopper(name: str) -> list[str]:
    return [f"backend={name}", "backend.implementation=hopper", "model.dtype=bfloat16"]


def _row(name: str, kind: str, overrides: list[str], *, size: int = 1, vocab_size: int = 256) -> Check:
    program = "step" if kind == "pack" else kind
    arguments = {"kind": program, "overrides": overrides, "size": size, "vocab_size": vocab_size}
    return Check(name, "compiled for an H100", _LIMIT, "compile_only.program", arguments, shares=True)
