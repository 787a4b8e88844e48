"""docs/extend.md: its code blocks form one working file, its YAML blocks are choices, and its commands run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import processes
from xattn.runs import run_folder

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extend.md").read_text("utf-8")
FILES = ["backend/steep.yaml", "experiment/steep_and_gated.yaml", "data/book.yaml"]
TINY = [
    *("trainer=debug", "trainer.steps=2", "trainer.eval_every=2", "tracking.wandb.mode=disabled"),
    *("evaluation.sequences=4", "backend.context_length=16", "model.embedding_dim=16", "model.num_layers=1"),
    *("model.num_heads=2", "model.mlp_dim=16"),
]
pytestmark = pytest.mark.slow


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mine.py, mine/ and book.txt, as the page says."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text("\n\n".join(blocks("python")), "utf-8")
    assert len(blocks("yaml")) == len(FILES)
    for name, block in zip(FILES, blocks("yaml"), strict=True):
        assert f"`mine/{name}`" in PAGE
        (folder / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mine" / name).write_text(block, "utf-8")
    (folder / "book.txt").write_text("Once upon a time, and a very good time it was, there was a cow. " * 200, "utf-8")
    return folder


def start(folder: Path, *words: str, code: int = 0) -> str:
    done = processes.run(*words, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_all_of_them_train_in_one_run_and_are_found_again(mine: Path) -> None:
    words = ["backend.activation=relu", "model.output_norm=l2", "data=echo", "data.delay=3", "optimizer=signum"]
    start(mine, "mine.py", *TINY, *words, "evaluation.probes=[repeats,induction]", "study=one")
    (run,) = (mine / "outputs" / "one").glob("relu*")
    summary = run_folder.read_summary(run) or {}
    assert summary["status"] == "done"
    assert {"probe/echo/accuracy", "probe/repeats/accuracy", "probe/induction/accuracy"} <= set(summary)
    origin = json.loads((run / "provenance.json").read_text("utf-8"))
    assert list(origin["registered"]) == ["mine.py"]
    assert len(start(mine, "mine.py", "evaluate", str(run)).splitlines()) > 3
    assert "mine.py" in start(mine, "-m", "xattn.cli", "evaluate", str(run), code=2)


def test_a_task_is_a_probe_of_a_model_that_never_saw_it(mine: Path) -> None:
    start(mine, "mine.py", "--config-dir", "mine", *TINY, "data=book", "evaluation.probes=[echo]", "study=book")
    (run,) = (mine / "outputs" / "book").glob("softmax*")
    assert "probe/echo/accuracy" in (run_folder.read_summary(run) or {})


def test_worker_processes_of_a_sweep_know_them(mine: Path) -> None:
    words = ["data=echo", "optimizer=signum", "model.output_norm=l2", "sweep.workers=2", "study=two"]
    words.append("backend.activation=softmax,relu")
    start(mine, "mine.py", "-m", *TINY, *words)
    runs = [path for path in (mine / "outputs" / "two").iterdir() if path.name.startswith(("softmax", "relu"))]
    assert len(runs) == 2
    for run in runs:
        assert (run_folder.read_summary(run) or {})["status"] == "done"
        assert "momentum: 0.9" in (run / "config.yaml").read_text("utf-8")
    assert "2 already done" in start(mine, "mine.py", "-m", *TINY, *words)


def test_they_are_explained_like_the_packages_own(mine: Path) -> None:
    told = start(mine, "mine.py", "explain", "optimizer", "data.delay", "backend.activation")
    assert re.search(r"optimizer=signum +the sign of the momentum", told)
    assert re.search(r"optimizer\.momentum = 0\.9 +a number ≥ 0 and < 1   \(optimizer=signum\)", told)
    assert "data.delay   (data=echo)\n  a whole number; default: 4\n  Places between a token and its echo." in told
    assert "softmax | sigmoid | none | relu" in told


def test_the_yaml_files_are_choices(mine: Path) -> None:
    shown = start(mine, "mine.py", "--config-dir", "mine", "experiment=steep_and_gated", "data=book", "--cfg", "job")
    assert "decay: alibi" in shown
    assert "window: 64" in shown
    assert "path: book.txt" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer=signm"], "optimizer = signm: no such choice (did you mean signum?)"),
        (["optimizer=signum", "optimizer.momentum=2"], "optimizer.momentum = 2: must be less than 1"),
        (["evaluation.probes=[repeat]"], "did you mean repeats?"),
        (["model.output_norm=l3"], "must be 'none', 'rmsnorm' or 'l2'"),
        (
            ["data=echo", "data.delay=99", "backend.context_length=16"],
            "data.delay = 99: at most backend.context_length",
        ),
    ],
)
def test_a_mistake_is_told_with_what_was_registered(words: list[str], told: str, mine: Path) -> None:
    assert told in start(mine, "mine.py", *words, code=2)
