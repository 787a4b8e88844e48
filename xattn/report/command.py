"""``xattn report``: reads a study, judges it, and writes outputs/<study>/report/."""

from __future__ import annotations

import os
import re
import shlex
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import matplotlib as mpl
from matplotlib.figure import Figure

from xattn.errors import BadInput, ExitCode, writing
from xattn.keys import short, show
from xattn.report import figures
from xattn.report.answer import Answer, Comparison
from xattn.report.content import page_of, prefix, where
from xattn.report.cost import why_speeds_differ
from xattn.report.curves import AXES, Curve, curves_of, difference_curve, loss_curves
from xattn.report.design import STEPS
from xattn.report.judge import judge
from xattn.report.measures import STATISTICS, heads_of
from xattn.report.metric import is_of_text
from xattn.report.options import add_question, pairs, question_of
from xattn.report.read import ATTENTION_CURVES, REPORT, Study, read_study
from xattn.report.render import to_html, to_markdown
from xattn.report.statistics import Effect, matched
from xattn.report.tables import effects_table, results_table, table_tex, to_csv
from xattn.report.verdict import verdict_of
from xattn.report.words import verdict
from xattn.report.worth import laws
from xattn.runs import run_folder
from xattn.system.arguments import Parser
from xattn.system.screen import counted, say

_PAGE = "report.html"
_DRAWN = 5  # comparisons with figures, at most
_NAMES = f"effects|worth|differences|tuning-.*|curves-({'|'.join(AXES)})|stability|attention-heads"
_FIGURE = re.compile(rf"([2-{_DRAWN}]-)?({_NAMES})\.(svg|pdf)")  # the name of every possible figure's file
_EPILOG = """examples:
  xattn report outputs/first
  xattn report outputs/default --where backend.context_length=128 --seeds 0,1,2
  xattn report outputs/first --baseline backend.activation=sigmoid --out other
  xattn report outputs/first --json"""


def main(argv: Sequence[str], publish: Callable[[Study, Path, bool], str | None] | None = None) -> int:
    """Judge a study and write its report.

    publish: (study, the report's folder, whether ``--wandb`` was typed) → a message to print, or None; without it there
    is no such option.
    """
    parser = Parser(
        prog="xattn report",
        description="Judge a study and write its report.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_question(parser)
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="KEY=ARM",
        help="the arm that the factor's others are compared with (default: conf's default); may be repeated",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: STUDY/report)")
    parser.add_argument("--json", action="store_true", help="print only verdict.json, on standard output")
    if publish is not None:
        parser.add_argument("--wandb", action="store_true", help="log the report's folder to wandb as an artifact")
    asked = parser.parse_args(argv)
    question = question_of(asked, dict(pairs(asked.baseline, "--baseline")))
    found = judge(read_study(asked.study), question, command=f"xattn report {shlex.join(argv)}")
    target = asked.out or asked.study / REPORT
    with writing(target):
        write(found, target)
    if asked.json:
        print(run_folder.to_json(verdict_of(found).model_dump(), indent=2, ascii_only=True), flush=True)
    screen = sys.stderr if asked.json else sys.stdout
    _tell(found, target, screen)
    if publish is not None and (uploaded := publish(found.study, target, asked.wandb)) is not None:
        print(uploaded, file=screen)
    return ExitCode.DONE


def _tell(found: Answer, target: Path, file: TextIO) -> None:
    for i, each in enumerate(found.comparisons):
        if len(found.comparisons) > 1 and each.effects:
            say(f"Comparison{where(found, i)}", file=file)
        for effect in each.effects:
            say(f"{effect.factor}: {verdict(effect)}", file=file)
    if found.finding is not None:
        say(f"finding: {found.finding.sentence}", file=file)
    if found.alone:
        differ = "differs" if len(found.alone) == 1 else "differ"
        settings = counted(len(found.alone), "setting")
        say(f"{settings} {differ} from all others in more than one choice: not compared", file=file)
    if found.odd:
        are, them = ("is", "it") if len(found.odd) == 1 else ("are", "them")
        things = counted(len(found.odd), "thing")
        say(f"{things} {are} missing or odd; the page lists {them}", file=file)
    say("report:", run_folder.shown(target.absolute() / _PAGE), file=file)


def write(found: Answer, folder: Path) -> None:
    """Write the report's files, each whole or not at all. Raises :class:`BadInput` if the folder is a run's."""
    if (folder / run_folder.CONFIG).exists():
        raise BadInput(f"{folder}: is a run's folder; choose where to write the report with --out FOLDER")
    folder.mkdir(exist_ok=True, parents=True)
    if (folder / _PAGE).exists():  # an earlier report: the new page would not show its figures
        for old in folder.iterdir():
            if _FIGURE.fullmatch(old.name):
                old.unlink(missing_ok=True)
    captions, svgs = {}, {}
    with mpl.rc_context(figures.STYLE):
        for name, figure, caption in _figures(found):
            svgs[name] = figures.save(figure, folder, name)
            captions[name] = caption
    for name, text in texts(found, captions, svgs, folder).items():
        content = text.encode("utf-8", "backslashreplace")  # a folder's name may not be text
        run_folder.write_atomically(folder / name, content, shared=True)


