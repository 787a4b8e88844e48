"""The config's keys over time: which keys name a run, and how a config.yaml of any version is read.

A run folder outlives the version that made it. If you add, rename or remove a key, record here what older runs meant
by it, so that they still load, resume and keep their names. Standard library only, since the report reads with it too.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from xattn.errors import BadInput

SEED = "seed"
TUNED = ("optimizer.learning_rate",)  # each arm of a comparison is tuned to its own best value

# Keys that commit 968f896 did not have, and matmul_precision. A config.yaml without the key always means this value,
# whatever the default becomes, and a run's name leaves the key out at this value. ``model.matmul_precision`` is older
# than that promise: 968f896 puts it into the name at every value.
ABSENT: dict[str, Any] = {
    "model.matmul_precision": "default",
    "backend.every": None,
    "backend.then": None,
    "model.norm_eps": 1e-6,
    "model.init_from": None,
    "data.filler": "random",
    "backend.decay": "none",
    "backend.input_gate": "none",
    "backend.rotary_fraction": 1.0,
    "backend.sink": "none",
    "backend.logit_scale": 1.0,
    "model.output_norm": "none",
    "model.output_gate": "none",
    "model.conv": None,
    "model.value_residual": "none",
    "model.exclusive": False,
    "model.parameters": None,
    "trainer.threads": None,
    "trainer.keep": "best_and_last",
    "sweep.half_width": None,
    "sweep.budget_minutes": None,
    "sweep.pilot_seeds": None,
    "finding": None,
    "tracking.wandb.tags": None,
    "tracking.wandb.notes": None,
    "tracking.wandb.job_type": None,
    "tracking.wandb.system_metrics": False,
    "tracking.wandb.console": False,
    "tracking.wandb.artifacts": [],
}
_OF_ONE_CHOICE = {"data.filler": "mqar"}  # the only choice of the group that has the key
_NAMED_AT_EVERY_VALUE = "model.matmul_precision"

# Old key → the key that replaces it. A run's name still uses the old one, and users may still write it.
RENAMED: dict[str, str] = {"evaluation.windows": "evaluation.sequences"}

# Removed key → the only value still supported. A run with another value cannot be read. Run names still use the key.
REMOVED: dict[str, Any] = {}

# Keys that do not change what a run computes: its tracking, devices, study, sweep and claim, when it is saved, which
# checkpoints are kept, and where its initial weights are.
_WITHOUT_EFFECT = (
    *("tracking", "parallel", "sweep", "study", "resume", "finding"),
    *("trainer.checkpoint_every", "trainer.checkpoint_minutes", "trainer.keep"),
    "model.init_from.path",  # the SHA-256 beside it identifies the weights
)

# Hashed keys that only set what is measured, and when: they do not change a bit of the training.
_MEASURING = ("trainer.log_every", "trainer.eval_every", "trainer.attention_stats_every", "evaluation")


def has_effect(key: str) -> bool:
    """Return whether this dotted key affects what the run computes, and so may differ between compared runs."""
    return _is_none_of(_WITHOUT_EFFECT, key)


def changes_training(key: str, values: Mapping[str, Any]) -> bool:
    """Return whether the bits of the training depend on this dotted key, one of a config's ``values``.

    Under ``trainer.nonfinite=rollback`` they depend on ``trainer.eval_every``: the best evaluation is a checkpoint,
    and such a run may go back to it.
    """
    if key == "trainer.eval_every" and values.get("trainer.nonfinite") == "rollback":
        return True
    return has_effect(key) and _is_none_of(_MEASURING, key)


def short(key: str) -> str:
    """Return the key without its group, for display; ``backend.then.theta`` becomes ``then.theta``."""
    group, _, leaf = key.rpartition(".")
    return f"then.{leaf}" if group.endswith(".then") else leaf


def show(value: Any) -> str:
    """Return the bare value as a user types it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(short := f"{value:g}") == value:
        return short
    return str(value)


