"""Sites, alike ones together: a table, or paragraphs where that gets too narrow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from convmerge.render.figures import arrow, error, speed
from convmerge.render.view import View, inset, natural_width, new_table
from convmerge.report import SiteReport

STYLES = {"merge": "green", "keep": "yellow", "refuse": "magenta"}
T = TypeVar("T", int, float)
_SPAN_WIDTH = 72
_REASON_WIDTH = 28  # a narrower column of reasons is hard to read


@dataclass(frozen=True)
class Group:
    """Sites that differ in place and size only; the first stands for all."""

    sites: tuple[SiteReport, ...]

    @property
    def first(self) -> SiteReport:
        """The site that is shown."""
        return self.sites[0]

    @property
    def place(self) -> str:
        """Where the first one is, and how many there are."""
        more = len(self.sites) - 1
        return f"{self.first.place} (and {more} more)" if more else self.first.place

    @property
    def operators(self) -> str:
        """The operators in a row; of sums only their number of branches, as the tree below has the rest."""
        outermost = [line for line in self.first.tree if not line.startswith(" ")]
        return ", ".join(outermost or self.first.operators)

    @property
    def geometry(self) -> str:
        """The geometry they share, or those of the first and the last."""
        return _span([site.geometry for site in self.sites])

    @property
    def reason(self) -> str:
        """The reason they share, or those of the first and the last."""
        return _span([site.reason for site in self.sites])

    def total(self, of: Callable[[SiteReport], T]) -> T:
        """The sum of a figure over all sites."""
        return sum((of(site) for site in self.sites[1:]), of(self.first))


def _span(values: Sequence[str]) -> str:
    """What the sites of a group share, else the first one's and the last one's, as far as there is room."""
    if len(set(values)) == 1:
        return values[0]
    both = f"{values[0]} … {values[-1]}"
    return both if len(both) <= _SPAN_WIDTH else f"{values[0]} …"


def group_sites(sites: Iterable[SiteReport]) -> list[Group]:
    """Merges of the same operators stand together; of kept and refused sites only those of one reason do."""
    groups: dict[tuple[object, ...], list[SiteReport]] = {}
    for site in sites:
        why = "" if site.action == "merge" else site.reason
        groups.setdefault((site.action, site.operators, site.tree, why), []).append(site)
    return [Group(tuple(group)) for group in groups.values()]


def site_parts(sites: Sequence[SiteReport], view: View) -> list[RenderableType]:
    """A table, or where that gets too narrow one paragraph a site; then the branches of sums."""
    groups = [Group((site,)) for site in sites] if view.verbose else group_sites(sites)
    table = _site_table(groups, view)
    # The reason is the one column that may wrap: the others are names and numbers, to be found and compared.
    reason = max(len(group.reason) for group in groups)
    if natural_width(table) - max(0, reason - _REASON_WIDTH) <= view.width:
        parts: list[RenderableType] = [table]
    else:
        parts = [part for group in groups for part in _paragraph(group, view)]
    for group in groups:
        if group.first.tree:
            parts += ["", view.text(group.place)]
            parts += [Text("  ") + _indented(line, view) for line in group.first.tree]
    return parts


def _site_table(groups: Sequence[Group], view: View) -> Table:
    table = new_table("action", "place", "operators", "geometry", "MACs", "weights")
    if view.verbose:
        table.add_column("float64 error", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for group in groups:
        site = group.first
        cells = [
            view.text(site.action, STYLES[site.action]),
            view.text(group.place),
            view.text(group.operators),
            view.text(group.geometry),
            view.text(_macs(group)),
            view.text(_weights(group)),
        ]
        if view.verbose:
            cells.append(view.text(_site_error(site)))
        table.add_row(*cells, view.text(_reason(group)))
    return table


def _paragraph(group: Group, view: View) -> list[RenderableType]:
    site = group.first
    title = view.text(site.action, STYLES[site.action]) + Text(" ") + view.text(group.place)
    figures = "; ".join(f"{k} {v}" for k, v in (("MACs", _macs(group)), ("weights", _weights(group))) if v)
    facts = [fact for fact in (group.operators, group.geometry, figures) if fact]
    row = "; ".join(facts)
    lines = [row] if len(row) + 2 <= view.width else facts
    return [title, *(inset(line, view) for line in [*lines, _reason(group)] if line)]


def _indented(line: str, view: View) -> Text:
    body = line.lstrip(" ")
    return Text(" " * (len(line) - len(body))) + view.text(body)


def _macs(group: Group) -> str:
    return _figure(group.total(lambda s: s.macs_before), group.total(lambda s: s.macs_after))


def _weights(group: Group) -> str:
    return _figure(group.total(lambda s: s.weights_before), group.total(lambda s: s.weights_after))


def _figure(before: int, after: int) -> str:
    return arrow(before, after) if before or after else ""


def _reason(group: Group) -> str:
    """Why, and what a merge gains."""
    reason = group.reason
    before, after = group.total(lambda s: s.latency_before), group.total(lambda s: s.latency_after)
    gain = speed(before, after, measured=all(site.measured for site in group.sites))
    if group.first.action == "merge" and gain:
        reason += f": {gain}"
    observed = any(site.evidence == "observed" for site in group.sites)
    return reason + (" (observed on these inputs)" if observed else "")


def _site_error(site: SiteReport) -> str:
    if site.error is None:
        return ""
    bound = "" if site.bound is None else f" ≤ {error(site.bound)}"
    return error(site.error) + bound
