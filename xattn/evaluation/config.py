"""The config of evaluation. Importing this module does not import jax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from xattn import registry
from xattn.data.config import tasks
from xattn.data.task import PROBES_OF_TEXT
from xattn.section import EachOnce, OneOf, Section

registered_probes: dict[str, Callable[..., Any]] = {}


def probe_names() -> tuple[str, ...]:
    """Return the values of ``evaluation.probes``: built-in ones, then registered ones."""
    return (*PROBES_OF_TEXT, *tasks(), *registered_probes)


def register_probe(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the probe ``name`` in this process.

    The function takes a :class:`xattn.evaluation.probes.Scene` and returns a :class:`xattn.evaluation.probes.Probe`. An
    invalid name, or that of a built-in probe, is a ValueError.
    """

    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        registry.check_name("probe", name, name in (*PROBES_OF_TEXT, *tasks()))
        registry.check_function("probe", name, make, "scene")
        _add_probe(name, make)
        return make

    return register


def _add_probe(name: str, make: Callable[..., Any]) -> None:
    registered_probes[name] = make
    registry.note(registry.Addition("probe", name, make, make, partial(_add_probe, name, make)))


class EvaluationConfig(Section):
    """The group ``evaluation``."""

    sequences: PositiveInt | Literal["all"]
    """Number of held-out sequences of context_length tokens to score. They are spread evenly over the text, and are the
    same in every evaluation of every run. ``all`` scores every token except the first.
    """
    probes: Annotated[tuple[Annotated[str, OneOf(probe_names)], ...], EachOnce] = Field(strict=False)
    """What to measure besides the loss. ``in_context``: loss late in a sequence minus loss early in it.
    ``extrapolation``: loss up to 8 · context_length. The others are synthetic tasks of that name, in the run's own
    vocabulary. A run on a task (``data=mqar``) always measures that task.
    """
