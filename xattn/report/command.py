"""``xattn report``: reads a study, judges it, writes outputs/<study>/report/."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from matplotlib.figure import Figure

from xattn import run_folder
from xattn.arguments import Parser
from xattn.errors import BadInput, ExitCode, storage_error
from xattn.report import figures
from xattn.report.checks import what_is_odd
from xattn.report.content import Findings, page_of
from xattn.report.cost import is_speed, why_speeds_differ
from xattn.report.curves import curves_of, loss_curves
from xattn.report.defaults import conf_defaults
from xattn.report.design import SEED, TUNED, find_design
from xattn.report.measures import STATISTICS, heads_of, probes_of
from xattn.report.read import ATTENTION_CURVES, REPORT, Study, read_study
from xattn.report.render import to_html, to_markdown
from xattn.report.selection import Selection, choose
from xattn.report.statistics import interactions, main_effects
from xattn.report.tables import effects_csv, results_csv, table_tex
from xattn.report.words import verdict

# The files of every figure that there can be.
_FIGURES = [
    f"{name}.{suffix}"
    for name in ("effects", "tuning-*", "curves-*", "stability", "attention-heads")
    for suffix in ("svg", "pdf")
]


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="xattn report", description="Judge a study and write its report.")
    parser.add_argument("study", type=Path, help="outputs/<study>")
    parser.add_argument(
        "--selection",
        choices=("same", "heldout"),
        default="same",
        help="choose the learning rate on the runs that are judged, or on other seeds",
    )
    parser.add_argument("--metric", default="val_loss", help="a number of summary.json (default: val_loss)")
    parser.add_argument(
        "--tuned",
        action="append",
        default=[],
        metavar="KEY",
        help=f"a key that was tuned for each arm, besides {', '.join(TUNED)}; may be given again",
    )
    asked = parser.parse_args(argv)
    study = read_study(asked.study)
    command = f"xattn report {shlex.join(argv)}"
    found = judge(study, metric=asked.metric, selection=asked.selection, tuned=asked.tuned, command=command)
    try:
        folder = write(found)
    except OSError as error:
        target = asked.study / REPORT
        raise storage_error(error, target) or BadInput(f"{target}: cannot be written: {error.strerror}") from error
    for effect in found.effects:
        print(f"{effect.factor}: {verdict(effect)}")
    if found.odd:
        print(f"{len(found.odd)} things are missing or odd; the page names them")
    print(f"report: {run_folder.shown(folder.absolute() / 'report.html')}")
    return ExitCode.DONE


def judge(study: Study, *, metric: str, selection: Selection, tuned: Sequence[str] = (), command: str = "") -> Findings:
    """All that the page says. Raises :class:`BadInput` where runs are done and none has the metric, and for a
    speed where speeds are not comparable."""
    done = [run for run in study.runs if run.status == "done"]
    if done and all(run.number(metric) is None for run in done):
        known = sorted({key for run in done for key in run.summary if run.number(key) is not None})
        nearest = difflib.get_close_matches(metric, known, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else f"; there are {', '.join(known[:12])}"
        raise BadInput(f"--metric {metric}: no run's summary.json has such a number{hint}")
    keys = sorted({key for run in done for key in run.config})
    for key in tuned:
        if keys and key not in keys:
            nearest = difflib.get_close_matches(key, keys, n=1)
            hint = f" (did you mean {nearest[0]}?)" if nearest else "; a key is, for example, backend.theta"
            raise BadInput(f"--tuned {key}: no run's config has it{hint}")
    design = find_design(study, conf_defaults(), (*TUNED, *tuned))
    chosen = choose(design, metric, selection)
    if is_speed(metric) and (why_not := why_speeds_differ(chosen.values())) is not None:
        raise BadInput(f"--metric {metric}: no verdict on speeds, because {why_not}; they stand in results.csv")
    effects = [effect for factor in design.factors for effect in main_effects(design, chosen, factor, metric)]
    probes_chosen = {probe: choose(design, probe, selection) for probe in probes_of(study.runs) if probe != metric}
    probes = {
        probe: [effect for factor in design.factors for effect in main_effects(design, at_chosen, factor, probe)]
        for probe, at_chosen in probes_chosen.items()
    }
    return Findings(
        study=study,
        design=design,
        chosen=chosen,
        effects=effects,
        interactions=interactions(design, chosen, metric),
        probes=probes,
        probes_chosen=probes_chosen,
        odd=what_is_odd(study, design, chosen, effects, selection),
        metric=metric,
        selection=selection,
        command=command,
    )


def write(found: Findings) -> Path:
    """Writes the report's files, each whole or not at all; returns their folder."""
    folder = found.study.folder / REPORT
    folder.mkdir(exist_ok=True)
    for old in (path for pattern in _FIGURES for path in folder.glob(pattern)):
        old.unlink()  # of a study that was another then: the page would not show it
    captions, svgs = {}, {}
    for name, figure, caption in _figures(found):
        svgs[name] = figures.save(figure, folder, name)
        captions[name] = caption
    for name, text in texts(found, captions, svgs).items():
        run_folder.write_atomically(folder / name, text)
    return folder


def texts(found: Findings, captions: Mapping[str, str], svgs: Mapping[str, str]) -> dict[str, str]:
    """File name → content, of the files that are text; the pages hold the figures that are given, by name."""
    page = page_of(found, captions)
    varying = [*(factor.key for factor in found.design.factors), *found.design.tuned, SEED]
    return {
        "report.html": to_html(page, svgs),
        "report.md": to_markdown(page),
        "table.tex": table_tex(found.design, found.effects, found.chosen, found.metric, found.command),
        "results.csv": results_csv(found.study.runs, varying, found.chosen, found.metric),
        "effects.csv": effects_csv([*found.effects, *chain.from_iterable(found.probes.values())]),
    }


def _figures(found: Findings) -> Iterator[tuple[str, Figure, str]]:
    if any(effect.paired.difference is not None for effect in found.effects):
        yield "effects", figures.forest(found.effects), "Difference of each arm to its baseline, paired by seed."
    for i, key in enumerate(found.design.tuned):
        figure = figures.rates(found.design, found.chosen, i)
        if figure is not None:
            caption = (
                f"Validation loss against {key}: the line is the mean over seeds, small marks are seeds, the ring is "
                "the value chosen, a cross at the top a value at which a seed diverged."
            )
            yield f"tuning-{key.rpartition('.')[2]}", figure, caption
    curves = loss_curves(found.chosen)
    comparable = why_speeds_differ(found.chosen.values()) is None
    for axis in ("steps", "tokens", *(["seconds"] if comparable else [])):
        figure = figures.learning_curves(found.design, curves, axis)
        if figure is not None:
            of = {"seconds": " Seconds are of training alone, as logged."}.get(axis, "")
            (loss,) = {curve.key for curve in curves.values()}
            caption = f"{loss} against {axis}: mean over seeds and their range; the other arms in grey.{of}"
            yield f"curves-{axis}", figure, caption
    watched = {key: curves_of(found.chosen, key) for key in ("grad_norm", *ATTENTION_CURVES)}
    if (figure := figures.stability(found.design, watched)) is not None:
        yield "stability", figure, "Means over seeds. The largest logit is the largest of all heads in each seed."
    maps = {
        name: {cell: each for cell, chosen in found.chosen.items() if (each := heads_of(chosen, key)) is not None}
        for key, name in STATISTICS.items()
        if key in ("effective_keys", "max_logit", "first_token", "output_norm")
    }
    if (figure := figures.heads(found.design, maps)) is not None:
        yield "attention-heads", figure, "Each head at the end of training; one scale for each row of panels."
