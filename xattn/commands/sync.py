"""``xattn sync RUN…``: restore what wandb lost from the run folder, which has everything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import xattn.config
from xattn.errors import BadInput, ExitCode, XattnError
from xattn.runs import run_folder
from xattn.runs.mirror import end_mirror, mirror_of, send_rows
from xattn.runs.run_folder import RunFolder
from xattn.system.arguments import Parser
from xattn.tracking.wandb import resolve_mode


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="xattn sync", description="Rebuild wandb's runs from their metrics.jsonl.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    for path in parser.parse_args(argv).runs:
        sync(path)
    return ExitCode.DONE


def sync(path: Path) -> None:
    """Send every whole row and the summary again, under the run's own wandb id, however long that takes.

    Raises :class:`BadInput` if ``path`` is not a run that has finished or stopped, :class:`FolderInUse` if it is
    running, and :class:`XattnError` if wandb fails.
    """
    if not (path / run_folder.CONFIG).is_file():
        raise BadInput(f"{path}: not a run folder: it has no {run_folder.CONFIG}")
    config = xattn.config.load(path / run_folder.CONFIG)
    folder = RunFolder(path)
    try:
        origin, summary = run_folder.read_provenance(path), run_folder.read_summary(path)
        if origin is None or summary is None:
            raise BadInput(f"{path}: this run has not begun")
        if resolve_mode(config.tracking.wandb) == "disabled":
            raise BadInput(f"{path}: disabled by tracking.wandb.mode of this run, WANDB_MODE or wandb's settings file")
        mirror = mirror_of(config, folder.path, origin, say=print, from_the_start=True)
        send_rows(mirror, config, folder.path)
        end_mirror(mirror, config, summary, 0 if summary["status"] == "done" else 1, for_ever=True)
        if mirror.failure is not None:
            raise XattnError(f"{path}: not synced: {mirror.failure}")
    finally:
        folder.release()
