"""Reports as Rich tables and lines, for any width and for streams without Unicode or colour."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from convmerge.report import Comparison, Counts, Report, SiteReport, Verification
from convmerge.terminal import one_line

_STYLES = {"merge": "green", "keep": "yellow", "refuse": "magenta"}
_REASON_WIDTH = 28  # a narrower column of reasons is hard to read


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
    def geometry(self) -> str:
        """The geometry they share, or those of the first and the last."""
        return _span([site.geometry for site in self.sites])

    @property
    def reason(self) -> str:
        """The reason they share, or those of the first and the last."""
        return _span([site.reason for site in self.sites])

    def total(self, of: Callable[[SiteReport], int]) -> int:
        """The sum of a figure over all sites."""
        return sum(of(site) for site in self.sites)


def _span(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else f"{values[0]} … {values[-1]}"


def group_sites(sites: Iterable[SiteReport]) -> list[Group]:
    """Merges of the same operators stand together; of kept and refused sites only those of one reason do."""
    groups: dict[tuple[object, ...], list[SiteReport]] = {}
    for site in sites:
        why = "" if site.action == "merge" else site.reason
        groups.setdefault((site.action, site.operators, site.tree, why), []).append(site)
    return [Group(tuple(group)) for group in groups.values()]


def inspect_parts(report: Report, view: View, next_command: str) -> list[RenderableType]:
    """What ``convmerge inspect`` prints."""
    parts: list[RenderableType] = [view.text(f"{report.model}: {_verdict(report.sites)}", "bold")]
    parts += _inputs(report, view)
    if report.sites:
        parts += ["", *_sites(report.sites, view)]
    parts.append("")
    if report.unknown:
        counts = ", ".join(f"{name} ×{calls}" for name, calls in _by_count(report.unknown))
        parts.append(view.text(f"operators without a rule: {counts}"))
    if report.before and report.after:
        parts.append(view.text(_totals(report.before, report.after)))
    parts += _times(report, view)
    if report.merged():
        parts.append(_command("next", next_command, view))
    return parts


def check_parts(report: Report, view: View, next_command: str) -> list[RenderableType]:
    """What ``convmerge check`` prints: nothing but the merges that are left."""
    merges = report.merged()
    if not merges:
        return [view.text(f"{report.model}: no profitable merge is left", "bold")]
    count = _plural(len(merges), "profitable merge")
    title = f"{report.model}: {count} {'is' if len(merges) == 1 else 'are'} left"
    return [
        view.text(title, "bold"),
        *_inputs(report, view),
        "",
        *_sites(merges, view),
        "",
        *_times(report, view),
        _command("next", next_command, view),
    ]


def fuse_parts(report: Report, view: View, outcome: str, time: float) -> list[RenderableType]:
    """What ``convmerge fuse`` prints; ``outcome`` says what became of the file, ``time`` is in seconds."""
    parts: list[RenderableType] = [view.text(f"{report.model}: {_verdict(report.sites)}", "bold")]
    parts += _inputs(report, view)
    if view.verbose and report.sites:
        parts += ["", *_sites(report.sites, view)]
    if report.before and report.after:
        parts += ["", _before_after(report, report.before, report.after, view)]
    parts.append("")
    if report.verification:
        parts += _verification(report.verification, view)
    parts += _times(report, view)
    parts.append(view.text(f"{outcome} ({seconds(time)})"))
    return parts


def verify_parts(report: Report, view: View) -> list[RenderableType]:
    """What ``convmerge verify`` prints."""
    parts: list[RenderableType] = [view.text(report.model, "bold"), *_inputs(report, view)]
    if report.verification:
        parts += _verification(report.verification, view)
    return parts + _times(report, view)


# ---- sites ----------------------------------------------------------------------------------------------


def _sites(sites: Sequence[SiteReport], view: View) -> list[RenderableType]:
    """A table, or where that gets too narrow one paragraph a site; then the branches of sums."""
    groups = [Group((site,)) for site in sites] if view.verbose else group_sites(sites)
    table = _site_table(groups, view)
    # The reason is the one column that may wrap: the others are names and numbers, to be found and compared.
    reason = max(len(group.reason) for group in groups)
    if _natural_width(table) - max(0, reason - _REASON_WIDTH) <= view.width:
        parts: list[RenderableType] = [table]
    else:
        parts = [part for group in groups for part in _paragraph(group, view)]
    for group in groups:
        if group.first.tree:
            parts += ["", view.text(group.place)]
            parts += [Text("  ") + _indented(line, view) for line in group.first.tree]
    return parts


def _site_table(groups: Sequence[Group], view: View) -> Table:
    table = _table(view, "action", "place", "operators", "geometry", "MACs", "weights")
    if view.verbose:
        table.add_column("float64 error", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for group in groups:
        site = group.first
        cells = [
            view.text(site.action, _STYLES[site.action]),
            view.text(group.place),
            view.text(", ".join(site.operators)),
            view.text(group.geometry),
            view.text(_macs(group)),
            view.text(_weights(group)),
        ]
        if view.verbose:
            cells.append(view.text(_site_error(site)))
        table.add_row(*cells, view.text(_reason(group, view)))
    return table


def _paragraph(group: Group, view: View) -> list[RenderableType]:
    site = group.first
    title = view.text(site.action, _STYLES[site.action]) + Text(" ") + view.text(group.place)
    facts = [", ".join(site.operators), group.geometry, f"MACs {_macs(group)}", f"weights {_weights(group)}"]
    lines = ["; ".join(fact for fact in facts if fact), _reason(group, view)]
    return [title, *(_inset(line, view) for line in lines if line)]


def _indented(line: str, view: View) -> Text:
    body = line.lstrip(" ")
    return Text(" " * (len(line) - len(body))) + view.text(body)


def _macs(group: Group) -> str:
    return arrow(group.total(lambda s: s.macs_before), group.total(lambda s: s.macs_after))


def _weights(group: Group) -> str:
    return arrow(group.total(lambda s: s.weights_before), group.total(lambda s: s.weights_after))


def _reason(group: Group, view: View) -> str:
    observed = any(site.evidence == "observed" for site in group.sites)
    return group.reason + (" (observed on these inputs)" if observed else "")


def _site_error(site: SiteReport) -> str:
    if site.error is None:
        return ""
    bound = "" if site.bound is None else f" ≤ {error(site.bound)}"
    return error(site.error) + bound


# ---- whole models ---------------------------------------------------------------------------------------


def _before_after(report: Report, before: Counts, after: Counts, view: View) -> Table:
    table = _table(view, "")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)

    def row(name: str, a: int, b: int, show: Callable[[int], str], change: str, style: str = "") -> None:
        table.add_row(view.text(name), *(view.text(t) for t in (show(a), show(b), change)), style=style)

    kinds = dict.fromkeys([*before.operators, *after.operators])
    for kind in sorted(kinds, key=lambda k: -before.operators.get(k, 0)):
        a, b = before.operators.get(kind, 0), after.operators.get(kind, 0)
        row(kind, a, b, str, difference(a, b))
    a, b = sum(before.operators.values()), sum(after.operators.values())
    row("operators", a, b, str, difference(a, b), "bold")
    row("MACs", before.macs, after.macs, compact, percent(before.macs, after.macs), "bold")
    a, b = before.parameters, after.parameters
    row("parameters", a, b, compact, percent(a, b), "bold")
    if {"before", "after"} <= report.file_bytes.keys():
        a, b = report.file_bytes["before"], report.file_bytes["after"]
        row("file", a, b, lambda n: compact(n, "B"), percent(a, b), "bold")
    return table


def _verification(verification: Verification, view: View) -> list[RenderableType]:
    verdict = "verified" if verification.equal else "NOT the same function"
    style = "bold green" if verification.equal else "bold red"
    parts: list[RenderableType] = [view.text(verdict, style) + view.text(f": {verification.reason}")]
    table = _table(view, "compared on", "max difference", "in float64", "error / the original's own")
    for item in verification.comparisons:
        table.add_row(*(view.text(figure) for figure in (item.inputs, *_figures(item))))
    if not verification.comparisons:
        return parts
    if _natural_width(table) + 2 <= view.width:
        return [*parts, Padding(table, (0, 0, 0, 2), expand=False)]
    names = [str(column.header) for column in table.columns[1:]]
    for item in verification.comparisons:
        figures = zip(names, _figures(item), strict=True)
        line = ", ".join(f"{name} {figure}" for name, figure in figures if figure)
        parts.append(_inset(f"{item.inputs}: {line}", view))
    return parts


def _figures(item: Comparison) -> tuple[str, str, str]:
    def pair(difference: float | None, relative: float | None) -> str:
        if difference is None:
            return ""
        return error(difference) + ("" if relative is None else f" ({error(relative)} relative)")

    ratio = "" if item.error_ratio is None else f"{item.error_ratio:.2g}×"
    return pair(item.difference, item.relative), pair(item.difference64, item.relative64), ratio


def _totals(before: Counts, after: Counts) -> str:
    a, b = sum(before.operators.values()), sum(after.operators.values())
    return (
        f"total: operators {a if a == b else f'{a} → {b}'}, MACs {arrow(before.macs, after.macs)}, "
        f"parameters {arrow(before.parameters, after.parameters)}"
    )


def _verdict(sites: Sequence[SiteReport]) -> str:
    counts = {action: sum(site.action == action for site in sites) for action in _STYLES}
    if not counts["merge"]:
        others = [f"{n} kept or refused" for n in [counts["keep"] + counts["refuse"]] if n]
        return ", ".join(["nothing to merge", *others])
    parts = [_plural(counts["merge"], "merge")]
    parts += [f"{counts['keep']} kept (cost more merged)"] if counts["keep"] else []
    parts += [f"{counts['refuse']} refused"] if counts["refuse"] else []
    return ", ".join(parts)


def _inputs(report: Report, view: View) -> list[RenderableType]:
    if not report.inputs:
        return []
    inputs = ", ".join(f"{name} {shape}" for name, shape in report.inputs.items())
    guessed = " (guessed; give --input for others)" if report.inputs_inferred else ""
    return [view.text(f"input: {inputs}{guessed}")]


def _times(report: Report, view: View) -> list[RenderableType]:
    if not (view.verbose and report.seconds):
        return []
    return [view.text("time: " + ", ".join(f"{k} {seconds(v)}" for k, v in report.seconds.items()))]


def _command(label: str, command: str, view: View) -> str:
    """A str, which the terminal prints without wrapping it."""
    return f"{label}: {one_line(command, unicode=view.unicode)}"


def _table(view: View, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _natural_width(table: Table) -> int:
    console = Console(width=10**6)
    return Measurement.get(console, console.options, table).maximum


def _inset(line: str, view: View) -> Padding:
    """A line that is indented, and stays so where it wraps."""
    return Padding(view.text(line), (0, 0, 0, 2), expand=False)


def _by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# ---- numbers --------------------------------------------------------------------------------------------


def compact(number: float, unit: str = "") -> str:
    """Three digits and an SI prefix: 532, 37.0 k, 25.6 M, 4.11 G."""
    scaled, prefix = float(number), ""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(scaled) < 999.5 or prefix == "T":
            break
        scaled /= 1000
    digits = 0 if not prefix or abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{digits}f} {prefix}{unit}".rstrip()


def arrow(before: int, after: int) -> str:
    """``before → after``, or just the one number where it shows no change."""
    a, b = compact(before), compact(after)
    return a if a == b else f"{a} → {b}"


def difference(before: int, after: int) -> str:
    """Signed change of a count; empty for none."""
    return "" if before == after else f"{'−' if after < before else '+'}{abs(after - before)}"


def percent(before: int, after: int) -> str:
    """Signed change in percent; empty for none."""
    if before == after or not before:
        return ""
    change = 100 * (after - before) / before
    digits = 0 if abs(change) >= 10 else 1
    return f"{'−' if change < 0 else '+'}{abs(change):.{digits}f} %"


def seconds(time: float) -> str:
    """340 ms, 6.2 s, 2 min 5 s."""
    if time < 1:
        return f"{time * 1000:.0f} ms"
    if time < 100:
        return f"{time:.1f} s"
    return f"{int(time) // 60} min {int(time) % 60} s"


def error(value: float) -> str:
    """An error figure: two digits, or 0 where there is none."""
    return "0" if value == 0 else f"{value:.1e}"
