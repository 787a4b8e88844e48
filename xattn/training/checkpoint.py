"""Checkpoints: the last and the best, by orbax, in the run folder's ``checkpoints/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from xattn.errors import BadInput
from xattn.training.programs import TrainState

Which = Literal["last", "best"]
_VAL_LOSS = "val_loss"


class Checkpoints:
    """``checkpoints/<step>/``, holding ``params`` (what a model is) and ``training`` (what a run needs besides).

    Of the saved steps the newest and the one with the lowest val_loss are kept. A save is asynchronous and atomic:
    it copies the arrays to the host before it returns, and a step exists once all of it is written.
    """

    def __init__(self, folder: Path):
        best = checkpoint_managers.BestN(
            get_metric_fn=_loss_of, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(1), best]),
                best_fn=_loss_of,
                best_mode="min",
            ),
        )

    def save(self, step: int, state: TrainState, val_loss: float | None) -> None:
        """val_loss: of these parameters, None where they were not evaluated or it is not finite."""
        training = {name: value for name, value in state._asdict().items() if name != "params"}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params), training=ocp.args.StandardSave(training)
            ),
            metrics=None if val_loss is None else {_VAL_LOSS: val_loss},
            force=True,
        )

    def restore_params(self, which: Which, shapes: Any) -> tuple[int, Any]:
        """The step and the parameters. shapes: the tree of jax.ShapeDtypeStruct that they have to fit."""
        step = self._manager.latest_step() if which == "last" else self._manager.best_step()
        if step is None:
            raise BadInput(f"{self._manager.directory}: holds no checkpoint")
        restored = self._manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(shapes)))
        return step, restored["params"]

    def close(self) -> None:
        """Waits for the saves under way."""
        self._manager.close()


def _loss_of(metrics: Any) -> float:
    return metrics[_VAL_LOSS]
