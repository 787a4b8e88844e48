"""Weights & Biases, as a mirror: whatever happens to it, training and metrics.jsonl do not care.

Everything that touches wandb happens in one thread of its own, so that neither a slow import nor a network that hangs
holds up a step.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import ValidationError

from xattn.errors import BadInput, XattnError
from xattn.run_folder import shown, to_json, write_atomically
from xattn.tracking.config import WandbConfig
from xattn.tracking.tracker import Row

HIGH_WATER_MARK = "last_step_sent"
_INIT_SECONDS = 30  # wandb's own patience with its service and the network
_FINISH_SECONDS = 60  # ours, at the end of a run
# What a shell may still export for one run of its own; wandb would apply it to every run that is started from there.
_OF_ONE_RUN = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM")
_ONLINE = ("online", "run", "shared")  # WANDB_MODE's words for it


def run_id() -> str:
    """The id that wandb's agent hands out for the run that it starts; a new one in every other case."""
    handed_out = os.environ.get("WANDB_RUN_ID") if _is_agents() else None
    return handed_out or secrets.token_hex(4)


def _is_agents() -> bool:
    """Whether this process was started by ``wandb agent`` or ``wandb launch-agent``, for one run."""
    return bool(os.environ.get("WANDB_SWEEP_ID")) or os.environ.get("WANDB_LAUNCH", "").lower() in ("true", "1")


def refuse_without_key(config: WandbConfig) -> None:
    """Raises :class:`BadInput` where online is asked for, here or by WANDB_MODE, and wandb would prompt for a key.

    Nothing else can be refused before a run starts, so that only here wandb's import has to be waited for.
    """
    if config.mode == "online" or (config.mode == "auto" and os.environ.get("WANDB_MODE") in _ONLINE):
        resolve_mode(config)


def resolve_mode(config: WandbConfig) -> Literal["online", "offline", "disabled"]:
    """The mode of wandb. ``auto`` is what the installed wandb would do, but offline where it has no API key.

    Imports wandb for ``auto`` and ``online``; uses no network. Raises :class:`BadInput` for ``online`` without a key,
    and where wandb refuses its own settings.
    """
    if config.mode in ("offline", "disabled"):
        return config.mode
    wandb = _import()
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
    raise BadInput(f"{asked}: no API key is configured; `wandb login` first, or use offline")


def _own_mode() -> Literal["online", "offline", "disabled"]:
    """What wandb's environment and settings files say."""
    from wandb.sdk import wandb_setup

    settings = wandb_setup.singleton().settings
    return "disabled" if settings._noop else "offline" if settings._offline else "online"


def _has_key() -> bool:
    """Whether wandb finds credentials for its server: in the environment, settings files, netrc or an earlier login."""
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    settings = wandb_setup.singleton().settings
    host = settings.base_url
    if settings.api_key:
        wbauth.AuthApiKey(host=host, api_key=settings.api_key)  # raises where wandb.init would: not the form of a key
    given = settings.api_key or settings.identity_token_file or wbauth.session_credentials(host=host)
    return bool(given or wbauth.read_netrc_auth(host=host))


def _import() -> ModuleType:
    """wandb, which reads its environment once: without what was exported for another run."""
    for name in _OF_ONE_RUN[_is_agents() :]:  # the id is the agent's
        os.environ.pop(name, None)
    import wandb

    return wandb


def _settings(wandb: ModuleType) -> Any:
    return wandb.Settings(
        silent=True, console="off", init_timeout=_INIT_SECONDS, disable_git=True, x_disable_stats=True
    )


def _line(error: Exception) -> str:
    """The error in one line, which for a setting that is refused does not show the value: it may be the key."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class WandbMirror:
    """A wandb run with the same metrics, by a thread that takes rows from a queue.

    A high-water mark in the run folder's ``wandb/`` remembers the last step that was handed over, so that a resumed run
    sends no step twice; it is moved before the row is sent, so that a kill in between loses a row of wandb's and never
    repeats one.

    from_the_start: forget that mark, and send every row that comes.
    say: told, once, how to look at an offline run, or what failed; from then on rows are dropped.
    failure: what failed, None while nothing has.
    """

    def __init__(
        self,
        config: WandbConfig,
        *,
        run_id: str,
        name: str,
        group: str,
        values: Mapping[str, Any],
        folder: Path,
        say: Callable[[str], None],
        from_the_start: bool = False,
    ):
        self._config, self._folder, self._say, self._from_the_start = config, folder, say, from_the_start
        self.failure: str | None = None
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._init: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "id": run_id,
            "name": name,
            "group": group,
            "config": dict(values),
            "dir": str(folder),
        }
        self._mark = folder / "wandb" / HIGH_WATER_MARK
        if from_the_start:
            self._mark.unlink(missing_ok=True)
        self._summary: dict[str, Any] = {}
        self._exit_code = 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        if self._thread.is_alive():
            self._rows.put(row)

    def finish(self, summary: Mapping[str, Any], exit_code: int, *, for_ever: bool = False) -> None:
        """Sends what summary.json says, and waits for wandb, but not for ever unless that is asked for."""
        self._summary, self._exit_code = json.loads(to_json(summary)), exit_code
        self._rows.put(None)
        self._thread.join(None if for_ever else _FINISH_SECONDS)
        if self._thread.is_alive():
            self._say(f"wandb: not finished after {_FINISH_SECONDS} s; the run folder has everything without it")

    def _work(self) -> None:
        try:
            self._mirror()
        except Exception as error:  # the rim: any failure of wandb's ends the mirror and nothing else
            self.failure = f"{type(error).__name__}: {_line(error)}"
            self._say(f"wandb: {self.failure}; mirror off")

    def _mirror(self) -> None:
        # Its import and start are seconds of the interpreter, in which the run's first step would have to wait.
        row = self._rows.get()
        mode = resolve_mode(self._config)
        if mode == "disabled":
            return
        if mode == "offline":
            command = shlex.join(["xattn", "wandb", shown(self._folder)])
            self._say(f"wandb       offline; the commands to look at it and to send it: `{command}`")
        wandb = _import()
        self._mark.parent.mkdir(exist_ok=True)
        mark = int(self._mark.read_text()) if self._mark.exists() else 0
        resume = "allow" if mode == "online" and not self._from_the_start else None
        run = wandb.init(settings=_settings(wandb), reinit="create_new", mode=mode, resume=resume, **self._init)
        while row is not None:
            if row["step"] > mark:
                write_atomically(self._mark, str(row["step"]))
                values = {key: value for key, value in row.items() if key != "step"}
                # Committed at once: wandb keeps a row back otherwise, and its values would come after the summary's.
                run.log(values, step=row["step"], commit=True)
            row = self._rows.get()
        run.summary.update(self._summary)
        run.finish(exit_code=self._exit_code)


def log_table(
    config: WandbConfig,
    *,
    mode: Literal["online", "offline"],
    group: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    folder: Path,
) -> None:
    """Logs one table, ``comparison``, as a wandb run of its own whose files are below ``folder``.

    Raises :class:`XattnError` where wandb does: here it is what was asked for, and no mirror of anything.
    """
    wandb = _import()
    try:
        run = wandb.init(
            settings=_settings(wandb),
            reinit="create_new",
            id=secrets.token_hex(4),
            project=config.project,
            entity=config.entity,
            mode=mode,
            name="compare",
            job_type="compare",
            group=group,
            dir=str(folder),
        )
        run.log({"comparison": wandb.Table(columns=list(columns), data=[list(row) for row in rows])})
        run.finish()
    except wandb.Error as error:
        raise XattnError(f"wandb: {error}") from error
