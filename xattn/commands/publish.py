"""``xattn report``, and the upload of its folder as a wandb artifact on request.

:mod:`xattn.report` itself knows nothing of wandb. Importing this module imports neither wandb nor Hydra.
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
    """Write the report of a study; upload it with ``--wandb``, or if a run's config has the key."""
    return report(argv, publish=publish)


def publish(study: Study, folder: Path, asked: bool) -> str | None:
    """Upload the report in ``folder`` as an artifact and return a line about it; None if nothing asks for the upload.

    asked: whether the command line asks. Raises :class:`BadInput` if it does and wandb is disabled, and
    :class:`XattnError` if wandb fails.
    """
    wanting = [run for run in study.runs if "report" in (run.config.get(KEY) or ())]
    if not (asked or wanting):
        return None
    import xattn.config
    from xattn.tracking.own_runs import OwnRun, log_report
    from xattn.tracking.wandb import resolve_mode

    run = (wanting or study.runs)[0].folder.absolute()
    config = xattn.config.load(run / run_folder.CONFIG)
    mode = resolve_mode(config.tracking.wandb)
    if mode == "disabled":
        if not asked:
            return None
        raise BadInput(f"--wandb: disabled by tracking.wandb.mode of {run}, WANDB_MODE or wandb's settings file")
    own = OwnRun(config.tracking.wandb, mode, group=config.study, beside=run)
    url = log_report(own, folder.absolute())
    return f"wandb: logged as an artifact ({url or mode})"
