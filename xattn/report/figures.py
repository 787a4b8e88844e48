"""The report's figures: one colour per arm, from Okabe and Ito's palette, plus a marker and a dash of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from xattn.keys import show
from xattn.report.curves import AXES, Curve
from xattn.report.design import Cell, Design
from xattn.report.selection import Candidate, Chosen
from xattn.report.statistics import Effect
from xattn.report.words import better_is
from xattn.report.worth import Fitted
from xattn.runs import run_folder

# Okabe and Ito (2008), "Color Universal Design", without black and yellow, which vanish on dark and on light.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
PANELS = 12  # at most
_COLUMNS = 3
_HEAT_MAPS = 6  # columns, at most
# The page replaces these with its own colours, so that its figures follow light and dark. A separate SVG uses greys
# that are legible on white and on black: text has a contrast above 4 : 1 on both. A PDF is for paper and stays black.
_INK, _GRID, _FAINT = "#010203", "#dcdddd", "#c3c4c4"
_ON_PAGE = {_INK: "currentColor", _GRID: "var(--grid)", _FAINT: "var(--faint)"}
_ANYWHERE = {_INK: "#777b80", _GRID: "#80808040", _FAINT: "#80808070"}
# The style of all figures: both drawing and :func:`save` are done under ``mpl.rc_context(STYLE)``.
STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "xattn",
    "pdf.fonttype": 42,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


def forest(panels: Mapping[str, Mapping[str, Effect]], metric: str) -> Figure:
    """Plot title → arm → its difference to its baseline, with the interval that its verdict rests on."""
    counts = [len(arms) for arms in panels.values()]
    figure = Figure(figsize=(7, 0.8 * len(counts) + 0.35 * sum(counts) + 0.5), layout="constrained")
    rows = figure.subplots(len(counts), 1, squeeze=False, sharex=True, height_ratios=[n + 1 for n in counts])
    for axes, (title, arms) in zip(rows[:, 0], panels.items(), strict=True):
        axes.axvline(0, color=_INK, linewidth=0.8)
        for y, effect in enumerate(arms.values()):
            arm = y + 1  # 0 is the baseline
            if effect.paired.difference is None:
                continue
            axes.plot(effect.paired.difference, y, **_style(arm))
            found = effect.stage or effect.paired
            if found.ci_low is not None and found.ci_high is not None:
                axes.hlines(y, found.ci_low, found.ci_high, color=_style(arm)["color"], linewidth=2)
        axes.set_yticks(range(len(arms)), [*map(_plain, arms)])
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_title(_plain(title), loc="left")
        axes.grid(axis="y", visible=False)
    _sides(rows[-1, 0], metric)
    return figure


def _sides(axes: Axes, metric: str) -> None:
    """Label the axis, and mark the better side at its zero if the metric has one."""
    sides = {-1: ("better", "worse"), 1: ("worse", "better")}.get(better_is(metric))
    if sides is not None:
        for text, place, side in ((f"← {sides[0]}", -4, "right"), (f"{sides[1]} →", 4, "left")):
            where = ("data", "axes fraction")
            axes.annotate(text, (0, 0), (place, -18), xycoords=where, textcoords="offset points", va="top", ha=side)
    axes.set_xlabel(f"difference in {metric}, 95 % interval", labelpad=14 if sides else 4)


def difference_curves(factors: Mapping[str, Mapping[str, Curve]]) -> Figure | None:
    """Plot factor → arm → its difference to the baseline against steps: a panel per factor, a line per arm."""
    factors = {name: arms for name, arms in list(factors.items())[:PANELS] if arms}
    if not factors:
        return None
    figure, panels = _grid(len(factors), columns=2, sharey=False)
    for axes, (name, arms) in zip(panels, factors.items(), strict=True):
        axes.axhline(0, color=_INK, linewidth=0.8)
        settled = []
        for i, (arm, curve) in enumerate([*arms.items()][:PANELS], 1):
            steps, style = curve.x["steps"], _style(i)
            axes.fill_between(steps, curve.low, curve.high, color=style["color"], alpha=0.2, linewidth=0)
            dash = DASHES[i % len(DASHES)]
            axes.plot(steps, curve.mean, color=style["color"], linestyle=dash, label=_plain(arm))
            settled.append(curve.mean[len(curve.mean) // 10 :])  # arms may be far apart in the steep beginning
        values = np.concatenate([*settled, [0.0]])
        margin = 0.5 * float(np.ptp(values)) or 0.1
        axes.set_ylim(values.min() - margin, values.max() + margin)
        axes.set_title(_plain(name), loc="left")
        axes.legend()
        (key,) = {curve.key for curve in arms.values()}
        axes.set_ylabel(f"difference in {key}")
    _label(panels, "steps", None, columns=2)
    return figure


def rates(design: Design, chosen: Mapping[Cell, Chosen], i: int) -> Figure | None:
    """Plot validation loss against the i-th tuned key: mean over seeds and each seed; a ring marks the chosen value.

    Each combination of the factors but the first has a panel; the first factor's arms have the colours. A cross at the
    top marks a setting with diverged seeds. Return None if the key lacks two numeric values.
    """
    cells = [each for each in chosen.values() if each.candidates]
    values = {c.setting[i] for each in cells for c in each.candidates}
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return None
    groups = list(dict.fromkeys(each.cell[1:] for each in cells))[:PANELS]
    figure, panels = _grid(len(groups))
    for axes, group in zip(panels, groups, strict=True):
        for each in (each for each in cells if each.cell[1:] == group):
            colour = design.factors[0].arms.index(each.cell[0]) if design.factors else 0
            _rate_curve(axes, each, i, colour, _plain(show(each.cell[0]) if each.cell else "all runs"))
        if min(values) > 0:
            axes.set_xscale("log")
        axes.set_xticks(sorted(values), [_plain(show(value)) for value in sorted(values)])
        axes.minorticks_off()
        others = ", ".join(f"{f.name} {show(v)}" for f, v in zip(design.factors[1:], group, strict=True))
        axes.set_title(_plain(others), loc="left")
    _label(panels, design.tuned[i], "val_loss")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend()
    return figure


def learning_curves(design: Design, curves: Mapping[Cell, Curve], against: str) -> Figure | None:
    """Plot the mean loss over seeds with its 95 % interval: a panel per cell, the others behind it in grey."""
    shown = list(curves)[:PANELS]
    xs = {cell: curves[cell].x[against] for cell in shown if against in curves[cell].x}
    if not xs:
        return None
    top = max(curves[cell].mean[len(curves[cell].mean) // 10] for cell in xs)  # not of the steep beginning
    bottom = min(curves[cell].mean.min() for cell in xs)
    margin = 0.1 * (top - bottom) or 0.1
    figure, panels = _grid(len(xs))
    for axes, cell in zip(panels, xs, strict=True):
        for other in xs:
            if other != cell:
                axes.plot(xs[other], curves[other].mean, color=_FAINT, linewidth=0.8)
        colour = _style(design.factors[0].arms.index(cell[0]) if cell else 0)["color"]
        axes.fill_between(xs[cell], curves[cell].low, curves[cell].high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(xs[cell], curves[cell].mean, color=colour)
        axes.set_title(_plain(design.label(cell)), loc="left")
        axes.set_ylim(bottom - margin, top + margin)
    _label(panels, AXES[against], curves[shown[0]].key)
    return figure


def worth(laws: Sequence[Fitted], metric: str) -> Figure | None:
    """Plot the baseline's losses against its steps and the law through them, a panel for each law.

    A line leads from an arm's loss to the steps at which the law reaches it.
    """
    laws = laws[:PANELS]
    if not laws:
        return None
    figure, panels = _grid(len(laws), sharey=False)
    for axes, each in zip(panels, laws, strict=True):
        steps = np.geomspace(each.steps.min(), each.steps.max(), 100)
        axes.plot(steps, each.law.loss(steps), color=_style(0)["color"])
        axes.plot(each.steps, each.losses, linestyle="none", label="baseline", **_style(0))
        for i, (arm, points) in enumerate([*each.arms.items()][:PANELS], 1):
            for own, loss in points:
                reached = float(np.exp(each.law.log_steps(np.array([loss]))[0]))
                axes.plot([own, reached], [loss, loss], color=_style(i)["color"], linewidth=0.8)
            axes.plot(*zip(*points, strict=True), linestyle="none", label=_plain(arm), **_style(i))
        axes.set_xscale("log")
        axes.set_xticks(each.steps, [f"{own:,}" for own in each.steps])
        axes.minorticks_off()
        axes.set_title(_plain(each.label), loc="left")
        axes.legend()
    _label(panels, "steps", metric)
    return figure


def stability(design: Design, curves: Mapping[str, Mapping[Cell, Curve]]) -> Figure | None:
    """Plot the warning signs of divergence against steps: a panel for each measure, a line for each cell."""
    curves = {name: of_cells for name, of_cells in curves.items() if of_cells}
    if not curves:
        return None
    figure, panels = _grid(len(curves), columns=2, sharey=False)
    for axes, (name, of_cells) in zip(panels, curves.items(), strict=True):
        for i, (cell, curve) in enumerate(list(of_cells.items())[:PANELS]):
            arm, rest = (design.factors[0].arms.index(cell[0]), cell[1:]) if cell else (0, ())
            groups = list(dict.fromkeys(other[1:] for other in of_cells))
            dash = DASHES[(groups.index(rest) if len(groups) > 1 else i) % len(DASHES)]
            colour = _style(arm)["color"]
            axes.plot(curve.x["steps"], curve.mean, color=colour, linestyle=dash, label=_plain(design.label(cell)))
        low, high = (over([over(curve.mean) for curve in of_cells.values()]) for over in (min, max))
        if 0 < 10 * low < high:
            axes.set_yscale("log")
        axes.set_title(name.rpartition("/")[2].replace("_", " "), loc="left")
    _label(panels, "steps", "", columns=2)
    entries = panels[0].get_legend_handles_labels()
    columns = min(2, len(curves))
    figure.legend(*entries, loc="outside lower center", ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(entries[1]) // columns))
    return figure


def heads(design: Design, maps: Mapping[str, Mapping[Cell, np.ndarray]]) -> Figure | None:
    """Plot layer × head: a row of panels on one scale for each statistic, a column for each cell."""
    maps = {name: of_cells for name, of_cells in maps.items() if of_cells}
    if not maps:
        return None
    cells = list(dict.fromkeys(cell for of_cells in maps.values() for cell in of_cells))[:_HEAT_MAPS]
    figure = Figure(figsize=(1.4 + 1.3 * len(cells), 1.35 * len(maps) + 0.3), layout="constrained")
    panels = figure.subplots(len(maps), len(cells), squeeze=False, sharex=True, sharey=True)
    for axes, cell in zip(panels[0], cells, strict=True):
        axes.set_title(_plain(design.label(cell)).replace(", ", "\n"), fontsize=6.5)
    for axes in panels[-1]:
        axes.set_xlabel("head")
    for row, (name, of_cells) in zip(panels, maps.items(), strict=True):
        values = np.concatenate([of_cells[cell].ravel() for cell in cells if cell in of_cells])
        low, high = np.nanmin(values), np.nanmax(values)
        scale = LogNorm(low, high) if 0 < 20 * low < high else Normalize(low, high)
        for axes, cell in zip(row, cells, strict=True):
            axes.grid(visible=False)
            if cell in of_cells:
                mesh = axes.pcolormesh(of_cells[cell], cmap="cividis", norm=scale, edgecolor="none")
                layers, count = of_cells[cell].shape
                axes.set_xticks(*_numbered(count))
                axes.set_yticks(*_numbered(layers))
                axes.set_ylim(layers, 0)
        row[0].set_ylabel("layer")
        figure.colorbar(mesh, ax=list(row), label=name, shrink=0.9)
    return figure


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write name.svg and name.pdf; return the SVG for the page: its elements alone, in the page's colours."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    figure.set_layout_engine("none")  # the layout is done; do not repeat it
    pdf = io.BytesIO()
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    run_folder.write_atomically(folder / f"{name}.svg", _coloured(text.getvalue(), _ANYWHERE), shared=True)
    run_folder.write_atomically(folder / f"{name}.pdf", pdf.getvalue(), shared=True)
    return _for_the_page(text.getvalue(), name)


def _for_the_page(svg: str, name: str) -> str:
    """Return the SVG without the XML around it, which HTML rejects, and with ids unique among the page's figures."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return _coloured(svg, _ON_PAGE)


def _coloured(svg: str, colours: Mapping[str, str]) -> str:
    for ours, theirs in colours.items():
        svg = svg.replace(ours, theirs)
    return svg


def _rate_curve(axes: Axes, each: Chosen, i: int, colour: int, label: str) -> None:
    """Plot, at each value of the i-th tuned key, the best of the candidates that have it."""
    style = _style(colour)
    at_value: dict[float, list[Candidate]] = {}
    for candidate in each.candidates:
        at_value.setdefault(candidate.setting[i], []).append(candidate)
    best = {x: min(found, key=lambda candidate: candidate.rank(each.shared)) for x, found in at_value.items()}
    for x, candidate in best.items():
        if candidate.diverged:
            axes.plot(x, 0.97 - 0.04 * colour, "x", color=style["color"], transform=axes.get_xaxis_transform())
    xs = sorted(x for x, candidate in best.items() if candidate.losses)
    if not xs:
        return
    means = [np.mean([*best[x].losses.values()]) for x in xs]
    axes.plot(xs, means, linestyle=DASHES[colour % len(DASHES)], markersize=4, label=label, **style)
    for x in xs:
        losses = [*best[x].losses.values()]
        axes.plot([x] * len(losses), losses, linestyle="none", markersize=2.5, alpha=0.5, **style)
    if (x := each.setting[i]) in xs:
        axes.plot(x, means[xs.index(x)], "o", markersize=9, markerfacecolor="none", color=style["color"])


def _style(arm: int) -> dict[str, Any]:
    return {"color": COLOURS[arm % len(COLOURS)], "marker": MARKERS[arm % len(MARKERS)]}


def _numbered(count: int) -> tuple[np.ndarray, list[str]]:
    """Return ticks at the centres of a heat map's squares, at most eight."""
    shown = np.unique(np.linspace(0, count - 1, min(count, 8)).round().astype(int))
    return shown + 0.5, [str(i) for i in shown]


def _grid(count: int, columns: int = _COLUMNS, *, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    width = 4.5 if columns == 1 else 9
    figure = Figure(figsize=(width, 2.5 * rows + 0.3), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=sharey).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _label(panels: Sequence[Axes], x: str, y: str | None, columns: int = _COLUMNS) -> None:
    """Label the lowest panel of each column and the first of each row; None leaves the y axes unchanged."""
    columns = min(columns, len(panels))
    for axes in panels[-columns:]:
        axes.set_xlabel(x)
        axes.tick_params(labelbottom=True)
    if y is not None:
        for axes in panels[::columns]:
            axes.set_ylabel(y)


def _plain(text: str) -> str:
    """Escape dollar signs: matplotlib would read the text between two as mathematics."""
    return text.replace("$", r"\$")
