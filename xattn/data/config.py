"""What a person chooses about data. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from xattn.data.task_config import TaskConfig
from xattn.section import Section

ValidationFraction = Annotated[float, Field(gt=0, lt=1)]
Documents = Literal["joined", "separated", "packed"]


class Tokenised(Section):
    """What every corpus of text has.

    validation_fraction: the share that is held out.
    tokenizer: ``bytes``, ``bpe`` (byte-level BPE of vocab_size entries, trained on the corpus), or the path of a
        tokenizer.json or of a .tiktoken file of ranks, which goes with a tiktoken_pattern.
    documents: ``joined`` end to end; ``separated`` by an end-of-text token before each; ``packed``: separated, and
        tokens of different documents don't attend to each other.
    end_of_text: its name in a tokenizer.json; null takes the first of the usual names that the file has. ``bytes`` and
        ``bpe`` have their own.
    """

    validation_fraction: ValidationFraction
    tokenizer: str = Field(min_length=1)
    vocab_size: int = Field(ge=257, le=2**24)
    tiktoken_pattern: Literal["gpt2", "cl100k", "o200k"] | None
    documents: Documents
    end_of_text: str | None

    @model_validator(mode="after")
    def _names_go_with_their_file(self) -> Self:
        if self.tokenizer.endswith(".tiktoken") and self.tiktoken_pattern is None:
            raise ValueError("a .tiktoken file needs data.tiktoken_pattern: gpt2 (r50k, p50k), cl100k or o200k")
        if self.tokenizer in ("bytes", "bpe") and self.end_of_text is not None:
            raise ValueError(f"data.end_of_text is a name in a tokenizer.json; {self.tokenizer} has an end of its own")
        return self


class PythonStdlibConfig(Tokenised):
    """``data=python_stdlib``: the source of the running Python's standard library, without its tests.

    Each file is a document. validation_fraction: of the bytes, in whole files, chosen by a hash of each file's name.
    """

    name: Literal["python_stdlib"]


class TextConfig(Tokenised):
    """``data=text``: files of your own.

    path: a file, a folder (all files below it) or a glob; files are joined in sorted order, each once. ``.jsonl``: a
        document a line; ``.parquet``: a document a row; any other file is one document of text. Text and ``.jsonl`` may
        be packed. What is no text is refused; of a folder it is left out, as its hidden files and folders are.
    field: the name of the text in each line or row.
    validation_fraction: of the tokens, at the end.
    """

    name: Literal["text"]
    path: str = Field(min_length=1)
    field: str = Field(min_length=1)


class MixtureSource(Section):
    """path and field: as of ``data=text``. weight: its share of the windows is weight / Σ weights."""

    path: str = Field(min_length=1)
    weight: PositiveFloat
    field: str = Field(default="text", min_length=1)


def _some_sources(sources: tuple[MixtureSource, ...]) -> tuple[MixtureSource, ...]:
    """Counts them after each was found good; pydantic's own min_length also counts the bad ones as missing."""
    if not 1 <= len(sources) <= 1000:
        raise ValueError("a list of 1 to 1000 sources, [{path: a.txt, weight: 3}]")
    return sources


class MixtureConfig(Tokenised):
    """``data=mixture``: several sources of text, each drawn from by its weight, and each with its own part held out."""

    name: Literal["mixture"]
    sources: Annotated[tuple[MixtureSource, ...], Field(strict=False), AfterValidator(_some_sources)]


class HFConfig(Tokenised):
    """``data=hf``: a dataset of Hugging Face's ``datasets``, a document a row.

    dataset: its name on the hub, or a local folder. subset, split, revision: which part and version. streaming: read it
        as a stream. max_documents: the first so many, or null for all.
    """

    name: Literal["hf"]
    dataset: str = Field(min_length=1)
    subset: str | None
    split: str = Field(min_length=1)
    revision: str | None
    field: str = Field(min_length=1)
    streaming: bool
    max_documents: PositiveInt | None


class MemmapConfig(Section):
    """``data=memmap``: token ids that are there already, in nanoGPT's layout.

    path: a folder with train and val as ``.bin`` or ``.npy``, or one such file, the end of which is held out.
    dtype: of a ``.bin``, little-endian. vocab_size: ids are below it.
    tokenizer: the tokenizer.json that made the ids, for text and bits per byte, or null.
    documents: ``packed`` keeps tokens of different documents from attending to each other; the id end_of_text then
        stands between them.
    """

    name: Literal["memmap"]
    path: str = Field(min_length=1)
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"]
    vocab_size: PositiveInt
    tokenizer: str | None
    documents: Literal["joined", "packed"]
    end_of_text: int | None = Field(ge=0)
    validation_fraction: ValidationFraction

    @model_validator(mode="after")
    def _packed_needs_a_border(self) -> Self:
        if self.documents == "packed" and self.end_of_text is None:
            raise ValueError("data.documents=packed needs data.end_of_text: the id between documents")
        if self.end_of_text is not None and self.end_of_text >= self.vocab_size:
            raise ValueError(f"data.end_of_text must be below data.vocab_size = {self.vocab_size}")
        return self


DataConfig = Annotated[
    PythonStdlibConfig | TextConfig | MixtureConfig | HFConfig | MemmapConfig | TaskConfig,
    Field(discriminator="name"),
]


def made_by(config: DataConfig) -> tuple[str, ...]:
    """The packages, as provenance.json's ``versions`` names them, of which another version may make other data of the
    same config: Python where its own library is the text, NumPy where it draws a task's tokens."""
    if isinstance(config, TaskConfig):
        return ("numpy",)
    of_text = ("python",) if isinstance(config, PythonStdlibConfig) else ()
    return (*of_text, "tokenizers") if isinstance(config, Tokenised) and config.tokenizer == "bpe" else of_text


def has_segments(config: DataConfig) -> bool:
    """Whether the windows of this data come with segment_ids."""
    return isinstance(config, Tokenised | MemmapConfig) and config.documents == "packed"
