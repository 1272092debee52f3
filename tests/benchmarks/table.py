"""What the benchmarks share: arguments, and one row for two models."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from convmerge.benchmark import peak_bytes, speedup
from convmerge.inputs import as_inputs
from convmerge.report import Report

COLUMNS = "{:34} {:>8} {:>15} {:>9} {:>7} {:>8} {:>19}"
HEAD = COLUMNS.format("", "faster", "middle half", "predicted", "MACs", "weights", "peak memory")


def parser(doc: str | None, *, pairs: int = 15) -> argparse.ArgumentParser:
    """Names, ``--pairs``, ``--threads``, and ``--quick`` for a check that the script runs."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("names", nargs="*", metavar="NAME")
    found.add_argument("--pairs", type=int, default=pairs)
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--quick", action="store_true", help="few pairs: figures mean nothing")
    return found


def parsed(found: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with the number of threads set."""
    arguments = found.parse_args()
    arguments.pairs = 3 if arguments.quick else arguments.pairs
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def chosen(names: Iterable[str], parts: Sequence[str]) -> list[str]:
    """The names that contain one of the parts; all of them where there are no parts."""
    return [name for name in names if not parts or any(part in name for part in parts)]


def attempted(name: str, row: Callable[[], str]) -> None:
    """Print a row, or why there is none."""
    try:
        print(row(), flush=True)
    except ImportError as error:
        print(f"{name:34} skipped: {error}", flush=True)


def compared(name: str, a: nn.Module, b: nn.Module, report: Report, x: Tensor, pairs: int) -> str:
    """A row for a model and what became of it."""
    assert report.before is not None and report.after is not None
    found = speedup(a, b, as_inputs(x), pairs=pairs)
    before, after = (peak_bytes(model, as_inputs(x)) / 2**20 for model in (a, b))
    low, high = found.middle_half
    return COLUMNS.format(
        name,
        f"{found.median:.2f}×",
        f"{low:.2f} – {high:.2f}×",
        predicted(report),
        f"{report.after.macs / max(report.before.macs, 1):.3f}×",
        f"{report.after.parameters / max(report.before.parameters, 1):.2f}×",
        f"{before:.1f} → {after:.1f} MiB",
    )


def predicted(report: Report) -> str:
    """The ratio by the planner's saving; what is not merged is taken to keep its share, that of its MACs."""
    if report.saving is None or report.before is None:
        return ""
    macs = sum(site.macs_before for site in report.merged())
    share = min(1.0, macs / report.before.macs) if report.before.macs else 1.0
    after = report.saving.latency_after / report.saving.latency_before
    return f"{1 / (1 - share + share * after):.2f}×"
