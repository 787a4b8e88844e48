"""Attention maps as a picture, with a panel for each layer and head."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np

from xattn.evaluation.attention import AttentionStatistics

_PANEL = 1.1  # inches
_MOST = 16  # layers, and heads; if there are more, evenly spaced ones are shown


def draw(found: AttentionStatistics, path: Path, *, step: int) -> None:
    """Write the PNG. Dark means a large share of a row's weight. The scale is the square root from 0 to 1 in every run,
    so pictures can be compared."""
    from matplotlib.figure import Figure  # takes half a second, and only runs with pictures need it

    maps = np.asarray(jax.device_get(found.maps))
    layers, heads = (np.unique(np.linspace(0, n - 1, min(n, _MOST)).round().astype(int)) for n in maps.shape[:2])
    size = (_PANEL * len(heads) + 0.4, _PANEL * len(layers) + 0.5)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(f"step {step}: queries downwards, keys to the right", fontsize=7)
    panels = figure.subplots(len(layers), len(heads), squeeze=False)
    for row, layer in zip(panels, layers, strict=True):
        for axes, head in zip(row, heads, strict=True):
            axes.imshow(np.sqrt(maps[layer, head]), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
            axes.set(xticks=[], yticks=[])
            if layer == layers[0]:
                axes.set_title(f"head {head}", fontsize=7)
            if head == heads[0]:
                axes.set_ylabel(f"layer {layer}", fontsize=7)
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})
    os.replace(temporary, path)
