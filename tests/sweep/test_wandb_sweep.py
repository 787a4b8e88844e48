"""The sweep for wandb's agent, expanded as the agent does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import xattn.config
from xattn.errors import BadInput

SWEEP = Path(__file__).resolve().parent.parent.parent / "conf" / "wandb_sweep.yaml"


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_the_agents_command_is_one_that_composes(activation: str) -> None:
    """The agent's own functions expand it, with typical values. Its loop is wandb.wandb_agent.Agent._command_run."""
    sweep = yaml.safe_load(SWEEP.read_text("utf-8"))
    drawn = {"backend.activation": activation, "optimizer.learning_rate": 0.00031622776601683794, "seed": 2}
    assert drawn.keys() == sweep["parameters"].keys()
    macros: dict[str, Any] = create_sweep_command_args(
        {"args": {key: {"value": value} for key, value in drawn.items()}}
    )
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    words: list[str] = []
    for word in create_sweep_command(sweep["command"]):
        words += macros[word[2:-1]] if word.startswith("${") else [word]
    assert words[:3] == ["/usr/bin/env", "python", "train.py"]
    config = xattn.config.compose(words[3:])
    assert (config.backend.activation, config.seed, config.study) == (activation, 2, "wandb")
    assert config.optimizer.learning_rate == 0.00031622776601683794


def test_a_pattern_of_layers_is_swept_as_a_string() -> None:
    """A mapping would reach the command line in Python's syntax; docs/sweeps.md warns of that."""
    base = ["backend=none", "backend.every=2"]
    for then, composes in (("{activation: softmax}", True), ({"activation": "softmax"}, False)):
        (word,) = create_sweep_command_args({"args": {"backend.then": {"value": then}}})["args_no_hyphens"]
        if composes:
            assert xattn.config.compose([*base, word]).backend.kinds["then"].activation == "softmax"
        else:
            with pytest.raises(BadInput, match="not a valid Hydra override"):
                xattn.config.compose([*base, word])
