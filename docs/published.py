"""Tables and sentences of README.md and findings.md, from the files of the studies in docs/findings/.

``cog -rP -I docs README.md docs/findings.md`` writes them, and a test checks that the pages agree with the
files. A folder has results.csv, effects.csv and verdict.json of ``outputs/STUDY/report/``, as ``xattn report`` wrote
them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

FOLDER = Path(__file__).parent / "findings"
EXPERIMENTS = Path(__file__).parent.parent / "conf" / "experiment"

CLAIMS = {
    "qk_norm": "QK-norm and learning rates",
    "sigmoid_bias": "Sigmoid and its bias",
    "recall": "Recall and the width of a head",
    "induction": "Induction and depth",
    "length": "Positions beyond the length of training",
    "hybrids": "Hybrids",
    "forget_gates": "Forget gates",
    "zoology": "Zoology's smallest cell",
}


def results(name: str) -> pd.DataFrame:
    """Return one row per run, with all values as text."""
    return pd.read_csv(FOLDER / name / "results.csv", dtype=str, keep_default_na=False)


def verdict(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / name / "verdict.json").read_text("utf-8"))
    return found


def command(name: str) -> str:
    """Return ``python train.py -m experiment=…``, from the comment at the top of the experiment's file."""
    lines = (EXPERIMENTS / f"finding_{name}.yaml").read_text("utf-8").splitlines()
    line = next(line for line in lines if line.startswith("# Command:"))
    return line.removeprefix("# Command:").partition("&&")[0].strip()


def setting(name: str) -> str:
    """Return the comment below the command at the top of the experiment's file."""
    lines = (EXPERIMENTS / f"finding_{name}.yaml").read_text("utf-8").splitlines()
    head = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    start = next(i for i, line in enumerate(head) if line.startswith("Command:"))
    return "\n".join(head[start + 1 :])


def minutes(name: str) -> float:
    """Return the minutes from the start of the first run to the end of the last one."""
    runs = results(name)
    start = pd.to_datetime(runs["started_at"])
    end = start + pd.to_timedelta(pd.to_numeric(runs["wall_seconds"]), unit="s")
    return float((end.max() - start.min()).total_seconds()) / 60


def signed(value: float | None, digits: int) -> str:
    """Return the number with its sign, as in ``−0.012``, with a true minus sign."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def interval(mean: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    if mean is None:
        return "–"
    return f"{signed(mean, digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def overview() -> str:
    """Return a table with one row per claim: its verdict, and what it took."""
    rows = []
    for number, (name, title) in enumerate(CLAIMS.items(), 1):
        found, runs = verdict(name)["finding"], results(name)
        seeds = min(contrast["seeds"] for contrast in found["contrasts"])
        took = [str(seeds), str(len(runs)), f"{minutes(name):.0f}"]
        rows.append(
            [f"[{number}. {title}](#{_anchor(number, title)})", found["claim"], f"**{found['verdict']}**", *took]
        )
    return table(["", "claim", "verdict", "seeds", "runs", "minutes"], rows)


def claim(name: str) -> str:
    """Return the claim, its command, and each contrast with what would have shown or contradicted it."""
    found, number = verdict(name)["finding"], list(CLAIMS).index(name) + 1
    rows = [
        [
            contrast["name"],
            interval(contrast["mean"], contrast["ci_low"], contrast["ci_high"]),
            *(f"`{contrast[key]}`" for key in ("shown", "contradicted")),
            f"**{contrast['verdict']}**",
        ]
        for contrast in found["contrasts"]
    ]
    contrasts = table(["contrast", "mean over seeds [interval]", "shown if", "contradicted if", "verdict"], rows)
    head = f"## {number}. {CLAIMS[name]}\n\n> {found['claim']} ({found['source']})"
    return f"{head}\n\n    {command(name)}\n\n{setting(name)}\n\nThe claim is **{found['verdict']}**.\n\n{contrasts}"


def _anchor(number: int, title: str) -> str:
    """Return the heading's anchor on GitHub."""
    return re.sub(r"[^\w -]", "", f"{number}. {title}".lower()).replace(" ", "-")


