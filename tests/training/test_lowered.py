"""The program of a training step is pinned, so that any change to it shows up in review.

The digest is of the lowered step (StableHLO), before any platform's compiler, so it is the same on every machine.
Another jax may lower the same mathematics differently, so each release has its own digests.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from xattn.config import compose, shaping
from xattn.data.batches import Batch
from xattn.training.programs import _one_run
from xattn.training.sharding import layout_of

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "lowered_steps.json"
CASES = {
    f"{activation}, {pre_activation}": (f"backend={activation}", f"backend.qk_pre_activation={pre_activation}")
    for activation in ("softmax", "sigmoid", "none")
    for pre_activation in ("none", "swish")
} | {
    "softmax, blockwise": ("backend=softmax", "backend.implementation=blockwise"),
    "none, linear": ("backend=none", "backend.implementation=linear"),
    "none, every second softmax": ("backend=none", "backend.every=2", "backend.then={activation: softmax}"),
}


def lowered(*overrides: str) -> str:
    """Return the SHA-256 of a tiny model's training step as StableHLO, lowered for a CPU."""
    tiny = ("trainer=debug", "model.embedding_dim=16", "model.num_layers=2", "model.mlp_dim=16", "trainer.batch_size=2")
    config = shaping(compose([*tiny, "backend.context_length=16", *overrides]))
    one = _one_run(config, 11, layout_of(config))
    tokens, weights = jnp.zeros((2, 17), jnp.int32), jnp.zeros((2, 16))
    text = jax.jit(one.step).lower(one.shapes, Batch(tokens, weights)).as_text()
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_the_golden_one(case: str) -> None:
    """To update or add a release's digests, run this from the repository's root:

    python -m tests.training.test_lowered
    """
    known = json.loads(GOLDEN.read_text()).get(jax.__version__)
    if known is None:
        pytest.skip(f"no digests of jax {jax.__version__}; python -m tests.training.test_lowered adds them")
    if jax.default_backend() != "cpu":
        pytest.skip("the step is traced otherwise where there is a GPU")
    assert lowered(*CASES[case]) == known[case]


def test_another_program_has_another_digest() -> None:
    """The test above would notice a changed scale or mask."""
    digests = {lowered(*CASES["softmax, none"], *more) for more in ((), ("backend.window=3",), ("model.qk_norm=none",))}
    assert len(digests) == 3
    assert lowered(*CASES["softmax, none"], "backend.theta=3", "optimizer.learning_rate=1") in digests


if __name__ == "__main__":
    found = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    found[jax.__version__] = {case: lowered(*overrides) for case, overrides in CASES.items()}
    GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
