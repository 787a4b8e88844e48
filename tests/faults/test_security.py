"""No pickle anywhere, and no import path that a person's config could name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from .harness import ROOT, runs, steps, the_run, train

pytestmark = pytest.mark.faults


# Lines that look like it, and why they are none of it.
KNOWN = {
    # A worker unpickles what its own parent sent it through multiprocessing's pipe, and nothing from a file.
    "xattn/sweep/workers.py: import pickle",
    # Reads which launcher was chosen. Hydra makes it, from its own group.
    'xattn/sweep/cluster.py: return str(_inner(settings).get("_target_", ""))',
}


def test_nothing_in_the_tree_loads_a_pickle_or_instantiates_a_name() -> None:
    forbidden = re.compile(
        r"\b(import|from) (pickle|cloudpickle|dill|joblib|shelve|marshal)\b|allow_pickle=True"
        r"|yaml\.(unsafe|full)_load|yaml\.load\([^,]*\)|\b(C?(Unsafe|Full)Loader|yaml\.C?Loader)\b"
        r"|hydra\.utils|\binstantiate\(|\b(eval|exec)\(|_target_"
    )
    found = []
    for folder in ("xattn", "conf"):
        for file in sorted((ROOT / folder).rglob("*")):
            # Hydra finds a launcher by a _target_ of ours, in its own group, and by nothing else.
            if file.suffix in (".py", ".yaml") and "conf/hydra/" not in str(file):
                lines = file.read_text("utf-8").splitlines()
                found += [f"{file.relative_to(ROOT)}: {line.strip()}" for line in lines if forbidden.search(line)]
    assert sorted(found) == sorted(KNOWN)


class Planted:
    """What a pickle would do on being loaded."""

    def __init__(self, file: Path):
        self._file = file

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._file), "w")


def test_a_target_in_an_override_is_an_unknown_key(command: list[str], cwd: Path) -> None:
    for key in ("model._target_", "optimizer._target_", "data._target_", "_target_"):
        training = train(*command, f"+{key}=os.abort", cwd=cwd)
        assert training.wait() == 2, training.out + training.err
        assert "_target_" in training.err
    assert runs(cwd) == []


def test_a_pickle_where_our_files_should_be_is_never_loaded(command: list[str], cwd: Path) -> None:
    """In place of a checkpoint's file, and of the data: it does nothing but fail, or is bytes."""
    loaded = cwd / "loaded"
    train(*command, cwd=cwd, points=["step:9"])
    poison = np.empty(1, object)
    poison[0] = Planted(loaded)
    for step in steps(the_run(cwd)):
        for file in (the_run(cwd) / "checkpoints" / str(step)).rglob("*"):
            if file.is_file():
                with file.open("wb") as target:
                    np.save(target, poison, allow_pickle=True)
    assert train(*command, cwd=cwd).wait() == 4
    assert not loaded.exists()


def test_names_become_paths_only_where_they_are_harmless(command: list[str], cwd: Path) -> None:
    for study in ("../outside", "/absolute", ".hidden", "a/b", ""):
        training = train(*command, f"study='{study}'", cwd=cwd)
        assert training.wait() == 2, training.out + training.err
    assert [entry.name for entry in cwd.iterdir() if entry.name != "outputs"] == []


def test_keys_and_tokens_reach_no_file_of_the_run(command: list[str], cwd: Path) -> None:
    secret = "0123456789abcdef" * 2 + "01234567"
    training = train(*command, cwd=cwd, env={"WANDB_API_KEY": secret, "HF_TOKEN": secret})
    assert training.wait() == 0
    assert [file for file in the_run(cwd).rglob("*") if file.is_file() and secret.encode() in file.read_bytes()] == []
