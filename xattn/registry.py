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
    function: Callable[..., Any]
    """A function of the user's, by whose source the addition is known."""
    row: Any
    """What the kind's table has of it: equal for the same registration."""
    repeat: Callable[[], None] = field(compare=False)
    """Makes the same registration in another process, after it was pickled."""

    @property
    def file(self) -> Path:
        return Path(inspect.unwrap(self.function).__code__.co_filename)


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


def check_name(kind: str, name: str, own: bool) -> None:
    """Raises :class:`ValueError` for a name that cannot be typed as a value, or that is the package's own."""
    is_name = name.isascii() and name.isidentifier() and name == name.lower() and name[0].isalpha()
    if not is_name or name in ("null", "true", "false", "nan", "inf"):  # the last are other things in a config
        raise ValueError(f"{kind} {name!r}: a name has lower-case letters, digits and underscores")
    if own:
        raise ValueError(f"{kind} {name!r}: xattn has one of that name; choose another")


def check_function(kind: str, name: str, function: Any, arguments: str) -> None:
    """Raises :class:`ValueError` for what is no plain function, whose file would not be known."""
    if getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None) is None:
        raise ValueError(f"{kind} {name!r}: a plain function ({arguments}) is needed, got {function!r}")
