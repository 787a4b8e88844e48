"""The corpus of the running Python's library depends on its version: a run that meets another version says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xattn
from xattn import config as xconfig
from xattn.cli import main
from xattn.data import corpus
from xattn.errors import ExitCode, IntegrityError
from xattn.report.answer import Question
from xattn.report.command import texts
from xattn.report.judge import judge
from xattn.report.read import read_study
from xattn.runs import provenance
from xattn.runs.desk import run

TINY = [
    *("trainer=debug", "trainer.steps=3", "trainer.log_every=1", "trainer.eval_every=3", "evaluation.sequences=4"),
    *("backend.context_length=16", "model.embedding_dim=16", "model.num_layers=1", "model.num_heads=2"),
    *("model.mlp_dim=16", "tracking.wandb.mode=disabled"),
]
Library = Callable[[str, int], None]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Makes this a Python of that version, with a library of that many lines in ten modules; the versions of packages
    may be given too."""
    real = provenance.versions()
    monkeypatch.chdir(tmp_path)

    def be(python: str, lines: int, **packages: str) -> None:
        files = {f"module{i}.py": tmp_path / f"lib{python}" / f"module{i}.py" for i in range(10)}
        for name, file in files.items():
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"# {name}\n" + "".join(f"x{i} = {i * lines % 17}\n" for i in range(lines)))
        monkeypatch.setattr(corpus, "library_files", lambda: files)
        monkeypatch.setattr(provenance, "versions", lambda: real | {"python": python} | packages)

    return be


def made(*overrides: str, steps: int | None = None) -> tuple[ExitCode, Path]:
    """The run of the tiny config, as the command makes it, stopped after the first step where ``steps`` is 1."""
    config, folder = xconfig.compose_in_folder([*TINY, *overrides])
    return run(config, folder, overrides, stop=lambda: steps is not None), folder


def test_provenance_and_report_name_the_corpus(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    library("3.98.1", 30)
    code, folder = made()
    assert code == ExitCode.DONE
    recorded = json.loads((folder / "provenance.json").read_text())
    size = sum(file.stat().st_size for file in Path("lib3.98.1").iterdir())
    assert recorded["corpus"] == {"name": "python_stdlib", "bytes": size, "python": "3.98.1"}
    page = texts(judge(read_study(folder.parent), Question()), {}, {}, folder.parent)["report.md"]
    sha = recorded["data_sha256"][:12]
    assert f"python_stdlib, the library of Python 3.98.1, {size:,} bytes, sha256 {sha}, as bytes" in page


def test_a_run_that_meets_another_library_says_whose_it_is(library: Library) -> None:
    library("3.98.1", 30)
    code, folder = made(steps=1)
    assert code == ExitCode.PREEMPTED
    before = (folder / "provenance.json").read_text()
    sizes = {"3.98.1": 0, "3.99.0": 0}
    library("3.99.0", 40)
    for python in sizes:
        sizes[python] = sum(file.stat().st_size for file in Path(f"lib{python}").iterdir())
    with pytest.raises(IntegrityError) as raised:
        made()
    first, second = str(raised.value).splitlines()
    sha = json.loads(before)["data_sha256"][:12]
    assert f"began with Python 3.98.1 (corpus of {sizes['3.98.1']:,} bytes, sha256 {sha}" in first
    assert f"this is Python 3.99.0 ({sizes['3.99.0']:,} bytes, sha256 " in first
    assert second == (
        "start it with Python 3.98.1, or start over with resume=never, or use a text that is the same everywhere: "
        "data=text data.path=…"
    )
    assert (folder / "provenance.json").read_text() == before
    recorded = json.loads(before)
    del recorded["corpus"]  # as older versions wrote it
    (folder / "provenance.json").write_text(json.dumps(recorded))
    with pytest.raises(IntegrityError, match=r"began with Python 3\.98\.1 \(corpus of sha256 "):
        made()
    library("3.98.1", 30)
    assert made()[0] == ExitCode.DONE


def test_a_finished_run_of_another_python_is_shown_as_such(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    library("3.98.1", 30)
    _, folder = made()
    other = "the corpus was the library of Python 3.98.1 ("
    capsys.readouterr()
    made()
    assert other not in capsys.readouterr().out
    library("3.99.0", 40)
    assert made()[0] == ExitCode.DONE
    assert other in capsys.readouterr().out
    assert xattn.train([*TINY, "trainer.log_every=3"]).path == folder, "the same training, logged less"
    assert other in capsys.readouterr().out
    assert main(["runs"]) == ExitCode.DONE
    assert f"1 run: {other}" in capsys.readouterr().out
    with pytest.raises(
        IntegrityError, match=r"began with Python 3\.98\.1 .*\nevaluate it with Python 3\.98\.1, or choose other data"
    ):
        xattn.load(folder).evaluate()


def test_other_data_that_a_package_makes_name_its_version(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's tokens are drawn by NumPy; a run on a text of one's own has nothing to do with the version of Python."""
    task = ("data=copying", "data.vocab_size=16", "backend.context_length=8")
    library("3.98.1", 30)
    _, folder = made(*task, steps=1)
    recorded: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    assert recorded["corpus"] == {"name": "copying", "bytes": None, "numpy": recorded["versions"]["numpy"]}
    recorded["data_sha256"], recorded["versions"]["numpy"] = "0" * 64, "1.0"
    (folder / "provenance.json").write_text(json.dumps(recorded))
    with pytest.raises(
        IntegrityError, match=r"began with numpy 1\.0 .*\nstart it with numpy 1\.0, or start over with resume=never$"
    ):
        made(*task)
    Path("own.txt").write_text("a text of one's own\n" * 200)
    _, folder = made("data=text", "data.path=own.txt", steps=1)
    Path("own.txt").write_text("another text\n" * 400)
    library("3.99.0", 40)
    with pytest.raises(IntegrityError, match=r"\(sha256 .*, was .*\); restore them, or start over with resume=never$"):
        made("data=text", "data.path=own.txt")


def test_a_text_that_experiments_name_says_where_it_comes_from() -> None:
    with pytest.raises(xattn.errors.BadInput, match=r"char-rnn.*1,115,394 bytes"):
        corpus.check(xconfig.compose(["experiment=shakespeare_quick", "data.path=missing/tinyshakespeare.txt"]).data)
