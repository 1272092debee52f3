"""What each command prints, as Rich renderables from top to bottom; a str is printed without wrapping it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table

from convmerge.cli.terminal import one_line
from convmerge.render.figures import arrow, compact, difference, error, percent, seconds, speed
from convmerge.render.sites import STYLES, site_parts
from convmerge.render.view import View, by_count, inset, natural_width, new_table, plural
from convmerge.report import Comparison, Counts, Report, Saving, SiteReport, Verification

if TYPE_CHECKING:
    from convmerge.io import Contents

_TENSORS_SHOWN = 12


def inspect_parts(report: Report, view: View, next_command: str) -> list[RenderableType]:
    """What ``convmerge inspect`` prints."""
    parts: list[RenderableType] = [view.text(f"{report.model}: {_verdict(report.sites)}", "bold")]
    parts += _inputs(report, view)
    if report.sites:
        parts += ["", *site_parts(report.sites, view)]
    parts.append("")
    if report.unknown:
        counts = ", ".join(f"{name} ×{calls}" for name, calls in by_count(report.unknown))
        parts.append(view.text(f"operators without a rule: {counts}"))
    if report.before:
        parts.append(view.text(_figures_of(report.before)))
    if report.merged():
        parts.append(view.text(_merge_totals(report)))
    parts += _times(report, view)
    if report.merged():
        parts.append(_command("next", next_command, view))
    return parts


def check_parts(report: Report, view: View, next_command: str) -> list[RenderableType]:
    """What ``convmerge check`` prints: nothing but the merges that are left."""
    merges = report.merged()
    if not merges:
        return [view.text(f"{report.model}: no profitable merge is left", "bold")]
    count = plural(len(merges), "profitable merge")
    title = f"{report.model}: {count} {'is' if len(merges) == 1 else 'are'} left"
    return [
        view.text(title, "bold"),
        *_inputs(report, view),
        "",
        *site_parts(merges, view),
        "",
        *_times(report, view),
        _command("next", next_command, view),
    ]


def fuse_parts(report: Report, view: View, outcome: str) -> list[RenderableType]:
    """What ``convmerge fuse`` prints; ``outcome`` says what became of the file."""
    parts: list[RenderableType] = [view.text(f"{report.model}: {_verdict(report.sites)}", "bold")]
    parts += _inputs(report, view)
    if view.verbose and report.sites:
        parts += ["", *site_parts(report.sites, view)]
    if report.before and report.after:
        columns = ("before", "after", "change")
        parts += ["", _before_after(report, report.before, report.after, columns, view)]
    parts.append("")
    if gain := _gain(report.saving, "merged places: "):
        parts.append(view.text(gain))
    if report.verification:
        parts += _verification(report.verification, view)
    parts += _times(report, view)
    parts.append(view.text(outcome))
    return parts


def bench_parts(report: Report, view: View) -> list[RenderableType]:
    """What ``convmerge bench`` prints."""
    parts: list[RenderableType] = [view.text(report.model, "bold"), *_inputs(report, view)]
    if report.before and report.after:
        parts += ["", _before_after(report, report.before, report.after, ("A", "B", "change"), view)]
    if report.speedup:
        low, high = (f"{ratio:.2f}" for ratio in report.speedup.middle_half)
        threads = plural(report.speedup.threads, "thread")
        times = f"B is {report.speedup.median:.2f}× as fast as A"
        spread = f": middle half of all pairs {low}–{high}×, {threads}"
        parts += ["", view.text(times, "bold") + view.text(spread)]
    return parts + _times(report, view)


def verify_parts(report: Report, view: View) -> list[RenderableType]:
    """What ``convmerge verify`` prints."""
    parts: list[RenderableType] = [view.text(report.model, "bold"), *_inputs(report, view)]
    if report.verification:
        parts += _verification(report.verification, view)
    return parts + _times(report, view)


def contents_parts(contents: Contents, view: View) -> list[RenderableType]:
    """What ``convmerge inspect`` prints of a file it may not load: what the file says it holds."""
    parts: list[RenderableType] = [view.text(f"the file holds {contents.title}", "bold")]
    kinds = Counter(contents.modules.values())
    if kinds:
        counts = ", ".join(f"{name} ×{count}" for name, count in by_count(kinds))
        parts.append(view.text(f"modules: {counts}"))
    if contents.needs and view.verbose:
        parts.append(view.text(f"names: {', '.join(contents.needs)}"))
    table = new_table("tensor", "shape", "dtype")
    shown = contents.tensors if view.verbose else contents.tensors[:_TENSORS_SHOWN]
    for tensor in shown:
        shape = "×".join(map(str, tensor.shape)) or "scalar"
        table.add_row(view.text(tensor.name), view.text(shape), view.text(tensor.dtype))
    parts += [table] if shown else []
    hidden = len(contents.tensors) - len(shown)
    return parts + ([view.text(f"and {plural(hidden, 'tensor')} more, shown with -v")] if hidden else [])


def _before_after(report: Report, before: Counts, after: Counts, columns: Sequence[str], view: View) -> Table:
    table = new_table("")
    for name in columns:
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
    for name, sizes in (("file", report.file_bytes), ("peak memory", report.peak_bytes)):
        if {"before", "after"} <= sizes.keys():
            a, b = sizes["before"], sizes["after"]
            row(name, a, b, lambda n: compact(n, "B"), percent(a, b), "bold")
    if report.speedup:
        a, b = (round(time * 1e9) for time in report.speedup.seconds)
        row("time", a, b, lambda n: seconds(n * 1e-9), percent(a, b), "bold")
    return table


def _verification(verification: Verification, view: View) -> list[RenderableType]:
    verdict = "verified" if verification.equal else "NOT the same function"
    style = "bold green" if verification.equal else "bold red"
    parts: list[RenderableType] = [view.text(verdict, style) + view.text(f": {verification.reason}")]
    table = new_table("compared on", "max difference", "in float64", "error / the original's own")
    for item in verification.comparisons:
        table.add_row(*(view.text(figure) for figure in (item.inputs, *_figures(item))))
    if not verification.comparisons:
        return parts
    if natural_width(table) + 2 <= view.width:
        return [*parts, Padding(table, (0, 0, 0, 2), expand=False)]
    names = [str(column.header) for column in table.columns[1:]]
    for item in verification.comparisons:
        figures = zip(names, _figures(item), strict=True)
        line = ", ".join(f"{name} {figure}" for name, figure in figures if figure)
        parts.append(inset(f"{item.inputs}: {line}", view))
    return parts


def _figures(item: Comparison) -> tuple[str, str, str]:
    def pair(difference: float | None, relative: float | None) -> str:
        if difference is None:
            return ""
        return error(difference) + ("" if relative is None else f" ({error(relative)} relative)")

    ratio = "" if item.error_ratio is None else f"{item.error_ratio:.2g}×"
    return pair(item.difference, item.relative), pair(item.difference64, item.relative64), ratio


def _figures_of(counts: Counts) -> str:
    calls = plural(sum(counts.operators.values()), "operator")
    return f"model: {calls}, {compact(counts.macs)} MACs, {compact(counts.parameters)} parameters"


def _merge_totals(report: Report) -> str:
    """The model after all merges: what a layer loses to one place and then to another adds up."""
    merges, before = report.merged(), report.before
    macs = sum(site.macs_after - site.macs_before for site in merges)
    weights = sum(site.weights_after - site.weights_before for site in merges)
    totals = (
        [
            f"{name} {arrow(n, n + change)}"
            for name, n, change in (("MACs", before.macs, macs), ("parameters", before.parameters, weights))
        ]
        if before
        else []
    )
    return f"merged: {', '.join(totals)}{_gain(report.saving, '; merged places ')}"


def _gain(saving: Saving | None, lead: str) -> str:
    """``time 2.9 ms → 520 µs (5.58× faster, predicted)`` after ``lead``; empty for no difference."""
    if saving is None:
        return ""
    gain = speed(saving.latency_before, saving.latency_after, measured=saving.measured)
    times = f"{seconds(saving.latency_before)} → {seconds(saving.latency_after)}"
    return f"{lead}{times} ({gain})" if gain else ""


def _verdict(sites: Sequence[SiteReport]) -> str:
    counts = {action: sum(site.action == action for site in sites) for action in STYLES}
    if not counts["merge"]:
        others = [f"{n} kept or refused" for n in [counts["keep"] + counts["refuse"]] if n]
        return ", ".join(["nothing to merge", *others])
    parts = [plural(counts["merge"], "merge")]
    parts += [f"{counts['keep']} kept (cost more merged)"] if counts["keep"] else []
    parts += [f"{counts['refuse']} refused"] if counts["refuse"] else []
    return ", ".join(parts)


def _inputs(report: Report, view: View) -> list[RenderableType]:
    if not report.inputs:
        return []
    guessed = " (guessed; give --input for others)" if report.inputs_inferred else ""
    if len(report.inputs) == 1:
        (shape,) = report.inputs.values()
        return [view.text(f"input: {shape}{guessed}")]
    inputs = ", ".join(f"{name} {shape}" for name, shape in report.inputs.items())
    return [view.text(f"inputs: {inputs}{guessed}")]


def _times(report: Report, view: View) -> list[RenderableType]:
    if not (view.verbose and report.seconds):
        return []
    return [view.text("time: " + ", ".join(f"{k} {seconds(v)}" for k, v in report.seconds.items()))]


def _command(label: str, command: str, view: View) -> str:
    """A str, which the terminal prints without wrapping it."""
    return f"{label}: {one_line(command, unicode=view.unicode)}"
