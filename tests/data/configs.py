"""The configs of the ``data`` group with what a test says in the place of the defaults."""

from __future__ import annotations

from typing import Any

from xattn.data.config import HFConfig, MemmapConfig, MixtureConfig, PythonStdlibConfig, TextConfig

TOKENISED: dict[str, Any] = {
    "validation_fraction": 0.1,
    "tokenizer": "bytes",
    "vocab_size": 300,
    "tiktoken_pattern": None,
    "documents": "joined",
    "end_of_text": None,
}


def stdlib_config(**values: Any) -> PythonStdlibConfig:
    return PythonStdlibConfig(name="python_stdlib", **TOKENISED | values)


def text_config(**values: Any) -> TextConfig:
    return TextConfig(name="text", **TOKENISED | {"field": "text"} | values)


def mixture_config(**values: Any) -> MixtureConfig:
    return MixtureConfig(name="mixture", **TOKENISED | values)


def hf_config(**values: Any) -> HFConfig:
    defaults = {"subset": None, "split": "train", "revision": None, "field": "text"}
    return HFConfig(name="hf", **TOKENISED | defaults | {"streaming": False, "max_documents": None} | values)


def memmap_config(**values: Any) -> MemmapConfig:
    defaults = {"dtype": "uint16", "vocab_size": 300, "tokenizer": None, "documents": "joined", "end_of_text": None}
    return MemmapConfig(name="memmap", **defaults | {"validation_fraction": 0.1} | values)