def means(name: str, rows: Sequence[str], columns: str, metric: str = "val_loss") -> str:
    """Return a table of means over the seeds of finished runs, by the values of some keys."""
    runs = results(name).query("status == 'done'")
    runs = runs.assign(number=pd.to_numeric(runs[metric])).replace("", "null")
    found = runs.pivot_table(index=list(rows), columns=columns, values="number", sort=False)
    found = found[sorted(found.columns, key=_by_size)].sort_index(key=lambda values: values.map(_by_size))
    lines = [
        [*(key if isinstance(key, tuple) else (key,)), *(f"{value:.3f}" if value == value else "–" for value in line)]
        for key, line in zip(found.index, found.to_numpy(), strict=True)
    ]
    names = [key.rpartition(".")[2] for key in (*rows, columns)]
    return table([*names[:-1], *(f"{names[-1]} {value}" for value in found.columns)], lines)


def _by_size(value: str) -> tuple[int, float, str]:
    """Return a sort key that puts numbers first."""
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


def lengths(name: str) -> str:
    """Return a table of the loss at the training length and beyond, by the kind of positions."""
    kinds = {
        ("none", "1.0"): "RoPE",
        ("none", "0.0"): "NoPE",
        ("alibi", "0.0"): "ALiBi",
        ("input", "0.0"): "forget gate",
    }
    runs = results(name)
    columns = ["val_loss", *(f"probe/extrapolation/loss_to_{length}" for length in (128, 256, 512, 1024))]
    rows = []
    for (decay, fraction), kind in kinds.items():
        of_kind = runs[(runs["backend.decay"] == decay) & (runs["backend.rotary_fraction"] == fraction)]
        rows.append([kind, *(f"{pd.to_numeric(of_kind[column]).mean():.3f}" for column in columns)])
    return table(
        ["positions", "val_loss", *(f"tokens to the {column.rpartition('_')[2]}th" for column in columns[1:])], rows
    )


def hybrids(name: str) -> str:
    """Return a table of loss on text and accuracy of recall, by how many of the four layers have softmax."""
    runs = results(name)
    every = runs["backend.every"]
    rows = []
    for share, where in (
        ("all", runs["backend.activation"] == "softmax"),
        ("every second", every == "2"),
        ("the fourth", every == "4"),
        ("none", (every == "") & (runs["backend.activation"] == "none")),
    ):
        text = pd.to_numeric(runs[where & (runs["data.name"] == "python_stdlib")]["val_loss"]).mean()
        recall = pd.to_numeric(runs[where & (runs["data.name"] == "mqar")]["probe/mqar/accuracy"]).mean()
        rows.append([share, f"{text:.3f}", f"{recall:.3f}"])
    return table(["layers with softmax", "val_loss of text", "accuracy of recall"], rows)


def plain_run(name: str) -> str:
    """Say what one run reaches, and what simpler ways to code the same text need, according to its log."""
    (run,) = results(name).to_dict("records")
    log = (FOLDER / name / "log.txt").read_text("utf-8")
    entropy, gzip = re.findall(r"(?:entropy|gzip) ([\d.]+)", log)
    took = f"{round(float(run['wall_seconds']), -1):.0f} seconds on two cores"
    found = f"{float(run['val_bpb']):.2f} bits per byte of held-out source code"
    others = f"where gzip needs {float(gzip):.2f} and the entropy of single bytes is {float(entropy):.2f}"
    return f"`python train.py` trains for {took} and reaches {found}, {others}."


def first_answer(name: str) -> str:
    """Say how long a study of two arms took, and quote its last line."""
    (effect,) = verdict(name)["effects"]
    day, version = results(name)["started_at"].min()[:10], results(name)["git_commit"].iloc[0][:7]
    took = f"{minutes(name):.1f} minutes after its first run began, on two idle cores ({day}, commit {version}),"
    return f"{took} this command ended with\n\n> {effect['factor']}: {effect['sentence']}"


SWITCHES = {
    "model.output_gate": "output gate",
    "model.exclusive": "exclusive attention",
    "model.value_residual": "value residual",
    "backend.rotary_fraction": "RoPE on half of the channels",
    "model.conv": "short convolution",
    "backend.sink": "learned sink",
    "backend.logit_scale": "logits × 2",
    "model.num_kv_heads": "two key/value heads of four",
    "model.qk_norm": "no QK-norm",
    "backend.decay": "forget gate",
}


