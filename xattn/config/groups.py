"""The choices in conf/, and in the user's folder that ``--config-dir`` names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from xattn.errors import BadInput
from xattn.section import CONF


def having(group: str, name: str, arguments: Sequence[str] = ()) -> list[str]:
    """Return the choices of a group that have this key."""
    texts = {choice: file.read_text("utf-8") for choice, file in choices_in(group, arguments).items()}
    return [f"{group}={choice}" for choice, text in texts.items() if name in (yaml.safe_load(text) or {})]


def check_folders(arguments: Sequence[str]) -> None:
    """Raise :class:`BadInput` if a ``--config-dir`` among these arguments of train.py is not a folder."""
    for folder in config_dirs(arguments):
        if not folder.is_dir():
            raise BadInput(f"--config-dir = {folder}: no such folder")


def flag(config_dir: Path | None) -> list[str]:
    return [] if config_dir is None else [f"--config-dir={config_dir}"]


def config_dirs(arguments: Sequence[str]) -> list[Path]:
    """Return the folders given by ``--config-dir`` or ``-cd`` among arguments of train.py."""
    found = []
    for argument, following in pairwise([*arguments, ""]):
        flag, separator, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            found.append(Path(value if separator else following))
    return found


def choices_in(group: str, arguments: Sequence[str] = ()) -> dict[str, Path]:
    """Return choice → file for a group, from conf/ and the arguments' ``--config-dir``; empty if it is no group."""
    if not re.fullmatch(r"[a-z_]+(/[a-z_]+)*", group):
        return {}
    files = [file for folder in (*config_dirs(arguments), CONF) for file in (folder / group).glob("*.yaml")]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def search_path(arguments: Sequence[str]) -> list[str]:
    """Return the override that gives Hydra the search path of these arguments of train.py."""
    folders = [json.dumps(f"file://{folder.absolute()}") for folder in config_dirs(arguments)]
    folders += [word.partition("=")[2].strip("[]") for word in arguments if word.startswith("hydra.searchpath=")]
    return [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []
