"""Names derived from a config: the hash, the folder's name, and the keys of shared programs and packs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn.config.schema import Config
from xattn.errors import BadInput
from xattn.keys import ABSENT, digest, flatten, has_effect, naming, naming_before_matmul_precision
from xattn.model.config import LayerConfig
from xattn.runs import run_folder
from xattn.system.screen import say


def hashed_values(config: Config) -> dict[str, Any]:
    """Return the dotted keys, with values, that determine what the run computes."""
    return {key: value for key, value in flatten(config.model_dump(mode="json")) if has_effect(key)}


def run_hash(config: Config) -> str:
    """Return ten hex digits: the same for every spelling of one validated config, and in every version."""
    return digest(naming(hashed_values(config)))


def folder_of(config: Config, folder: Path) -> Path:
    """Return the folder of the config's run: ``folder``, or the one beside it where an older version made the same run.

    If both hold a run, ``folder`` is taken and a line says so. ``resume=never`` starts over in ``folder``.
    Raises :class:`BadInput` if the folder is that of a study's report.
    """
    if folder.name == run_folder.REPORT and not (folder / run_folder.CONFIG).is_file():
        raise BadInput(f"{folder}: a run's folder cannot be called {folder.name}; `xattn report` writes there")
    older = older_folder(config, folder)
    if older is None or config.resume == "never":
        return folder
    if (folder / run_folder.CONFIG).is_file():
        say(f"{older.name}: holds the same run, made by an older version; using {folder.name}", file=sys.stderr)
        return folder
    return older


def older_folder(config: Config, folder: Path) -> Path | None:
    """Return the folder beside ``folder`` where a version without ``model.matmul_precision`` made the config's run.

    None if there is no such folder, or if ``folder`` was named by hand.
    """
    values = naming_before_matmul_precision(hashed_values(config))
    if values is None or folder.name != run_name(config):
        return None
    older = folder.with_name(folder.name.removesuffix(run_hash(config)) + digest(values))
    return older if (older / run_folder.CONFIG).is_file() else None


# Optional terms of attention: a run's name shows those whose value differs from ABSENT's.
_BACKEND_TERMS = ("decay", "input_gate", "rotary_fraction", "sink", "logit_scale")


_MODEL_TERMS = ("conv", "value_residual", "exclusive", "output_norm", "output_gate")


def run_name(config: Config) -> str:
    """Return the name of the run's folder, ``<readable>-<hash>``."""
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
    """Return the config with a fixed value for every key that does not shape a compiled program.

    Equal results mean equal programs. Swept numbers, such as the learning rate, live in the train state instead.
    """
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
    """Return fixed values for the numbers that a layer reads from the train state."""
    bias = "learned" if layers.sigmoid_bias == "learned" else "auto"
    return {"theta": 1.0, "sigmoid_bias": bias, "logit_scale": 1.0}


def program_key(config: Config) -> str:
    """Return a key that is equal for configs that share their compiled programs."""
    parts = shaping(config).model_dump(mode="json", exclude={"data", "evaluation", "tracking", "sweep", "finding"})
    return json.dumps(parts, sort_keys=True)


def pack_key(config: Config) -> str:
    """Return a key that is equal for configs of one pack: they share program, data, evaluation and pace."""
    parts = config.model_dump(mode="json", include={"data", "evaluation", "trainer"}, exclude={"trainer": {"keep"}})
    return program_key(config) + json.dumps(parts, sort_keys=True)


def varying_keys(configs: Sequence[Config]) -> list[str]:
    """Return the hashed keys whose values differ between the configs."""
    values = [hashed_values(config) for config in configs]
    hashed = list(dict.fromkeys(key for each in values for key in each))
    return [key for key in hashed if any(each.get(key) != values[0].get(key) for each in values)]


def untracked(config: Config) -> Config:
    """Return the config with wandb disabled."""
    wandb = config.tracking.wandb.model_copy(update={"mode": "disabled"})
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"wandb": wandb})})


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the hashed keys that differ, each with both values; a key that one side lacks is None there."""
    before, after = hashed_values(old), hashed_values(new)
    return {key: (before.get(key), after.get(key)) for key in varying_keys([old, new])}
