"""A run's data: from the ``data`` group to training batches, held-out sequences, and a tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from xattn.data.batches import Batch, Batches, Batching, HeldOutBatches, TrainingBatches, in_batches
from xattn.data.cache import Tokens
from xattn.data.config import DataConfig, MemmapConfig, Tokenised, has_segments
from xattn.data.corpus import Corpus, load_corpus
from xattn.data.task import Task, TaskBatches, evaluation_examples
from xattn.data.tokenizer import ByteTokenizer, IdTokenizer, JsonTokenizer, TextTokenizer, Tokenizer
from xattn.errors import BadInput, IntegrityError
from xattn.runs import run_folder


@dataclass(frozen=True)
class RunData:
    """What a run needs of its data."""

    batch: Batches
    """The training batch of each update."""
    held_out: Sequence[Batch]
    """The sequences that every evaluation scores, in batches of one shape."""
    tokenizer: Tokenizer
    """A :class:`TextTokenizer` if the tokens stand for text."""
    sha256: str
    """Hash of everything that was read to make the data."""
    description: str
    """Shown to the user, such as ``11,834,567 bytes of training text``."""
    scored_size: int | None = None
    """Bytes of the text behind the scored tokens. None: it was not read here, so their decoded bytes count."""
    gives_back: bool = True
    """Whether the tokens decode to that text."""
    corpus_size: int | None = None
    """Bytes of the corpus's files; None if no text files were read."""

    @cached_property
    def optional(self) -> tuple[tuple[str, int], ...]:
        """Names and widths of the optional arrays that all batches have, in training and evaluation."""
        return self.held_out[0].optional

    @property
    def tokenizer_json(self) -> str | None:
        """The tokenizer as the run's folder keeps it; None if the config alone determines it."""
        return self.tokenizer.text if isinstance(self.tokenizer, JsonTokenizer) else None

    def check_tokenizer(self, folder: Path) -> None:
        """Raise :class:`IntegrityError` if the run in that folder has kept another tokenizer, or none."""
        if (here := self.tokenizer_json) is None:
            return
        file = folder / run_folder.TOKENIZER
        if not file.is_file() or file.read_bytes() != here.encode():
            raise IntegrityError(f"{file}: is not the tokenizer that this run began with; start over with resume=never")

    def scored_bytes(self) -> bytes | None:
        """Return the text behind the scored tokens, sequence after sequence; None if they don't decode to it."""
        if not isinstance(self.tokenizer, TextTokenizer) or not (self.gives_back or self.tokenizer.is_byte_level):
            return None
        found = b"".join(self.tokenizer.to_bytes(each.targets[each.weights > 0]) for each in self.held_out)
        return found if self.scored_size in (None, len(found)) else None

    def bytes_per_token(self) -> float | None:
        """Return the bytes of text per scored token; None if the tokens stand for no bytes."""
        size = len(self.scored_bytes() or b"") if self.scored_size is None else self.scored_size
        return size / sum(int((each.weights > 0).sum()) for each in self.held_out) or None


