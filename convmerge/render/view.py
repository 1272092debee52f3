"""What all output is made of: literal text, tables, indented lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from convmerge.cli.terminal import one_line


@dataclass(frozen=True)
class View:
    """What is shown and on what.

    Attributes:
        width: columns.
        unicode: whether × and → can be printed.
        verbose: every site by itself, with its evidence and errors, and the time of every stage.
    """

    width: int
    unicode: bool = True
    verbose: bool = False

    def text(self, value: str, style: str = "") -> Text:
        """``value`` in one line and literally: names come from files and may look like markup."""
        return Text(one_line(value, unicode=self.unicode), style=style)


def new_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def natural_width(table: Table) -> int:
    console = Console(width=10**6)
    return Measurement.get(console, console.options, table).maximum


def inset(line: str, view: View) -> Padding:
    """A line that is indented, and stays so where it wraps."""
    return Padding(view.text(line), (0, 0, 0, 2), expand=False)


def by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
