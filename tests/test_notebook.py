"""``xattn.train`` in a process that continues: what it returns, what it raises, and what it leaves unchanged."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

import xattn
from xattn import config as xconfig, notebook
from xattn.errors import BadInput, Diverged, ExitCode, Preempted, XattnError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture
def tiny(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of a tiny run, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return [
        *("trainer=debug", "trainer.steps=4", "trainer.log_every=2", "trainer.eval_every=4"),
        *("data=text", f"data.path={text_file}", "backend.context_length=16", "evaluation.sequences=8"),
        *("model.embedding_dim=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16"),
        "tracking.wandb.mode=disabled",
    ]


def standing() -> list[Any]:
    """What a run takes over in its process, or Hydra does."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    levels = [logging.getLogger(name).level for name in ("absl", "asyncio")]
    return [*handlers, threading.excepthook, sys.unraisablehook, *levels, GlobalHydra.instance().hydra]


def test_a_run_is_trained_once_and_opened(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = standing()
    run = xattn.train(tiny)
    assert standing() == before
    config = xconfig.compose(tiny)
    assert run.path == tmp_path / "outputs" / "default" / xconfig.run_name(config)
    assert (run.config, run.step, run.summary["status"]) == (config, 4, "done")
    assert "step 4/4" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert run.metrics["step"].tolist() == [2, 4]
    assert run.metrics["val_loss"].tolist()[1:] == [rows[1]["val_loss"]]
    assert run.metrics["train_loss"].tolist() == [row["train_loss"] for row in rows]
    assert len(repr(run).splitlines()) == 4
    assert "done, checkpoint of step 4" in repr(run)
    assert "params" not in repr(run)

    state = {file: file.read_bytes() for file in run.path.glob("*.json*")}
    assert xattn.train(tiny).path == run.path
    assert "already done at step 4" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in run.path.glob("*.json*")} == state

    more = xattn.train([*tiny, "evaluation.sequences=6"], quiet=True)
    assert more.path == run.path, "it is the same training"
    assert [folder.name for folder in run.path.parent.iterdir()] == [run.path.name]
    assert capsys.readouterr() == ("", "")


def test_overrides_that_cannot_be_used_are_named(tiny: list[str], tmp_path: Path) -> None:
    for overrides, message in (
        ("seed=1", r"must be a list of strings, \['seed=1'\]"),
        (["backend.activation=relu"], "'relu': must be 'softmax', 'sigmoid' or 'none'"),
        (["-m"], "is a command-line flag"),
        (["seed=0,1"], "several values make a sweep"),
        (["hydra/launcher=xattn"], r"from Python, use hydra\.run\.dir or hydra\.searchpath"),
        (["sweep.half_width=0.1"], "adds seeds to a sweep"),
        (["data=text", "data.path=missing.txt"], "missing.txt"),
    ):
        with pytest.raises(BadInput, match=message):
            xattn.train(overrides)
    assert not (tmp_path / "outputs").exists()


def test_hydra_initialised_by_the_caller_stays_so(tiny: list[str], tmp_path: Path) -> None:
    """For a config of the caller's own, from which nothing is taken."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.yaml").write_text("seed: 7\n")
    with hydra.initialize_config_dir(str(tmp_path / "own"), version_base="1.3"):
        before = standing()
        run = xattn.train([*tiny, f"hydra.run.dir={tmp_path}/elsewhere"], quiet=True)
        assert standing() == before
        assert hydra.compose("config").seed == 7
    assert run.config.seed == 0
    assert run.path == tmp_path / "elsewhere"


def test_an_interrupt_saves_and_the_same_call_continues(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = notebook.run

    def interrupted(*args: Any, **kwargs: Any) -> ExitCode:
        signal.raise_signal(signal.SIGINT)
        return run(*args, **kwargs)

    before = standing()
    monkeypatch.setattr(notebook, "run", interrupted)
    with pytest.raises(Preempted, match=r"outputs/default/.*: stopped at step \d and saved; the same call continues"):
        xattn.train([*tiny, "seed=1"])
    assert standing() == before
    monkeypatch.setattr(notebook, "run", run)
    assert xattn.train([*tiny, "seed=1"]).summary["status"] == "done"


def test_what_goes_wrong_is_raised_with_the_folder(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # as it happens, and when the result is shown
        with pytest.raises(Diverged, match=r"outputs/default/softmax-text-lr1e\+30.*: diverged at step \d") as raised:
            xattn.train([*tiny, "optimizer.learning_rate=1e30"], quiet=True)
        assert raised.value.exit_code == ExitCode.DIVERGED
    monkeypatch.setattr(notebook, "run", lambda *args, **kwargs: ExitCode.ERROR)
    with pytest.raises(XattnError, match=r"failed at step None; the traceback is in outputs/default/.*log\.txt"):
        xattn.train([*tiny, "seed=2"], quiet=True)
