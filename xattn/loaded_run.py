"""A run's folder, opened from Python. Importing this module imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xattn.config
from xattn import run_folder
from xattn.config import Config
from xattn.data.run_data import load_tokenizer
from xattn.data.tokenizer import Tokenizer
from xattn.errors import BadInput

if TYPE_CHECKING:
    from xattn.model.transformer import LanguageModel, ModelHyperparameters


@dataclass(frozen=True)
class LoadedRun:
    """What a notebook needs of a run.

    ``model.apply({"params": params}, tokens, hyperparameters)`` gives the logits of int (B, S) tokens; ``step`` is that
    of the checkpoint.
    """

    path: Path
    config: Config
    summary: dict[str, Any]
    model: LanguageModel
    params: Any
    hyperparameters: ModelHyperparameters
    tokenizer: Tokenizer
    step: int

    def generate(self, prompt: str, *, max_tokens: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
        """Continues a prompt of at least one character; temperature 0 takes the likeliest token each time."""
        import jax

        from xattn.model.generation import Sampling, generate

        if not prompt:
            raise ValueError("prompt: at least one character is needed")
        tokens = generate(
            self.model,
            self.params,
            self.hyperparameters,
            self.tokenizer.encode(prompt),
            num_tokens=max_tokens,
            sampling=Sampling(temperature),
            key=jax.random.key(seed),
        )
        return self.tokenizer.decode(tokens)


def load(path: str | Path, *, checkpoint: Literal["last", "best"] = "last") -> LoadedRun:
    """Opens a run's folder, and changes nothing in it.

    Raises :class:`BadInput` where it is not a run's, :class:`IntegrityError` where it holds no whole checkpoint.
    """
    import jax
    import jax.numpy as jnp

    from xattn.model.transformer import LanguageModel
    from xattn.training.checkpoint import Checkpoints
    from xattn.training.programs import hyperparameters

    path = Path(path).absolute()
    summary = run_folder.read_summary(path)
    if summary is None or not (path / run_folder.CONFIG).is_file():
        raise BadInput(f"{path}: not a run folder, it lacks {run_folder.CONFIG} or {run_folder.SUMMARY}")
    config = xattn.config.load(path / run_folder.CONFIG)
    tokenizer = load_tokenizer(config.data, path)
    model = LanguageModel(config.model, config.backend, tokenizer.vocab_size)
    hyper = hyperparameters(config).model
    tokens = jax.ShapeDtypeStruct((1, config.backend.context_length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, hyper)["params"]
    with Checkpoints(path / run_folder.CHECKPOINTS) as checkpoints:
        restored = checkpoints.restore_params(checkpoint, shapes)
    return LoadedRun(path, config, summary, model, restored.tree, hyper, tokenizer, restored.step)
