"""The parts that a page is made of, whatever it is written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """words: the columns that hold words. code: those that hold what a person types. All others hold numbers.

    folders: the column that holds names of run folders, which become links to them.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()
    code: Sequence[str] = ()
    folders: str = ""
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure by its file's name, without the ending."""

    name: str
    caption: str


Block = Heading | Paragraph | Bullets | Table | Picture


@dataclass(frozen=True)
class Page:
    title: str
    blocks: Sequence[Block]
