"""What each command has to say, as documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from convmerge.render.document import (
    Column,
    Command,
    Document,
    Line,
    Part,
    Row,
    Span,
    Table,
    Words,
    document,
    line,
    words,
)
from convmerge.render.figures import arrow, compact, difference, error, percent, seconds, speed
from convmerge.render.sites import site_sections
from convmerge.report import Comparison, Counts, Report, Saving, SiteReport, Verification

if TYPE_CHECKING:
    from convmerge.io import Contents

_TENSORS_SHOWN = 12


def inspect_document(report: Report, next_command: str, *, verbose: bool = False) -> Document:
    """What ``convmerge inspect`` says."""
    end: list[Part] = []
    if report.unknown:
        counts = ", ".join(f"{name} ×{calls}" for name, calls in _by_count(report.unknown))
        end.append(line(f"operators without a rule: {counts}"))
    if report.before:
        end.append(line(_figures_of(report.before)))
    if report.merged():
        end.append(line(_merge_totals(report)))
    end += _times(report, verbose)
    if report.merged():
        end.append(Command("next", next_command))
    sites = site_sections(report.sites, verbose=verbose) if report.sites else []
    title = _title(report, _verdict(report.sites))
    return document(title, _inputs(report), *sites, end, warnings=report.warnings)


def check_document(report: Report, next_command: str, *, verbose: bool = False) -> Document:
    """What ``convmerge check`` says: nothing but the merges that are left."""
    merges = report.merged()
    if not merges:
        return document(_title(report, "no profitable merge is left"), warnings=report.warnings)
    verb = "is" if len(merges) == 1 else "are"
    return document(
        _title(report, f"{_plural(len(merges), 'profitable merge')} {verb} left"),
        _inputs(report),
        *site_sections(merges, verbose=verbose),
        [*_times(report, verbose), Command("next", next_command)],
        warnings=report.warnings,
    )


def fuse_document(report: Report, outcome: str, *, verbose: bool = False) -> Document:
    """What ``convmerge fuse`` says; ``outcome`` is what became of the file."""
    sections: list[list[Part]] = [_inputs(report)]
    if verbose and report.sites:
        sections += site_sections(report.sites, verbose=verbose)
    if report.before and report.after:
        sections.append([_before_after(report, report.before, report.after, ("before", "after", "change"))])
    end: list[Part] = []
    if gain := _gain(report.saving, "merged places: "):
        end.append(line(gain))
    if report.verification:
        end += _verification(report.verification)
    end += [*_times(report, verbose), line(outcome)]
    return document(_title(report, _verdict(report.sites)), *sections, end, warnings=report.warnings)


def bench_document(report: Report, *, verbose: bool = False) -> Document:
    """What ``convmerge bench`` says."""
    sections: list[list[Part]] = [_inputs(report)]
    if report.before and report.after:
        sections.append([_before_after(report, report.before, report.after, ("A", "B", "change"))])
    end: list[Part] = []
    if report.speedup:
        low, high = (f"{ratio:.2f}" for ratio in report.speedup.middle_half)
        threads = _plural(report.speedup.threads, "thread")
        times = Span(f"B is {report.speedup.median:.2f}× as fast as A", "strong")
        end.append(line(times, f": middle half of all pairs {low}–{high}×, {threads}"))
    end += _times(report, verbose)
    return document(_title(report), *sections, end, warnings=report.warnings)


def verify_document(report: Report, *, verbose: bool = False) -> Document:
    """What ``convmerge verify`` says."""
    verdict = _verification(report.verification) if report.verification else []
    parts = [*_inputs(report), *verdict, *_times(report, verbose)]
    return document(_title(report), parts, warnings=report.warnings)


def contents_document(contents: Contents, *, verbose: bool = False) -> Document:
    """What ``convmerge inspect`` says of a file it may not load: what the file says it holds."""
    parts: list[Part] = []
    kinds = Counter(contents.modules.values())
    if kinds:
        parts.append(line(f"modules: {', '.join(f'{name} ×{count}' for name, count in _by_count(kinds))}"))
    if contents.needs and verbose:
        parts.append(line(f"names: {', '.join(contents.needs)}"))
    shown = contents.tensors if verbose else contents.tensors[:_TENSORS_SHOWN]
    if shown:
        rows = tuple(
            Row((words(Span(t.name, "code")), words(_size(t.shape) or "scalar"), words(t.dtype)))
            for t in shown
        )
        parts.append(
            Table("tensors", tuple(Column(name) for name in ("tensor", "shape", "dtype")), rows, listing=True)
        )
    hidden = len(contents.tensors) - len(shown)
    parts += [line(f"and {_plural(hidden, 'tensor')} more, shown with -v")] if hidden else []
    return document(words(f"the file holds {contents.title}"), parts)


def _title(report: Report, outcome: str = "") -> Words:
    return words(Span(report.model, "code"), f": {outcome}" if outcome else "")


def _before_after(report: Report, before: Counts, after: Counts, columns: Sequence[str]) -> Table:
    rows: list[Row] = []

    def row(
        name: str, a: int, b: int, show: Callable[[int], str], change: str, *, strong: bool = True
    ) -> None:
        rows.append(Row(tuple(words(text) for text in (name, show(a), show(b), change)), strong))

    kinds = dict.fromkeys([*before.operators, *after.operators])
    for kind in sorted(kinds, key=lambda k: -before.operators.get(k, 0)):
        a, b = before.operators.get(kind, 0), after.operators.get(kind, 0)
        row(kind, a, b, str, difference(a, b), strong=False)
    a, b = sum(before.operators.values()), sum(after.operators.values())
    row("operators", a, b, str, difference(a, b))
    row("MACs", before.macs, after.macs, compact, percent(before.macs, after.macs))
    row(
        "parameters",
        before.parameters,
        after.parameters,
        compact,
        percent(before.parameters, after.parameters),
    )
    for name, sizes in (("file", report.file_bytes), ("peak memory", report.peak_bytes)):
        if {"before", "after"} <= sizes.keys():
            a, b = sizes["before"], sizes["after"]
            row(name, a, b, lambda n: compact(n, "B"), percent(a, b))
    if report.speedup:
        a, b = (round(time * 1e9) for time in report.speedup.seconds)
        row("time", a, b, lambda n: seconds(n * 1e-9), percent(a, b))
    headings = (Column(""), *(Column(name, numeric=True) for name in columns))
    return Table("the model in figures", headings, tuple(rows))


def _verification(verification: Verification) -> list[Part]:
    verdict = Span("verified", "good") if verification.equal else Span("NOT the same function", "bad")
    parts: list[Part] = [line(verdict, f": {verification.reason}")]
    if verification.comparisons:
        figures = ("max difference", "in float64", "error / the original's own")
        columns = (Column("compared on"), *(Column(name, numeric=True) for name in figures))
        rows = tuple(
            Row(tuple(words(text) for text in (item.inputs, *_figures(item))))
            for item in verification.comparisons
        )
        parts.append(Table("comparisons", columns, rows, inset=True))
    return parts


def _figures(item: Comparison) -> tuple[str, str, str]:
    def pair(difference: float | None, relative: float | None) -> str:
        if difference is None:
            return ""
        return error(difference) + ("" if relative is None else f" ({error(relative)} relative)")

    ratio = "" if item.error_ratio is None else f"{item.error_ratio:.2g}×"
    return pair(item.difference, item.relative), pair(item.difference64, item.relative64), ratio


def _figures_of(counts: Counts) -> str:
    calls = _plural(sum(counts.operators.values()), "operator")
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
    counts = {action: sum(site.action == action for site in sites) for action in ("merge", "keep", "refuse")}
    if not counts["merge"]:
        others = [f"{n} kept or refused" for n in [counts["keep"] + counts["refuse"]] if n]
        return ", ".join(["nothing to merge", *others])
    parts = [_plural(counts["merge"], "merge")]
    parts += [f"{counts['keep']} kept (cost more merged)"] if counts["keep"] else []
    parts += [f"{counts['refuse']} refused"] if counts["refuse"] else []
    return ", ".join(parts)


def _inputs(report: Report) -> list[Part]:
    if not report.inputs:
        return []
    guessed = " (guessed; give --input for others)" if report.inputs_inferred else ""
    if len(report.inputs) == 1:
        (shape,) = report.inputs.values()
        return [line(f"input: {shape}{guessed}")]
    inputs = ", ".join(f"{name} {shape}" for name, shape in report.inputs.items())
    return [line(f"inputs: {inputs}{guessed}")]


def _times(report: Report, verbose: bool) -> list[Line]:
    if not (verbose and report.seconds):
        return []
    return [line("time: " + ", ".join(f"{k} {seconds(v)}" for k, v in report.seconds.items()))]


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
