"""From what a person types to one frozen, validated :class:`Config`; and from that to the name of the run's folder.

Only this module, :mod:`xattn.app` and Hydra's plugins know Hydra and omegaconf. It imports no jax.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import Field, SerializeAsAny, ValidationError
from pydantic.fields import FieldInfo

from xattn import entry, run_folder
from xattn.data.config import DataConfig, data_kinds
from xattn.errors import BadInput
from xattn.evaluation.config import EvaluationConfig
from xattn.keys import ABSENT, digest, flatten, has_effect, naming, naming_before_matmul_precision, up_to_date
from xattn.model.config import BackendConfig, LayerConfig, ModelConfig
from xattn.model.size import mlp_dim_for
from xattn.report.config import FindingConfig
from xattn.screen import say
from xattn.section import CONF, Section, SectionT, kind_name
from xattn.sweep.config import SweepConfig
from xattn.tracking.config import TrackingConfig
from xattn.training.config import ParallelConfig, ScheduleConfig, TrainerConfig
from xattn.training.optimizers import Optimizer, optimizers

PathName = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Config(Section):
    """Everything that a run is made from."""

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
    """A claim that the study is to show; null without one."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of initialisation, data order and dropout."""
    study: str = Field(pattern=PathName, max_length=100)
    """The set of runs that this one belongs to; a folder below ``outputs/``."""
    resume: Literal["auto", "never"]
    """``auto`` shows the result of a finished run and continues any other; ``never`` moves an earlier run aside and
    starts over.
    """


def config_type() -> type[Config]:
    """:class:`Config`, with the kinds of data and optimizers that there are now: a script may have registered some.

    What a registered kind has as defaults is what Hydra sets for ``data=NAME`` or ``optimizer=NAME``.
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


_KINDS: dict[str, tuple[type[Section], ...]] = {}  # as :class:`Config` has them


def registered_choices(group: str) -> dict[str, dict[str, Any]]:
    """The choices of a group that a script has registered, each with its keys and their defaults, ``???`` for none."""
    found, files = {}, choices_in(group)
    for kind in _kinds().get(group, ()):
        if (name := kind_name(kind)) not in files:
            fields = {key: field for key, field in kind.model_fields.items() if key != "name"}
            found[name] = {key: "???" if field.is_required() else field.default for key, field in fields.items()}
    return found


def hashed_values(config: Config) -> dict[str, Any]:
    """The dotted keys, with their values, that say what the run computes."""
    return {key: value for key, value in flatten(config.model_dump(mode="json")) if has_effect(key)}


def run_hash(config: Config) -> str:
    """Ten hex digits, the same for every spelling of the same validated config, and in every version."""
    return digest(naming(hashed_values(config)))


def folder_of(config: Config, folder: Path) -> Path:
    """Where the config's run is: ``folder``, or the one beside it in which an older version made the same run.

    Where both folders hold a run the first is taken, and a line says so. ``resume=never`` starts over in the first.
    Raises :class:`BadInput` where the folder is the one of a study's report.
    """
    if folder.name == run_folder.REPORT and not (folder / run_folder.CONFIG).is_file():
        raise BadInput(f"{folder}: a run's folder cannot be called {folder.name}: `xattn report` writes there")
    older = older_folder(config, folder)
    if older is None or config.resume == "never":
        return folder
    if (folder / run_folder.CONFIG).is_file():
        say(f"{older.name}: holds the same run, made by an older version; {folder.name} is taken", file=sys.stderr)
        return folder
    return older


def older_folder(config: Config, folder: Path) -> Path | None:
    """The folder beside ``folder`` in which a version from before ``model.matmul_precision`` made the config's run.

    None where there is none, and where ``folder`` was named by hand.
    """
    values = naming_before_matmul_precision(hashed_values(config))
    if values is None or folder.name != run_name(config):
        return None
    older = folder.with_name(folder.name.removesuffix(run_hash(config)) + digest(values))
    return older if (older / run_folder.CONFIG).is_file() else None


# Keys of attention's terms: a run's name shows those that it has.
_BACKEND_TERMS = ("decay", "input_gate", "rotary_fraction", "sink", "logit_scale")
_MODEL_TERMS = ("conv", "value_residual", "exclusive", "output_norm", "output_gate")


def run_name(config: Config) -> str:
    """``<readable>-<hash>``: the name of the run's folder."""
    backend = config.backend
    words: list[str] = [backend.activation]
    if backend.qk_pre_activation != "none":
        words.append(backend.qk_pre_activation)
    terms = {
        group: [f"{key}_{_bare(value)}" for key in keys if (value := getattr(section, key)) != ABSENT[f"{group}.{key}"]]
        for group, keys, section in (("backend", _BACKEND_TERMS, backend), ("model", _MODEL_TERMS, config.model))
    }
    words += terms["backend"]
    if backend.then is not None:
        words.append(f"every{backend.every}")
        for key, value in backend.model_dump()["then"].items():
            words.append(value if key in ("activation", "qk_pre_activation") else f"{key}_{_bare(value)}")
    words += terms["model"]
    words += [config.data.name, f"lr{config.optimizer.learning_rate:g}", f"seed{config.seed}", run_hash(config)]
    return "-".join(words)


