"""Each key is documented once, in the config's classes; the command, the page and the schema agree with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from xattn import cli
from xattn.commands import explain
from xattn.config import CONF, compose
from xattn.keys import flatten

DOCS = CONF.parent / "docs"


def partial(text: str) -> Any:
    """As omegaconf reads it: 1e-3 is a number there, and text to YAML 1.1."""
    values = yaml.safe_load(text) or {}

    def numbers(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: numbers(value) for key, value in node.items()}
        if isinstance(node, list):
            return [numbers(value) for value in node]
        try:
            return float(node) if isinstance(node, str) else node
        except ValueError:
            return node

    return numbers(values)


def test_every_key_has_a_meaning_a_rule_and_a_default() -> None:
    for entry in explain.entries():
        assert entry.meaning.endswith("."), entry
        assert entry.values, entry
        assert entry.default, entry
    keys = {entry.key for entry in explain.entries()}
    composed = {key for key, _ in flatten(compose().model_dump(mode="json"))} - {"data.name", "optimizer.name"}
    assert composed <= keys


@pytest.mark.parametrize(("flag", "file"), [("--markdown", "configuration.md"), ("--schema", "config.schema.json")])
def test_the_page_and_the_schema_are_up_to_date(flag: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", flag]) == 0
    assert capsys.readouterr().out == (DOCS / file).read_text("utf-8"), f"xattn explain {flag} > docs/{file} writes it"


@pytest.mark.parametrize("file", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_schema_takes_every_experiment(file: Path) -> None:
    jsonschema.validate(partial(file.read_text("utf-8")), explain.schema())


@pytest.mark.parametrize(
    "text", ["model: {num_layer: 2}", "backend: {activation: softmx}", "optimizer: {momentum: 2}", "seed: -1", "sed: 1"]
)
def test_the_schema_refuses_a_mistake(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(partial(text), explain.schema())


def test_a_key_is_explained_with_its_choices_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "model.qk_norm", "optimizer.momentum"]) == 0
    out = capsys.readouterr().out
    assert "model.qk_norm\n  none | rmsnorm; default: rmsnorm\n  ``rmsnorm`` normalises each query" in out
    assert "optimizer.momentum   (optimizer=muon)\n  a number ≥ 0 and < 1; default: 0.95\n" in out
    assert "optimizer.momentum   (optimizer=sgd)\n  a number ≥ 0 and < 1; default: 0.9\n" in out
    assert cli.main(["explain", "backend"]) == 0
    assert "backend=fox " in (out := capsys.readouterr().out)
    assert "  backend.theta = 10000 " in out
    assert cli.main(["explain", "modl.qk_norm"]) == 2
    assert "modl.qk_norm: no such key (did you mean model.qk_norm?)" in capsys.readouterr().err


def test_help_shows_beside_each_value_what_it_may_be() -> None:
    shown = explain.annotated("optimizer:\n  name: sgd\n  momentum: 0.9\nbackend:\n  decay: none\nnew: 1").splitlines()
    assert [line.split() for line in shown] == [
        ["optimizer:"],
        ["name:", "sgd"],
        ["momentum:", "0.9", "#", "a", "number", "≥", "0", "and", "<", "1"],
        ["backend:"],
        ["decay:", "none", "#", "none", "|", "alibi", "|", "retnet", "|", "learned", "|", "input"],
        ["new:", "1"],
    ]


def test_a_registered_activation_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from xattn.backend import activations

    monkeypatch.setattr(activations, "_TABLE", dict(activations._TABLE))
    explain.entries.cache_clear()
    activations.register_activation("relu")(lambda logits, n: logits)
    (entry,) = (entry for entry in explain.entries() if entry.key == "backend.activation")
    assert entry.values == "softmax | sigmoid | none | relu"
    explain.entries.cache_clear()
    assert "relu" not in json.dumps(explain.schema()["$defs"]["LayerConfig"]["properties"]["sink"])
