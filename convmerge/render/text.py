"""Documents on terminals of any width, with and without colour and Unicode, as Rich renderables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import rich.table
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.text import Text

from convmerge.cli.terminal import one_line
from convmerge.render.document import Command, Document, Line, Part, Row, Span, Style, Table, Trees, Words

_STYLES: dict[Style, str] = {
    "strong": "bold",
    "good": "bold green",
    "bad": "bold red",
    "merge": "green",
    "keep": "yellow",
    "refuse": "magenta",
}
_SENTENCE_WIDTH = 28  # a narrower column of sentences is hard to read


def text_parts(document: Document, width: int, *, unicode: bool = True) -> list[RenderableType]:
    """A document in ``width`` columns, without its warnings. A str is to be printed without wrapping it."""
    return _Page(width, unicode).document(document)


@dataclass(frozen=True)
class _Page:
    width: int
    unicode: bool

    def document(self, document: Document) -> list[RenderableType]:
        parts: list[RenderableType] = [self._text(document.title, "bold")]
        for index, section in enumerate(document.sections):
            if index or not isinstance(section[0], Line):
                parts.append("")
            for part in section:
                parts += self._part(part)
        return parts

    def _part(self, part: Part) -> list[RenderableType]:
        if isinstance(part, Line):
            return [self._text(part.words)]
        if isinstance(part, Command):
            return [f"{part.label}: {one_line(part.command, unicode=self.unicode)}"]
        return self._table(part) if isinstance(part, Table) else self._trees(part)

    def _table(self, table: Table) -> list[RenderableType]:
        """A table, or where that gets too narrow one paragraph a row."""
        indent = 2 if table.inset else 0
        drawn = self._drawn(table)
        sentences = max((_wrapping(table, row, self.unicode) for row in table.rows), default=0)
        if natural_width(drawn) - max(0, sentences - _SENTENCE_WIDTH) + indent <= self.width:
            return [Padding(drawn, (0, 0, 0, indent), expand=False) if indent else drawn]
        return [part for row in table.rows for part in self._paragraph(table, row, indent)]

    def _drawn(self, table: Table) -> rich.table.Table:
        drawn = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for column in table.columns:
            drawn.add_column(
                self._text((Span(column.name),)),
                justify="right" if column.numeric else "left",
                no_wrap=not column.wraps,
                overflow="fold" if column.wraps else "ellipsis",
            )
        for row in table.rows:
            drawn.add_row(*map(self._text, row.cells), style="bold" if row.strong else "")
        return drawn

    def _paragraph(self, table: Table, row: Row, indent: int) -> Iterable[RenderableType]:
        """The head of a row, and below it the facts in one line if they fit."""
        head = Text(" ").join(text for text in map(self._text, row.cells[: table.head]) if text)
        yield Padding(head, (0, 0, 0, indent), expand=False) if indent else head
        facts = self._facts(table, row)
        together = "; ".join(facts)
        lines = [together] if len(together) + indent + 2 <= self.width else facts
        sentences = [
            self._plain(cell) for column, cell in zip(table.columns, row.cells, strict=True) if column.wraps
        ]
        for line in (*lines, *sentences):
            if line:
                yield Padding(Text(line), (0, 0, 0, indent + 2), expand=False)

    def _facts(self, table: Table, row: Row) -> list[str]:
        """What stands beside the head; figures with the names of their columns, those in a row together."""
        facts: list[list[str]] = []
        figures = False
        for column, cell in list(zip(table.columns, row.cells, strict=True))[table.head :]:
            text = self._plain(cell)
            if column.wraps or not text:
                continue
            if column.numeric and figures:
                facts[-1].append(f"{column.name} {text}")
            else:
                facts.append([f"{column.name} {text}" if column.numeric else text])
            figures = column.numeric
        return ["; ".join(fact) for fact in facts]

    def _trees(self, trees: Trees) -> list[RenderableType]:
        parts: list[RenderableType] = []
        for tree in trees.trees:
            parts += ["", self._text(tree.title)]
            for level, line in tree.levels():
                parts.append(Text("  " * (level + 1)) + self._text((Span(line),)))
        return parts[1:]

    def _text(self, words: Words, style: str = "") -> Text:
        text = Text(style=style)
        for span in words:
            text.append(span.literal(unicode=self.unicode), _STYLES.get(span.style, ""))
        return text

    def _plain(self, words: Words) -> str:
        return self._text(words).plain


def _wrapping(table: Table, row: Row, unicode: bool) -> int:
    """How long the sentences in a row are."""
    cells = zip(table.columns, row.cells, strict=True)
    return sum(len(span.literal(unicode=unicode)) for column, cell in cells if column.wraps for span in cell)


def natural_width(table: rich.table.Table) -> int:
    """Columns that the table takes where nothing wraps."""
    console = Console(width=10**6)
    return Measurement.get(console, console.options, table).maximum
