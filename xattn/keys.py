"""The config's keys over time: which of them name a run, and how a config.yaml of any version is read.

A run folder outlives the version that made it. If you add, rename or remove a key, say here what older runs meant by
it: then they still load, resume and keep their names. Standard library only, since the report reads with this too.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from xattn.errors import BadInput

SEED = "seed"
TUNED = ("optimizer.learning_rate",)  # what each arm of a comparison has its own best of

# Keys that commit 968f896 did not have, and matmul_precision. A config.yaml without the key means this value, for ever,
# whatever the default becomes; at this value the key is left out of a run's name. ``model.matmul_precision`` is older
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
_OF_ONE_CHOICE = {"data.filler": "mqar"}  # only this choice of the group has the key
_NAMED_AT_EVERY_VALUE = "model.matmul_precision"

# Old key → the key that has its meaning now. A run's name is still made with the old one.
RENAMED: dict[str, str] = {}

# Key that is gone → the only behaviour that is left. A run with another value cannot be read; the others' names are
# still made with it.
REMOVED: dict[str, Any] = {}

# Keys that do not change what a run computes: where it is tracked, over which devices it is spread, how it is grouped
# and swept, what it is to show, when it is saved, what is kept of it, where the weights lie that it starts from.
_WITHOUT_EFFECT = (
    *("tracking", "parallel", "sweep", "study", "resume", "finding"),
    *("trainer.checkpoint_every", "trainer.checkpoint_minutes", "trainer.keep"),
    "model.init_from.path",  # the SHA-256 beside it says what is there
)

# Hashed keys that say only what is measured of the parameters, and when: they change no bit of the training.
_MEASURING = ("trainer.log_every", "trainer.eval_every", "trainer.attention_stats_every", "evaluation")


def has_effect(key: str) -> bool:
    """Whether this dotted key says what the run computes, and so may differ between runs that are compared."""
    return _is_none_of(_WITHOUT_EFFECT, key)


def changes_training(key: str, values: Mapping[str, Any]) -> bool:
    """Whether this dotted key, one of a config's ``values``, is one that the bits of its training depend on.

    Under ``trainer.nonfinite=rollback`` ``trainer.eval_every`` is: the best evaluation is a checkpoint, and such a run
    may go back to it.
    """
    if key == "trainer.eval_every" and values.get("trainer.nonfinite") == "rollback":
        return True
    return has_effect(key) and _is_none_of(_MEASURING, key)


def short(key: str) -> str:
    """The key without its group, for a column or a sentence; ``backend.then.theta`` is ``then.theta``."""
    group, _, leaf = key.rpartition(".")
    return f"then.{leaf}" if group.endswith(".then") else leaf


def show(value: Any) -> str:
    """The bare value, as a person types it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(short := f"{value:g}") == value:
        return short
    return str(value)


def up_to_date(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.yaml of any version, in the keys of this one.

    Raises:
        BadInput: a removed key has a value that no code is left for.
    """
    tree = copy.deepcopy(dict(config))
    for old, new in RENAMED.items():
        if (found := _take(tree, old)) is not None:
            _group(tree, new)[new.rpartition(".")[2]] = found[0]
    for key, left in REMOVED.items():
        if (found := _take(tree, key)) is not None and found[0] != left:
            raise BadInput(f"{key} = {found[0]}: only {left} is supported since this key was removed")
    for key, meaning in ABSENT.items():
        group = _group(tree, key)
        if key not in _OF_ONE_CHOICE or group.get("name") == _OF_ONE_CHOICE[key]:
            group.setdefault(key.rpartition(".")[2], copy.deepcopy(meaning))
    return tree


def naming(values: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted keys and values that a run's name is made from, spelled as in commit 968f896."""
    old_names = {new: old for old, new in RENAMED.items()}
    named = {
        old_names.get(key, key): value
        for key, value in values.items()
        if key not in ABSENT or value != ABSENT[key] or key == _NAMED_AT_EVERY_VALUE
    }
    return named | REMOVED


def naming_before_matmul_precision(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """As :func:`naming`, for versions without that key; None if the run has a value that they did not have."""
    named = naming(values)
    if named.pop(_NAMED_AT_EVERY_VALUE) != ABSENT[_NAMED_AT_EVERY_VALUE]:
        return None
    return named


def training_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of hashed dotted keys and their values, those that the bits of the training depend on."""
    return {key: value for key, value in values.items() if changes_training(key, values)}


def training_identity(values: Mapping[str, Any]) -> str:
    """Ten hex digits, the same for configs that train the same: the hash of a run's name, of :func:`training_values`.

    values: the hashed dotted keys of a config.
    """
    return digest(naming(training_values(values)))


def training_identity_of(config: Mapping[str, Any]) -> str:
    """:func:`training_identity` from the content of a config.yaml of any version.

    Raises:
        BadInput: a removed key has a value that no code is left for.
    """
    return training_identity({key: value for key, value in flatten(up_to_date(config)) if has_effect(key)})


def digest(values: Mapping[str, Any]) -> str:
    """Ten hex digits over JSON values, whatever their order."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each leaf. A list, and an empty mapping, is one leaf."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _is_none_of(names: tuple[str, ...], key: str) -> bool:
    """Whether the dotted key is none of these and below none of them."""
    return not any(key == name or key.startswith(f"{name}.") for name in names)


def _take(tree: dict[str, Any], key: str) -> tuple[Any] | None:
    """Removes a dotted key, and returns its value in a tuple; None where it is not there."""
    group, leaf = _group(tree, key), key.rpartition(".")[2]
    return (group.pop(leaf),) if leaf in group else None


def _group(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping that a dotted key is in; a new empty one if the tree has no such group."""
    node: Any = tree
    for part in key.split(".")[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}
