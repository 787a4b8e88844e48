"""``xattn report``, and its folder as an artifact of wandb's where that is asked for.

:mod:`xattn.report` itself knows no wandb. Importing this module imports neither wandb nor Hydra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xattn.errors import BadInput
from xattn.report.command import main as report
from xattn.report.read import Study
from xattn.runs import run_folder

KEY = "tracking.wandb.artifacts"


def main(argv: Sequence[str]) -> int:
    """Writes the report of a study; with ``--wandb``, or where a run's config has the key, wandb gets it too."""
    return report(argv, publish=publish)


def publish(study: Study, folder: Path, *, asked: bool) -> str | None:
    """Uploads the report in ``folder`` as an artifact; what to tell of it, None where nothing asks for the upload.

    asked: on the command line. Raises :class:`BadInput` where that is so and wandb is disabled, :class:`XattnError`
    where wandb fails.
    """
    wanting = [run for run in study.runs if "report" in (run.config.get(KEY) or ())]
    if not (asked or wanting):
        return None
    import xattn.config
    from xattn.tracking.own_runs import log_report
    from xattn.tracking.wandb import resolve_mode

    run = (wanting or study.runs)[0].folder.absolute()
    config = xattn.config.load(run / run_folder.CONFIG)
    mode = resolve_mode(config.tracking.wandb)
    if mode == "disabled":
        if not asked:
            return None
        raise BadInput(f"--wandb: disabled by tracking.wandb.mode of {run}, WANDB_MODE or wandb's settings file")
    url = log_report(config.tracking.wandb, mode=mode, group=config.study, folder=folder.absolute(), beside=run)
    return f"wandb: logged as an artifact ({url or mode})"
