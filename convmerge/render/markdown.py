"""Documents as GitHub-flavoured Markdown, for comments and job summaries.

Text stands there literally: as code, or with every sign that Markdown could take for its own as a character
reference (these never count as structure, https://spec.commonmark.org/0.31.2/#entity-references). Links,
mentions and emoji are found in the finished text: there a zero-width space parts the sign from what follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from convmerge.cli.terminal import one_line
from convmerge.render.document import Command, Document, Line, Part, Span, Table, Trees, Words

_FOLDED = 12  # rows; longer listings are folded
_APART = "&#8203;"
_SIGNS = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])")
_BLOCK = re.compile(r"^(\s*)([-+=#])(?=[-+=#\s]|$)|^(\s*\d{1,9})([.)])(?=\s|$)")
_MENTIONS = re.compile(r"@|(?<!&)#(?=\w)|:(?=//|[\w+-]+:)|\bwww(?=\.)|\bGH(?=-\d)", re.IGNORECASE)


def markdown(document: Document, *, unicode: bool = True) -> str:
    """A document in Markdown; without ``unicode``, with the signs of the tables in ASCII."""
    page = _Page(unicode)
    return "\n\n".join(page.blocks(document)) + "\n"


@dataclass(frozen=True)
class _Page:
    unicode: bool

    def blocks(self, document: Document) -> Iterator[str]:
        """Blocks that an empty line parts."""
        yield f"### {self._words(document.title)}"
        if document.warnings:
            warnings = (f"> {self._span(Span(warning))}" for warning in document.warnings)
            yield "\n".join(["> [!WARNING]", "\n>\n".join(warnings)])
        for section in document.sections:
            for lines, parts in groupby(section, key=lambda part: isinstance(part, Line)):
                if lines:
                    yield "\\\n".join(self._words(part.words) for part in parts if isinstance(part, Line))
                else:
                    for part in parts:
                        yield from self._part(part)

    def _part(self, part: Part) -> Iterator[str]:
        if isinstance(part, Table):
            yield from _folded(part.caption, len(part.rows) * part.listing, self._table(part))
        elif isinstance(part, Trees):
            levels = [f"{'  ' * level}- {line}" for level, line in self._tree_lines(part)]
            yield from _folded(part.caption, len(levels), "\n".join(levels))
        elif isinstance(part, Command):
            command = one_line(part.command, unicode=self.unicode)
            yield f"{part.label}:"
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
            yield f"{fence}sh\n{command}\n{fence}"

    def _table(self, table: Table) -> str:
        rows = [[self._span(Span(column.name)) for column in table.columns]]
        rows.append(["--:" if column.numeric else "---" for column in table.columns])
        for row in table.rows:
            cells = map(self._words, row.cells)
            rows.append([f"**{cell}**" if row.strong and cell else cell for cell in cells])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)

    def _tree_lines(self, trees: Trees) -> Iterator[tuple[int, str]]:
        for tree in trees.trees:
            yield 0, self._words(tree.title)
            for level, line in tree.levels():
                yield level + 1, self._span(Span(line))

    def _words(self, words: Words) -> str:
        return "".join(map(self._span, words))

    def _span(self, span: Span) -> str:
        text = span.literal(unicode=self.unicode)
        if not text:
            return ""
        if span.style == "code":
            plain = not re.search(r"[`|\\]", text) and text == text.strip()
            return f"`{text}`" if plain else f"<code>{_literal(text)}</code>"
        strong = span.style in ("strong", "good", "bad")
        return f"**{_literal(text)}**" if strong else _literal(text)


def _folded(caption: str, length: int, block: str) -> Iterator[str]:
    """The block, inside of what unfolds where it is long."""
    if length <= _FOLDED:
        yield block
    else:
        yield f"<details>\n<summary>{length} {caption}</summary>"
        yield block
        yield "</details>"


def _literal(text: str) -> str:
    """``text`` so that it shows as it is."""
    text = _SIGNS.sub(lambda found: f"&#{ord(found[0])};", text)
    text = _BLOCK.sub(lambda m: f"{m[1] or m[3] or ''}&#{ord(m[2] or m[4])};", text)
    return _MENTIONS.sub(rf"\g<0>{_APART}", text)
