"""What a page of a report is put together from: tables, figures, lists and paragraphs, without any markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["", "good", "bad", "warn"]
MOST_ROWS = 1000
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Attributes:
        text: as it is read.
        value: what it is sorted by, if that is a number.
        tone: a colour; the text says the same.
        code: whether it is a name out of a program.
        share: 0 to 1, drawn as a bar beside the text.
    """

    text: str
    value: float | None = None
    tone: Tone = ""
    code: bool = False
    share: float | None = None


@dataclass(frozen=True)
class Column:
    """The head of a column: numbers stand on the right, long texts may wrap."""

    title: str
    numeric: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a caption; the first cell of a row is its head. `hidden` rows are in `report.json` alone."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    hidden: int = 0
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A drawing, with what it shows in words."""

    svg: str
    alternative: str
    caption: str
    kind: str = "figure"


@dataclass(frozen=True)
class Figures:
    """Drawings beside each other."""

    figures: tuple[Figure, ...]
    kind: str = "figures"


@dataclass(frozen=True)
class Bullets:
    """Lines of equal rank; numbered where their order matters."""

    lines: tuple[str, ...]
    tone: Tone = ""
    numbered: bool = False
    code: bool = False
    kind: str = "bullets"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    tone: Tone = ""
    kind: str = "text"


@dataclass(frozen=True)
class Heading:
    """The title of a part of a section."""

    text: str
    kind: str = "heading"


Heads = list[Column | str]
Row = tuple[Cell | str, ...]
Block = Table | Figures | Bullets | Text | Heading


@dataclass(frozen=True)
class Section:
    """A part of the page with a title; `anchor` is its id."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Tile:
    """A figure that is read first."""

    label: str
    value: str
    note: str = ""
    tone: Tone = ""


def table(caption: str, columns: Sequence[Column | str], rows: Iterable[Sequence[Cell | str]]) -> Table:
    """A table of cells and plain texts; of very long ones the beginning."""
    found = [tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows]
    heads = tuple(column if isinstance(column, Column) else Column(column) for column in columns)
    return Table(caption, heads, tuple(found[:MOST_ROWS]), max(0, len(found) - MOST_ROWS))


def numeric(*titles: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(title, numeric=True) for title in titles]


def number(value: float | None, form: str, tone: Tone = "") -> Cell:
    """A number as `form` writes it, sorted by its value; a dash where there is none."""
    return Cell("\N{EN DASH}") if value is None else Cell(form.format(value), value, tone)


def share(value: float | None) -> Cell:
    """A share as per cent, with a bar."""
    return Cell("\N{EN DASH}") if value is None else Cell(f"{value:.1%}", value, share=min(max(value, 0.0), 1.0))


def code(text: str, tone: Tone = "") -> Cell:
    """A name out of a program."""
    return Cell(text, tone=tone, code=True)


def some(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many there are beside them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def printable(text: str) -> str:
    """The text without what neither HTML nor XML admits."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
