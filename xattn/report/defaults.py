"""What ``python train.py`` runs without arguments: the values of conf/, read without Hydra."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from xattn.report.read import YAML_LOADER, flatten
from xattn.section import CONF


def conf_defaults(conf: Path = CONF) -> dict[str, Any]:
    """Return dotted key → default value.

    Supports what conf/ uses of Hydra's defaults lists: ``- group: choice`` in config.yaml, ``[file, _self_]`` in a
    choice.
    """
    text = (conf / "config.yaml").read_text("utf-8")
    tree = yaml.load(text, YAML_LOADER)
    values: dict[str, Any] = {}
    for entry in tree.pop("defaults"):
        if isinstance(entry, Mapping):
            ((group, choice),) = entry.items()
            if choice is not None and not str(group).startswith("override "):
                values |= {f"{group}.{key}": value for key, value in choice_values(conf / str(group), choice).items()}
    tree.pop("hydra", None)
    return values | _leaves(tree)


def choice_values(group: Path, name: str) -> dict[str, Any]:
    """Return key within the group → the value that the named choice gives it, from a folder of choices."""
    text = (group / f"{name}.yaml").read_text("utf-8")
    tree = yaml.load(text, YAML_LOADER) or {}
    values: dict[str, Any] = {}
    for base in tree.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            values |= choice_values(group, base)
    return values | _leaves(tree)


def _leaves(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the leaves, with ``3e-3`` as a number, as in config.yaml; YAML 1.1 wants a dot and reads a string."""
    return {
        key: float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value) else value
        for key, value in flatten(tree).items()
    }
