"""Studies on disk, of simulated run folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xattn.report import figures

from .folders import Writer

_FONTS = figures.STYLE["pdf.fonttype"]


@pytest.fixture(autouse=True)
def _quick_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw letters as shapes: a font's subset for a PDF takes longer than all the rest of a figure."""
    monkeypatch.setitem(figures.STYLE, "pdf.fonttype", 3)


@pytest.fixture
def fonts_of_reports(_quick_fonts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embed fonts as users' reports do."""
    monkeypatch.setitem(figures.STYLE, "pdf.fonttype", _FONTS)


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "outputs" / "study")


@pytest.fixture
def write_study(writer: Writer) -> Callable[..., Writer]:
    """Write activations × learning rates × seeds: sigmoid is 0.05 worse, none 0.2, and 1e-3 is the best rate."""

    def write(seeds: int = 3, rows: int = 40, arms: tuple[str, ...] = ("softmax", "sigmoid", "none")) -> Writer:
        rng = np.random.default_rng(1)
        common = 0.03 * rng.standard_normal(seeds)
        for arm in arms:
            for rate, worse in ((3e-4, 0.1), (1e-3, 0.0), (3e-3, 0.06)):
                for seed in range(seeds):
                    effect = {"softmax": 0.0, "sigmoid": 0.05, "none": 0.2}[arm]
                    loss = 2.0 + effect + worse + float(common[seed] + 0.005 * rng.standard_normal())
                    keys = {"backend.activation": arm, "optimizer.learning_rate": rate, "seed": seed}
                    writer.run(keys, loss, rows=rows)
        return writer

    return write
