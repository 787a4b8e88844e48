"""Weights & Biases, as a mirror: whatever happens to it, training and metrics.jsonl do not care.

Everything that touches wandb happens in one thread of its own, so that neither a slow import nor a network that hangs
holds up a step.
"""

from __future__ import annotations

import netrc
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from xattn.errors import BadInput, XattnError
from xattn.run_folder import write_atomically
from xattn.tracking.config import WandbConfig
from xattn.tracking.tracker import Row

HIGH_WATER_MARK = "last_step_sent"
_INIT_SECONDS = 30  # wandb's own patience with its service and the network
_FINISH_SECONDS = 60  # ours, at the end of a run


def resolve_mode(config: WandbConfig) -> Literal["online", "offline", "disabled"]:
    """What ``auto`` means here: wandb's own WANDB_MODE if set, else online where an API key is configured.

    Raises :class:`BadInput` for ``online`` without a key, for which wandb would prompt.
    """
    if config.mode == "online" and not _has_api_key():
        raise BadInput("tracking.wandb.mode = 'online': no API key is configured; `wandb login` first, or use offline")
    if config.mode != "auto":
        return config.mode
    asked = os.environ.get("WANDB_MODE")
    if asked in ("online", "offline", "disabled"):
        return asked  # type: ignore[return-value]  # one of the three, as just seen
    return "online" if _has_api_key() else "offline"


def _has_api_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC") or os.path.expanduser("~/.netrc")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


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
        mode: Literal["online", "offline"],
        run_id: str,
        name: str,
        group: str,
        values: Mapping[str, Any],
        folder: Path,
        say: Callable[[str], None],
        from_the_start: bool = False,
    ):
        self._say = say
        self.failure: str | None = None
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._init: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "mode": mode,
            "id": run_id,
            "name": name,
            "group": group,
            "config": dict(values),
            "dir": str(folder),
            "resume": "allow" if mode == "online" and not from_the_start else None,
        }
        self._mark = folder / "wandb" / HIGH_WATER_MARK
        if from_the_start:
            self._mark.unlink(missing_ok=True)
        self._summary: dict[str, Any] = {}
        self._exit_code = 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        if mode == "offline":
            where = os.path.relpath(folder / "wandb")
            say(f"wandb       offline; look: wandb leet {where}/latest-run  sync: wandb sync {where}/offline-run-*")

    def log(self, row: Row) -> None:
        self._rows.put(row)

    def finish(self, summary: Mapping[str, Any], exit_code: int, *, for_ever: bool = False) -> None:
        """Sends what summary.json says, and waits for wandb, but not for ever unless that is asked for."""
        self._summary, self._exit_code = dict(summary), exit_code
        self._rows.put(None)
        self._thread.join(None if for_ever else _FINISH_SECONDS)
        if self._thread.is_alive():
            self._say(f"wandb: not finished after {_FINISH_SECONDS} s; the run folder has everything without it")

    def _work(self) -> None:
        try:
            self._mirror()
        except Exception as error:  # the rim: any failure of wandb's ends the mirror and nothing else
            self.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self._say(f"wandb: {self.failure}; mirror off")

    def _mirror(self) -> None:
        # Its import and start are seconds of the interpreter, in which the run's first step would have to wait.
        row = self._rows.get()
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", init_timeout=_INIT_SECONDS, disable_git=True, x_disable_stats=True
        )
        self._mark.parent.mkdir(exist_ok=True)
        mark = int(self._mark.read_text()) if self._mark.exists() else 0
        run = wandb.init(settings=settings, reinit="create_new", **self._init)
        while row is not None:
            if row["step"] > mark:
                write_atomically(self._mark, str(row["step"]))
                run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])
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
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=_INIT_SECONDS, disable_git=True, x_disable_stats=True
    )
    try:
        run = wandb.init(
            settings=settings,
            reinit="create_new",
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