def load_data(
    config: DataConfig,
    batching: Batching,
    *,
    tokenizer: TextTokenizer | None = None,
    say: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> RunData:
    """Read the data, the same way every time.

    tokenizer: replaces the config's own. Raises :class:`BadInput` for what cannot be used, and :class:`Preempted` if
    ``stop()`` becomes true during tokenisation.
    """
    if isinstance(config, Task):
        return _task_data(config, batching)
    corpus = load_corpus(config, batching.context_length, tokenizer=tokenizer, say=say, stop=stop)
    packed_at = corpus.end_of_text if has_segments(config) else None
    held_out = HeldOutBatches([(part.validation, part.weight) for part in corpus.parts], batching, packed_at)
    size = sum(len(part.train) for part in corpus.parts)
    if isinstance(corpus.tokenizer, ByteTokenizer):
        description = f"{size:,} bytes of training text"
    else:
        description = f"{size:,} training tokens, vocabulary of {corpus.tokenizer.vocab_size:,}"
    return RunData(
        batch=TrainingBatches([(part.train, part.weight) for part in corpus.parts], batching, packed_at),
        held_out=held_out,
        tokenizer=corpus.tokenizer,
        sha256=corpus.sha256,
        description=description,
        scored_size=None if isinstance(config, MemmapConfig) else _scored_size(held_out, corpus),
        gives_back=corpus.gives_back,
        corpus_size=corpus.size,
    )


def _scored_size(held_out: HeldOutBatches, corpus: Corpus) -> int:
    """Return the number of bytes of text behind the held-out targets."""
    size, tokenizer = 0, corpus.tokenizer
    assert isinstance(tokenizer, TextTokenizer)
    for ids, part in held_out.targets():
        sizes = ids.sizes(part, tokenizer.sizes) if isinstance(ids, Tokens) else tokenizer.sizes(ids[part])
        size += int(sizes.sum())
    return size


def load_tokenizer(config: DataConfig, folder: Path) -> Tokenizer:
    """Return an existing run's tokenizer from its folder, since its source may be gone. Raises :class:`IntegrityError`
    if the folder lacks it."""
    if isinstance(config, Task) or (isinstance(config, MemmapConfig) and config.tokenizer is None):
        return IdTokenizer(config.vocab_size)
    if not isinstance(config, MemmapConfig) and config.tokenizer == "bytes":
        return ByteTokenizer(end_of_text=config.documents != "joined")
    file = folder / run_folder.TOKENIZER
    try:
        text = file.read_text("utf-8")
        if isinstance(config, MemmapConfig):
            return JsonTokenizer(text, vocab_size=config.vocab_size)
        tokenizer = JsonTokenizer(text, end_of_text=config.end_of_text)
        return tokenizer.without_border() if config.documents == "joined" else tokenizer
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{file}: the run's tokenizer cannot be read: {error}") from error


def as_documents(tokenizer: TextTokenizer, config: Tokenised) -> TextTokenizer:
    """Return the tokenizer with an end of text between documents if ``data.documents`` of another corpus asks for it.
    Raises :class:`BadInput` if the tokenizer has no end of text."""
    joined = config.documents == "joined"
    if isinstance(tokenizer, ByteTokenizer):
        return ByteTokenizer(end_of_text=not joined)
    assert isinstance(tokenizer, JsonTokenizer)
    if joined:
        return tokenizer.without_border()
    try:
        tokenizer = JsonTokenizer(tokenizer.text, end_of_text=config.end_of_text, vocab_size=tokenizer.vocab_size)
    except ValueError as error:
        raise BadInput(f"data.end_of_text: the run's tokenizer {error}") from error
    if tokenizer.end_of_text is None:
        raise BadInput(f"data.documents = {config.documents}: the run's tokenizer has no end of text; allowed: joined")
    return tokenizer


def _task_data(config: Task, batching: Batching) -> RunData:
    if batching.sequences == "all":
        raise BadInput(f"evaluation.sequences = all: data={config.name} is endless; give a number")
    context_length, batch_size = batching.context_length, batching.batch_size
    config.check(context_length)
    batch = TaskBatches(config, context_length, batch_size, batching.seed)
    scored = evaluation_examples(config, context_length=context_length, number=batching.sequences).batch
    # A task reads no files. Hash what the generator makes from this config, which also depends on NumPy's version.
    made = hashlib.sha256()
    for array in (*TaskBatches(config, context_length, 1, seed=0)(0), *scored):
        made.update(b"" if array is None else array.tobytes())
    return RunData(
        batch=batch,
        held_out=in_batches(scored, batch_size),
        tokenizer=IdTokenizer(config.vocab_size),
        sha256=made.hexdigest(),
        description=f"sequences of {config.name}, generated as needed",
    )
