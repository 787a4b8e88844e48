"""Registration by a script: the allowed names, and the file and source by which an addition is known."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import optax
import pytest

import xattn
from xattn import registry
from xattn.config import compose
from xattn.data import config as data_config
from xattn.data.tasks import MQAR, Copying
from xattn.errors import BadInput
from xattn.evaluation import config as evaluation_config
from xattn.runs.provenance import registered
from xattn.training import optimizers
from xattn.training.optimizers import SGD, AdamW


@pytest.fixture(autouse=True)
def _tables_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for kinds in (data_config.tasks, optimizers.optimizers):
        monkeypatch.setattr(kinds, "_classes", dict(kinds._classes))
    monkeypatch.setattr(evaluation_config, "registered_probes", dict(evaluation_config.registered_probes))


def named(base: Any, name: str, **members: Any) -> Any:
    """A subclass with that value of ``name``, written in this file."""
    annotations = {"name": Literal[name]}  # type: ignore[valid-type]
    return type(name, (base,), {"__module__": __name__, "__annotations__": annotations, **members})


@pytest.mark.parametrize("name", ["mqar", "text", "hf", "in_context", "Mqar", "null", "two words"])
def test_a_task_takes_no_name_that_means_something_else(name: str) -> None:
    """A task called text would stand for files of text, and one called in_context would never be measured."""
    with pytest.raises(ValueError, match=f"task '{name}': (xattn already has|a name must)"):
        xattn.register_task(named(Copying, name))
    assert registry.additions() == ()


@pytest.mark.parametrize("name", ["mqar", "extrapolation"])
def test_a_probe_takes_no_name_of_a_task(name: str) -> None:
    with pytest.raises(ValueError, match="xattn already has this name"):
        xattn.register_probe(name)(lambda scene: scene)


def test_an_optimizer_takes_no_name_of_another() -> None:
    with pytest.raises(ValueError, match="optimizer 'sgd': xattn already has this name"):
        xattn.register_optimizer(named(SGD, "sgd"))


def test_what_inherits_all_but_its_name_is_known_by_the_users_file() -> None:
    """Its methods are in the package's file, which is in the source's digest anyway."""
    xattn.register_task(named(MQAR, "mine"))
    assert registered() == {Path(__file__).name: hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}


def test_without_a_file_it_is_known_by_its_source() -> None:
    digests = []
    for momentum in ("0.9", "0.8"):
        cell = f"def direction(self):\n    import optax\n\n    return optax.trace({momentum})\n"
        members: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(cell, "<cell 1>", "exec"), members)
        xattn.register_optimizer(
            type(
                "Cell",
                (SGD,),
                {
                    "__module__": "__main__",
                    "__annotations__": {"name": Literal["cell"]},
                    "direction": members["direction"],
                },
            )
        )
        digests.append(registered()["<cell 1>"])
    assert digests[0] != digests[1]


def test_a_class_that_is_registered_again_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a notebook's cell: its keys, its defaults, and no program of the old one is left."""
    forgotten: list[str] = []
    monkeypatch.setattr(registry, "caches", [lambda: forgotten.append("programs")])
    for default in (0.1, 0.2):

        class Mine(AdamW):
            name: Literal["mine"] = "mine"  # type: ignore[assignment]
            learning_rate: float = 1e-3
            weight_decay: float = default
            clip_norm: float | None = None
            beta1: float = 0.9
            beta2: float = 0.95
            eps: float = 1e-8

        xattn.register_optimizer(Mine)
        assert compose(["optimizer=mine"]).optimizer == Mine()
        assert isinstance(compose(["optimizer=mine"]).optimizer.direction(), optax.GradientTransformation)
    assert forgotten == ["programs"]
    with pytest.raises(BadInput, match=r"optimizer\.weight_decay = 'x': must be a valid number"):
        compose(["optimizer=mine", "optimizer.weight_decay=x"])
