"""What a script of the user's has added to the choices of this process: activations, output norms, tasks, …

Each kind has a table of its own; here is what they have in common: which names can be given, which file each addition
comes from, and how it is repeated in another process.
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
    """What the kind's table has of it: equal for the same registration."""
    source: Callable[..., Any]
    """The user's function or class."""
    repeat: Callable[[], None] = field(compare=False)
    """Makes the same registration in another process, after it was pickled."""

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The function, or those that the class itself has."""
        if not inspect.isclass(self.source):
            return (inspect.unwrap(self.source),)
        members = (getattr(member, "__func__", member) for member in vars(self.source).values())
        own = (member for member in members if inspect.isfunction(member))
        return tuple(member for member in own if member.__module__ == self.source.__module__)

    @property
    def file(self) -> Path:
        """Where it was written; in a notebook, the name that a cell was compiled under."""
        for function in self.functions:
            return Path(function.__code__.co_filename)
        module = sys.modules[self.source.__module__]
        return Path(getattr(module, "__file__", None) or f"<{module.__name__}>")


_ADDITIONS: dict[tuple[str, str], Addition] = {}
caches: list[Callable[[], None]] = []  # each forgets programs that are known by the names of choices


def additions() -> tuple[Addition, ...]:
    """All of this process, in the order of their first registration."""
    return tuple(_ADDITIONS.values())


def note(addition: Addition) -> None:
    """Keeps an addition; one of the same kind and name, as a notebook's cell that is run again makes it, is replaced.

    Programs that were made with the old one are then forgotten.
    """
    key = addition.kind, addition.name
    if key in _ADDITIONS and _ADDITIONS[key] != addition:
        if (jax := sys.modules.get("jax")) is not None:  # a program of the user's own may have it too
            jax.clear_caches()
        for forget in caches:
            forget()
    _ADDITIONS[key] = addition


def check_name(kind: str, name: str, is_taken: bool) -> None:
    """Raises :class:`ValueError` for a name that cannot be typed as a value, or that is the package's own."""
    is_name = name.isascii() and name.isidentifier() and name == name.lower() and name[0].isalpha()
    if not is_name or name in ("null", "true", "false", "nan", "inf"):  # the last are other things in a config
        raise ValueError(f"{kind} {name!r}: a name has lower-case letters, digits and underscores")
    if is_taken:
        raise ValueError(f"{kind} {name!r}: xattn has one of that name; choose another")


def check_function(kind: str, name: str, function: Any, arguments: str) -> None:
    """Raises :class:`ValueError` for what is no plain function, whose file would not be known."""
    if getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None) is None:
        raise ValueError(f"{kind} {name!r}: a plain function ({arguments}) is needed, got {function!r}")
