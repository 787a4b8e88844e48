"""wandb is a mirror: the same rows, and whatever happens to it, nobody else notices."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xattn import run_folder
from xattn.config import compose, save
from xattn.errors import BadInput, XattnError
from xattn.sync import sync
from xattn.tracking import wandb as adapter
from xattn.tracking.config import WandbConfig
from xattn.tracking.wandb import WandbMirror, resolve_mode

CONFIG = WandbConfig(mode="auto", project="a project", entity=None)


class FakeWandb(types.ModuleType):
    """Remembers what it was told. ``fails`` names the call that raises."""

    def __init__(self, fails: str = "", init: Callable[[], None] = lambda: None):
        super().__init__("wandb")
        self.fails, self.on_init = fails, init
        self.arguments: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def _call(self, name: str) -> None:
        if name == self.fails:
            raise RuntimeError(f"{name} broke\nand says more")

    def Settings(self, **_: Any) -> None:
        self._call("Settings")

    def init(self, **arguments: Any) -> FakeWandb:
        self._call("init")
        self.on_init()
        self.arguments = arguments
        return self

    def log(self, row: dict[str, Any], *, step: int) -> None:
        self._call("log")
        self.rows.append((step, row))

    def finish(self, *, exit_code: int) -> None:
        self._call("finish")
        self.exit_code = exit_code


def mirror(folder: Path, said: list[str], **more: Any) -> WandbMirror:
    return WandbMirror(
        CONFIG,
        mode="offline",
        run_id="abcd1234",
        name="a run",
        group="a study",
        values={"seed": 0, "hash": "0123456789"},
        folder=folder,
        say=said.append,
        **more,
    )


ROWS = [{"step": 1, "train_loss": 5.5}, {"step": 2, "train_loss": 5.0, "val_loss": 5.25}]


def test_the_mirror_has_the_same_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake, said = FakeWandb(), list[str]()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    wandb = mirror(tmp_path, said)
    for row in ROWS:
        wandb.log(row)
    wandb.finish({"val_loss": 5.25, "status": "done"}, 0)
    assert fake.rows == [(1, {"train_loss": 5.5}), (2, {"train_loss": 5.0, "val_loss": 5.25})]
    assert fake.summary == {"val_loss": 5.25, "status": "done"}
    assert fake.exit_code == 0
    expected = {
        "project": "a project",
        "entity": None,
        "mode": "offline",
        "id": "abcd1234",
        "name": "a run",
        "group": "a study",
        "config": {"seed": 0, "hash": "0123456789"},
        "dir": str(tmp_path),
    }
    assert {key: fake.arguments[key] for key in expected} == expected
    assert len(said) == 1
    assert "wandb sync" in said[0]
    assert "wandb leet" in said[0]


def test_a_resumed_run_sends_no_step_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = []
    for rows in (ROWS, [*ROWS, {"step": 3, "train_loss": 4.5}]):
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        wandb = mirror(tmp_path, [])
        for row in rows:
            wandb.log(row)
        wandb.finish({}, 0)
        sent += [step for step, _ in fake.rows]
    assert sent == [1, 2, 3]


@pytest.mark.parametrize("fails", ["Settings", "init", "log", "finish"])
def test_a_failure_is_one_line_and_nothing_else(fails: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake, said = FakeWandb(fails), list[str]()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    wandb = mirror(tmp_path, said)
    for row in ROWS:
        wandb.log(row)
    wandb.finish({}, 0)
    wandb.log(ROWS[0])
    assert len(said) == 2
    (told,) = (line for line in said if f"{fails} broke" in line)
    assert "\n" not in told


def test_a_wandb_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = list[str]()
    monkeypatch.setitem(sys.modules, "wandb", None)
    wandb = mirror(tmp_path, said)
    wandb.log(ROWS[0])
    wandb.finish({}, 0)
    assert len(said) == 2


def test_a_wandb_that_hangs_is_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor does it hold up a single row on the way."""
    let_go = threading.Event()
    fake, said = FakeWandb(init=lambda: let_go.wait(60) and None), list[str]()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(adapter, "_FINISH_SECONDS", 0.3)
    began = time.monotonic()
    wandb = mirror(tmp_path, said)
    for row in ROWS:
        wandb.log(row)
    wandb.finish({}, 0)
    assert time.monotonic() - began < 5
    assert "not finished after 0.3 s" in said[-1]
    let_go.set()
    wandb._thread.join(30)
    assert [step for step, _ in fake.rows] == [1, 2]


