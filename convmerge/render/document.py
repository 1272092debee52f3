"""What a command has to say, free of any format: lines, commands, tables and trees, in sections.

Text comes from files and may look like markup of any kind; it is made literal where it is written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from convmerge.cli.terminal import one_line

Style = Literal["", "strong", "code", "good", "bad", "merge", "keep", "refuse"]


@dataclass(frozen=True)
class Span:
    """Text of one style; ``code`` is for names and paths."""

    text: str
    style: Style = ""

    def literal(self, *, unicode: bool = True) -> str:
        """The text in one line, with the spaces at its ends that part it from its neighbours."""
        first, last = self.text[:1].isspace(), self.text[-1:].isspace()
        line = one_line(self.text, unicode=unicode)
        return f"{' ' * first}{line}{' ' * last}" if line else " " * first


Words: TypeAlias = tuple[Span, ...]


@dataclass(frozen=True)
class Line:
    """A line of text."""

    words: Words


@dataclass(frozen=True)
class Command:
    """A command to copy."""

    label: str
    command: str


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        numeric: whether it holds figures, which are aligned to the right.
        wraps: whether its cells are sentences, which may take several lines.
    """

    name: str
    numeric: bool = False
    wraps: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table; ``strong`` for totals."""

    cells: tuple[Words, ...]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what its rows are.
        head: how many of its first columns say what a row is about.
        inset: whether it belongs to the line before it.
        listing: whether it is for looking things up, and may be folded where it is long.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    head: int = 1
    inset: bool = False
    listing: bool = False


@dataclass(frozen=True)
class Tree:
    """Lines below a title, each indented by two spaces a level."""

    title: Words
    lines: tuple[str, ...]

    def levels(self) -> list[tuple[int, str]]:
        """Level, from 0 and at most one more than that of the line before, and text of every line."""
        found: list[tuple[int, str]] = []
        for line in self.lines:
            text = line.lstrip(" ")
            deepest = found[-1][0] + 1 if found else 0
            found.append((min((len(line) - len(text)) // 2, deepest), text))
        return found


@dataclass(frozen=True)
class Trees:
    """Trees of one kind; ``caption`` says which."""

    caption: str
    trees: tuple[Tree, ...]


Part: TypeAlias = Line | Command | Table | Trees


@dataclass(frozen=True)
class Document:
    """What a command has to say, from top to bottom.

    Attributes:
        title: the outcome in one line.
        sections: parts that belong together.
        warnings: a sentence each.
    """

    title: Words
    sections: tuple[tuple[Part, ...], ...] = ()
    warnings: tuple[str, ...] = ()


def words(*parts: str | Span) -> Words:
    """Plain strings and spans in a row."""
    return tuple(Span(part) if isinstance(part, str) else part for part in parts if part != "")


def line(*parts: str | Span) -> Line:
    """A line of plain strings and spans."""
    return Line(words(*parts))


def document(title: Words, *sections: Sequence[Part], warnings: tuple[str, ...] = ()) -> Document:
    """A document of the sections that hold something."""
    return Document(title, tuple(tuple(section) for section in sections if section), warnings)


def failure(message: str, hint: str | None) -> Document:
    """The document of an error."""
    return document(words(Span("error", "bad"), f": {message}"), [line(f"hint: {hint}")] if hint else [])