def _bare(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()


def shaping(config: Config) -> Config:
    """The config with every key that shapes no compiled program at a fixed value: where these are equal, so are the
    programs. The numbers left out are the ones that the train state carries."""
    backend = config.backend
    then = None if backend.then is None else backend.then.model_copy(update=_unswept(backend.then))
    pace: dict[str, Any] = {"log_every": 1, "eval_every": 1, "keep": "best_and_last"} | dict.fromkeys(
        ("attention_stats_every", "checkpoint_every", "checkpoint_minutes")
    )
    elsewhere: dict[str, Any] = dict.fromkeys(("data", "evaluation", "tracking", "sweep", "finding"))
    elsewhere |= {"seed": 0, "study": "", "resume": "auto"}
    return config.model_copy(
        update={
            "backend": backend.model_copy(update=_unswept(backend) | {"then": then}),
            "model": config.model.model_copy(update={"init_from": None, "parameters": None}),
            "optimizer": config.optimizer.model_copy(
                update={"learning_rate": 1.0, "weight_decay": 0.0, "clip_norm": None}
            ),
            "trainer": config.trainer.model_copy(update=pace),
            "parallel": config.parallel.model_copy(update={"heartbeat_seconds": 1, "connect_seconds": 1}),
            **elsewhere,
        }
    )


def _unswept(layers: LayerConfig) -> dict[str, Any]:
    """Fixed values of the numbers that a layer reads from the train state."""
    bias = "learned" if layers.sigmoid_bias == "learned" else "auto"
    return {"theta": 1.0, "sigmoid_bias": bias, "logit_scale": 1.0}


def program_key(config: Config) -> str:
    """Equal for configs that share their compiled programs."""
    parts = shaping(config).model_dump(mode="json", exclude={"data", "evaluation", "tracking", "sweep", "finding"})
    return json.dumps(parts, sort_keys=True)


def pack_key(config: Config) -> str:
    """Equal for configs whose runs can train as one pack: program, data, evaluation and pace are the same."""
    parts = config.model_dump(mode="json", include={"data", "evaluation", "trainer"}, exclude={"trainer": {"keep"}})
    return program_key(config) + json.dumps(parts, sort_keys=True)


def varying_keys(configs: Sequence[Config]) -> list[str]:
    """The hashed keys that do not have one value in all."""
    values = [hashed_values(config) for config in configs]
    hashed = list(dict.fromkeys(key for each in values for key in each))
    return [key for key in hashed if any(each.get(key) != values[0].get(key) for each in values)]


def tracked_values(config: Config) -> dict[str, Any]:
    """What wandb is told of the config: all of it, and the hash."""
    return config.model_dump(mode="json") | {"hash": run_hash(config)}


def untracked(config: Config) -> Config:
    """The same run, of which wandb is told nothing."""
    wandb = config.tracking.wandb.model_copy(update={"mode": "disabled"})
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"wandb": wandb})})


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The hashed keys whose values differ, each with both; a key that one side lacks is None there."""
    before, after = hashed_values(old), hashed_values(new)
    hashed = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in hashed if before.get(key) != after.get(key)}


def from_hydra(composed: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """Validates a config composed from these overrides, and chooses mlp_dim where ``model.parameters`` is given.

    Raises :class:`BadInput` with a line for each bad key, five at most.
    """
    config = _read(composed, overrides)
    if config.model.parameters is None:
        return config
    from xattn.data.vocabulary import vocab_size

    return sized(config, vocab_size(config.data))


def sized(config: Config, vocab_size: int) -> Config:
    """The config with the mlp_dim with which the model has ``model.parameters`` as nearly as possible; that of the
    config, whatever was typed, has no say. Where ``model.parameters`` is null, the config as it is.

    Raises :class:`BadInput` where no mlp_dim makes the model that small, or where ``model.init_from`` gives it a size.
    """
    model = config.model
    if model.parameters is None:
        return config
    if model.init_from is not None:
        raise BadInput(
            f"model.parameters = {model.parameters}: must be null with model.init_from; mlp_dim is that of the weights"
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
    """Returns the config of ``python train.py --config-dir CONFIG_DIR OVERRIDES…``, for notebooks and tests.

    config_dir: a folder with YAML files of your own, laid out as conf/ is. Raises :class:`BadInput`.
    """
    arguments = [*overrides, *_flag(config_dir)]
    try:
        return from_hydra(_composed(arguments), overrides)
    except COMPOSITION_ERRORS as error:
        raise BadInput(explain(error, arguments)) from error


# What a call from Python may say to Hydra itself; its other keys are of a command line.
_TAKEN_OF_HYDRA = ("hydra.run.dir", "hydra.searchpath")


def compose_in_folder(overrides: Sequence[str]) -> tuple[Config, Path]:
    """The config of ``python train.py OVERRIDES…``, and the folder that Hydra would make for it.

    Hydra may be initialised by the caller for a config of its own, and stays so. Raises :class:`BadInput`.
    """
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.startswith(("hydra.", "hydra/")) and key not in _TAKEN_OF_HYDRA:
            raise BadInput(
                f"{override}: is for the command line; from Python {' and '.join(_TAKEN_OF_HYDRA)} are taken"
            )
        if key.startswith("-"):
            raise BadInput(f"{override}: is a flag of the command line; allowed are overrides, key=value")
    register_resolvers()
    callers, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        composed = _composed(overrides, with_hydra=True)
        return from_hydra(composed, overrides), Path(composed.hydra.run.dir).absolute()
    except COMPOSITION_ERRORS as error:
        raise BadInput(explain(error, overrides)) from error
    finally:
        GlobalHydra.instance().hydra = callers


def amend(
    config: Config, overrides: Sequence[str], *, may_differ: Sequence[str], config_dir: Path | None = None
) -> Config:
    """The config with overrides such as train.py takes, of keys that are or begin with one of ``may_differ``.

    A group (``data=text``) takes the place of its whole section; a key (``data.path=x``) that of its value. config_dir:
    as of :func:`compose`.

    Raises :class:`BadInput`.
    """
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for override, key in zip(overrides, keys, strict=True):
        if key.startswith("backend.then.") and config.backend.then is None:
            raise BadInput(f"{override}: this run has layers of one kind")
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in may_differ):
            known = key in type(config).model_fields or key in hashed_values(config)
            near = "" if known else _nearest_key(key, _flag(config_dir))
            told = "cannot be changed here" if known else f"no such key{near}"
            raise BadInput(f"{override}: {told}; what can be changed here is {', '.join(may_differ)}")
    own = [f"{group}={getattr(config, group).name}" for group in ("data", "optimizer") if group not in keys]
    if (then := config.backend.then) is not None:
        values_of = ", ".join(f"{key}: {'null' if value is None else value}" for key, value in then)
        own += [f"backend.every={config.backend.every}", f"backend.then={{{values_of}}}"]
    arguments = [*own, *overrides, *_flag(config_dir)]
    try:
        composed = OmegaConf.to_container(_composed(arguments), resolve=False, throw_on_missing=False)
    except COMPOSITION_ERRORS as error:
        raise BadInput(explain(error, arguments)) from error
    values = OmegaConf.create(config.model_dump(mode="json"))
    for key in sorted(keys, key=lambda key: key.count(".")):  # groups first: keys change what they brought
        value = OmegaConf.select(OmegaConf.create(composed), key)
        OmegaConf.update(values, key, value, merge=False)
    return _read(values, overrides)  # its mlp_dim stays what it is, whatever the vocabulary of other data


def save(config: Config) -> str:
    """The YAML text of config.yaml."""
    return _to_yaml(config.model_dump(mode="json"))


def load(path: Path) -> Config:
    """Reads back a config.yaml. Raises :class:`BadInput` where it is not one of ours."""
    try:
        loaded = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: not a readable {path.name}: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise BadInput(f"{path}: not the {path.name} of a run")
    try:
        return _validated(up_to_date(loaded))
    except BadInput as error:
        own = list((run_folder.read_provenance(path.parent) or {}).get("registered", {}))
        hint = ""
        if own:
            hint = f"\nit was registered by {own[0]}; run that in place of xattn: python {own[0]} sample RUN"
        raise BadInput(f"{path}: {error}{hint}") from error


def save_overrides(overrides: Sequence[str]) -> str:
    """The YAML text of overrides.yaml: what the person typed."""
    return _to_yaml(list(overrides))


def register_resolvers() -> None:
    """Makes ``${run_name:}`` the name of the composed run's folder, ``${program:}`` the words that start a training.

    ``${run_name:}`` raises :class:`BadInput` for a bad config, and for one that only a sweep can carry out.
    """

    def name(*, _root_: DictConfig) -> str:
        config = from_hydra(_root_, list(_root_.hydra.overrides.task))
        if _root_.hydra.mode != RunMode.MULTIRUN:
            _refuse_study(config, _root_)
        return run_name(config)

    config_type()
    OmegaConf.register_new_resolver("run_name", name, replace=True)
    OmegaConf.register_new_resolver("program", entry.program, replace=True)


def _refuse_study(config: Config, composed: DictConfig) -> None:
    """Raises :class:`BadInput` where what was typed for one run asks for many."""
    typed = list(composed.hydra.overrides.task)
    keys = {override.lstrip("+~").partition("=")[0] for override in typed}
    swept = OmegaConf.select(composed, "hydra.sweeper.params") or {}
    if open_keys := [str(key) for key in swept if str(key) not in keys]:
        chosen = [override for override in typed if override.startswith("experiment=")]
        words = shlex.join([override for override in typed if override != "sweep.half_width=null"])
        raise BadInput(
            f"{chosen[-1] if chosen else 'hydra.sweeper.params'}: is a study, not one run, and needs -m:\n"
            f"`{entry.program()} -m {words}`\n"
            f"one run of it takes a value of each: {', '.join(open_keys)}"
        )
    if (half_width := config.sweep.half_width) is not None:
        raise BadInput(
            f"sweep.half_width = {half_width:g}: adds seeds to a sweep, and needs -m; sweep.half_width=null makes one "
            "run"
        )


def section(kind: type[SectionT], values: Mapping[str, Any], *, at: str) -> SectionT:
    """Validates the values of a section that is not of :class:`Config`; ``at`` is the key that it stands at."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise BadInput(_explain_validation(error, values, at=f"{at}.")) from error


