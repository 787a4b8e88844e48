"""The attention backend: pure JAX, no Hydra, no files.

The names below are the public interface. They are loaded on first use, so importing this package or
:mod:`xattn.backend.dispatch` does not import jax. (No module here may be called ``attention``: as an attribute of the
package it would hide the function.)

Shape letters, in annotations and formulas: B batch, NH query heads, NKV key/value heads (NKV divides NH), G = NH / NKV,
S sequence, T a part of it, C a cache's capacity, DHQK query/key head width, DHV value head width.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xattn.backend.activations import register_activation as register_activation
    from xattn.backend.api import attention as attention
    from xattn.backend.module import (
        mLSTMBackendAttention as mLSTMBackendAttention,
        mLSTMBackendAttentionConfig as mLSTMBackendAttentionConfig,
    )
    from xattn.backend.rope import apply_rotary_emb as apply_rotary_emb, precompute_freqs as precompute_freqs

_HOME = {
    "apply_rotary_emb": "rope",
    "attention": "api",
    "mLSTMBackendAttention": "module",
    "mLSTMBackendAttentionConfig": "module",
    "precompute_freqs": "rope",
    "register_activation": "activations",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
