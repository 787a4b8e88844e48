"""From overrides or a config.yaml to one frozen, validated :class:`Config`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from xattn.config.groups import flag, having
from xattn.config.messages import COMPOSITION_ERRORS, explain, explain_validation, nearest_key
from xattn.config.naming import hashed_values, run_name
from xattn.config.renamed import arguments_under_new_names, read_old_names
from xattn.config.schema import Config, composed, config_type
from xattn.errors import BadInput, first_line
from xattn.keys import flatten, up_to_date
from xattn.model.size import mlp_dim_for
from xattn.report.config import FindingConfig
from xattn.runs import run_folder
from xattn.section import SectionT
from xattn.system import entry


def from_hydra(composed: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """Validate a config composed from these overrides, and choose mlp_dim if ``model.parameters`` is given.

    Raises :class:`BadInput` with a line for each bad key, at most five.
    """
    config = _read(composed, overrides)
    if config.model.parameters is None:
        return config
    from xattn.data.corpus_tokenizer import vocab_size

    return sized(config, vocab_size(config.data))


def sized(config: Config, vocab_size: int) -> Config:
    """Return the config with the mlp_dim that brings the model closest to ``model.parameters``.

    The config's own mlp_dim is ignored. If ``model.parameters`` is null, the config is returned unchanged.

    Raises :class:`BadInput` if no mlp_dim makes the model that small, or if ``model.init_from`` fixes its size.
    """
    model = config.model
    if model.parameters is None:
        return config
    if model.init_from is not None:
        raise BadInput(
            f"model.parameters = {model.parameters}: must be null with model.init_from; the weights fix mlp_dim"
        )
    chosen = mlp_dim_for(model.parameters, model, config.backend, vocab_size=vocab_size)
    return config.model_copy(update={"model": model.model_copy(update={"mlp_dim": chosen})})


def _read(composed: DictConfig, overrides: Sequence[str]) -> Config:
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    try:
        raw = OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise BadInput(explain(error)) from error
    assert isinstance(raw, dict)
    return _validated({str(key): value for key, value in raw.items()}, overrides)


def compose(overrides: Sequence[str] = (), *, config_dir: Path | None = None) -> Config:
    """Return the config of ``python train.py --config-dir CONFIG_DIR OVERRIDES…``, for notebooks and tests.

    config_dir: a folder of your own YAML files, laid out like conf/. Raises :class:`BadInput`.
    """
    arguments = [*overrides, *flag(config_dir)]
    try:
        return from_hydra(composed(arguments), overrides)
    except COMPOSITION_ERRORS as error:
        raise BadInput(explain(error, arguments)) from error


# The only keys of Hydra's that a call from Python may set; the others are for a command line.
_TAKEN_OF_HYDRA = ("hydra.run.dir", "hydra.searchpath")


def compose_in_folder(overrides: Sequence[str]) -> tuple[Config, Path]:
    """Return the config of ``python train.py OVERRIDES…``, and the folder that Hydra would create for it.

    The caller may have initialised Hydra for another config; that is restored. Raises :class:`BadInput`.
    """
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.startswith(("hydra.", "hydra/")) and key not in _TAKEN_OF_HYDRA:
            raise BadInput(
                f"{override}: works only on the command line; from Python, use {' or '.join(_TAKEN_OF_HYDRA)}"
            )
        if key.startswith("-"):
            raise BadInput(f"{override}: is a command-line flag; allowed here are overrides, key=value")
    register_resolvers()
    callers, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        found = composed(overrides, with_hydra=True)
        return from_hydra(found, overrides), Path(found.hydra.run.dir).absolute()
    except COMPOSITION_ERRORS as error:
        raise BadInput(explain(error, overrides)) from error
    finally:
        GlobalHydra.instance().hydra = callers


def amend(
    config: Config, overrides: Sequence[str], *, may_differ: Sequence[str], config_dir: Path | None = None
) -> Config:
    """Return the config with overrides as for train.py; their keys must equal, or be below, one of ``may_differ``.

    A group (``data=text``) replaces its whole section, a key (``data.path=x``) its value. config_dir: see
    :func:`compose`. Raises :class:`BadInput`.
    """
    overrides = arguments_under_new_names(overrides)
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for override, key in zip(overrides, keys, strict=True):
        if key.startswith("backend.then.") and config.backend.then is None:
            raise BadInput(f"{override}: this run has only one kind of layer")
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in may_differ):
            known = key in type(config).model_fields or key in hashed_values(config)
            near = "" if known else nearest_key(key, flag(config_dir))
            reason = "cannot be changed here" if known else f"no such key{near}"
            raise BadInput(f"{override}: {reason}; allowed here: {', '.join(may_differ)}")
    own = [f"{group}={getattr(config, group).name}" for group in ("data", "optimizer") if group not in keys]
    if (then := config.backend.then) is not None:
        values_of = ", ".join(f"{key}: {'null' if value is None else value}" for key, value in then)
        own += [f"backend.every={config.backend.every}", f"backend.then={{{values_of}}}"]
    arguments = [*own, *overrides, *flag(config_dir)]
    try:
        found = OmegaConf.to_container(composed(arguments), resolve=False, throw_on_missing=False)
    except COMPOSITION_ERRORS as error:
        raise BadInput(explain(error, arguments)) from error
    values = OmegaConf.create(config.model_dump(mode="json"))
    for key in sorted(keys, key=lambda key: key.count(".")):  # groups first: keys then change values inside them
        value = OmegaConf.select(OmegaConf.create(found), key)
        OmegaConf.update(values, key, value, merge=False)
    return _read(values, overrides)  # mlp_dim stays, even if other data have another vocabulary


def save(config: Config) -> str:
    """Return the YAML text of config.yaml."""
    return to_yaml(config.model_dump(mode="json"))


def to_yaml(values: Any) -> str:
    """Return the YAML text of plain values, in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load(path: Path) -> Config:
    """Read a config.yaml back. Raises :class:`BadInput` if it is not one of ours."""
    try:
        loaded = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: not a readable {path.name}: {first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise BadInput(f"{path}: not the {path.name} of a run")
    try:
        return _validated(up_to_date(loaded))
    except BadInput as error:
        own = list((run_folder.read_provenance(path.parent) or {}).get("registered", {}))
        hint = ""
        if own:
            hint = f"\nit was registered by {own[0]}; run that script instead of xattn: python {own[0]} sample RUN"
        raise BadInput(f"{path}: {error}{hint}") from error


def register_resolvers() -> None:
    """Define ``${run_name:}``, the name of the composed run's folder, and ``${program:}``, the command that trains.

    Hydra also learns to read the old names of renamed keys.
    ``${run_name:}`` raises :class:`BadInput` for a bad config, and for one that needs a sweep.
    """

    def name(*, _root_: DictConfig) -> str:
        config = from_hydra(_root_, list(_root_.hydra.overrides.task))
        if _root_.hydra.mode != RunMode.MULTIRUN:
            _refuse_study(config, _root_)
        return run_name(config)

    config_type()
    read_old_names()
    OmegaConf.register_new_resolver("run_name", name, replace=True)
    OmegaConf.register_new_resolver("program", entry.program, replace=True)


def _refuse_study(config: Config, composed: DictConfig) -> None:
    """Raise :class:`BadInput` if overrides typed for one run ask for many."""
    typed = list(composed.hydra.overrides.task)
    keys = {override.lstrip("+~").partition("=")[0] for override in typed}
    swept = OmegaConf.select(composed, "hydra.sweeper.params") or {}
    if open_keys := [str(key) for key in swept if str(key) not in keys]:
        chosen = [override for override in typed if override.startswith("experiment=")]
        words = shlex.join([override for override in typed if override != "sweep.half_width=null"])
        raise BadInput(
            f"{chosen[-1] if chosen else 'hydra.sweeper.params'}: is a study, not a single run, and needs -m:\n"
            f"`{entry.program()} -m {words}`\n"
            f"for a single run, give one value for each of {', '.join(open_keys)}"
        )
    if (half_width := config.sweep.half_width) is not None:
        raise BadInput(
            f"sweep.half_width = {half_width:g}: adds seeds to a sweep and needs -m; for a single run, set it to null"
        )


def section(kind: type[SectionT], values: Mapping[str, Any], *, at: str) -> SectionT:
    """Validate a section that is not part of :class:`Config`; ``at`` is its key in messages."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise BadInput(explain_validation(error, values, at=f"{at}.")) from error


def _validated(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    try:
        config = config_type().model_validate(raw)
    except ValidationError as error:
        raise BadInput(explain_validation(error, raw, overrides=overrides)) from error
    every, layers = config.backend.every, config.model.num_layers
    if every is not None and every > layers:
        raise BadInput(f"backend.every = {every}: must be at most model.num_layers = {layers}, else no layer uses then")
    if config.finding is not None:
        _check_keys(config.finding, config)
    return config


def _check_keys(finding: FindingConfig, config: Config) -> None:
    """Raise :class:`BadInput` if a contrast names a key that no run of the config could have."""
    known = {key for key, _ in flatten(config.model_dump(mode="json"))}
    for i, contrast in enumerate(finding.contrasts):
        for key in contrast.keys - known:
            group, _, name = key.rpartition(".")
            if not key.startswith("backend.then.") and not having(group, name):
                raise BadInput(f"finding.contrasts[{i}]: {key}: no such key{nearest_key(key, ())}")
