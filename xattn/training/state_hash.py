"""A fingerprint of the state that training has reached."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from xattn.training.sharding import to_host


def state_sha256(params: Any, opt_state: Any) -> str:
    """Return a SHA-256 over the leaves of parameters and optimizer state, sorted by path.

    Each leaf contributes ``<path>|<dtype>|<shape>|`` in UTF-8, as jax.tree_util.keystr and NumPy write them, and its
    bytes in C order. All processes must call this, because each holds a part of the leaves.
    """
    leaves = jax.tree_util.tree_flatten_with_path({"params": params, "opt_state": opt_state})[0]
    digest = hashlib.sha256()
    for path, leaf in sorted(((jax.tree_util.keystr(path), leaf) for path, leaf in leaves), key=lambda item: item[0]):
        array = np.asarray(to_host(leaf))
        digest.update(f"{path}|{array.dtype}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
