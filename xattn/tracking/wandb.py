"""Weights & Biases as a mirror: training and metrics.jsonl do not depend on it.

One separate thread does everything that touches wandb, so neither a slow import nor a hanging network delays a step.
"""

from __future__ import annotations

import html
import json
import os
import queue
import secrets
import shlex
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import ValidationError

from xattn.errors import BadInput
from xattn.runs import run_folder
from xattn.runs.run_folder import shown, to_json, write_atomically
from xattn.tracking.config import WandbConfig
from xattn.tracking.tracker import Row

HIGH_WATER_MARK, LOG_MARK = "last_step_sent", "log_bytes_sent"
DESTINATION = "destination.json"
_INIT_SECONDS = 30  # wandb's own timeout for its service and the network
_FINISH_SECONDS = 60  # our timeout at the end of a run
# A shell may still export these for another run; wandb would apply them to every run started from that shell.
_OF_ONE_RUN = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM")
_ONLINE = ("online", "run", "shared")  # the values of WANDB_MODE that mean online
# Keys of WandbConfig that may be null → the setting from wandb's environment or files that then applies.
_SETTINGS = {
    "project": "project",
    "entity": "entity",
    "tags": "run_tags",
    "notes": "run_notes",
    "job_type": "run_job_type",
}
_PROJECT = "xattn"
# Plotted against tokens; wandb's own steps can be chosen in each panel. Numbers of single heads get no panel.
_AGAINST_TOKENS = ("train_loss", "val_loss", "val_bpb", "probe/*", "heads/*")
_ATTENTION = "attention/"
_FINAL = ("done", "diverged")  # a run in one of these states has its last samples and pictures, and gets no more rows


def run_id() -> str:
    """Return the id that wandb's agent hands out for the run it starts; a new one otherwise."""
    handed_out = os.environ.get("WANDB_RUN_ID") if _is_agents() else None
    return handed_out or secrets.token_hex(4)


def _is_agents() -> bool:
    """Return whether ``wandb agent`` or ``wandb launch-agent`` started this process, for one run."""
    return bool(os.environ.get("WANDB_SWEEP_ID")) or os.environ.get("WANDB_LAUNCH", "").lower() in ("true", "1")


def refuse_without_key(config: WandbConfig) -> None:
    """Raise :class:`BadInput` if online is asked for, here or by WANDB_MODE, and wandb would prompt for a key.

    Nothing else can be refused before a run starts, so only this check waits for wandb's import.
    """
    if config.mode == "online" or (config.mode == "auto" and os.environ.get("WANDB_MODE") in _ONLINE):
        resolve_mode(config)


def resolve_mode(config: WandbConfig) -> Literal["online", "offline", "disabled"]:
    """Return the mode of wandb. ``auto`` follows the installed wandb, but is offline without an API key.

    Imports wandb for ``auto`` and ``online``; uses no network. Raises :class:`BadInput` for online without a key, and
    if wandb refuses its own settings.
    """
    if config.mode in ("offline", "disabled"):
        return config.mode
    wandb = import_wandb()
    try:
        if config.mode == "auto" and (own := _own_mode()) != "online":
            return own
        if _has_key():
            return "online"
    except (ValueError, wandb.Error) as error:
        raise BadInput(f"tracking.wandb.mode = {config.mode!r}: wandb refuses its settings: {_line(error)}") from error
    if config.mode == "auto" and os.environ.get("WANDB_MODE") not in _ONLINE:
        return "offline"
    asked = "tracking.wandb.mode = 'online'" if config.mode == "online" else f"WANDB_MODE={os.environ['WANDB_MODE']}"
    raise BadInput(f"{asked}: no API key is configured; run `wandb login` first, or use offline")


def _own_settings() -> Any:
    """Return the settings from wandb's environment and files."""
    from wandb.sdk import wandb_setup

    return wandb_setup.singleton().settings


def _own_mode() -> Literal["online", "offline", "disabled"]:
    """Return the mode that wandb's environment and settings files ask for."""
    settings = _own_settings()
    return "disabled" if settings._noop else "offline" if settings._offline else "online"


