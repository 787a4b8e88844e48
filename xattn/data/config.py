"""What a person chooses about data. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xattn.data.task_config import TaskConfig
from xattn.section import Section

ValidationFraction = Annotated[float, Field(gt=0, lt=1)]


class PythonStdlibConfig(Section):
    """``data=python_stdlib``: the source of the running Python's standard library, without its tests.

    validation_fraction: share of the bytes held out, in whole files, chosen by a hash of each file's name.
    """

    name: Literal["python_stdlib"]
    validation_fraction: ValidationFraction


class TextConfig(Section):
    """``data=text``: the bytes of files of your own.

    path: a file, a folder (all files below it) or a glob; ``.gz`` is unpacked; files are joined in sorted order.
    validation_fraction: share of the bytes, at the end, held out.
    """

    name: Literal["text"]
    path: str = Field(min_length=1)
    validation_fraction: ValidationFraction


DataConfig = Annotated[PythonStdlibConfig | TextConfig | TaskConfig, Field(discriminator="name")]
