"""The options that ask a question of a study, for every command that asks one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from xattn.errors import BadInput
from xattn.keys import TUNED, renamed
from xattn.report.answer import Question


def add_question(parser: argparse.ArgumentParser) -> None:
    """Add the study and the options of a question; :func:`question_of` reads them."""
    parser.add_argument("study", type=Path, help="outputs/<study>")
    parser.add_argument(
        "--metric", help="a number in summary.json (default: val_loss, or val_bpb where the runs' tokens differ)"
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="use only runs with this value, or one of several separated by commas; may be repeated",
    )
    parser.add_argument("--seeds", metavar="0,1,2", help="use only runs with these seeds")
    parser.add_argument(
        "--tuned",
        action="append",
        default=[],
        metavar="KEY",
        help=f"a key that was tuned for each arm, besides {', '.join(TUNED)}; may be repeated",
    )
    parser.add_argument(
        "--selection",
        choices=("same", "heldout"),
        help="choose the learning rate on the runs that are judged, or on other seeds (default: same; heldout where "
        "sweep.half_width chose the number of seeds)",
    )


def question_of(asked: argparse.Namespace, baselines: Mapping[str, str]) -> Question:
    return Question(
        metric=asked.metric,
        selection=asked.selection,
        tuned=[renamed(key) for key in asked.tuned],
        where={key: value.split(",") for key, value in pairs(asked.where, "--where")},
        seeds=None if asked.seeds is None else asked.seeds.split(","),
        baselines=baselines,
    )


def pairs(options: Sequence[str], name: str) -> Iterator[tuple[str, str]]:
    """Yield the key and value of each ``KEY=VALUE``; the key may be an old name."""
    for option in options:
        key, is_pair, value = renamed(option).partition("=")
        if not (key and is_pair and value):
            raise BadInput(f"{name} {option}: must be KEY=VALUE, for example backend.activation=softmax")
        yield key, value