def switches(name: str) -> str:
    """Return one row per arm, the best first: difference, worth in steps, time per step, and the quotient of the two.

    The time is from the study NAME_speed, which had the machine to itself: the median over its seeds, and the range.
    """
    speed, rows = results(f"{name}_speed"), []
    for effect in sorted(_effects(name), key=lambda effect: effect["difference"]):
        stage, key, steps = effect["two_stage"], effect["factor"], effect["worth"]["steps"]
        ours, theirs = (_speeds(speed, key, effect[side]) for side in ("arm", "baseline"))
        cost = (theirs / ours).dropna()
        rows.append(
            [
                SWITCHES[key],
                f"`{key}={effect['arm']}`",
                interval(effect["difference"], stage["ci_low"], stage["ci_high"]),
                str(effect["seeds"]),
                "< 0.001" if effect["p_holm"] < 0.001 else f"{effect['p_holm']:.3f}",
                f"× {steps['value']:.2f} [{steps['low']:.2f}, {steps['high']:.2f}]",
                f"× {cost.median():.2f} ({cost.min():.2f}–{cost.max():.2f})",
                f"× {steps['value'] / cost.median():.2f}",
            ]
        )
    columns = ["switch", "key", "val_loss, arm − baseline [95 %]", "seeds", "p (Holm)", "worth in steps"]
    return table([*columns, "time per step", "net"], rows)


def _effects(name: str) -> list[dict[str, Any]]:
    return [effect for effect in verdict(name)["effects"] if effect["factor"] in SWITCHES]


def _speeds(runs: pd.DataFrame, key: str, value: str) -> pd.Series:
    """Return seed → tokens per second of the arm with that value of the key and the baseline's values of all others."""
    keys = [other for other in SWITCHES if other != key]
    most = {other: runs[other].mode().iloc[0] for other in keys}
    typed = "" if value == "null" else value
    is_ours = runs[key].map(_by_size) == _by_size(typed)
    for other in keys:
        is_ours &= runs[other] == most[other]
    return pd.to_numeric(runs[is_ours].set_index("seed")["tokens_per_second"])


def switches_in_words(name: str) -> str:
    """Say which switches help, which hurt, and which show no difference."""
    sides: dict[str, list[str]] = {"Better": [], "Worse": [], "No difference shown": []}
    for effect in sorted(_effects(name), key=lambda effect: effect["difference"]):
        stage = effect["two_stage"]
        side = "Better" if stage["ci_high"] < 0 else "Worse" if stage["ci_low"] > 0 else "No difference shown"
        sides[side].append(SWITCHES[effect["factor"]])
    sentences = " ".join(f"{side}: {', '.join(names)}." for side, names in sides.items() if names)
    widest = max((each["two_stage"]["ci_high"] - each["two_stage"]["ci_low"]) / 2 for each in _effects(name))
    return f"{sentences} All are known to ±{widest:.3f}: {len(results(name))} runs in {minutes(name):.0f} minutes."


def picture(name: str) -> str:
    """Return the path of the picture of the arms' differences; draw it unless the file shows these effects already."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path, made_of = FOLDER / f"{name}.svg", digest(name)
    if not path.is_file() or made_of not in path.read_text("utf-8"):
        effects = sorted(_effects(name), key=lambda effect: -effect["difference"])
        style = {"svg.fonttype": "none", "svg.hashsalt": "xattn", "font.size": 9, "font.family": "sans-serif"}
        ink = dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#777b80"
        )
        with mpl.rc_context(style | ink):
            figure = Figure(figsize=(7, 3.4), layout="constrained")
            axes = figure.subplots()
            axes.axvline(0, color="#777b80", linewidth=0.8)
            for y, effect in enumerate(effects):
                low, high = (effect["two_stage"][end] for end in ("ci_low", "ci_high"))
                colour = "#0072B2" if high < 0 else "#D55E00" if low > 0 else "#777b80"
                axes.hlines(y, low, high, color=colour, linewidth=2)
                axes.plot(effect["difference"], y, "o", color=colour, markersize=5)
            axes.set_yticks(range(len(effects)), [SWITCHES[effect["factor"]] for effect in effects])
            axes.set_xlabel("← better  ·  difference in val_loss, nats a byte  ·  worse →")
            axes.grid(axis="x", color="#80808040", linewidth=0.6)
            axes.spines[["top", "right", "left"]].set_visible(False)
            figure.savefig(path, metadata={"Date": None, "Description": made_of}, transparent=True)
    return f"findings/{name}.svg"


def digest(name: str) -> str:
    """Return the SHA-256 of the verdict that the picture shows."""
    return hashlib.sha256((FOLDER / name / "verdict.json").read_bytes()).hexdigest()
