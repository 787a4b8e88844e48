"""Separate wandb runs, beside the mirrors of runs: a table of runs, a study's report."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from xattn.errors import XattnError
from xattn.tracking.config import WandbConfig
from xattn.tracking.wandb import destination, import_wandb, settings_of


@dataclass(frozen=True)
class OwnRun:
    """A separate wandb run, which goes where the mirror of one of the user's runs goes."""

    config: WandbConfig
    mode: Literal["online", "offline"]
    group: str
    beside: Path
    """The user's run."""


def log_table(own: OwnRun, columns: Sequence[str], rows: Sequence[Sequence[str]], folder: Path) -> str | None:
    """Log one table, ``comparison``, as a separate wandb run with its files below ``folder``. Return its URL if online.

    Raises :class:`XattnError` if wandb fails, because here wandb is what the user asked for and not a mirror.
    """
    with _logging(own, "compare", folder) as (wandb, run):
        run.log({"comparison": wandb.Table(columns=list(columns), data=[list(row) for row in rows])})
    return run.url if own.mode == "online" else None


def log_report(own: OwnRun, folder: Path) -> str | None:
    """Log the files of a report's folder as an artifact of a separate wandb run; otherwise like :func:`log_table`."""
    with _logging(own, "report", folder) as (wandb, run):
        artifact = wandb.Artifact(f"report-{own.group}", type="report")
        for file in sorted(folder.iterdir()):
            if file.is_file():
                artifact.add_file(str(file), name=file.name)
        run.log_artifact(artifact)
    return run.url if own.mode == "online" else None


@contextlib.contextmanager
def _logging(own: OwnRun, name: str, folder: Path) -> Iterator[tuple[ModuleType, Any]]:
    wandb = import_wandb()
    try:
        where = destination(own.config, own.beside)
        run = wandb.init(
            settings=settings_of(wandb),
            reinit="create_new",
            id=secrets.token_hex(4),
            project=where["project"],
            entity=where["entity"],
            mode=own.mode,
            name=name,
            job_type=name,
            group=own.group,
            dir=str(folder),
        )
        yield wandb, run
        run.finish()
    except wandb.Error as error:
        raise XattnError(f"wandb: {error}") from error
