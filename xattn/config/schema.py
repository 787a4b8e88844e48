"""The root of the config, with a section for each group of conf/, and its composition by Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

from hydra import compose as hydra_compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from pydantic import Field, SerializeAsAny
from pydantic.fields import FieldInfo

from xattn.config.groups import check_folders, choices_in, search_path
from xattn.config.renamed import arguments_under_new_names, read_old_names
from xattn.data.batches import Batching
from xattn.data.config import DataConfig, data_kinds
from xattn.evaluation.config import EvaluationConfig
from xattn.model.config import BackendConfig, ModelConfig
from xattn.report.config import FindingConfig
from xattn.section import CONF, Section, kind_name
from xattn.sweep.config import SweepConfig
from xattn.tracking.config import TrackingConfig
from xattn.training.config import ParallelConfig, ScheduleConfig, TrainerConfig
from xattn.training.optimizers import Optimizer, optimizers

PathName = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Config(Section):
    """Everything that defines a run."""

    backend: BackendConfig
    model: ModelConfig
    data: SerializeAsAny[DataConfig]
    optimizer: SerializeAsAny[Optimizer]
    schedule: ScheduleConfig
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    tracking: TrackingConfig
    parallel: ParallelConfig
    sweep: SweepConfig
    finding: FindingConfig | None
    """The claim that the study is to test; null without one."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of initialisation, data order and dropout."""
    study: str = Field(pattern=PathName, max_length=100)
    """The set of runs that this one belongs to; a folder below ``outputs/``."""
    resume: Literal["auto", "never"]
    """``auto`` shows the result of a finished run and continues any other; ``never`` moves an earlier run aside and
    starts over.
    """

    @property
    def batching(self) -> Batching:
        """The numbers that :func:`xattn.data.run_data.load_data` needs beside the group ``data``."""
        return Batching(
            context_length=self.backend.context_length,
            batch_size=self.trainer.batch_size,
            sequences=self.evaluation.sequences,
            seed=self.seed,
        )


def config_type() -> type[Config]:
    """Return :class:`Config` with the current kinds of data and optimizers: a script may have registered some.

    The defaults of a registered kind become the values that Hydra sets for ``data=NAME`` or ``optimizer=NAME``.
    """
    if (now := _kinds()) == _KINDS:
        return Config
    for group, kinds in now.items():
        one_of: Any = reduce(or_, kinds)
        named: Any = Annotated[one_of, Field(discriminator="name")]
        Config.model_fields[group] = FieldInfo.from_annotation(named)
        for name, values in registered_choices(group).items():
            ConfigStore.instance().store(group=group, name=name, node={"name": name, **values})
    Config.model_rebuild(force=True)
    _KINDS.update(now)
    return Config


def _kinds() -> dict[str, tuple[type[Section], ...]]:
    return {"data": data_kinds(), "optimizer": tuple(optimizers().values())}


_KINDS: dict[str, tuple[type[Section], ...]] = {}  # those that :class:`Config` has now


def registered_choices(group: str) -> dict[str, dict[str, Any]]:
    """Return the choices of a group that a script registered, each with its keys and defaults (``???`` for none)."""
    found, files = {}, choices_in(group)
    for kind in _kinds().get(group, ()):
        if (name := kind_name(kind)) not in files:
            fields = {key: field for key, field in kind.model_fields.items() if key != "name"}
            found[name] = {key: "???" if field.is_required() else field.default for key, field in fields.items()}
    return found


def composed(arguments: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose overrides, with any ``--config-dir`` among them. Raises :data:`COMPOSITION_ERRORS`."""
    check_folders(arguments)
    config_type()
    read_old_names()
    arguments = arguments_under_new_names(arguments)
    overrides = [argument for argument in arguments if not argument.startswith("--config-dir=")]
    if not any(override.startswith("hydra.searchpath=") for override in overrides):
        overrides += search_path(arguments)
    if GlobalHydra().is_initialized():  # by train.py, with this same conf/
        return hydra_compose("config", overrides, return_hydra_config=with_hydra)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", overrides, return_hydra_config=with_hydra)
