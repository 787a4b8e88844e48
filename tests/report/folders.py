"""Simulated run folders: a run's files without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

DEFAULT: dict[str, dict[str, Any]] = {
    "backend": {"activation": "softmax", "qk_pre_activation": "none", "theta": 10000.0, "context_length": 128},
    "data": {"name": "python_stdlib", "tokenizer": "bytes", "documents": "joined"},
    "optimizer": {"learning_rate": 0.003, "weight_decay": 0.1, "name": "adamw"},
    "trainer": {"steps": 200, "batch_size": 16, "checkpoint_every": 100},
    "tracking": {"wandb": {"mode": "disabled"}},
}
PROVENANCE = {
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "git_dirty": False,
    "versions": {"jax": "0.10.2", "python": "3.11.7"},
    "device_kind": "cpu",
    "device_count": 1,
    "process_count": 1,
    "data_sha256": "d" * 64,
    "source_sha256": "5" * 64,
    "host": "here",
    "started_at": "2026-01-01T00:00:00+00:00",
}


def metrics(loss: float, rows: int, seed: int, steps: int) -> str:
    """Return a noisy curve that falls from 5.5 to the loss; every tenth row has an evaluation too."""
    noise = 0.02 * np.random.default_rng(seed).standard_normal(rows)
    lines = []
    for i in range(rows):
        step = (i + 1) * steps // rows
        value = loss + (5.5 - loss) * float(np.exp(-6 * (i + 1) / rows))
        row: dict[str, Any] = {"step": step, "train_loss": value + float(noise[i]), "learning_rate": 1e-3}
        row |= {"grad_norm": 1 + abs(float(noise[i])), "param_norm": 18.5, "tokens_per_second": 40000.0 + i % 7}
        if (i + 1) % max(1, rows // 10) == 0:
            row |= {"val_loss": value, "val_bpb": value * 1.44}
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


_Dumper = yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper


class Writer:
    """Writes run folders below one study's folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)

    def run(
        self,
        overrides: Mapping[str, Any],
        loss: float | None = 2.0,
        *,
        name: str | None = None,
        status: str = "done",
        rows: int = 40,
        summary: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a run with these overrides of the default config, which ended at this val_loss."""
        config: dict[str, Any] = {group: dict(values) for group, values in DEFAULT.items()}
        config |= {"seed": 0, "study": self.folder.name, "resume": "auto"}
        for key, value in overrides.items():
            group, _, leaf = key.rpartition(".")
            (config.setdefault(group, {}) if group else config)[leaf] = value
        path = self.folder / (name or "-".join(f"{k.rpartition('.')[2]}{v}" for k, v in overrides.items()))
        path.mkdir()
        typed = [f"{key}={value}" for key, value in overrides.items()]
        (path / "config.yaml").write_text(yaml.dump(config, Dumper=_Dumper, sort_keys=False))
        (path / "overrides.yaml").write_text(yaml.dump(typed, Dumper=_Dumper))
        (path / "provenance.json").write_text(json.dumps(PROVENANCE | dict(provenance or {})))
        found = {"status": status, "step": 200, "val_loss": loss, "val_bpb": None if loss is None else loss * 1.44}
        found |= {"tokens_per_second": 40000.0, "num_params": 900_000, "flops_per_step": 4_000_000_000}
        found |= {
            "compile_seconds": 5.0,
            "peak_memory_bytes": 100_000_000,
            "packed_with": 1,
            "implementation": "reference",
        }
        (path / "summary.json").write_text(json.dumps(found | dict(summary or {})))
        steps = config["trainer"]["steps"]
        (path / "metrics.jsonl").write_text(metrics(loss or 3.0, rows, config["seed"], steps))
        return path
