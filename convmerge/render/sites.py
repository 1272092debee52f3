"""Sites, alike ones together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from convmerge.render.document import Column, Part, Row, Span, Table, Tree, Trees, Words, words
from convmerge.render.figures import arrow, error, speed
from convmerge.report import SiteReport

T = TypeVar("T", int, float)
_SPAN_WIDTH = 72


@dataclass(frozen=True)
class Group:
    """Sites that differ in place and size only; the first stands for all."""

    sites: tuple[SiteReport, ...]

    @property
    def first(self) -> SiteReport:
        """The site that is shown."""
        return self.sites[0]

    @property
    def place(self) -> Words:
        """Where the first one is, and how many there are."""
        more = len(self.sites) - 1
        return words(Span(self.first.place, "code"), f" (and {more} more)" if more else "")

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


def site_sections(sites: Sequence[SiteReport], *, verbose: bool) -> list[list[Part]]:
    """A table of the sites, and the branches of sums; every site by itself where ``verbose``."""
    groups = [Group((site,)) for site in sites] if verbose else group_sites(sites)
    trees = tuple(Tree(group.place, group.first.tree) for group in groups if group.first.tree)
    return [[_site_table(groups, verbose)], [Trees("branches", trees)] if trees else []]


def _site_table(groups: Sequence[Group], verbose: bool) -> Table:
    columns = [Column(name) for name in ("action", "place", "operators", "geometry")]
    columns += [Column(name, numeric=True) for name in ("MACs", "weights")]
    columns += [Column("float64 error", numeric=True)] if verbose else []
    rows = tuple(Row(tuple(_cells(group, verbose))) for group in groups)
    return Table("places", (*columns, Column("reason", wraps=True)), rows, head=2, listing=True)


def _cells(group: Group, verbose: bool) -> Iterator[Words]:
    site = group.first
    yield words(Span(site.action, site.action))
    yield group.place
    yield words(group.operators)
    yield words(group.geometry)
    yield words(_figure(group.total(lambda s: s.macs_before), group.total(lambda s: s.macs_after)))
    yield words(_figure(group.total(lambda s: s.weights_before), group.total(lambda s: s.weights_after)))
    if verbose:
        yield words(_site_error(site))
    yield words(_reason(group))


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
