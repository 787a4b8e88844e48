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
class Place:
    """Where a separate wandb run goes: to the same place as the mirror of one of the user's runs."""

    config: WandbConfig
    mode: Literal["online", "offline"]
    group: str
    beside: Path
    """The user's run."""


def log_table(place: Place, columns: Sequence[str], rows: Sequence[Sequence[str]], folder: Path) -> str | None:
    """Log one table, ``comparison``, as a separate wandb run with its files below ``folder``. Return its URL if online.

    Raises :class:`XattnError` if wandb fails, because here wandb is what the user asked for and not a mirror.
    """
    with _run_of_its_own(place, "compare", folder) as (wandb, run):
        run.log({"comparison": wandb.Table(columns=list(columns), data=[list(row) for row in rows])})
    return run.url if place.mode == "online" else None


def log_report(place: Place, folder: Path) -> str | None:
    """Log the files of a report's folder as an artifact of a separate wandb run; otherwise like :func:`log_table`."""
    with _run_of_its_own(place, "report", folder) as (wandb, run):
        artifact = wandb.Artifact(f"report-{place.group}", type="report")
        for file in sorted(folder.iterdir()):
            if file.is_file():
                artifact.add_file(str(file), name=file.name)
        run.log_artifact(artifact)
    return run.url if place.mode == "online" else None


@contextlib.contextmanager
def _run_of_its_own(place: Place, name: str, folder: Path) -> Iterator[tuple[ModuleType, Any]]:
    wandb = import_wandb()
    try:
        where = destination(place.config, place.beside)
        run = wandb.init(
            settings=settings_of(wandb),
            reinit="create_new",
            id=secrets.token_hex(4),
            project=where["project"],
            entity=where["entity"],
            mode=place.mode,
            name=name,
            job_type=name,
            group=place.group,
            dir=str(folder),
        )
        yield wandb, run
        run.finish()
    except wandb.Error as error:
        raise XattnError(f"wandb: {error}") from error