def texts(found: Answer, captions: Mapping[str, str], svgs: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return file name → content of the text files for ``folder``. The pages contain the given figures, by name."""
    page = page_of(found, captions)
    study, folder = found.study.folder.resolve(), folder.resolve()
    here = "/".join(("", *folder.parts[-2:], _PAGE))
    return {
        _PAGE: to_html(page, svgs, runs=os.path.relpath(study, folder), here=here),
        "report.md": to_markdown(page),
        "table.tex": table_tex(found.comparisons, found.command),
        "results.csv": to_csv(*results_table(found.study.runs, found.comparisons)),
        "effects.csv": to_csv(*effects_table(found.comparisons)),
        "verdict.json": run_folder.to_json(verdict_of(found).model_dump(), indent=2) + "\n",
    }


def _figures(found: Answer) -> Iterator[tuple[str, Figure, str]]:
    for i, each in enumerate(found.comparisons[:_DRAWN]):
        for name, figure, caption in _figures_of(each):
            yield f"{prefix(i)}{name}", figure, caption


def _figures_of(each: Comparison) -> Iterator[tuple[str, Figure, str]]:
    if any(effect.paired.difference is not None for effect in each.effects):
        caption = "Difference of each arm to its baseline, paired by seed."
        yield "effects", figures.forest(panels_of(each), each.metric.name), caption
    if (figure := figures.worth(laws(each), each.metric.name)) is not None:
        caption = "The baseline's mean loss at each of its lengths, the law through these, and the arms' losses."
        yield "worth", figure, f"{caption} A line leads from each arm's to the baseline's steps that reach it."
    differences = _differences(each)
    if (figure := figures.difference_curves(differences)) is not None:
        losses = dict.fromkeys(curve.key for arms in differences.values() for curve in arms.values())
        caption = f"Arm − baseline in {' or '.join(losses)}, seed by seed, against steps: mean and 95 % interval."
        same = "For train_loss, both sides saw the same batches, so their noise cancels."
        yield "differences", figure, f"{caption} {same}" if "train_loss" in losses else caption
    for i, key in enumerate(each.design.tuned):
        figure = figures.rates(each.design, each.chosen, i)
        if figure is not None:
            caption = (
                f"Validation loss against {key}: the line is the mean over seeds, small marks are seeds, the ring is "
                "the value chosen, a cross at the top a value at which a seed diverged."
            )
            others = " Each is at the best of the other tuned keys." if len(each.design.tuned) > 1 else ""
            yield f"tuning-{short(key)}", figure, caption + others
    curves = loss_curves(each.chosen)
    comparable = why_speeds_differ(each.chosen.values()) is None
    for axis in ("steps", "tokens", *(["seconds"] if comparable else [])):
        figure = figures.learning_curves(each.design, curves, axis)
        if figure is not None:
            of = {"seconds": " Seconds are of training alone, as logged."}.get(axis, "")
            (loss,) = {curve.key for curve in curves.values()}
            caption = f"{loss} against {axis}: mean over seeds and its 95 % interval; the other arms in grey.{of}"
            yield f"curves-{axis}", figure, caption
    watched = {key: curves_of(each.chosen, key) for key in ("grad_norm", *ATTENTION_CURVES)}
    if (figure := figures.stability(each.design, watched)) is not None:
        logit = " The largest logit is the largest of all heads in each seed." if watched["attention/max_logit"] else ""
        yield "stability", figure, f"Means over seeds.{logit}"
    heads = {cell: heads_of(chosen) for cell, chosen in each.chosen.items()}
    maps = {
        name: {cell: found[key] for cell, found in heads.items() if key in found}
        for key, name in STATISTICS.items()
        if key in ("effective_keys", "max_logit", "first_token", "output_norm")
    }
    if (figure := figures.heads(each.design, maps)) is not None:
        yield "attention-heads", figure, "Each head at the end of training; one scale for each row of panels."


def panels_of(each: Comparison) -> dict[str, dict[str, Effect]]:
    """Return title → arm → effect: a panel per family of factors. Training lengths have one only as the sole factor."""
    found = {}
    for family in each.design.families:
        effects = [effect for effect in each.effects if effect.factor in {factor.key for factor in family}]
        if len(family) > 1:
            arms = {f"{short(effect.factor)} = {show(effect.arm)}": effect for effect in effects}
            found["each arm against the one baseline"] = arms
        elif family[0].key != STEPS or len(each.design.factors) == 1:
            title = f"{family[0].key}: against {show(family[0].baseline)}"
            found[title] = {show(effect.arm): effect for effect in effects}
    return found


def _differences(each: Comparison) -> dict[str, dict[str, Curve]]:
    """Return factor → arm → how its difference to the baseline develops."""
    if not is_of_text(each.metric.name):
        return {}
    found: dict[str, dict[str, Curve]] = {}
    for factor in each.design.factors:
        if factor.key == STEPS and len(each.design.factors) > 1:
            continue
        for arm in factor.arms[1:]:
            pairs = matched(each.design, each.chosen, factor, arm, each.metric)
            if (curve := difference_curve(pairs)) is not None:
                found.setdefault(f"{factor.key}: against {show(factor.baseline)}", {})[show(arm)] = curve
    return {name: arms for name, arms in found.items() if len({curve.key for curve in arms.values()}) == 1}
