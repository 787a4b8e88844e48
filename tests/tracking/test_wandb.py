"""wandb is a mirror: the same rows, and whatever happens to it, nobody else notices."""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb as real
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth

from xattn import run_folder
from xattn.config import compose, save
from xattn.errors import BadInput, XattnError
from xattn.sync import sync
from xattn.tracking import wandb as adapter
from xattn.tracking.config import WandbConfig
from xattn.tracking.wandb import WandbMirror, log_table, refuse_without_key, resolve_mode, run_id

CONFIG = WandbConfig(mode="offline", project="a project", entity=None)


class FakeWandb(types.ModuleType):
    """Remembers what it was told. ``fails`` names the call that raises.

    As in wandb, a row is in the summary once it is committed, by request, by the next step or by the end.
    """

    def __init__(self, fails: str = "", init: Callable[[], None] = lambda: None):
        super().__init__("wandb")
        self.fails, self.on_init = fails, init
        self.arguments: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.open_row: dict[str, Any] = {}
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

    def log(self, row: dict[str, Any], *, step: int, commit: bool | None = None) -> None:
        self._call("log")
        self.rows.append((step, row))
        self.summary.update(self.open_row)
        self.open_row = row
        if commit:
            self.summary.update(row)
            self.open_row = {}

    def finish(self, *, exit_code: int) -> None:
        self._call("finish")
        self.summary.update(self.open_row)
        self.exit_code = exit_code


