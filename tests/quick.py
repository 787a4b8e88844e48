"""Importing this makes OmegaConf read YAML in C, and parse each interpolation once in a process.

It also spares Hydra a table of a file's choices where nothing in its defaults list refers to one. Composing a config
then takes half the time.
"""

from __future__ import annotations

import functools
from typing import Any

import hydra._internal.defaults_list as hydra_defaults
import omegaconf._utils
import omegaconf.base
import yaml

if yaml.__with_libyaml__:
    _Loader: Any = type("_Loader", (yaml.CSafeLoader, omegaconf._utils.get_yaml_loader()), {})
    omegaconf._utils.get_yaml_loader = lambda: _Loader
omegaconf._utils.parse = omegaconf.base.parse = functools.cache(omegaconf._utils.parse)  # type: ignore[assignment]

_table = hydra_defaults._create_interpolation_map


def _create_interpolation_map(overrides: Any, defaults: Any, self_added: bool) -> Any:
    return _table(overrides, defaults, self_added) if any(each.is_interpolation() for each in defaults) else None


hydra_defaults._create_interpolation_map = _create_interpolation_map
