"""What docs/architecture.md says of the code is true: its files and names, the links between them, its picture."""

from __future__ import annotations

import ast
import itertools
import re
import runpy
from pathlib import Path

import grimp
import pytest

from xattn.backend import dispatch

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
DRAWING = runpy.run_path(str(ROOT / "docs" / "architecture.py"))
# Title of each way → (file, name in it) of its steps.
WAYS = {
    title: re.findall(r"^\d+\. `(\S+)`, `(\S+)`: ", steps, re.M)
    for title, steps in re.findall(r"^\*\*(.+?)\*\*.*\n((?:\d+\. .*\n?)+)", PAGE, re.M)
}


def test_every_file_and_folder_named_is_there() -> None:
    named = re.findall(r"(?<![\w/.])(?:\w+\.py\b|(?:xattn|conf|docs|tests|hydra_plugins)/[\w/.]*\w/?)", PAGE)
    linked = [f"docs/{target}" for target in re.findall(r"\]\(([^)#:]+)\)", PAGE)]
    assert len(named) > 60
    assert [path for path in [*named, *linked] if not (ROOT / path).exists()] == []


def test_every_room_has_a_line() -> None:
    package = ROOT / "xattn"
    rooms = {f"xattn/{path.parent.name}/" for path in package.glob("*/*.py")}
    rooms |= {f"xattn/{path.name}" for path in package.glob("*.py") if path.name != "__init__.py"}
    assert set(re.findall(r"^    (xattn/\S+) ", PAGE, re.M)) == rooms


def test_the_picture_is_that_of_the_imports() -> None:
    drawn = re.search(r"<!-- \[\[\[cog .*\]\]\] -->\n(.*)\n<!-- \[\[\[end\]\]\] -->", PAGE, re.S)
    assert drawn is not None
    assert drawn[1] == DRAWING["picture"](), "cog -rP -I docs docs/architecture.md draws it"


def test_the_page_shows_five_ways() -> None:
    steps = re.findall(r"^\d+\. ", PAGE, re.M)
    assert len(WAYS) == 5
    assert sum(map(len, WAYS.values())) == len(steps), "a step is a file, a name in it, and a clause"


@pytest.mark.parametrize("way", WAYS)
def test_each_step_of_a_way_is_linked_to_the_next(way: str) -> None:
    """One of the two imports the other. An import by way of a package's __init__, or by dispatch's table, counts."""
    graph = DRAWING["imports"]()
    for row in dispatch.TABLE:
        graph.add_import(importer=dispatch.__name__, imported=f"{dispatch.__package__}.{row.name}")
    modules = [file.removesuffix(".py").replace("/", ".") for file, _ in WAYS[way]]
    loose = [
        (one, other)
        for one, other in itertools.pairwise(modules)
        if not _imports(graph, one, other) and not _imports(graph, other, one)
    ]
    assert loose == []


def _imports(graph: grimp.ImportGraph, one: str, other: str) -> bool:
    direct = graph.find_modules_directly_imported_by(one)
    inits = [graph.find_modules_directly_imported_by(module) for module in direct if graph.find_children(module)]
    return other in direct.union(*inits)


@pytest.mark.parametrize("way", WAYS)
def test_each_name_of_a_way_is_defined_in_its_file(way: str) -> None:
    for file, name in WAYS[way]:
        assert name in _definitions(ast.parse((ROOT / file).read_text("utf-8"))), f"{file}: {name}"


def _definitions(node: ast.Module | ast.ClassDef, prefix: str = "") -> set[str]:
    """Return the functions and classes of a module, and methods as ``Class.method``."""
    found = set()
    for each in node.body:
        if isinstance(each, ast.FunctionDef | ast.ClassDef):
            found.add(f"{prefix}{each.name}")
        if isinstance(each, ast.ClassDef):
            found |= _definitions(each, f"{each.name}.")
    return found