def _has_key() -> bool:
    """Return whether wandb finds credentials for its server in the environment, settings, netrc or an earlier login."""
    from wandb.sdk.lib import wbauth

    settings = _own_settings()
    host = settings.base_url
    if settings.api_key:
        wbauth.AuthApiKey(host=host, api_key=settings.api_key)  # raises as wandb.init would for a malformed key
    given = settings.api_key or settings.identity_token_file or wbauth.session_credentials(host=host)
    return bool(given or wbauth.read_netrc_auth(host=host))


def import_wandb() -> ModuleType:
    """Import wandb without what was exported for another run; wandb reads its environment once."""
    for name in _OF_ONE_RUN[_is_agents() :]:  # the id is the agent's
        os.environ.pop(name, None)
    import wandb

    return wandb


def settings_of(wandb: ModuleType, *, system_metrics: bool = False) -> Any:
    return wandb.Settings(
        silent=True, console="off", init_timeout=_INIT_SECONDS, disable_git=True, x_disable_stats=not system_metrics
    )


def destination(config: WandbConfig, folder: Path) -> dict[str, Any]:
    """Return project, entity, tags, notes and job type of the run in ``folder``.

    A null key takes wandb's own setting, or else the value from when the run was last mirrored. So a run that is
    resumed or rebuilt from another shell goes to the same place.
    """
    settings = _own_settings()
    file = folder / "wandb" / DESTINATION
    before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    found = {}
    for key, name in _SETTINGS.items():
        value = getattr(config, key)
        found[key] = value if value is not None else getattr(settings, name) or before.get(key)
    return found | {"project": found["project"] or _PROJECT}