def up_to_date(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the content of a config.yaml of any version to the keys of this one.

    Raises:
        BadInput: a removed key has a value that no code is left for, or a renamed key is there under both names.
    """
    tree = copy.deepcopy(dict(config))
    for old, new in RENAMED.items():
        if (found := take(tree, old)) is not None:
            group, leaf = _group(tree, new), new.rpartition(".")[2]
            if leaf in group:
                raise given_twice(old)
            group[leaf] = found[0]
    for key, left in REMOVED.items():
        if (found := take(tree, key)) is not None and found[0] != left:
            raise BadInput(f"{key} = {found[0]}: only {left} is supported since this key was removed")
    for key, meaning in ABSENT.items():
        group = _group(tree, key)
        if key not in _OF_ONE_CHOICE or group.get("name") == _OF_ONE_CHOICE[key]:
            group.setdefault(key.rpartition(".")[2], copy.deepcopy(meaning))
    return tree


def renamed(override: str) -> str:
    """Return an override (or only its key, or any other word) with a renamed key under its new name."""
    key = override.lstrip("+~").partition("=")[0]
    return override.replace(key, RENAMED[key], 1) if key in RENAMED else override


def under_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys and their values, each renamed key under its new name.

    Raises:
        BadInput: a key is there under both names.
    """
    if (old := next((old for old, new in RENAMED.items() if old in values and new in values), None)) is not None:
        raise given_twice(old)
    return {RENAMED.get(key, key): value for key, value in values.items()}


def given_twice(old: str) -> BadInput:
    """Return the error for a renamed key that is given under both names."""
    return BadInput(f"{old}: is now {RENAMED[old]}, and both are given; leave out {old}")


def stored_name(key: str) -> str:
    """Return the key's name in commit 968f896, which run names and tuning studies still use."""
    return next((old for old, new in RENAMED.items() if new == key), key)


def naming(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dotted keys and values that a run's name is made from, spelled as in commit 968f896."""
    named = {
        stored_name(key): value
        for key, value in values.items()
        if key not in ABSENT or value != ABSENT[key] or key == _NAMED_AT_EVERY_VALUE
    }
    return named | REMOVED


def naming_before_matmul_precision(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return :func:`naming` for versions without that key; None if the run has a value that they did not support."""
    named = naming(values)
    if named.pop(_NAMED_AT_EVERY_VALUE) != ABSENT[_NAMED_AT_EVERY_VALUE]:
        return None
    return named


def training_identity(values: Mapping[str, Any]) -> str:
    """Return ten hex digits, equal for configs that train the same.

    They are a run name's hash over the keys that :func:`changes_training` selects. values: the hashed dotted keys of a
    config.
    """
    return digest(naming({key: value for key, value in values.items() if changes_training(key, values)}))


def training_identity_of(config: Mapping[str, Any]) -> str:
    """Return :func:`training_identity` from the content of a config.yaml of any version.

    Raises:
        BadInput: a removed key has a value that no code is left for.
    """
    return training_identity({key: value for key, value in flatten(up_to_date(config)) if has_effect(key)})


def digest(values: Mapping[str, Any]) -> str:
    """Return a hash of ten hex digits over JSON values, independent of their order."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of each leaf. A list is one leaf, and so is an empty mapping."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _is_none_of(names: tuple[str, ...], key: str) -> bool:
    """Return whether the dotted key is neither one of these nor below one of them."""
    return not any(key == name or key.startswith(f"{name}.") for name in names)


def take(tree: dict[str, Any], key: str) -> tuple[Any] | None:
    """Remove a dotted key and return its value in a tuple; None if it is missing."""
    group, leaf = _group(tree, key), key.rpartition(".")[2]
    return (group.pop(leaf),) if leaf in group else None


def _group(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the mapping that holds a dotted key, or a new empty one if the tree has no such group."""
    node: Any = tree
    for part in key.split(".")[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}
