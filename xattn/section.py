"""The base of every config section: frozen, complete, and strict about the types of YAML values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from xattn import registry

_PACKAGE = Path(__file__).resolve().parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""The YAML files: inside the package in an installation, beside it in a clone."""


class Section(BaseModel):
    """A frozen group of validated settings.

    Unknown keys, NaN, infinities and values of another type are errors, except that an integer is accepted as a float.
    The string below a field is its documentation, which `xattn explain` prints.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class OneOf:
    """A Literal that looks its names up when a value is validated, since a script may have registered some."""

    names: Callable[[], tuple[str, ...]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(self.names())}

    def _checked(self, value: Any) -> Any:
        if value in self.names():
            return value
        *others, last = (repr(name) for name in self.names())
        raise PydanticCustomError(
            "literal_error", "Input should be {expected}", {"expected": f"{', '.join(others)} or {last}"}
        )


EachOnce = AfterValidator(lambda names: tuple(sorted(set(names))))
"""For a field that is a set of names: each once, in alphabetical order."""


def kind_name(kind: type[Section]) -> str:
    """Return the one value that the field ``name`` of a class may have."""
    (name,) = kind.model_fields["name"].annotation.__args__  # type: ignore[union-attr]  # the Literal's
    return str(name)


SectionT = TypeVar("SectionT", bound=Section)


class Kinds(Generic[SectionT]):
    """The classes that a config group may have, each under its ``name``: the package's own, and registered ones.

    kind: what messages call one of them. taken: names that have another meaning in this place.
    """

    def __init__(self, kind: str, own: Sequence[type[SectionT]], *, taken: Sequence[str] = ()):
        self._kind, self._classes = kind, {kind_name(each): each for each in own}
        self._taken = {*taken, *self._classes}

    def __call__(self) -> dict[str, type[SectionT]]:
        """Return name → class, the package's own first."""
        return dict(self._classes)

    def register(self, kind: type[SectionT]) -> None:
        """Add a class in this process. Raises :class:`ValueError` for a name that is invalid or taken."""
        name = kind_name(kind)
        registry.check_name(self._kind, name, name in self._taken)
        registry.note(registry.Addition(self._kind, name, kind, kind, partial(self.register, kind)))
        self._classes[name] = kind
