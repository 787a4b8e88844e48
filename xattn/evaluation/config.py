"""What a person chooses about evaluation. Importing this module imports no jax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator

from xattn import registry
from xattn.data.config import tasks
from xattn.data.task import PROBES_OF_TEXT
from xattn.section import OneOf, Section

registered_probes: dict[str, Callable[..., Any]] = {}


def probe_names() -> tuple[str, ...]:
    """The values of ``evaluation.probes``: the package's own, then what was registered."""
    return (*PROBES_OF_TEXT, *tasks(), *registered_probes)


def register_probe(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: makes a function the probe ``name`` in this process.

    The function takes a :class:`xattn.evaluation.probes.Scene` and returns a :class:`xattn.evaluation.probes.Probe`. A
    name that is no name, or the package's own, is a ValueError.
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

    windows: PositiveInt | Literal["all"]
    """Number of windows of context_length tokens of the validation text that are scored, spread evenly over it and the
    same at every evaluation of every run; ``all`` scores every token but the first.
    """
    probes: tuple[Annotated[str, OneOf(probe_names)], ...] = Field(strict=False)
    """What is measured beside the loss. ``in_context``: loss late in a window minus loss early in it.
    ``extrapolation``: loss up to 8 · context_length. The others are the synthetic tasks of that name, in the run's own
    vocabulary. A run on a task (``data=mqar``) measures that task anyway.
    """

    @field_validator("probes")
    @classmethod
    def _each_once(cls, probes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(probes)))
