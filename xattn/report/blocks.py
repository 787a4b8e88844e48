"""The parts of a page, whatever its format."""

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
    """A table. Columns not listed in words, code or folders hold numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()
    code: Sequence[str] = ()
    """the columns that hold what a user types"""
    folders: str = ""
    """the column of run folder names, which become links"""
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure, by its file's name without the suffix."""

    name: str
    caption: str


Block = Heading | Paragraph | Bullets | Table | Picture


@dataclass(frozen=True)
class Page:
    title: str
    blocks: Sequence[Block]