def _line(error: Exception) -> str:
    """Return the error in one line. For a refused setting it omits the value, which may be the key."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class WandbMirror:
    """A wandb run with the same metrics, sent by a thread that takes rows from a queue.

    A high-water mark in the run folder's ``wandb/`` remembers the last step that was sent, so a resumed run sends no
    step twice. It is written before the row is sent: a kill in between loses a row in wandb and never repeats one. The
    lines of log.txt have their own mark.

    run: its id, group and config as ``wandb.init`` takes them; its name in wandb is that of its folder.
    from_the_start: forget these marks and send everything. say: called with where the run is, or how to view an offline
    one, and with what failed. failure: what failed, or None; after a failure, rows are dropped.
    """

    def __init__(
        self,
        config: WandbConfig,
        folder: Path,
        run: Mapping[str, Any],
        *,
        say: Callable[[str], None],
        from_the_start: bool = False,
    ):
        self._config, self.folder, self.say, self._from_the_start = config, folder, say, from_the_start
        self.failure: str | None = None
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._init: dict[str, Any] = {"name": folder.name, "dir": str(folder), **run}
        self._own = folder / "wandb"
        if from_the_start:
            for mark in (HIGH_WATER_MARK, LOG_MARK):
                (self._own / mark).unlink(missing_ok=True)
        self._summary: dict[str, Any] = {}
        self._exit_code = 0
        self._model: Mapping[str, Path] = {}
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        if self._thread.is_alive():
            self._rows.put(row)

    def finish(
        self,
        summary: Mapping[str, Any],
        exit_code: int,
        *,
        model: Mapping[str, Path] | None = None,
        for_ever: bool = False,
    ) -> None:
        """Send summary.json's values, the sample and pictures if the run has ended, and the files of ``model`` as an
        artifact. Waits for wandb, with a time limit unless ``for_ever``."""
        self._summary, self._exit_code, self._model = json.loads(to_json(summary)), exit_code, model or {}
        self._rows.put(None)
        self._thread.join(None if for_ever else _FINISH_SECONDS)
        if self._thread.is_alive():
            self.say(f"wandb: not finished after {_FINISH_SECONDS} s; the run folder has everything anyway")

    def _work(self) -> None:
        try:
            self._mirror()
        except Exception as error:  # the boundary: a failure in wandb ends the mirror and nothing else
            self.failure = f"{type(error).__name__}: {_line(error)}"
            self.say(f"wandb: {self.failure}; mirror off")

    def _mirror(self) -> None:
        # Wait for a row: importing and starting wandb holds the interpreter for seconds and would delay the first step.
        row = self._rows.get()
        mode = resolve_mode(self._config)
        if mode == "disabled":
            return
        if mode == "offline":
            command = shlex.join(["xattn", "wandb", shown(self.folder)])
            self.say(f"wandb       offline; for the commands that show it and send it: `{command}`")
        wandb = import_wandb()
        run = self._begun(wandb, mode)
        mark, tokens = self._own / HIGH_WATER_MARK, 0
        sent = _number_in(mark)
        while row is not None:
            if row["step"] > sent:
                write_atomically(mark, str(row["step"]))
                values = {key: value for key, value in row.items() if key != "step"} | _histograms(wandb, row)
                # Commit immediately: otherwise wandb holds a row back, and its values arrive after the summary's.
                run.log(values, step=row["step"], commit=True)
            tokens = row["tokens"]
            self._send_log(run)
            row = self._rows.get()
        if self._summary.get("status") in _FINAL and (media := _media(wandb, self.folder)):
            run.log(media | {"tokens": tokens}, commit=True)
        self._send_log(run)
        self._send_model(wandb, run)
        run.summary.update(self._summary)
        run.finish(exit_code=self._exit_code)

    def _begun(self, wandb: ModuleType, mode: str) -> Any:
        """Start wandb's run and define which metrics it plots by itself, and against what."""
        self._own.mkdir(exist_ok=True)
        where = destination(self._config, self.folder)
        run = wandb.init(
            settings=settings_of(wandb, system_metrics=self._config.system_metrics),
            reinit="create_new",
            mode=mode,
            resume="allow" if mode == "online" and not self._from_the_start else None,
            **self._init,
            **where,
        )
        if mode == "online":
            self.say(f"wandb       {run.url}")
            where["entity"] = run.entity
        write_atomically(self._own / DESTINATION, json.dumps(where))
        run.define_metric("tokens", hidden=True)
        for name in _AGAINST_TOKENS:
            run.define_metric(name, step_metric="tokens")
        run.define_metric(f"{_ATTENTION}*", hidden=True)
        return run

    def _send_log(self, run: Any) -> None:
        """Send the complete lines of log.txt since the last call, if ``tracking.wandb.console`` asks for them."""
        log, mark = self.folder / run_folder.LOG, self._own / LOG_MARK
        if not self._config.console or not log.is_file():
            return
        sent = _number_in(mark)
        with log.open("rb") as file:
            file.seek(sent)
            text, end, _ = file.read().rpartition(b"\n")
        if end:
            write_atomically(mark, str(sent + len(text + end)))
            run.write_logs((text + end).decode("utf-8", "replace"))

    def _send_model(self, wandb: ModuleType, run: Any) -> None:
        if self._model:
            artifact = wandb.Artifact(f"model-{self._init['id']}", type="model")
            for name, file in self._model.items():
                artifact.add_file(str(file), name=name)
            run.log_artifact(artifact, aliases=["best"])


def _number_in(mark: Path) -> int:
    return int(mark.read_text()) if mark.exists() else 0


def _histograms(wandb: ModuleType, row: Row) -> dict[str, Any]:
    """Return ``heads/<statistic>`` → a histogram over all heads: one panel instead of one per head."""
    found: dict[str, list[float]] = {}
    for key, value in row.items():
        if key.startswith(_ATTENTION) and value is not None:
            found.setdefault(f"heads/{key.rpartition('/')[2]}", []).append(value)
    return {key: wandb.Histogram(values) for key, values in found.items()}


def _media(wandb: ModuleType, folder: Path) -> dict[str, Any]:
    """Return the sample and the attention maps from the run's artifacts, if it has them."""
    sample, maps = (folder / run_folder.ARTIFACTS / name for name in (run_folder.SAMPLE, run_folder.ATTENTION_MAPS))
    found = {}
    if sample.is_file():
        text = html.escape(sample.read_text("utf-8", "replace"))
        found["sample"] = wandb.Html(f'<pre style="white-space: pre-wrap">{text}</pre>', data_is_not_path=True)
    if maps.is_file():
        found["attention_maps"] = wandb.Image(str(maps))
    return found
