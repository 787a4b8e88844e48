"""Renamed keys under their old names: in what users type, and in YAML files of their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.default_element import ResultDefault
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, open_dict

from xattn.errors import BadInput
from xattn.keys import RENAMED, given_twice, renamed, take, under_new_names
from xattn.system.screen import say

_SWEPT = "hydra.sweeper.params"


def arguments_under_new_names(arguments: Sequence[str]) -> list[str]:
    """Return arguments of train.py, each override of a renamed key under the key's new name.

    Raises :class:`BadInput` if a key is given under both names.
    """
    typed = {argument.lstrip("+~").partition("=")[0] for argument in arguments}
    for old in RENAMED.keys() & typed:
        if RENAMED[old] in typed:
            raise given_twice(old)
        _warn(old)
    return [renamed(argument) for argument in arguments]


def read_old_names() -> None:
    """Make Hydra read a renamed key in a YAML file under either name.

    It is renamed as the file is loaded: what another file or an override says of the key then counts as usual.
    """
    ConfigLoaderImpl._load_single_config = _load_file  # type: ignore[method-assign]


_hydras = ConfigLoaderImpl._load_single_config


def _load_file(self: ConfigLoaderImpl, default: ResultDefault, repo: IConfigRepository) -> ConfigResult:
    found = _hydras(self, default, repo)
    if isinstance(found.config, DictConfig):
        try:
            _rename(found.config)
        except BadInput as error:
            raise BadInput(f"{default.config_path}.yaml: {error}") from error
    return found


def _rename(config: DictConfig) -> None:
    """Rename the keys of a file's content, in place."""
    tree: Any = OmegaConf.to_container(config)
    for old, new in RENAMED.items():
        if (value := take(tree, old)) is None:
            continue
        if take(tree, new) is not None:
            raise given_twice(old)
        _warn(old)
        group, _, leaf = old.rpartition(".")
        with open_dict(config):
            del OmegaConf.select(config, group)[leaf]
            OmegaConf.update(config, new, value[0])
    swept = take(tree, _SWEPT)
    if swept is not None and isinstance(swept[0], dict) and RENAMED.keys() & swept[0].keys():
        with open_dict(config):
            OmegaConf.update(config, _SWEPT, under_new_names(swept[0]), merge=False)


@cache
def _warn(old: str) -> None:
    say(f"{old} is now {RENAMED[old]}", file=sys.stderr)
