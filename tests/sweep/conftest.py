"""A run so small that a study of many takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.plugins import Plugins

Plugins.instance()  # executes the modules of hydra_plugins again: earlier imports would have other classes


@pytest.fixture(scope="session")
def tiny(text_file: Path) -> list[str]:
    return [
        *("trainer=debug", "tracking.wandb.mode=disabled", "data=text", f"data.path={text_file}"),
        *("model.embedding_dim=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16"),
        *("backend.context_length=16", "evaluation.sequences=8"),
    ]
