"""A run whose folder this process holds, and its records: provenance.json and summary.json.

Importing this module imports no jax: everything that can be checked without it is checked before it is loaded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xattn.config
from xattn import keys
from xattn.config import Config
from xattn.data.corpus import check
from xattn.data.run_data import RunData
from xattn.errors import BadInput, ExitCode, IntegrityError, XattnError
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.runs.mirror import end_mirror, mirror_of
from xattn.runs.provenance import changes, corpus, other_data, provenance
from xattn.runs.run_folder import RunFolder, shown
from xattn.system import hosts
from xattn.tracking.display import Display
from xattn.tracking.wandb import WandbMirror, refuse_without_key
from xattn.training.kept import keep_only
from xattn.training.llama import initial_weights

MAX_FAILURES_IN_A_ROW = 3


class Run:
    """One attempt at a run. It alone writes the run's config.yaml, provenance.json and summary.json.

    Attributes:
        before: the summary that the previous attempt left; empty at a first start.
        mirror: the run's mirror in wandb, once it is open.
        is_finished: whether a previous attempt has brought the run to its end.
        is_concluded: whether this attempt has concluded the run.
        code: the exit code; an error until the run has a better one.
    """

    def __init__(self, job: Job, folder: RunFolder, before: Mapping[str, Any], *, quiet: bool):
        self.job, self.config, self.folder, self.before = job, job.config, folder, before
        self.display = Display(folder / run_folder.LOG, job.config.trainer.steps, quiet=quiet)
        self.is_finished = before.get("status") in ("done", "diverged")
        self.is_concluded = False
        self.code = ExitCode[before["status"].upper()] if self.is_finished else ExitCode.ERROR
        self.summary: dict[str, Any] = {"step": 0, "committed_step": None} | dict(before) | {"status": "running"}
        self._supersedes = job.config.resume == "never" and folder.is_ours()  # moved aside once the new run is accepted
        self._has_begun = False
        self.mirror: WandbMirror | None = None
        self._start = time.perf_counter()

    # ---- before it begins

    def refuse(self) -> None:
        """Raise :class:`XattnError` if the run can be refused without loading jax."""
        failures = self.before.get("failures")
        if failures and failures["count"] >= MAX_FAILURES_IN_A_ROW and not changes(failures, provenance()):
            raise XattnError(
                f"{shown(self.folder.path)}: failed {failures['count']} times in a row at step {failures['step']} "
                f"with this same source; see its {run_folder.LOG}. Change the source, or start over with resume=never"
            )
        refuse_without_key(self.config.tracking.wandb)
        with self.as_recorded():
            check(self.config.data)
        if self.is_new:
            initial_weights(self.config)

    @property
    def is_new(self) -> bool:
        """Whether there is no checkpoint yet to continue from."""
        return self.summary["committed_step"] is None

    @contextlib.contextmanager
    def as_recorded(self) -> Iterator[None]:
        """Turn a refusal of the data into :class:`IntegrityError` if the run once began with other data."""
        try:
            yield
        except BadInput as error:
            if self._supersedes or run_folder.read_provenance(self.folder.path) is None:
                raise
            raise IntegrityError(f"the training data are not the ones that this run began with: {error}") from error

    # ---- from its beginning to its end

    def begin(self, data: RunData, devices: Mapping[str, Any], pack: list[str] | None) -> dict[str, Any]:
        """Make the folder a run's, or continue the run in it; return provenance.json.

        ``devices`` is recorded there. ``pack`` names the runs of the pack; it is None if the run trains alone.
        """
        if self._supersedes:
            status = (run_folder.read_summary(self.folder.path) or {"status": "not begun"})["status"]
            self.display.close()  # its log.txt moves too
            self.display.warn(f"moved the earlier run here ({status}) to {shown(self.folder.move_aside())}")
            self._supersedes = False
        if self.config.resume == "never" and hosts.team().is_first:
            move_older_aside(self.config, self.folder.path, self.display.warn)
        here = provenance() | {
            **devices,
            "data_sha256": data.sha256,
            "corpus": corpus(self.config.data, data.corpus_size),
            "training_identity": keys.training_identity(xattn.config.hashed_values(self.config)),
            "pack": pack,
        }
        before = run_folder.read_provenance(self.folder.path)
        origin = self._first_origin(here, data) if before is None else self._next_origin(before, here, data)
        if origin != before:
            run_folder.write_json(self.folder / run_folder.PROVENANCE, origin)
        self.write_summary()
        self._has_begun = True
        return origin

    def _first_origin(self, here: dict[str, Any], data: RunData) -> dict[str, Any]:
        """Write the run's first files. config.yaml comes first: it makes the folder a run's."""
        run_folder.write_atomically(self.folder / run_folder.CONFIG, xattn.config.save(self.config))
        run_folder.write_atomically(self.folder / run_folder.OVERRIDES, xattn.config.to_yaml([*self.job.overrides]))
        if data.tokenizer_json is not None:
            run_folder.write_atomically(self.folder / run_folder.TOKENIZER, data.tokenizer_json)
        return here

    def _next_origin(self, before: dict[str, Any], here: dict[str, Any], data: RunData) -> dict[str, Any]:
        if before["data_sha256"] != data.sha256:
            what = "the training data or their tokenizer are not the ones that this run began with"
            own, size = self.config.data, data.corpus_size
            problem = other_data(what, own, before, size=size, sha256=data.sha256, to="start")
            same = ", or use a text that is the same everywhere: data=text data.path=…"
            hint = same if "the run began with Python" in problem else ""
            raise IntegrityError(f"{problem}, or start over with resume=never{hint}")
        data.check_tokenizer(self.folder.path)
        if self.before.get("committed_step") is None:  # that pack has saved nothing yet
            before = before | {"pack": here["pack"]}
        if not (changed := changes(before, here)):
            return before
        self.display.warn(f"warning: changed since this run began: {', '.join(changed)}")
        again = {key: here[key] for key in (*changed, "started_at", "command")}
        return before | {"resumed_with": [*before.get("resumed_with", []), again]}

    def open_mirror(self, origin: Mapping[str, Any]) -> None:
        """Start the run's mirror in wandb, unless that is disabled."""
        if self.config.tracking.wandb.mode != "disabled":
            self.mirror = mirror_of(self.config, self.folder.path, origin, say=self.display.say)

    def write_summary(self, **values: Any) -> None:
        """Add these values to summary.json and write it."""
        self.summary |= values
        run_folder.write_summary(self.folder.path, self.summary)

    def committed(self, step: int) -> None:
        self.write_summary(step=step, committed_step=step)

    # ---- how it ends

    def conclude(self, code: ExitCode, results: Mapping[str, Any]) -> None:
        """Record how the run has ended, or where it was stopped."""
        self.summary.pop("failures", None)
        seconds = self.before.get("wall_seconds", 0.0) + time.perf_counter() - self._start
        self.write_summary(**results, wall_seconds=seconds)
        self.code, self.is_concluded = code, True
        self.display.say(f"run folder  {shown(self.folder.path)}")

    def note(self, text: str) -> None:
        """Write to log.txt, if that is possible."""
        with contextlib.suppress(OSError):  # the disk may be full
            self.display.note(text)

    def refused(self, error: XattnError) -> None:
        """Record an error that is shown to the user elsewhere."""
        if self.folder.is_ours():
            self.note(f"error: {error}")
        if self._has_begun and isinstance(error, BadInput):  # a step that does not fit in memory
            self.write_summary(status=self.before.get("status", "failed"))
        self.code = error.exit_code

    def failed(self, error: Exception) -> None:
        """Record a failure. Count those of the same source with no new step between, so that retries end."""
        before, step, here = self.before.get("failures"), self.summary["step"], provenance()
        again = before and before["step"] >= step and not changes(before, here)
        count = before["count"] + 1 if before and again else 1
        same = {key: here[key] for key in ("source_sha256", "versions", "registered") if key in here}
        self.summary |= {"status": "failed", "failures": {"count": count, "step": step} | same}
        if self.folder.is_ours() and not self._supersedes:  # else nothing has begun here
            self.write_summary()
        self.display.warn(f"{type(error).__name__}: {error}".splitlines()[0])
        self.display.warn(f"the traceback is in {shown(self.folder / run_folder.LOG)}")

    def finish_mirror(self) -> None:
        """End the run's mirror; this may wait for wandb."""
        if self.mirror is not None:
            end_mirror(self.mirror, self.config, self.summary, self.code)

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints that ``trainer.keep`` does not ask for, if the run has ended and says so itself."""
        if not self.is_concluded or self.summary["status"] not in ("done", "diverged"):
            return
        folder, keep = self.folder / run_folder.CHECKPOINTS, self.config.trainer.keep
        try:
            keep_only(folder, keep, why=f"trainer.keep={keep}")
        except OSError as error:  # the run is done anyway
            self.display.warn(f"warning: {folder}: could not delete everything: {error.strerror}")


def move_older_aside(config: Config, folder: Path, say: Callable[[str], None]) -> None:
    """For ``resume=never``: move aside the same run as an older version made and named it."""
    if (older := xattn.config.older_folder(config, folder)) is not None:
        held = RunFolder(older)
        say(f"moved the run made by an older version to {shown(held.move_aside())}")
        held.withdraw()
        held.release()
