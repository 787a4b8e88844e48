"""Command-line arguments with one-line errors, and numbers with bounds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from xattn.errors import BadInput


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a mistake raises :class:`BadInput`: one line in place of nine of usage."""

    def error(self, message: str) -> NoReturn:
        for action in self._actions:  # parse_intermixed_args lists optional positionals as required
            if not action.option_strings and action.nargs in ("*", "?"):
                message = message.replace(f", {action.metavar or action.dest}", "")
        raise BadInput(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def whole(at_least: int, below: int | None = None) -> Callable[[str], int]:
    """Return an argument's type: an integer of at least ``at_least`` and, if given, below ``below``."""

    def parse(text: str) -> int:
        value = int(text)
        if value < at_least or (below is not None and value >= below):
            rule = f"at least {at_least}" + ("" if below is None else f" and below {below}")
            raise argparse.ArgumentTypeError(f"{text}: must be {rule}")
        return value

    parse.__name__ = "whole number"
    return parse


def number(at_least: float = 0.0, at_most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """Return an argument's type: a finite number within bounds; above: the lower bound itself is not allowed."""

    def parse(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or not at_least <= value <= at_most or (above and value == at_least):
            rule = f"{'above' if above else 'at least'} {at_least:g}" + (
                "" if at_most == math.inf else f" and at most {at_most:g}"
            )
            raise argparse.ArgumentTypeError(f"{text}: must be {rule}")
        return value

    parse.__name__ = "number"
    return parse
