"""examples/quickstart.ipynb: every cell runs, and draws what it announces."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"

# Cell after cell in one namespace, in the main thread and within an event loop, as a notebook's kernel does; the value
# of a last line is shown.
KERNEL = """
import ast, asyncio, json, sys
import matplotlib.pyplot as plt

def figures_shown():
    for number in plt.get_fignums():
        plt.figure(number).savefig(f"figure{number}.png")
        assert all(axes.lines for axes in plt.figure(number).axes)

plt.show = figures_shown

async def cells():
    scope = {"__name__": "__main__"}
    for number, source in enumerate(json.load(sys.stdin)):
        *_, last = tree = ast.parse(source, f"cell {number}").body
        shown = ast.Expression(tree.pop().value) if isinstance(last, ast.Expr) else None
        exec(compile(ast.Module(tree, []), f"cell {number}", "exec"), scope)
        if shown is not None:
            value = eval(compile(shown, f"cell {number}", "eval"), scope)
            print(repr(value) if value is not None else "")

asyncio.run(cells())
"""


def cells(kind: str) -> list[str]:
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_it_is_kept_without_outputs_and_its_links_lead_somewhere() -> None:
    """Outputs change at each execution, and would hide in a diff what somebody has changed."""
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    links = [part.split(")")[0].split("#")[0] for text in cells("markdown") for part in text.split("](")[1:]]
    assert len(links) >= 3
    assert all((NOTEBOOK.parent / link).is_file() for link in links), links


@pytest.mark.slow
def test_every_cell_is_executed_in_less_than_a_minute(tmp_path: Path) -> None:
    """Of the processor's time on all cores, programs that are compiled included; other processes don't count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KERNEL],
        input=json.dumps(cells("code")),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    assert done.stderr == ""
    for words in (
        "done, checkpoint of step 60",
        "LoadedStudy outputs/quickstart: 6 runs (6 done)",
        "backend.activation",
    ):
        assert words in done.stdout
    assert len(list((tmp_path / "outputs" / "quickstart").iterdir())) == 6
    assert len(list(tmp_path.glob("figure*.png"))) == 2