def mirror(folder: Path, said: list[str], **more: Any) -> WandbMirror:
    return WandbMirror(
        CONFIG,
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
    assert fake.summary == {"train_loss": 5.0, "val_loss": 5.25, "status": "done"}
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
    assert f"`xattn wandb {tmp_path}`" in said[0]


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

KEY = "0123456789" * 4
CLOUD = "https://api.wandb.ai"
OWN_SERVER = "http://wandb.example.org:8080"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home folder that is the working directory too, without anything of wandb's, which forgets what it loaded."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    real.teardown()
    yield tmp_path
    real.teardown()


def log_in(server: str | None = None) -> str:
    """What ``wandb login`` writes, by wandb's own functions: the key, and a server that is not its default."""
    settings = wandb_setup.singleton().settings
    wbauth.write_netrc_auth(host=server or settings.base_url, api_key=KEY)
    if server is not None:
        write_setting("base_url", server, everywhere=True)
    real.teardown()
    return server or settings.base_url


def write_setting(key: str, value: str, *, everywhere: bool = False) -> None:
    """What ``wandb offline`` and its like write, by wandb's own functions."""
    files = wandb_setup.singleton().settings.read_system_settings()
    files.set(key, value, globally=everywhere)
    files.save()
    real.teardown()


def mode(asked: Any = "auto") -> str:
    return resolve_mode(WandbConfig(mode=asked, project="p", entity=None))


@pytest.mark.parametrize("server", [None, CLOUD, OWN_SERVER])
def test_a_login_by_the_installed_wandb_is_recognised(server: str | None, home: Path) -> None:
    """Under whatever host it is kept: the default server's, and a server's of one's own with its port."""
    assert mode() == "offline"
    real.teardown()
    log_in(server)
    assert (home / ".netrc").is_file()
    assert mode() == mode("online") == "online"
    refuse_without_key(WandbConfig(mode="online", project="p", entity=None))


def test_a_login_elsewhere_is_no_login(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(OWN_SERVER)
    monkeypatch.setenv("WANDB_BASE_URL", "https://another.example.org")
    assert mode() == "offline"
    with pytest.raises(BadInput, match="no API key"):
        mode("online")


@pytest.mark.parametrize(
    ("asked", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": ""}, "offline"),
        ("auto", {"WANDB_IDENTITY_TOKEN_FILE": "token.jwt"}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "shared"}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "dummy", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "disabled"),
        ("offline", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "offline"),
        ("disabled", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "disabled"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "online"),
    ],
)
def test_what_wandb_treats_as_offline_stays_offline(
    asked: str, environment: dict[str, str], expected: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mode(asked) == expected


@pytest.mark.parametrize(
    ("written", "expected"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")]
)
def test_so_does_what_its_settings_file_says(
    written: str, expected: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``wandb offline`` in this folder. The environment says more than the file."""
    log_in()
    write_setting("mode", written)
    assert mode() == expected
    real.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    assert mode() == "online"


@pytest.mark.parametrize(
    ("asked", "environment", "told"),
    [
        ("online", {}, r"tracking\.wandb\.mode = 'online': no API key"),
        ("auto", {"WANDB_MODE": "online"}, "WANDB_MODE=online: no API key"),
        ("online", {"WANDB_API_KEY": "a-secret"}, "must have 40"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "nonsense"}, "mode: Input should be 'online', 'offline'"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "nonsense"}, "base_url"),
    ],
)
def test_what_wandb_would_prompt_for_or_refuse_is_bad_input(
    asked: Any, environment: dict[str, str], told: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, without the key, and before the run starts."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=told) as error:
        refuse_without_key(WandbConfig(mode=asked, project="p", entity=None))
    assert len(str(error.value).splitlines()) == 1
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("asked", ["auto", "offline", "disabled"])
def test_nobody_waits_for_wandbs_import_before_the_first_step(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    refuse_without_key(WandbConfig(mode=asked, project="p", entity=None))


# ---- whose id --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "handed_out"),
    [
        ({}, False),
        ({"WANDB_SWEEP_ID": ""}, False),
        ({"WANDB_LAUNCH": "false"}, False),
        ({"WANDB_SWEEP_ID": "sweep"}, True),
        ({"WANDB_LAUNCH": "True"}, True),
    ],
)
def test_an_id_of_the_environment_is_taken_from_an_agent_only(
    environment: dict[str, str], handed_out: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left over in a shell, it would be that of every run of a sweep."""
    monkeypatch.setenv("WANDB_RUN_ID", "exported")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ids = {run_id(), run_id()}
    assert ids == {"exported"} if handed_out else len(ids) == 2 and "exported" not in ids


# ---- wandb itself, offline -------------------------------------------------------------------------------------------


def records(log: Path) -> Iterator[Record]:
    """What an offline run has written: LevelDB's log of protocol buffers, behind seven bytes of wandb's."""
    data, at, whole = log.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no head fits before the next block
            at += left
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last of several
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def written_by(log: Path) -> list[Record]:
    """All of an offline run: wandb's own process closes its file after ``finish`` has returned."""
    patience = time.monotonic() + 30
    while True:
        found = list(records(log))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < patience
        time.sleep(0.1)


def summary_of(found: list[Record]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for record in found:
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return summary


@pytest.mark.slow
def test_a_real_offline_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its summary is summary.json's, though the last row says otherwise. What a shell exports for one run is left."""
    for name, value in {"RUN_ID": "exported", "RESUME": "must", "FORK_FROM": "another?_step=1"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    said = list[str]()
    wandb = mirror(home, said)
    for row in ROWS:
        wandb.log(row | {"tokens_per_second": 4874.0})
    summary = {"tokens_per_second": 4391.0, "val_loss": float("nan"), "passed_over": {"a": "b"}, "none": None}
    run_folder.write_summary(home, summary)
    wandb.finish(summary, 0)
    assert len(said) == 1, said
    (log,) = (home / "wandb").glob("offline-run-*/run-abcd1234.wandb")
    found = written_by(log)
    (run,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.run_group, run.display_name, run.project) == ("abcd1234", "a study", "a run", "a project")
    on_file = json.loads((home / run_folder.SUMMARY).read_text())
    assert on_file["tokens_per_second"] == 4391.0
    assert {key: summary_of(found)[key] for key in on_file} == on_file
    assert [
        [json.loads(item.value_json) for item in record.history.item if "train_loss" in (item.key, *item.nested_key)]
        for record in found
        if record.WhichOneof("record_type") == "history"
    ] == [[5.5], [5.0]]


@pytest.mark.slow
def test_a_table_is_a_run_of_its_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one more of the run whose id a shell still exports."""
    monkeypatch.setenv("WANDB_RUN_ID", "exported")
    log_table(CONFIG, mode="offline", group="a study", columns=["a"], rows=[["1"]], folder=home)
    (log,) = (home / "wandb").glob("offline-run-*/run-*.wandb")
    assert "exported" not in log.name


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
    (tmp_path / run_folder.SUMMARY).write_text('{"status": "running", "tokens_per_second": 4391.0}')
    row = {"step": 1, "train_loss": 5.5, "tokens_per_second": 4874.0}
    (tmp_path / run_folder.METRICS).write_text(json.dumps(row) + '\n{"step": 2, "tr')
    if fails:
        with pytest.raises(XattnError, match=f"not synced: RuntimeError: {fails} broke"):
            sync(tmp_path)
        return
    sync(tmp_path)
    assert fake.rows == [(1, {"train_loss": 5.5, "tokens_per_second": 4874.0})]
    assert fake.summary == {"status": "running", "train_loss": 5.5, "tokens_per_second": 4391.0}
