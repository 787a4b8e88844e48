"""Every preset names its source and its differences, is short, and appears in the help and on its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from xattn.config import CONF, compose, differences

ROOT = CONF.parent
PRESETS = {
    f"{file.parent.name}={file.stem}": file
    for folder in ("backend", "experiment")
    for file in sorted((CONF / folder).glob("*.yaml"))
    if "# Exact:" in file.read_text("utf-8")
}
ACTIVATIONS = {"backend=softmax", "backend=sigmoid", "backend=none"}


def listed(text: str) -> list[str]:
    """backend=a, b, experiment=c → backend=a, backend=b, experiment=c."""
    found = []
    for group, names in re.findall(r"(backend|experiment)=((?:\w+(?:, (?!experiment=))?)+)", text):
        found += [f"{group}={name}" for name in names.split(", ") if name]
    return found


@pytest.mark.parametrize("file", PRESETS.values(), ids=PRESETS)
def test_a_preset_is_short_and_says_its_source(file: Path) -> None:
    lines = file.read_text("utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert sum(bool(line) and line not in head for line in lines) <= 8
    text = "\n".join(head)
    assert re.search(r"arXiv \d{4}\.\d{5}|\w+, 20\d\d", text)
    assert text.index("# Exact: ") < text.index("# Different: ")
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("typed", PRESETS)
def test_a_preset_changes_attention_and_nothing_else(typed: str) -> None:
    """Those in backend only the keys of backend, those in experiment some of the model's."""
    changed = set(differences(compose(), compose([typed])))
    assert changed
    is_of_model = {key for key in changed if key.startswith("model.")}
    assert bool(is_of_model) == typed.startswith("experiment=")
    assert all(key.startswith("backend.") for key in changed - is_of_model)


def test_the_help_lists_each_activation_and_preset() -> None:
    text = yaml.safe_load((CONF / "hydra" / "help" / "xattn.yaml").read_text("utf-8"))["template"]
    groups = text[text.index("Attentions (") : text.index("Choices (")]
    assert set(listed(groups)) == PRESETS.keys() | ACTIVATIONS


def test_the_help_fits_eighty_columns() -> None:
    text = yaml.safe_load((CONF / "hydra" / "help" / "xattn.yaml").read_text("utf-8"))["template"]
    assert max(map(len, text.replace("${program:}", "python train.py").splitlines())) <= 80


def test_the_page_lists_each_preset_once_and_runs_all_of_them() -> None:
    text = (ROOT / "docs" / "attention.md").read_text("utf-8")
    described, results = (
        sorted(re.findall(r"^\| `((?:backend|experiment)=\w+)` \|", part, re.MULTILINE))
        for part in text.split("## Results")
    )
    assert described == sorted(PRESETS)
    assert results == sorted([*PRESETS, *ACTIVATIONS])
    commands = "\n".join(line for line in text.splitlines() if "study=presets" in line)
    assert sorted(listed(commands.replace(",", ", "))) == sorted(PRESETS.keys() | ACTIVATIONS)


@pytest.mark.parametrize(
    ("typed", "override", "changed"),
    [
        ("experiment=gemma3", "backend.then.theta=500", "backend.then.theta"),
        ("experiment=gemma3", "backend.every=3", "backend.every"),
        ("backend=gpt_oss", "backend.window=16", "backend.window"),
        ("backend=smollm3", "+backend.then.window=32", "backend.then.window"),
        ("backend=hybrid", "backend.then.rotary_fraction=0.5", "backend.then.rotary_fraction"),
        ("backend=fox", "backend.rotary_fraction=1", "backend.rotary_fraction"),
    ],
)
def test_a_preset_is_a_place_to_start_from(typed: str, override: str, changed: str) -> None:
    assert list(differences(compose([typed]), compose([typed, override]))) == [changed]
