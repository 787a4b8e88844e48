"""``xattn verdict``: whether an arm is shown to be better than another, as an exit code and a line."""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import NoReturn

from xattn.errors import BadInput, ExitCode
from xattn.keys import show
from xattn.report import words
from xattn.report.answer import Answer, Comparison
from xattn.report.design import Factor
from xattn.report.judge import check_key, is_typed, judge, there_are, value_typed
from xattn.report.options import add_question, pairs, question_of
from xattn.report.read import Run, read_study
from xattn.report.statistics import Effect
from xattn.report.verdict import effect_of
from xattn.runs import run_folder
from xattn.system import entry, screen
from xattn.system.arguments import Parser

# Any other outcome is undecided, also if the arm's values are better but a larger share of its runs diverged.
_CODES: dict[words.Outcome, ExitCode] = {"better": ExitCode.DONE, "worse": ExitCode.OPPOSITE}
_TOLD = {ExitCode.DONE: "shown", ExitCode.UNDECIDED: "undecided", ExitCode.OPPOSITE: "the opposite is shown"}
_EPILOG = """exit codes:
  0   it is shown that KEY=ARM is better
  10  undecided
  11  it is shown to be worse
  2   bad input, such as an arm that no run has; any other code is an error

examples:
  xattn verdict outputs/gate --better model.output_gate=channel
  xattn verdict outputs/first --better backend.activation=softmax \\
    --than sigmoid --where backend.theta=10000"""


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="xattn verdict",
        description="Is this arm shown to be better?",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_question(parser)
    parser.add_argument("--better", required=True, metavar="KEY=ARM", help="the arm that should be better")
    parser.add_argument("--than", metavar="ARM", help="the arm of KEY that it is compared with (default: the baseline)")
    parser.add_argument("--json", action="store_true", help="print the effect as JSON, as in verdict.json")
    asked = parser.parse_args(argv)
    ((key, arm),) = pairs([asked.better], "--better")
    study = read_study(asked.study)
    check_key(key, study.runs, "--better")
    value_typed(study.runs, key, arm)
    found = judge(study, question_of(asked, {} if asked.than is None else {key: asked.than}))
    number, comparison, effect = _asked_for(found, key, arm, asked.than)
    _check_direction(effect.metric, study.runs)
    code = _CODES.get(words.outcome(effect), ExitCode.UNDECIDED)
    if asked.json:
        entry.answer(run_folder.to_json(effect_of(number, comparison, effect).model_dump(), indent=2, ascii_only=True))
    else:
        sentence = " ".join(f"{_TOLD[code]}: {words.verdict(effect)}".splitlines())
        entry.answer(screen.fitted(sentence, screen.columns(sys.stdout)))
    return code


def _asked_for(found: Answer, key: str, arm: str, than: str | None) -> tuple[int, Comparison, Effect]:
    """Return the comparison's number in the report, the comparison, and the effect."""
    effects = [
        (number, comparison, effect)
        for number, comparison in enumerate(found.comparisons, 1)
        for effect in comparison.effects
        if effect.factor == key and is_typed(effect.arm, arm) and (than is None or is_typed(effect.baseline, than))
    ]
    if not effects:
        _refuse(found, key, arm, than)
    if len(effects) > 1:
        labels = "; ".join(comparison.group.label for _, comparison, _ in effects[:4])
        raise BadInput(f"--better {key}={arm}: is in {len(effects)} comparisons; choose one with --where: {labels}")
    return effects[0]


def _refuse(found: Answer, key: str, arm: str, than: str | None) -> NoReturn:
    """Raise the :class:`BadInput` that says why there is no such effect."""
    factors = [factor for comparison in found.comparisons for factor in comparison.design.factors]
    own = [factor for factor in factors if factor.key == key]
    for factor in factors:
        if key in factor.also and not own:
            raise BadInput(f"--better {key}: changes together with {factor.key}; use that key: {_arms(factor)}")
    if not own:
        raise BadInput(f"--better {key}: is not a factor here; {there_are(dict.fromkeys(f.key for f in factors))}")
    for factor in own:
        if is_typed(factor.baseline, arm):
            raise BadInput(f"--better {key}={arm}: is the baseline; name another arm with --than: {_arms(factor)}")
    against = "" if than is None else f" with {than}"
    raise BadInput(f"--better {key}={arm}: in no comparison{against}; the arms are {'; '.join(map(_arms, own[:4]))}")


def _arms(factor: Factor) -> str:
    return ", ".join(map(show, factor.arms[:12]))


def _check_direction(metric: str, runs: Sequence[Run]) -> None:
    if words.better_is(metric):
        return
    names = sorted({key for run in runs for key in run.summary if words.better_is(key) and run.number(key) is not None})
    raise BadInput(f"--metric {metric}: neither more nor less of it is better; choose one of {', '.join(names[:12])}")
