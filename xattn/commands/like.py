"""``train.py --like RUN …``: start from the overrides typed for another run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from xattn.errors import BadInput
from xattn.keys import renamed
from xattn.runs import run_folder

_FLAG = "--like"


def expanded(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the run's own overrides in place of ``--like RUN``.

    A typed override replaces the run's override of the same key, and of keys below it: the group ``backend=fox``
    replaces all of ``backend.…``. The run's ``resume`` is never taken over; its ``sweep.half_width`` only by a sweep.

    Raises :class:`BadInput` if there is no such run.
    """
    rest, folders = [], []
    words = iter(arguments)
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag != _FLAG:
            rest.append(word)
        elif found := value if has_value else next(words, ""):
            folders.append(Path(found))
        else:
            raise BadInput(f"{_FLAG}: requires a run's folder, such as {_FLAG} outputs/…")
    if not folders:
        return rest
    if len(folders) > 1:
        raise BadInput(f"{_FLAG}: takes one run, got {' and '.join(map(str, folders))}")
    typed = {_key(word) for word in rest if not word.startswith("-")}
    own = [word for word in map(renamed, _overrides(folders[0])) if not _is_replaced(_key(word), typed)]
    sweeps = {"-m", "--multirun"} & set(rest)
    if not sweeps and "sweep.half_width" not in typed and _adds_seeds(folders[0]):
        own = [word for word in own if _key(word) != "sweep.half_width"] + ["sweep.half_width=null"]
    flags = [i for i, word in enumerate(rest) if word.startswith("-")]
    return [*rest[: flags[-1] + 1], *own, *rest[flags[-1] + 1 :]] if flags else [*own, *rest]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")


def _is_replaced(key: str, typed: set[str]) -> bool:
    return key == "resume" or any(key == other or key.startswith(f"{other}.") for other in typed)


def _overrides(run: Path) -> list[str]:
    if not (run / run_folder.CONFIG).is_file():
        raise BadInput(f"{_FLAG} {run}: not a run folder: it has no {run_folder.CONFIG}")
    try:
        loaded = yaml.safe_load((run / run_folder.OVERRIDES).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{_FLAG} {run}: its {run_folder.OVERRIDES} cannot be read") from error
    if not isinstance(loaded, list) or not all(isinstance(word, str) for word in loaded):
        raise BadInput(f"{_FLAG} {run}: its {run_folder.OVERRIDES} is not a list of overrides")
    return loaded


def _adds_seeds(run: Path) -> bool:
    """Return whether the run's config asks a sweep to add seeds. Its folder has been read before."""
    try:
        config = yaml.safe_load((run / run_folder.CONFIG).read_text("utf-8"))
        return config["sweep"]["half_width"] is not None
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):  # older runs have no such key
        return False
