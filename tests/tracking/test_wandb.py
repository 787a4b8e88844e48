"""wandb is a mirror: the same rows, and whatever happens to it, nobody else notices."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth

from xattn.cli import main as xattn
from xattn.commands.sync import sync
from xattn.config import Config, compose, save
from xattn.errors import BadInput, XattnError
from xattn.runs import run_folder
from xattn.runs.mirror import end_mirror, mirror_of, send_rows
from xattn.tracking import wandb as adapter
from xattn.tracking.config import WandbConfig
from xattn.tracking.own_runs import OwnRun, log_table
from xattn.tracking.wandb import WandbMirror, destination, refuse_without_key, resolve_mode, run_id


def config_of(mode: Any = "offline", **more: Any) -> WandbConfig:
    nothing = dict.fromkeys(("entity", "tags", "notes", "job_type"))
    off = {"system_metrics": False, "console": False, "artifacts": []}
    return WandbConfig.model_validate({"mode": mode, "project": "a project", **nothing, **off, **more})


CONFIG = config_of()


class FakeWandb(types.ModuleType):
    """Remembers what it was told. ``fails`` names the call that raises.

    As in wandb, a row is in the summary once it is committed, by request, by the next step or by the end.
    """

    def __init__(self, fails: str = "", init: Callable[[], None] = lambda: None):
        super().__init__("wandb")
        self.fails, self.on_init = fails, init
        self.arguments: dict[str, Any] = {}
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.open_row: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.metrics: dict[str, dict[str, Any]] = {}
        self.console = ""
        self.artifacts: list[str] = []
        self.url, self.entity = "https://wandb.example.org/a/run", "somebody"

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

    def define_metric(self, name: str, **how: Any) -> None:
        self._call("define_metric")
        self.metrics[name] = how

    def write_logs(self, text: str) -> None:
        self.console += text

    def Html(self, text: str, *, data_is_not_path: bool) -> str:
        return text

    def Image(self, path: str) -> str:
        return path

    def Histogram(self, values: list[float]) -> list[float]:
        return values

    def Artifact(self, name: str, *, type: str) -> FakeWandb:
        return self

    def add_file(self, path: str, *, name: str) -> None:
        pass

    def log_artifact(self, artifact: FakeWandb, *, aliases: list[str]) -> None:
        self.artifacts += aliases

    def log(self, row: dict[str, Any], *, step: int | None = None, commit: bool | None = None) -> None:
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


def mirror(folder: Path, said: list[str], *, config: WandbConfig = CONFIG, **more: Any) -> WandbMirror:
    run = {"id": "abcd1234", "group": "a study", "config": {"seed": 0, "hash": "0123456789"}}
    return WandbMirror(config, folder, run, say=said.append, **more)


ROWS = [
    {"step": 1, "tokens": 8, "train_loss": 5.5},
    {"step": 2, "tokens": 16, "train_loss": 5.0, "val_loss": 5.25},
]


def test_the_mirror_has_the_same_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake, said = FakeWandb(), list[str]()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    wandb = mirror(tmp_path, said)
    for row in ROWS:
        wandb.log(row)
    wandb.finish({"val_loss": 5.25, "status": "done"}, 0)
    assert fake.rows == [
        (1, {"tokens": 8, "train_loss": 5.5}),
        (2, {"tokens": 16, "train_loss": 5.0, "val_loss": 5.25}),
    ]
    assert fake.summary == {"tokens": 16, "train_loss": 5.0, "val_loss": 5.25, "status": "done"}
    assert fake.exit_code == 0
    expected = {
        "project": "a project",
        "entity": None,
        "mode": "offline",
        "id": "abcd1234",
        "name": tmp_path.name,
        "group": "a study",
        "config": {"seed": 0, "hash": "0123456789"},
        "dir": str(tmp_path),
    }
    assert {key: fake.arguments[key] for key in expected} == expected
    assert len(said) == 1
    assert f"`xattn wandb {tmp_path}`" in said[0]


def test_a_resumed_run_sends_no_step_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = []
    for rows in (ROWS, [*ROWS, {"step": 3, "tokens": 24, "train_loss": 4.5}]):
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        wandb = mirror(tmp_path, [])
        for row in rows:
            wandb.log(row)
        wandb.finish({}, 0)
        sent += [step for step, _ in fake.rows]
    assert sent == [1, 2, 3]


@pytest.mark.parametrize("fails", ["Settings", "init", "define_metric", "log", "finish"])
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
    return resolve_mode(config_of(asked))


@pytest.mark.parametrize("server", [None, CLOUD, OWN_SERVER])
def test_a_login_by_the_installed_wandb_is_recognised(server: str | None, home: Path) -> None:
    """Under whatever host it is kept: the default server's, and a server's of one's own with its port."""
    assert mode() == "offline"
    real.teardown()
    log_in(server)
    assert (home / ".netrc").is_file()
    assert mode() == mode("online") == "online"
    refuse_without_key(config_of("online"))


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
        refuse_without_key(config_of(asked))
    assert len(str(error.value).splitlines()) == 1
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("asked", ["auto", "offline", "disabled"])
def test_nobody_waits_for_wandbs_import_before_the_first_step(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    refuse_without_key(config_of(asked))


# ---- where it goes, and under which labels ---------------------------------------------------------------------------


def test_wandbs_variables_count_where_a_key_is_null(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"project": "p", "entity": "e", "tags": ["t", "u"], "notes": "n", "job_type": "j"}
    none = dict.fromkeys(labels)
    nothing = config_of(**none)
    assert destination(nothing, home) == none | {"project": "xattn"}
    real.teardown()
    for name, value in labels.items():
        monkeypatch.setenv(f"WANDB_{name.upper()}", f"{value if name != 'tags' else 't,u'}")
    assert destination(nothing, home) == labels | {"tags": ("t", "u")}
    typed = {name: f"typed {name}" for name in labels} | {"tags": ["typed"]}
    assert destination(config_of(**typed), home) == typed | {"tags": ("typed",)}
    assert destination(config_of(**none | {"tags": []}), home)["tags"] == ()  # none, whatever is exported


def test_a_run_is_sent_again_to_where_it_was_though_the_shell_is_another(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "exported")
    for _ in range(2):
        wandb = mirror(home, [], config=config_of(project=None, tags=["typed"]))
        wandb.log(ROWS[0])
        wandb.finish({}, 0)
        assert (fake.arguments["project"], fake.arguments["tags"]) == ("exported", ("typed",))
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
        real.teardown()


def test_online_the_address_of_the_run_is_printed_and_its_entity_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, said = FakeWandb(), list[str]()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb = mirror(home, said, config=config_of("online"))
    wandb.log(ROWS[0])
    wandb.finish({}, 0)
    assert said == [f"wandb       {fake.url}"]
    assert destination(config_of(), home)["entity"] == "somebody"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("tags=a", "tracking.wandb.tags = 'a': must be a list, [a]"),
        ("tags=['']", "tracking.wandb.tags[0] = '': "),
        ("project=''", "tracking.wandb.project = '': "),
        ("artifacts=[model]", "tracking.wandb.artifacts[0] = 'model': must be 'checkpoint' or 'report'"),
        ("console=wrap", "tracking.wandb.console = 'wrap': must be"),
    ],
)
def test_labels_that_wandb_would_refuse_are_bad_input(typed: str, told: str) -> None:
    with pytest.raises(BadInput) as error:
        compose([f"tracking.wandb.{typed}"])
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# ---- what it is sent -------------------------------------------------------------------------------------------------


def test_each_line_of_the_log_is_sent_once_by_whichever_attempt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whole lines only; and all of them again where all is sent again."""
    log, sent = tmp_path / run_folder.LOG, []
    for text, more in (("one\ntw", {}), ("o\nthrée\n", {}), ("", {}), ("", {"from_the_start": True})):
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        with log.open("a", encoding="utf-8") as file:
            file.write(text)
        wandb = mirror(tmp_path, [], config=config_of(console=True), **more)
        wandb.log(ROWS[0])
        wandb.finish({}, 0)
        sent.append(fake.console)
    assert sent == ["one\n", "two\nthrée\n", "", "one\ntwo\nthrée\n"]


def test_the_log_stays_here_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / run_folder.LOG).write_text("one\n")
    wandb = mirror(tmp_path, [])
    wandb.log(ROWS[0])
    wandb.finish({}, 0)
    assert fake.console == ""


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
    assert (run.run_id, run.run_group, run.display_name, run.project) == ("abcd1234", "a study", home.name, "a project")
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
    log_table(OwnRun(CONFIG, "offline", group="a study", beside=home), columns=["a"], rows=[["1"]], folder=home)
    (log,) = (home / "wandb").glob("offline-run-*/run-*.wandb")
    assert "exported" not in log.name


HEADS = {f"attention/{layer}/{head}/entropy": layer + head / 4 for layer in range(2) for head in range(4)}
SECRET = "the host, which is nobody's business"


def run_in(folder: Path, *overrides: str) -> Config:
    """A finished run's files, with one intact checkpoint that is evaluated."""
    config = compose(["trainer=debug", "study=a-study", "tracking.wandb.mode=offline", *overrides])
    provenance = {"wandb_id": "abcd1234", "git_commit": "c0ffee", "versions": {"jax": "1"}, "data_sha256": "d" * 64}
    (folder / run_folder.CONFIG).write_text(save(config))
    (folder / run_folder.PROVENANCE).write_text(json.dumps(provenance | {"host": SECRET}))
    run_folder.write_summary(folder, {"status": "done", "val_loss": 5.0, "tokens_per_second": 4391.0})
    tokens = config.trainer.batch_size * config.backend.context_length
    rows = [{"step": step, "tokens": step * tokens, "train_loss": 6.0 - step, **HEADS} for step in (1, 2)]
    (folder / run_folder.METRICS).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / run_folder.LOG).write_text("step 1\nstep 2\n")
    (folder / run_folder.ARTIFACTS).mkdir()
    (folder / run_folder.ARTIFACTS / run_folder.SAMPLE).write_text("def <main>:\n")
    Image.new("RGB", (4, 4)).save(folder / run_folder.ARTIFACTS / run_folder.ATTENTION_MAPS)
    for step, val_loss in ((1, 5.0), (2, 5.5)):
        checkpoint = folder / run_folder.CHECKPOINTS / str(step)
        for part in ("params", "training"):
            (checkpoint / part).mkdir(parents=True)
            (checkpoint / part / "array").write_text(f"{part} of {step}")
        manifest = json.dumps({"step": step, "val_loss": val_loss}).encode()
        (checkpoint / "manifest.json").write_bytes(manifest)
        (checkpoint / "manifest.sha256").write_text(hashlib.sha256(manifest).hexdigest())
    return config


