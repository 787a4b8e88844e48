"""The picture in architecture.md, drawn from the imports: which rooms of xattn import which.

``cog -rP -I docs docs/architecture.md`` writes it, and tests/test_architecture.py checks that the page is up to date.
"""

from __future__ import annotations

import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
APART = "xattn.runs.run_folder"
"""A module that is drawn apart from its package, because rooms below the package import it too."""


def imports() -> grimp.ImportGraph:
    """Return the graph of all imports in xattn/ and hydra_plugins/, including those inside functions."""
    return grimp.build_graph("xattn", "hydra_plugins", cache_dir=None)


def rooms() -> dict[str, set[str]]:
    """Return room → the rooms that it imports, without the imports that the contract of the layers exempts."""
    graph = imports()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    for expression in settings["contracts"][0]["ignore_imports"]:
        for each in graph.find_matching_direct_imports(import_expression=expression):
            graph.remove_import(importer=each["importer"], imported=each["imported"])
    found: dict[str, set[str]] = {}
    for module in graph.modules - {"xattn"}:  # xattn/__init__.py only lists public names
        others = {room_of(other) for other in graph.find_modules_directly_imported_by(module)}
        found.setdefault(room_of(module), set()).update(others - {room_of(module)})
    return found


def room_of(module: str) -> str:
    """Return a module's room: its package, itself if it lies in the root, or :data:`APART`."""
    if module == APART:
        return "run_folder"
    parts = module.split(".")
    return parts[1] if parts[0] == "xattn" else parts[0]


def picture() -> str:
    """Return the rooms as a Mermaid flowchart, each before the rooms that it imports.

    An arrow is left out if others lead to the same room. Raises :class:`graphlib.CycleError` if imports form a cycle.
    """
    direct = rooms()
    order = list(TopologicalSorter({room: sorted(direct[room]) for room in sorted(direct)}).static_order())
    below: dict[str, set[str]] = {}
    for room in order:
        below[room] = direct[room].union(*(below[other] for other in direct[room]))
    arrows: dict[str, list[str]] = {}
    for room in reversed(order):
        needed = [other for other in sorted(direct[room]) if not any(other in below[via] for via in direct[room])]
        if needed:
            arrows.setdefault(" & ".join(needed), []).append(room)
    lines = [f"  {' & '.join(importing)} --> {imported}" for imported, importing in arrows.items()]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```"])
