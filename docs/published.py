"""Tables and sentences of README.md and findings.md, from the files of the studies in docs/findings/.

``cog -rP -I docs README.md docs/findings.md`` writes them, and a test checks that what stands there is what the files say.
A folder there has results.csv, effects.csv and verdict.json of ``outputs/STUDY/report/``, as ``xattn report`` wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

FOLDER = Path(__file__).parent / "findings"
EXPERIMENTS = Path(__file__).parent.parent / "conf" / "experiment"


def results(name: str) -> pd.DataFrame:
    """A row a run."""
    return pd.read_csv(FOLDER / name / "results.csv", keep_default_na=False, na_values=[""])


def verdict(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / name / "verdict.json").read_text("utf-8"))
    return found


def stated(name: str) -> dict[str, Any]:
    """What the study's experiment states: the config group ``finding``."""
    found: dict[str, Any] = yaml.safe_load((EXPERIMENTS / f"finding_{name}.yaml").read_text("utf-8"))["finding"]
    return found


def command(name: str) -> str:
    """``python train.py -m experiment=…``, from the head of the experiment's file."""
    lines = (EXPERIMENTS / f"finding_{name}.yaml").read_text("utf-8").splitlines()
    line = next(line for line in lines if line.startswith("# Command:"))
    return line.removeprefix("# Command:").partition("&&")[0].strip()


def minutes(name: str) -> int:
    """From the start of the first run to the end of the last one."""
    runs = results(name)
    start = pd.to_datetime(runs["started_at"])
    end = start + pd.to_timedelta(runs["wall_seconds"], unit="s")
    return round((end.max() - start.min()).total_seconds() / 60)


def signed(value: float | None, digits: int) -> str:
    """``−0.012``: with its sign, and a minus that is one."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def interval(mean: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    if mean is None:
        return "–"
    return f"{signed(mean, digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def overview(names: Sequence[str]) -> str:
    """A row a claim: what became of it, and what that took."""
    rows = []
    for number, name in enumerate(names, 1):
        found, runs = verdict(name)["finding"], results(name)
        anchor = f"[{number}]({f'#{number}-{name}'.replace('_', '-')})"
        seeds = min(contrast["seeds"] for contrast in found["contrasts"])
        took = [str(seeds), str(len(runs)), str(minutes(name))]
        rows.append([anchor, found["claim"], found["source"], f"**{found['verdict']}**", *took])
    return table(["", "claim", "source", "verdict", "seeds", "runs", "minutes"], rows)


def claim(name: str) -> str:
    """The claim, its command, and each contrast with what would have shown or contradicted it."""
    found = verdict(name)["finding"]
    rows = [
        [
            contrast["name"],
            interval(contrast["mean"], contrast["ci_low"], contrast["ci_high"]),
            *(f"`{contrast[key]}`" for key in ("shown", "contradicted")),
            f"**{contrast['verdict']}**",
        ]
        for contrast in found["contrasts"]
    ]
    head = f"> {found['claim']} ({found['source']}): **{found['verdict']}**"
    how = f"    {command(name)}"
    contrasts = table(["contrast", "mean over seeds [interval]", "shown if", "contradicted if", "verdict"], rows)
    return f"{head}\n\n{how}\n\n{contrasts}"


def means(name: str, rows: Sequence[str], columns: str, metric: str = "val_loss", where: str = "") -> str:
    """Means over seeds of the runs that are done, by the values of some keys. where: a pandas query on the columns."""
    runs = results(name)
    runs = runs.query(where) if where else runs
    found = runs.fillna({key: "null" for key in (*rows, columns)}).pivot_table(
        index=list(rows), columns=columns, values=metric, sort=False
    )
    found = found[sorted(found.columns, key=lambda value: (isinstance(value, str), value))]
    names = [key.rpartition(".")[2] for key in rows]
    lines = [
        [*(str(value) for value in (key if isinstance(key, tuple) else (key,))), *(f"{value:.3f}" for value in line)]
        for key, line in zip(found.index, found.to_numpy(), strict=True)
    ]
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in found.columns]
    return table([*names, *(f"{columns.rpartition('.')[2]} {value}" for value in shown)], lines)
