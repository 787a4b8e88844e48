"""The user's choices about data. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from xattn.data.task import PROBES_OF_TEXT, Task
from xattn.data.tasks import TASKS
from xattn.section import Kinds, Section, kind_name

ValidationFraction = Annotated[float, Field(gt=0, lt=1)]
Documents = Literal["joined", "separated", "packed"]


class Tokenised(Section):
    """Fields shared by every corpus of text."""

    validation_fraction: ValidationFraction
    """Share that is held out."""
    tokenizer: str = Field(min_length=1)
    """``bytes``; ``bpe``, a byte-level BPE of vocab_size entries, trained on the corpus; or the path of a
    tokenizer.json or a .tiktoken file of ranks. A .tiktoken file needs a tiktoken_pattern.
    """
    vocab_size: int = Field(ge=257, le=2**24)
    """Number of entries of ``bpe``; other tokenizers have their own."""
    tiktoken_pattern: Literal["gpt2", "cl100k", "o200k"] | None
    """How a .tiktoken file splits text: ``gpt2`` (also r50k and p50k), ``cl100k`` or ``o200k``; null without one."""
    documents: Documents
    """``joined`` puts documents end to end. ``separated`` puts an end-of-text token before each. ``packed`` is
    separated, and tokens of different documents do not attend to each other.
    """
    end_of_text: str | None
    """Name of the end-of-text token in a tokenizer.json; null takes the first of the usual names in the file. ``bytes``
    and ``bpe`` have their own.
    """

    @model_validator(mode="after")
    def _names_go_with_their_file(self) -> Self:
        if self.tokenizer.endswith(".tiktoken") and self.tiktoken_pattern is None:
            raise ValueError("a .tiktoken file needs data.tiktoken_pattern: gpt2 (r50k, p50k), cl100k or o200k")
        if self.tokenizer in ("bytes", "bpe") and self.end_of_text is not None:
            raise ValueError(
                f"data.end_of_text names a token of a tokenizer.json; {self.tokenizer} has its own end of text"
            )
        return self


class PythonStdlibConfig(Tokenised):
    """``data=python_stdlib``: the source of the running Python's standard library, without its tests.

    Each file is a document. validation_fraction is of the bytes, in whole files chosen by a hash of each file's name.
    """

    name: Literal["python_stdlib"]


class TextConfig(Tokenised):
    """``data=text``: your own files. ``validation_fraction`` is a share of the tokens, taken from the end."""

    name: Literal["text"]
    path: str = Field(min_length=1)
    """A file, a folder (all files below it) or a glob; files are joined in sorted order, each once. ``.jsonl`` has a
    document per line and ``.parquet`` one per row; any other file is one document of text. A single file that is not
    text is refused; in a folder it is skipped, as are hidden files and folders. Text and ``.jsonl`` may be compressed.
    """
    field: str = Field(min_length=1)
    """Name of the text field in each line of ``.jsonl`` or row of ``.parquet``."""


class MixtureSource(Section):
    """One source of ``data=mixture``."""

    path: str = Field(min_length=1)
    """Like data.path of ``data=text``."""
    weight: PositiveFloat
    """The source's share of the sequences is weight / Σ weights."""
    field: str = Field(default="text", min_length=1)
    """Like data.field of ``data=text``."""


def _some_sources(sources: tuple[MixtureSource, ...]) -> tuple[MixtureSource, ...]:
    """Check the number of sources once each is valid; pydantic's own min_length counts invalid ones as missing."""
    if not 1 <= len(sources) <= 1000:
        raise ValueError("a list of 1 to 1000 sources, [{path: a.txt, weight: 3}]")
    return sources


class MixtureConfig(Tokenised):
    """``data=mixture``: several sources of text, each drawn from by its weight and each with its own held-out part."""

    name: Literal["mixture"]
    sources: Annotated[tuple[MixtureSource, ...], Field(strict=False), AfterValidator(_some_sources)]
    """A list of mappings, [{path: a.txt, weight: 3}, …]."""


