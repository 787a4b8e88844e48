"""The user's additions to the choices of this process: activations, output norms, tasks, …

Each kind has its own table. This module has what they share: the allowed names, the file that each addition comes from,
and the repetition in another process.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Addition:
    """One registration."""

    kind: str
    """``activation``, ``output norm``, ``task``, ``probe`` or ``optimizer``."""
    name: str
    row: Any
    """Its row in the kind's table: equal for the same registration."""
    source: Callable[..., Any]
    """The user's function or class."""
    repeat: Callable[[], None] = field(compare=False)
    """Repeats the registration in another process, after unpickling."""

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The function, or the functions that the class itself defines."""
        if not inspect.isclass(self.source):
            return (inspect.unwrap(self.source),)
        members = (getattr(member, "__func__", member) for member in vars(self.source).values())
        own = (member for member in members if inspect.isfunction(member))
        return tuple(member for member in own if member.__module__ == self.source.__module__)

    @property
    def file(self) -> Path:
        """The file of its source; in a notebook, the name that its cell was compiled under."""
        for function in self.functions:
            return Path(function.__code__.co_filename)
        module = sys.modules[self.source.__module__]
        return Path(getattr(module, "__file__", None) or f"<{module.__name__}>")


_ADDITIONS: dict[tuple[str, str], Addition] = {}
caches: list[Callable[[], None]] = []  # each forgets programs that are cached by the names of choices


def additions() -> tuple[Addition, ...]:
    """Return all additions in this process, in the order of their first registration."""
    return tuple(_ADDITIONS.values())


def note(addition: Addition) -> None:
    """Store an addition, replacing one of the same kind and name, as when a notebook cell runs again.

    If the two differ, programs compiled with the old one are forgotten.
    """
    key = addition.kind, addition.name
    if key in _ADDITIONS and _ADDITIONS[key] != addition:
        if (jax := sys.modules.get("jax")) is not None:  # the user's own programs may contain it too
            jax.clear_caches()
        for forget in caches:
            forget()
    _ADDITIONS[key] = addition


def check_name(kind: str, name: str, is_taken: bool) -> None:
    """Raise :class:`ValueError` for a name that cannot be typed as a value, or that the package itself uses."""
    is_name = name.isascii() and name.isidentifier() and name == name.lower() and name[0].isalpha()
    if not is_name or name in ("null", "true", "false", "nan", "inf"):  # these mean something else in a config
        raise ValueError(f"{kind} {name!r}: a name must consist of lower-case letters, digits and underscores")
    if is_taken:
        raise ValueError(f"{kind} {name!r}: xattn already has this name; choose another")


def check_function(kind: str, name: str, function: Any, arguments: str) -> None:
    """Raise :class:`ValueError` unless this is a plain function: the file of anything else would be unknown."""
    if getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None) is None:
        raise ValueError(f"{kind} {name!r}: must be a plain function ({arguments}), got {function!r}")