# ---- modes -----------------------------------------------------------------------------------------------------------

NETRC = "machine api.wandb.ai\n  login user\n  password secret\n"


@pytest.mark.parametrize(
    ("asked", "environment", "netrc", "mode"),
    [
        ("auto", {}, "", "offline"),
        ("auto", {"WANDB_API_KEY": "secret"}, "", "online"),
        ("auto", {"WANDB_API_KEY": ""}, "", "offline"),
        ("auto", {}, NETRC, "online"),
        ("auto", {}, "machine example.org login user password secret\n", "offline"),
        ("auto", {}, "not a netrc {", "offline"),
        ("auto", {"WANDB_BASE_URL": "https://wandb.example.org"}, NETRC, "offline"),
        (
            "auto",
            {"WANDB_BASE_URL": "https://wandb.example.org"},
            NETRC.replace("api.wandb.ai", "wandb.example.org"),
            "online",
        ),
        ("auto", {"WANDB_API_KEY": "secret", "WANDB_MODE": "offline"}, "", "offline"),
        ("auto", {"WANDB_API_KEY": "secret", "WANDB_MODE": "disabled"}, "", "disabled"),
        ("auto", {"WANDB_MODE": "nonsense"}, "", "offline"),
        ("offline", {"WANDB_API_KEY": "secret"}, "", "offline"),
        ("disabled", {"WANDB_API_KEY": "secret", "WANDB_MODE": "online"}, "", "disabled"),
        ("online", {"WANDB_API_KEY": "secret", "WANDB_MODE": "offline"}, "", "online"),
    ],
)
def test_auto_uses_the_network_only_with_a_key(
    asked: Any, environment: dict[str, str], netrc: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(WandbConfig(mode=asked, project="p", entity=None)) == mode


def test_online_without_a_key_is_bad_input_and_never_a_prompt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "missing"))
    with pytest.raises(BadInput, match=r"tracking\.wandb\.mode.*online.*key"):
        resolve_mode(WandbConfig(mode="online", project="p", entity=None))


@pytest.mark.slow
def test_a_real_offline_run(tmp_path: Path) -> None:
    said = list[str]()
    wandb = mirror(tmp_path, said)
    for row in ROWS:
        wandb.log(row)
    wandb.finish({"val_loss": 5.25, "passed_over": {"a": "b"}, "none": None}, 0)
    assert len(said) == 1, said
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-abcd1234.wandb")
    # wandb's own process closes its file after ``finish`` has returned.
    for written in (b"train_loss", b"a study", b"0123456789"):
        patience = time.monotonic() + 30
        while written not in log.read_bytes() and time.monotonic() < patience:
            time.sleep(0.1)
        assert written in log.read_bytes()


# ---- xattn sync ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["", "init", "finish"])
def test_sync_sends_every_whole_row_and_says_where_it_failed(
    fails: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However long wandb takes."""
    fake = FakeWandb(fails, init=lambda: time.sleep(0.3))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(adapter, "_FINISH_SECONDS", 0.01)
    (tmp_path / run_folder.CONFIG).write_text(save(compose(["tracking.wandb.mode=offline"])))
    (tmp_path / run_folder.PROVENANCE).write_text('{"wandb_id": "abcd1234"}')
    (tmp_path / run_folder.SUMMARY).write_text('{"status": "running"}')
    (tmp_path / run_folder.METRICS).write_text('{"step": 1, "train_loss": 5.5}\n{"step": 2, "tr')
    if fails:
        with pytest.raises(XattnError, match=f"not synced: RuntimeError: {fails} broke"):
            sync(tmp_path)
        return
    sync(tmp_path)
    assert fake.rows == [(1, {"train_loss": 5.5})]
    assert fake.summary == {"status": "running"}