class HFConfig(Tokenised):
    """``data=hf``: a dataset of Hugging Face's ``datasets``, one document per row."""

    name: Literal["hf"]
    dataset: str = Field(min_length=1)
    """Name of the dataset on the hub, or a local folder."""
    subset: str | None
    """Name of the dataset's configuration; null takes the default one."""
    split: str = Field(min_length=1)
    """Name of the split, such as ``train``."""
    revision: str | None
    """A branch, tag or commit of the dataset; null takes the default branch."""
    field: str = Field(min_length=1)
    """Name of the column that holds the text."""
    streaming: bool
    """Whether the dataset is read as a stream."""
    max_documents: PositiveInt | None
    """Number of documents to read, from the first; null reads all."""


class MemmapConfig(Section):
    """``data=memmap``: existing token ids, in nanoGPT's layout."""

    name: Literal["memmap"]
    path: str = Field(min_length=1)
    """A folder with train and val as ``.bin`` or ``.npy``, or one such file. The end of a single file is held out."""
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"]
    """Type of the numbers in a ``.bin``, little-endian."""
    vocab_size: PositiveInt
    """Every id is below this."""
    tokenizer: str | None
    """The tokenizer.json that made the ids; text and bits per byte need it. null without one."""
    documents: Literal["joined", "packed"]
    """``packed`` keeps tokens of different documents from attending to each other; end_of_text then separates them."""
    end_of_text: int | None = Field(ge=0)
    """Id of the token between documents; null without one."""
    validation_fraction: ValidationFraction
    """Share of a single file that is held out."""

    @model_validator(mode="after")
    def _packed_needs_a_border(self) -> Self:
        if self.documents == "packed" and self.end_of_text is None:
            raise ValueError("data.documents=packed needs data.end_of_text: the id between documents")
        if self.end_of_text is not None and self.end_of_text >= self.vocab_size:
            raise ValueError(f"data.end_of_text must be below data.vocab_size = {self.vocab_size}")
        return self


DataConfig = PythonStdlibConfig | TextConfig | MixtureConfig | HFConfig | MemmapConfig | Task


_CORPORA: tuple[type[Section], ...] = (PythonStdlibConfig, TextConfig, MixtureConfig, HFConfig, MemmapConfig)
tasks = Kinds("task", TASKS, taken=(*map(kind_name, _CORPORA), *PROBES_OF_TEXT))
TaskT = TypeVar("TaskT", bound=type[Task])


def register_task(kind: TaskT) -> TaskT:
    """Make a subclass of :class:`Task` a choice of ``data`` and of ``evaluation.probes`` in this process; a decorator.

    Its fields become the keys ``data.…``, and their defaults are what ``data=NAME`` sets. Raises ValueError if the name
    is not valid, or if ``data`` or ``evaluation.probes`` already has it.
    """
    tasks.register(kind)
    return kind


def data_kinds() -> tuple[type[Section], ...]:
    """Return the classes of the group ``data``, each with its ``name``: the corpora and the tasks registered so far."""
    return (*_CORPORA, *tasks().values())


def made_by(config: DataConfig) -> tuple[str, ...]:
    """Return the packages, as in provenance.json's ``versions``, that can change the data of a config. Python counts if
    its own library is the text, NumPy if it draws a task's tokens, and tokenizers if it trains the BPE."""
    if isinstance(config, Task):
        return ("numpy",)
    of_text = ("python",) if isinstance(config, PythonStdlibConfig) else ()
    return (*of_text, "tokenizers") if isinstance(config, Tokenised) and config.tokenizer == "bpe" else of_text


def has_segments(config: DataConfig) -> bool:
    """Return whether the sequences of this data have segment_ids."""
    return isinstance(config, Tokenised | MemmapConfig) and config.documents == "packed"
