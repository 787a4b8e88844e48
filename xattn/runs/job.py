"""What is asked for: a run, before there is anything of it on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from xattn.config import Config
from xattn.tracking.tracker import Row, Tracker


def prunes_nothing(row: Row) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to make: its validated config, its folder, and what the person typed for it.

    watch: trackers besides the run's own. prune: given each evaluation's row but the last; True ends the run.
    answerable: whether a finished run of the same training may stand in for it.
    """

    config: Config
    folder: Path
    overrides: tuple[str, ...] = ()
    watch: tuple[Tracker, ...] = ()
    prune: Callable[[Row], bool] = prunes_nothing
    answerable: bool = True
