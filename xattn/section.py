"""The base of every config section: frozen, complete, and strict about what a YAML value may become."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

_PACKAGE = Path(__file__).resolve().parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""The YAML files: inside the package in an installation, beside it in a clone."""


class Section(BaseModel):
    """A frozen group of validated settings.

    Unknown keys, NaN, infinities and values of another type are errors; only an integer is taken where a float is due.
    The text below a field is its documentation, which `xattn explain` prints.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True
    )