def told_to_wandb(log: Path) -> dict[str, Any]:
    """What an offline run has, but for the clock and file names."""
    found = written_by(log)
    (run,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    artifacts = [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    history = [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
            if item.nested_key[-1:] not in (["path"], ["_timestamp"], ["_runtime"])
        }
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    return {
        "labels": (run.project, run.run_group, run.job_type, run.notes, list(run.tags)),
        "config": {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"},
        "panels": [
            (metric.name or metric.glob_name, metric.step_metric, metric.options.hidden)
            for metric in (record.metric for record in found if record.WhichOneof("record_type") == "metric")
        ],
        "history": history,
        "log": [record.output_logger.line for record in found if record.WhichOneof("record_type") == "output_logger"],
        "artifacts": [(item.type, item.name, list(item.aliases), item.digest) for item in artifacts],
        "files": [sorted(file.path for file in item.manifest.contents) for item in artifacts],
        "summary": {key: value for key, value in summary_of(found).items() if key in ("status", "val_loss")},
    }


@pytest.mark.slow
def test_all_that_wandb_gets_of_a_run_live_and_rebuilt(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every key of ``tracking.wandb``; by the installed wandb itself, offline."""
    monkeypatch.setenv("WANDB_ARTIFACT_DIR", str(home / "artifacts"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(home / "data"))
    monkeypatch.setenv("WANDB_NOTES", "exported")
    folder = home / "a run"
    folder.mkdir()
    keys = ("tags=[one,two]", "job_type=train", "console=true", "artifacts=[checkpoint]")
    config = run_in(folder, *(f"tracking.wandb.{key}" for key in keys))
    origin = json.loads((folder / run_folder.PROVENANCE).read_text())
    said = list[str]()
    live = mirror_of(config, folder, origin, say=said.append)
    send_rows(live, config, folder)
    end_mirror(live, config, json.loads((folder / run_folder.SUMMARY).read_text()), 0)
    assert live.failure is None, said
    (first,) = (folder / "wandb").glob("offline-run-*/run-abcd1234.wandb")
    found = told_to_wandb(first)

    assert found["labels"] == ("xattn", "a-study", "train", "exported", ["one", "two"])
    assert found["config"]["seed"] == 0
    assert found["config"]["provenance"] == {key: origin[key] for key in ("git_commit", "versions", "data_sha256")}
    assert SECRET.encode() not in first.read_bytes()
    panels = {name: (axis, hidden) for name, axis, hidden in found["panels"]}
    assert panels["train_loss"] == panels["val_loss"] == ("tokens", False)
    assert panels["attention/*"] == ("", True)  # none for each head; one for all, of each statistic
    rows = [json.loads(line) for line in (folder / run_folder.METRICS).read_text().splitlines()]
    for row, sent in zip(rows, found["history"], strict=False):
        assert {key: sent[key] for key in row if key != "step"} | {"step": sent["_step"]} == row
        assert sent["heads/entropy/_type"] == "histogram"
        assert sum(sent["heads/entropy/values"]) == len(HEADS)
    last = found["history"][-1]
    assert (last["sample/_type"], last["attention_maps/_type"]) == ("html-file", "image-file")
    assert last["tokens"] == rows[-1]["tokens"]
    (page,) = first.parent.glob("files/media/html/*.html")
    assert "def &lt;main&gt;:" in page.read_text()
    assert "".join(found["log"]) == (folder / run_folder.LOG).read_text()
    ((kind, name, aliases, _),) = found["artifacts"]
    assert (kind, name, set(aliases)) == ("model", "model-abcd1234", {"best", "latest"})
    checkpoint = [f"checkpoints/1/{name}" for name in ("manifest.json", "manifest.sha256", "params/array")]
    assert found["files"] == [[*checkpoint, run_folder.CONFIG, run_folder.PROVENANCE, run_folder.SUMMARY]]
    assert found["summary"] == {"status": "done", "val_loss": 5.0}

    monkeypatch.delenv("WANDB_NOTES")
    real.teardown()
    time.sleep(1.1)  # wandb names its folders by the second
    sync(folder)
    (second,) = set((folder / "wandb").glob("offline-run-*/run-abcd1234.wandb")) - {first}
    assert told_to_wandb(second) == found


@pytest.mark.parametrize("status", ["done", "running", "preempted", "pruned", "failed"])
def test_only_a_run_that_has_ended_sends_its_sample(
    status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Any other goes on, and wandb would refuse the next row: its steps have to ascend."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / run_folder.ARTIFACTS).mkdir()
    (tmp_path / run_folder.ARTIFACTS / run_folder.SAMPLE).write_text("text")
    wandb = mirror(tmp_path, [])
    wandb.log(ROWS[0])
    wandb.finish({"status": status}, 0)
    assert [set(row) for step, row in fake.rows if step is None] == ([{"sample", "tokens"}] if status == "done" else [])


@pytest.mark.parametrize("kept", [True, False])
def test_a_checkpoint_that_is_gone_ends_no_mirror(
    kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_in(tmp_path, "tracking.wandb.artifacts=[checkpoint]")
    if not kept:
        shutil.rmtree(tmp_path / run_folder.CHECKPOINTS)
    sync(tmp_path)
    assert len(fake.artifacts) == kept
    assert ("no evaluated checkpoint is left" in capsys.readouterr().out) != kept


# ---- a study's report ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "options"), [(["artifacts=[report]"], []), ([], ["--wandb", "--json"])])
def test_a_report_is_an_artifact_where_a_key_or_the_command_asks(
    overrides: list[str],
    options: list[str],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(home / "data"))
    folder = home / "a-study" / "a-run"
    folder.mkdir(parents=True)
    run_in(folder, *(f"tracking.wandb.{key}" for key in overrides))
    assert xattn(["report", "a-study", *options]) == 0
    out, err = capsys.readouterr()
    assert "wandb: logged as an artifact (offline)" in (err if options else out)
    if options:
        json.loads(out)
    (log,) = (home / "a-study" / "report" / "wandb").glob("offline-run-*/run-*.wandb")
    found = told_to_wandb(log)
    assert found["labels"][:3] == ("xattn", "a-study", "report")
    assert [artifact[:2] for artifact in found["artifacts"]] == [("report", "report-a-study")]
    assert {"report.html", "report.md", "verdict.json"} <= set(found["files"][0])


def test_a_report_stays_here_unless_that_is_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or where the runs' own wandb is disabled, which only the command line is told of."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    folder = home / "a-study" / "a-run"
    folder.mkdir(parents=True)
    run_in(folder)
    assert xattn(["report", "a-study"]) == 0
    config = compose(["tracking.wandb.mode=disabled", "tracking.wandb.artifacts=[report]"])
    (folder / run_folder.CONFIG).write_text(save(config))
    assert xattn(["report", "a-study"]) == 0
    assert xattn(["report", "a-study", "--wandb"]) == 2


# ---- xattn sync ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["", "init", "finish"])
def test_sync_sends_every_whole_row_and_says_where_it_failed(
    fails: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However long wandb takes."""
    fake = FakeWandb(fails, init=lambda: time.sleep(0.3))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(adapter, "_FINISH_SECONDS", 0.01)
    config = compose(["tracking.wandb.mode=offline"])
    (tmp_path / run_folder.CONFIG).write_text(save(config))
    (tmp_path / run_folder.PROVENANCE).write_text('{"wandb_id": "abcd1234"}')
    (tmp_path / run_folder.SUMMARY).write_text('{"status": "running", "tokens_per_second": 4391.0}')
    row = {"step": 1, "train_loss": 5.5, "tokens_per_second": 4874.0}
    (tmp_path / run_folder.METRICS).write_text(json.dumps(row) + '\n{"step": 2, "tr')
    if fails:
        with pytest.raises(XattnError, match=f"not synced: RuntimeError: {fails} broke"):
            sync(tmp_path)
        return
    sync(tmp_path)
    tokens = config.trainer.batch_size * config.backend.context_length  # a row of before rows had them
    assert fake.rows == [(1, {"tokens": tokens, "train_loss": 5.5, "tokens_per_second": 4874.0})]
    assert fake.summary == {"tokens": tokens, "status": "running", "train_loss": 5.5, "tokens_per_second": 4391.0}
