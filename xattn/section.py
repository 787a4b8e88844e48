"""The base of every config section: frozen, complete, and strict about what a YAML value may become."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of validated settings.

    Unknown keys, NaN, infinities and values of another type are errors; only an integer is taken where a float is due.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)
