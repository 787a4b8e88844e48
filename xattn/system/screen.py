"""Text on a terminal: lines that fit it, paths and commands that stay whole, characters that can be printed.

Standard library only, since a command's first line is printed with it before anything slow is imported.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from typing import IO

_WORD = re.compile(r"(?:`[^`]*`|\S)+")  # a command in backticks is one word
_SHELL_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\\.|[^\s'"\\])+""")
_LABEL = re.compile(r" *\S+(?: \S+)? {2,}(?=\S)")  # "run folder  …": continuation lines align with what follows it
_WIDEST_LABEL = 16
_COLUMNS = 80  # of a terminal that does not report it

UNPRINTABLE = "· stands for a byte or character that is not printable"  # of :func:`printable`


def columns(stream: IO[str]) -> int | None:
    """Return the width of the stream's terminal; None for a file or a pipe, which has none."""
    if not stream.isatty():
        return None
    if (given := os.environ.get("COLUMNS", "")).isdigit() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


def say(text: str, command: str = "", *, file: IO[str] | None = None) -> None:
    """Print text, followed by a command to copy, at the width of the terminal.

    A command that does not fit behind the text goes on lines of its own: see :func:`continued`.
    """
    stream = sys.stdout if file is None else file
    width = columns(stream)
    if not command:
        print(fitted(text, width), file=stream)
    elif width is None or width_of(text) + 1 + width_of(command) <= width:
        print(text, command, file=stream)
    else:
        print(fitted(text, width), continued(command, width), sep="\n", file=stream)


def fitted(text: str, width: int | None) -> str:
    """Return the text in lines of at most ``width`` columns, broken between words.

    A wider word stays whole on a line of its own: a path, or a command in backticks, which then loses them and is
    :func:`continued`. Continuation lines align below what follows the label, else two columns further in. None leaves
    the text unchanged.
    """
    if width is None:
        return text
    return "\n".join(line if width_of(line) <= width else _broken(line, width) for line in text.split("\n"))


def _broken(line: str, width: int) -> str:
    label = _LABEL.match(line)
    indent = len(line) - len(line.lstrip(" ")) + 2
    if label is not None and label.end() <= min(_WIDEST_LABEL, width // 3):
        indent = label.end()
    lines, end = [""], 0
    for word in _WORD.finditer(line):
        gap = line[end : word.start()]
        end = word.end()
        if width_of(lines[-1]) + len(gap) + width_of(word[0]) <= width:
            lines[-1] += gap + word[0]
        elif indent + width_of(word[0]) <= width and lines[-1].strip():
            lines.append(" " * indent + word[0])
        else:
            whole = continued(word[0][1:-1], width) if re.fullmatch("`[^`]*`", word[0]) else word[0]
            lines[len(lines) - (not lines[-1].strip()) :] = [whole, " " * (indent - 1)]
    return "\n".join(line for line in lines if line.strip())


def continued(command: str, width: int) -> str:
    """Return the command over several lines, as a shell takes it: each but the last ends with a backslash.

    It is broken only between words. A wider word, such as a path, stays whole.
    """
    lines = [""]
    for word in _SHELL_WORD.findall(command):
        if not lines[-1].strip():
            lines[-1] += word
        elif width_of(f"{lines[-1]} {word} \\") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def folded(text: str, width: int | None) -> str:
    """Return the text with lines cut at ``width`` columns, between any two characters. None leaves it unchanged."""
    if width is None:
        return text
    lines = []
    for line in text.split("\n"):
        lines.append("")
        for character in line:
            if width_of(lines[-1]) + width_of(character) > width:
                lines.append("")
            lines[-1] += character
    return "\n".join(lines)


def printable(text: str) -> str:
    """Return the text with ``·`` for each character that would control a terminal or could not be decoded.

    Newlines stay, and tabs become spaces.
    """
    shown = (c if c in "\n\t" or (c.isprintable() and c != "\ufffd") else "·" for c in text)
    return "".join(shown).expandtabs(4)


def counted(number: int, thing: str) -> str:
    """Return ``1 seed``, ``3 seeds``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def width_of(text: str) -> int:
    """Return how many columns the text takes on one line of a terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def clock(seconds: float) -> str:
    """Return the time as on a clock: 0:06, 12:30, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def abandon(stream: IO[str]) -> None:
    """Send the rest of a stream that failed to the null device, so that the interpreter's last flush succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