def _validated(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    try:
        config = config_type().model_validate(raw)
    except ValidationError as error:
        raise BadInput(_explain_validation(error, raw, overrides=overrides)) from error
    every, layers = config.backend.every, config.model.num_layers
    if every is not None and every > layers:
        raise BadInput(f"backend.every = {every}: must be at most model.num_layers = {layers}, or no layer is the then")
    if config.finding is not None:
        _check_keys(config.finding, config)
    return config


def _check_keys(finding: FindingConfig, config: Config) -> None:
    """Raises :class:`BadInput` for a contrast of a key that no run of the config could have."""
    known = {key for key, _ in flatten(config.model_dump(mode="json"))}
    for i, contrast in enumerate(finding.contrasts):
        for key in contrast.keys - known:
            group, _, name = key.rpartition(".")
            if not key.startswith("backend.then.") and not _having(group, name):
                raise BadInput(f"finding.contrasts[{i}]: {key}: no such key{_nearest_key(key, ())}")


def _having(group: str, name: str, arguments: Sequence[str] = ()) -> list[str]:
    """The choices of a group that have this key."""
    texts = {choice: file.read_text("utf-8") for choice, file in choices_in(group, arguments).items()}
    return [f"{group}={choice}" for choice, text in texts.items() if name in (yaml.safe_load(text) or {})]


def _to_yaml(values: Any) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _composed(arguments: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Composes overrides; a ``--config-dir`` among them is looked in too. Raises :data:`COMPOSITION_ERRORS`."""
    check_folders(arguments)
    config_type()
    overrides = [argument for argument in arguments if not argument.startswith("--config-dir=")]
    if not any(override.startswith("hydra.searchpath=") for override in overrides):
        overrides += _search_path(arguments)
    if GlobalHydra().is_initialized():  # by train.py, with this same conf/
        return hydra_compose("config", overrides, return_hydra_config=with_hydra)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", overrides, return_hydra_config=with_hydra)


def check_folders(arguments: Sequence[str]) -> None:
    """Raises :class:`BadInput` if a ``--config-dir`` among these arguments of train.py is no folder."""
    for folder in _config_dirs(arguments):
        if not folder.is_dir():
            raise BadInput(f"--config-dir = {folder}: no such folder")


def _flag(config_dir: Path | None) -> list[str]:
    return [] if config_dir is None else [f"--config-dir={config_dir}"]


def _config_dirs(arguments: Sequence[str]) -> list[Path]:
    """The folders that follow ``--config-dir``, or ``-cd``, among arguments of train.py."""
    found = []
    for argument, following in pairwise([*arguments, ""]):
        flag, separator, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            found.append(Path(value if separator else following))
    return found


# ---- what a person is told -------------------------------------------------------------------------------------------

# What Hydra and omegaconf raise while they compose: their own kinds, and plain ones for some malformed overrides.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError, TypeError, KeyError)

_QUOTING = (
    "A value with a space, a comma, brackets or other special characters goes in quotes:\n"
    """  'data.path="/some folder/a,b.txt"'"""
)


def explain(error: Exception, overrides: Sequence[str] = ()) -> str:
    """One message of at most five lines for an error of Hydra, omegaconf or ours, raised for these overrides."""
    for cause in _causes(error):
        if isinstance(cause, BadInput):
            return str(cause)
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not an override that Hydra's grammar takes; write key=value. {_QUOTING}"
    if "Ambiguous value" in text:
        return f"{_first_line(error)}: several values are a sweep, and need -m. {_QUOTING}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: a value is needed, for example {error.full_key}=…"
    if isinstance(error, MissingConfigException) and error.options:
        return _no_such_choice(error, error.options, overrides)
    if (told := _no_choice_at_all(overrides)) is not None:
        return told
    if isinstance(error, KeyError):
        return f"hydra.job.env_copy = {error.args[0]}: no such environment variable"
    if unknown := re.search(r"Could not override '([^']+)'|Interpolation key '([^']+)' not found", text):
        key = unknown[1] or unknown[2]
        if by := re.search(r"full_key: (hydra\.\S+)", text):
            return f"{by[1]}: refers to {key}, which Hydra does not know where it reads this key"
        group, _, leaf = key.rpartition(".")
        if group == "backend.then" and leaf in LayerConfig.model_fields:
            value = next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == key), "…")
            return f"{key}: not there to be changed; write +{key}={value}, or 'backend.then={{{leaf}: {value}}}'"
        shown = "hydra" if key.startswith("hydra.") else "job"
        near = "" if shown == "hydra" else _nearest_key(key, overrides)
        if key.startswith("hydra.sweeper.params."):
            near = f" yet; ++{key}=… adds it"
        return f"{key}: no such key{near}; `{entry.program()} --cfg {shown}` shows them all"
    key_of_value = re.search(r"full_key: (\S+)", text)
    return f"{key_of_value[1]}: {_first_line(error)}" if key_of_value else _first_line(error)


_WITH_PRESETS = ("backend", "experiment")  # a published attention is a choice of one of them


def _no_such_choice(error: MissingConfigException, options: Sequence[str], arguments: Sequence[str]) -> str:
    """Names the group as it is typed, and the file that asks for the choice where nobody typed it."""
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    asked_by = re.match(r"In '([^']+)'", str(error))
    where = "" if asked_by is None or asked_by[1] in ("config", "hydra/config") else f"{asked_by[1]}.yaml: "
    others = [other for other in _WITH_PRESETS if other != group and choice in choices_in(other, arguments)]
    elsewhere = f" (did you mean {others[0]}={choice}?)" if group in _WITH_PRESETS and others else ""
    near = elsewhere or _nearest(choice, options)
    return f"{where}{group} = {choice}: no such choice{near}; allowed: {', '.join(options)}"


def _no_choice_at_all(overrides: Sequence[str]) -> str | None:
    """For a group that is given null, a number, a list or a mapping, of which Hydra names none."""
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        options = choices_in(group, overrides)
        if options and re.fullmatch(r"null|true|false|[-+.\d{\[].*", value, re.IGNORECASE):
            hint = " (leave it out for none)" if override == "experiment=null" else ""
            return f"{group} = {value}: no such choice{hint}; allowed: {', '.join(options)}"
    return None


def choices_in(group: str, arguments: Sequence[str] = ()) -> dict[str, Path]:
    """The choices of a group, each with its file, in conf/ and in the ``--config-dir`` of the arguments; none where it
    is no group."""
    if not re.fullmatch(r"[a-z_]+(/[a-z_]+)*", group):
        return {}
    files = [file for folder in (*_config_dirs(arguments), CONF) for file in (folder / group).glob("*.yaml")]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def _explain_validation(
    error: ValidationError, raw: Mapping[str, Any], *, at: str = "", overrides: Sequence[str] = ()
) -> str:
    expected: dict[str, list[str]] = {}  # key → what each member of its type allows
    given: dict[str, str] = {}
    nearest: dict[str, str] = {}
    details = error.errors(include_url=False)
    for detail in details:
        if detail["type"] == "too_short" and len(details) > 1:
            continue  # pydantic counts a list's good items; the bad ones have lines of their own
        kind, context = detail["type"], detail.get("ctx", {})
        key = at + _dotted(detail["loc"], raw)
        message = re.sub(r"^(Value error, |Input should be )", "", detail["msg"])
        if kind == "extra_forbidden":
            message, nearest[key] = "no such key", _nearest_key(key, ())
        elif kind == "missing":
            message = f"a value is needed, for example {key}=…"
        elif kind == "string_pattern_mismatch":
            message = "letters, digits, '.', '_' and '-' are allowed, the first a letter or a digit"
        elif kind == "string_type":
            message = f"text{_quoting(key, overrides)}"
            given[key] = _short(detail["input"])
        elif kind == "model_type":
            message = "a mapping" + (", such as {activation: softmax}" if key.endswith("then") else "")
        elif kind == "tuple_type":
            message = f"a list, [{detail['input']}]" if isinstance(detail["input"], str) else "a list"
        elif kind == "union_tag_invalid":
            key, message = f"{key}.name", str(context["expected_tags"])
            given[key], nearest[key] = repr(context["tag"]), _nearest(context["tag"], re.findall(r"'(.*?)'", message))
        elif kind == "literal_error":
            nearest[key] = _nearest(str(detail["input"]), re.findall(r"'(.*?)'", context["expected"]))
        expected.setdefault(key, []).append(message)
        if kind != "missing" and not isinstance(detail["input"], Mapping):
            given[key] = _short(detail["input"])
    lines = []
    for key, messages in expected.items():
        value = f" = {given[key]}" if key in given else ""
        rule = " or ".join(messages)
        if not rule.startswith(("no such", "a value", "letters")) and key in given:
            rule = f"must be {rule}"
        lines.append(f"{key}{value}: {rule}{nearest.get(key, '')}")
    return "\n".join(lines if len(lines) <= 5 else [*lines[:4], f"and {len(lines) - 4} more"])


def _quoting(key: str, overrides: Sequence[str]) -> str:
    """How to type a text that Hydra's grammar reads as a number, a truth value, null or a list."""
    if "[" in key:
        return ", in quotes"
    values = [override.partition("=")[2] for override in overrides if override.lstrip("+").partition("=")[0] == key]
    typed = values[-1] if values and re.fullmatch(r"[^'\",(]+", values[-1]) else "…"
    return f""", which it is in quotes: '{key}="{typed}"'"""


def _dotted(loc: Sequence[int | str], raw: Mapping[str, Any]) -> str:
    """The key as a person types it: pydantic's path without the names of union members."""
    found = ""
    node: Any = raw
    for i, part in enumerate(loc):
        if isinstance(node, Mapping) and (part in node or i == len(loc) - 1):
            found += f".{part}" if found else str(part)
            node = node.get(part)
        elif isinstance(node, list | tuple) and isinstance(part, int) and part < len(node):
            found += f"[{part}]"
            node = node[part]
    return found


def _nearest(word: str, options: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _nearest_key(key: str, overrides: Sequence[str]) -> str:
    group, _, name = key.rpartition(".")
    if having := _having(group, name, overrides):
        return f" here; {' and '.join(having)} {'has' if len(having) == 1 else 'have'} it"
    choices = [override for override in overrides if re.fullmatch(r"\+?[\w/]+=[\w-]+", override)]
    try:
        known = _composed([*choices, *_search_path(overrides)])
    except COMPOSITION_ERRORS:
        known = _composed(())
    keys = [k for k, _ in flatten(OmegaConf.to_container(known, resolve=False))] + [str(k) for k in known]
    return nearest_of(key, keys)


def nearest_of(key: str, keys: Sequence[str]) -> str:
    """`` (did you mean KEY?)`` with the key that is most like this one; empty where none is like it."""

    def likeness(candidate: str) -> float:
        """Mostly of the last word: a person forgets or mistakes the group more often than the key."""
        typed, known = key.rpartition(".")[2], candidate.rpartition(".")[2]
        initials = "".join(word[0] for word in known.split("_") if word)
        leaf = 0.9 if typed == initials and len(typed) > 1 else _similar(typed, known)
        return 0.8 * leaf + 0.2 * _similar(key, candidate) if leaf >= 0.6 else 0.0

    best = max(keys, key=likeness)
    return f" (did you mean {best}?)" if likeness(best) else ""


def _search_path(arguments: Sequence[str]) -> list[str]:
    """The override that has Hydra look where these arguments of train.py had it look."""
    folders = [json.dumps(f"file://{folder.absolute()}") for folder in _config_dirs(arguments)]
    folders += [word.partition("=")[2].strip("[]") for word in arguments if word.startswith("hydra.searchpath=")]
    return [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []


def _similar(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
