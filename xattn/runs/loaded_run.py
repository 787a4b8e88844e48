"""A run's folder, opened from Python. Importing this module does not import jax."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xattn.config
from xattn.config import Config
from xattn.data.config import Tokenised
from xattn.data.run_data import RunData, as_documents, load_data, load_tokenizer
from xattn.data.task import Task
from xattn.data.tokenizer import ByteTokenizer, IdTokenizer, JsonTokenizer, TextTokenizer, Tokenizer
from xattn.errors import BadInput, IntegrityError
from xattn.model.config import group_of
from xattn.runs import run_folder
from xattn.runs.provenance import other_data
from xattn.runs.run_folder import finite_or_none
from xattn.runs.streaming import Piece, pieces
from xattn.system.device import first_look, keep_compiled_programs
from xattn.training import llama

if TYPE_CHECKING:
    import jax
    import pandas as pd

    from xattn.model.hyperparameters import ModelHyperparameters
    from xattn.model.transformer import LanguageModel

# The config keys that an evaluation may change.
MAY_DIFFER = (
    *("data", "evaluation", "trainer.batch_size", "trainer.attention_stats_every"),
    "backend.context_length",
    *(
        f"{of}.{key}"
        for of in ("backend", "backend.then")
        for key in ("theta", "sigmoid_bias", "logit_scale", "window", "implementation")
    ),
)


@dataclass(frozen=True, repr=False)
class LoadedRun:
    """A run opened for a notebook."""

    path: Path
    config: Config
    summary: dict[str, Any]
    model: LanguageModel
    params: Any
    hyperparameters: ModelHyperparameters
    tokenizer: Tokenizer
    step: int
    """The checkpoint's step."""

    def __repr__(self) -> str:
        import jax

        model, summary = self.config.model, self.summary
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        attention = ", ".join(dict.fromkeys(kind.activation for kind in self.config.backend.kinds.values()))
        result = f", {run_folder.result_line(summary)}" if {"val_loss", "val_bpb"} <= summary.keys() else ""
        return "\n".join(
            [
                f"LoadedRun {run_folder.shown(self.path)}",
                f"  {summary.get('status', 'weights only')}, checkpoint of step {self.step}{result}",
                f"  {attention}; {size:,} parameters in {model.num_layers} layers of width {model.embedding_dim}",
                f"  {self.config.data.name}, vocabulary of {self.model.vocab_size:,}",
            ]
        )

    @property
    def metrics(self) -> pd.DataFrame:
        """The rows of metrics.jsonl: ``step`` and a column for each number (NaN if missing). Empty if not a run's."""
        from xattn.report.frames import metrics_of

        return metrics_of(self.path)

    def logits(self, tokens: Any, segment_ids: Any = None) -> jax.Array:
        """Return the logits of each next token: int (B, S), or (S,) for one sequence → float (B, S, V), or (S, V).

        segment_ids: int, of the tokens' shape; tokens of different segments don't attend to each other.

        Raises :class:`BadInput` for tokens outside the vocabulary. Linear layers and convolutions recognise a segment
        only as a contiguous run of tokens; with either, an id that recurs after another one is refused too.
        """
        import jax.numpy as jnp
        import numpy as np

        from xattn.backend.activations import activation

        ids = np.asarray(tokens)
        if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
            raise BadInput(f"tokens must be integers of shape (B, S) or (S,), got {ids.dtype} of shape {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.model.vocab_size:
            raise BadInput(f"tokens must be 0 to {self.model.vocab_size - 1}, got {ids.min()} to {ids.max()}")
        segments = None if segment_ids is None else np.atleast_2d(segment_ids)
        linear = any(activation(kind.activation).is_linear for kind in self.model.backend.kinds.values())
        knows_runs_only = linear or self.model.config.conv is not None
        rows: Any = segments if segments is not None and knows_runs_only else ()
        if any(len(np.unique(row)) <= np.count_nonzero(np.diff(row)) for row in rows):
            raise BadInput("segment_ids: an id recurs after another one; give each document its own id")
        found: Any = self.model.apply(
            {"params": self.params},
            *(jnp.asarray(np.atleast_2d(ids)), self.hyperparameters),
            segment_ids=None if segments is None else jnp.asarray(segments),
        )
        return found if ids.ndim == 2 else found[0]

    def generate(self, prompt: str = "", **choices: Any) -> str:
        """Return the continuation of a prompt, without the prompt; the choices are those of :meth:`stream`."""
        return "".join(piece.text for piece in self.stream(prompt, **choices))

    def stream(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        sample: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Continue a prompt, yielding each piece of text as soon as no later token can change it.

        An empty prompt stands for the tokenizer's start token. temperature 0 always takes the likeliest token.
        top_k, top_p: see :class:`xattn.model.generation.Sampling`. The same (seed, sample) give the same text,
        whatever max_tokens is. stop: the text ends before the first of these.

        Raises :class:`BadInput` for a number out of its range.
        """
        for name, value, fits, rule in (
            ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
            ("temperature", temperature, temperature >= 0, "at least 0"),
            ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
            ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        ):
            if not fits:
                raise BadInput(f"{name} = {value}: must be {rule}")
        import jax

        from xattn.model.generation import Sampling, TrainedModel, stream

        try:
            tokens: Sequence[int] = self.tokenizer.encode(prompt).tolist() or [self.tokenizer.start]
        except (ValueError, TypeError) as error:  # TypeError: the tokenizers library on invalid characters
            raise BadInput(f"prompt = {prompt!r}: {error}") from error
        drawn = stream(
            TrainedModel(self.model, self.params, self.hyperparameters),
            tokens,
            num_tokens=max_tokens,
            sampling=Sampling(temperature, top_k, top_p),
            key=jax.random.fold_in(jax.random.key(seed), sample),
        )
        return pieces(self.tokenizer, drawn, [stop] if isinstance(stop, str) else stop)

    def evaluate(self, overrides: Sequence[str] = (), *, config_dir: Path | None = None) -> dict[str, float | None]:
        """Return val_loss, val_bpb and ``probe/<name>/<measure>`` under the run's config with these overrides.

        Without overrides, the numbers are those of the run's last evaluation if the checkpoint is of the same step. A
        number for ``trainer.attention_stats_every`` adds ``attention/<layer>/<head>/<statistic>``. Another text is read
        in the model's own tokens, and with the run's data.documents unless that is given.
        backend.context_length changes the length of the sequences; sigmoid's n stays that of training unless
        backend.sigmoid_bias is given. Numbers that are not finite become None. config_dir: a folder of your own YAML
        files, which the overrides may choose from.

        Raises :class:`BadInput` for an override that does not fit or a corpus with another vocabulary, and
        :class:`IntegrityError` if no data are given and the run's own have changed.
        """
        from xattn.evaluation.attention import attention_statistics, statistics_batch, statistics_row
        from xattn.evaluation.loss import held_out_loss, score_batch
        from xattn.evaluation.probes import Scene, make_probes, run_probes, token_scores_of
        from xattn.model.hyperparameters import layer_hyperparameters, with_sigmoid_bias
        from xattn.model.transformer import LanguageModel
        from xattn.training.attention_choice import choose_attention
        from xattn.training.programs import hyperparameters

        config = xattn.config.amend(self.config, overrides, may_differ=MAY_DIFFER, config_dir=config_dir)
        given = dict(override.lstrip("+~").partition("=")[::2] for override in overrides)
        own = self.config.backend
        bias_keys = {kind: f"{group_of(kind)}.sigmoid_bias" for kind in own.kinds}
        for kind, key in bias_keys.items():
            if given.get(key) == "learned" != own.kinds[kind].sigmoid_bias:
                raise BadInput(f"{key} = learned: this run has no learned value")
        choose_attention(config, context=1)
        batch_size, data_config = config.trainer.batch_size, config.data
        tokenizer = None
        if isinstance(data_config, Tokenised) and isinstance(self.tokenizer, TextTokenizer):
            if chosen := given.keys() & {"data.tokenizer", "data.vocab_size", "data.tiktoken_pattern"}:
                raise BadInput(
                    f"{', '.join(sorted(chosen))}: text is read with the model's own tokenizer; leave it out"
                )
            trained = self.config.data
            if isinstance(trained, Tokenised) and "data.documents" not in given:
                data_config = data_config.model_copy(update={"documents": trained.documents})
            tokenizer = as_documents(self.tokenizer, data_config)
        data = load_data(data_config, config.batching, tokenizer=tokenizer)
        if not any(key.startswith("data") for key in given):
            _check_data(self, data)
        # With fewer tokens, the text uses a subset of the model's: the model was trained with end-of-text tokens.
        too_many = data.tokenizer.vocab_size > self.model.vocab_size
        if too_many or (tokenizer is None and data.tokenizer.vocab_size < self.model.vocab_size):
            raise BadInput(
                f"data = {config.data.name}: has a vocabulary of {data.tokenizer.vocab_size} tokens; the model's has "
                f"{self.model.vocab_size}"
            )
        # Only the sequences take the new context_length; sigmoid's n stays that of training.
        trained_for = {"context_length": self.config.backend.context_length}
        model = LanguageModel(config.model, config.backend.model_copy(update=trained_for), self.model.vocab_size)
        # Keep the trained sigmoid biases, unless an override replaces them.
        inherits = "sigmoid_bias" not in (own.model_dump()["then"] or {})
        kept = {
            kind: layer_hyperparameters(self.hyperparameters, kind).sigmoid_bias
            for kind in config.backend.kinds
            if bias_keys[kind] not in given and not (inherits and bias_keys["backend"] in given)
        }
        hyper = with_sigmoid_bias(hyperparameters(config).model, kept)
        loss = held_out_loss(
            score_batch(model), self.params, hyper, data.held_out, bytes_per_token=data.bytes_per_token()
        )
        probes = make_probes(config.evaluation.probes, Scene(data_config, data, config.backend, batch_size))
        found = loss.row() | run_probes(token_scores_of(model), self.params, hyper, probes)
        if "trainer.attention_stats_every" in given and config.trainer.attention_stats_every is not None:
            found |= statistics_row(attention_statistics(model)(self.params, hyper, statistics_batch(data.held_out)))
        return {name: None if value is None else finite_or_none(value) for name, value in found.items()}


def _check_data(run: LoadedRun, data: RunData) -> None:
    """Raise :class:`IntegrityError` if the data are not those that the run began with."""
    if isinstance(own := run.config.data, Task):  # its hash is over the sequences that the run itself scores
        data = load_data(own, run.config.batching)
    before = run_folder.read_provenance(run.path) or {}
    if before.get("data_sha256") not in (None, data.sha256):
        what = f"{run.path}: the data are not the ones that this run began with"
        problem = other_data(what, own, before, size=data.corpus_size, sha256=data.sha256, to="evaluate")
        raise IntegrityError(f"{problem}, or choose other data with data.…")


def read(path: Path) -> tuple[Config, dict[str, Any]]:
    """Return the config and summary of a run folder. Raises :class:`BadInput` if it is not one."""
    summary = run_folder.read_summary(path)
    if summary is None or not (path / run_folder.CONFIG).is_file():
        raise BadInput(f"{path}: not a run folder: it lacks {run_folder.CONFIG} or {run_folder.SUMMARY}")
    return xattn.config.load(path / run_folder.CONFIG), summary


def load(path: str | Path, *, checkpoint: Literal["last", "best"] = "last") -> LoadedRun:
    """Open a run's folder, or a Llama's (config.json and .safetensors), without changing anything in it.

    Raises :class:`BadInput` if it is neither, or if the checkpoint was deleted on purpose (:class:`NotKept`), and
    :class:`IntegrityError` if a run's folder holds no intact checkpoint.
    """
    path = Path(path).absolute()
    if run_folder.read_summary(path) is None and (path / llama.CONFIG).is_file():
        return _load_llama(path)
    config, summary = read(path)
    tokenizer = load_tokenizer(config.data, path)

    first_look()
    import jax

    from xattn.model.transformer import LanguageModel, init_params
    from xattn.training.checkpoint import Checkpoints
    from xattn.training.programs import hyperparameters

    keep_compiled_programs()
    model = LanguageModel(config.model, config.backend, tokenizer.vocab_size)
    hyper = hyperparameters(config).model
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    with Checkpoints(path / run_folder.CHECKPOINTS) as checkpoints:
        restored = checkpoints.restore_params(checkpoint, shapes)
    return LoadedRun(path, config, summary, model, restored.tree, hyper, tokenizer, restored.step)


def _load_llama(path: Path) -> LoadedRun:
    """Open a Llama's folder as a run of no steps, with the tokenizer.json beside the weights.

    Without a tokenizer.json, the tokens of a vocabulary of 256 are bytes; those of any other are ids without text.
    """
    overrides, params = llama.from_llama(path)
    vocab_size = overrides.pop("vocab_size")
    typed = [f"{key}={value}" for key, value in overrides.items()]
    config = xattn.config.compose([*typed, "model.layers=scanned"])  # scanned: it compiles faster
    tokenizer: Tokenizer = ByteTokenizer() if vocab_size == ByteTokenizer().vocab_size else IdTokenizer(vocab_size)
    if (file := path / run_folder.TOKENIZER).is_file():
        try:
            tokenizer = JsonTokenizer(file.read_text("utf-8"), vocab_size=vocab_size)
        except (OSError, ValueError) as error:
            raise BadInput(f"{file}: {error}") from error
        config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(file)})})

    import jax

    from xattn.model.transformer import LanguageModel
    from xattn.training.programs import hyperparameters

    keep_compiled_programs()
    model = LanguageModel(config.model, config.backend, vocab_size)
    return LoadedRun(path, config, {}, model, jax.device_put(params), hyperparameters(config).model, tokenizer, step=0)
