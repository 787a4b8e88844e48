"""A requested run, before anything of it is on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from xattn.config import Config
from xattn.tracking.tracker import Row, Tracker


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to make."""

    config: Config
    folder: Path
    overrides: tuple[str, ...] = ()
    """What the user typed."""
    watch: tuple[Tracker, ...] = ()
    """Trackers besides the run's own."""
    prune: Callable[[Row], bool] | None = None
    """Called with each evaluation's row except the last; True ends the run."""
    answerable: bool = True
    """Whether a finished run of the same training may stand in for it."""
