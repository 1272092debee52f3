"""Documents as self-contained HTML: no scripts, nothing loaded, for screens, readers and paper."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from convmerge.cli.terminal import one_line
from convmerge.render.document import (
    Column,
    Command,
    Document,
    Line,
    Part,
    Row,
    Span,
    Table,
    Tree,
    Trees,
    Words,
)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Contrast of all text is at least 4.5 : 1 on its ground, in light and in dark.
_CSS = """
:root { color-scheme: light dark; --text: #1b1f24; --dim: #57606a; --ground: #fff; --line: #d0d7de;
  --good: #116329; --keep: #7d4e00; --refuse: #8250df; --bad: #a40e26; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --dim: #9198a1; --ground: #0d1117;
  --line: #3d444d; --good: #56d364; --keep: #e3b341; --refuse: #d2a8ff; --bad: #ff7b72; } }
body { margin: 2rem auto; padding: 0 1rem; max-width: 90rem; color: var(--text); background: var(--ground);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
p, li, pre { margin: .2rem 0; overflow-wrap: anywhere; }
section { margin: 1.2rem 0; }
code { font-family: ui-monospace, monospace; font-size: .9em; }
pre { white-space: pre-wrap; border: 1px solid var(--line); padding: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; }
caption { text-align: left; color: var(--dim); }
th, td { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top; font-weight: normal;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--dim); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.sentence { min-width: 16rem; }
.total > *, .strong, .good, .bad { font-weight: bold; }
.good, .merge { color: var(--good); }
.keep { color: var(--keep); }
.refuse { color: var(--refuse); }
.bad, .warning { color: var(--bad); }
@media print { :root { --text: #000; --dim: #333; --ground: #fff; --line: #999; --good: #000; --keep: #000;
  --refuse: #000; --bad: #000; } body { margin: 0; max-width: none; font-size: 9pt; }
  .scroll { overflow: visible; } thead { display: table-header-group; } tr, li { break-inside: avoid; } }
""".strip()


def html(document: Document) -> str:
    """A document as a page of HTML in ASCII, which is the same in any encoding."""
    title = "".join(span.literal() for span in document.title)
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{_CSS}\n</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{_words(document.title)}</h1>",
        *(f'<p class="warning" role="note">warning: {_text(warning)}</p>' for warning in document.warnings),
    ]
    for section in document.sections:
        lines += ["<section>", *(line for part in section for line in _part(part)), "</section>"]
    lines += ["</main>", "</body>", "</html>", ""]
    return "\n".join(lines).encode("ascii", "xmlcharrefreplace").decode("ascii")


def _part(part: Part) -> Iterator[str]:
    if isinstance(part, Line):
        yield f"<p>{_words(part.words)}</p>"
    elif isinstance(part, Command):
        yield f"<p>{escape(part.label)}:</p>"
        yield f"<pre><code>{_text(part.command)}</code></pre>"
    elif isinstance(part, Table):
        yield from _table(part)
    elif isinstance(part, Trees):
        yield f"<p>{escape(part.caption)}:</p>"
        yield "<ul>"
        for tree in part.trees:
            yield f"<li>{_words(tree.title)}{_branches(tree)}</li>"
        yield "</ul>"


def _table(table: Table) -> Iterator[str]:
    caption = escape(table.caption)
    # What scrolls must be reachable by keyboard, and then needs a name.
    yield f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0">'
    yield f"<table>\n<caption>{caption}</caption>"
    heads = (_cell("th", column, escape(column.name), ' scope="col"') for column in table.columns)
    yield f"<thead><tr>{''.join(heads)}</tr></thead>"
    yield "<tbody>"
    for row in table.rows:
        total = ' class="total"' if row.strong else ""
        yield f"<tr{total}>{''.join(_cells(table, row))}</tr>"
    yield "</tbody>\n</table>\n</div>"


def _cells(table: Table, row: Row) -> Iterator[str]:
    """The cells of a row; the last one of its head names it."""
    for index, (column, cell) in enumerate(zip(table.columns, row.cells, strict=True)):
        names = index == table.head - 1
        yield _cell("th" if names else "td", column, _words(cell), ' scope="row"' if names else "")


def _cell(tag: str, column: Column, content: str, attributes: str) -> str:
    if tag == "th" and not content:
        tag, attributes = "td", ""  # a heading without text says nothing to those who listen
    kind = ' class="number"' if column.numeric else ' class="sentence"' if column.wraps else ""
    return f"<{tag}{kind}{attributes}>{content}</{tag}>"


def _branches(tree: Tree) -> str:
    """Nested lists for the levels of a tree."""
    written, depth = "", 0
    for level, text in tree.levels():
        written += "</li></ul>" * (depth - level - 1)
        written += "<ul>" if level == depth else "</li>"
        written += f"<li>{_text(text)}"
        depth = level + 1
    return written + "</li></ul>" * depth


def _words(words: Words) -> str:
    return "".join(map(_span, words))


def _span(span: Span) -> str:
    text = escape(span.literal())
    if not span.style or not text:
        return text
    return f"<code>{text}</code>" if span.style == "code" else f'<span class="{span.style}">{text}</span>'


def _text(text: str) -> str:
    return escape(one_line(text))
