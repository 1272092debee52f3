"""How much faster the real models become: paired latency, MACs and operator calls, original against fused.

    python tests/benchmarks/latency.py [NAME ...] [--pairs 15] [--threads N]

NAME is any part of a model's name. Original and fused run in turn, so that whatever else the machine does
meets both. The speed-up is the median of the ratios within a pair; its spread is the middle half. Only
ratios are printed: absolute times are of one machine on one day.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import zoo

import convmerge

COLUMNS = "{:32} {:>8} {:>15} {:>8} {:>8}  {}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = [n for n in zoo.MODELS if not arguments.names or any(part in n for part in arguments.names)]
    print(COLUMNS.format("model", "faster", "middle half", "MACs", "params", "operator calls"))
    for name in chosen:
        try:
            model, x = zoo.build(name)
        except ImportError as error:
            print(f"{name:32} skipped: {error}")
            continue
        measure(name, model, x, arguments.pairs)


def measure(name: str, model: nn.Module, x: Tensor, pairs: int) -> None:
    """Fuse, time and print one row."""
    result = convmerge.fuse(model, x)
    before, after = result.report.before, result.report.after
    low, median, high = speedup(model, result.model, x, pairs)
    print(
        COLUMNS.format(
            name,
            f"{median:.2f}×",
            f"{low:.2f} – {high:.2f}×",
            f"{after.macs / before.macs:.3f}×",
            f"{after.parameters / before.parameters:.3f}×",
            calls(models.operators(model, x), models.operators(result.model, x)),
        ),
        flush=True,
    )


def speedup(a: nn.Module, b: nn.Module, x: Tensor, pairs: int) -> tuple[float, float, float]:
    """Quartiles of time(a) / time(b) over pairs of runs, the order within a pair alternating."""
    ratios = []
    for model in (a, b, a, b):
        seconds(model, x)
    for i in range(pairs):
        first, second = (a, b) if i % 2 else (b, a)
        times = {id(first): seconds(first, x), id(second): seconds(second, x)}
        ratios.append(times[id(a)] / times[id(b)])
    low, median, high = statistics.quantiles(ratios, n=4)
    return low, median, high


def seconds(model: nn.Module, x: Tensor) -> float:
    """Of as many forward passes as make up about a twentieth of a second, per pass."""
    passes, total = 0, 0.0
    with torch.inference_mode():
        while total < 0.05:
            start = time.perf_counter()
            model(x)
            total += time.perf_counter() - start
            passes += 1
    return total / passes


def calls(before: dict[str, int], after: dict[str, int]) -> str:
    """``conv 53, batch_norm 53→0``: the kinds that change with both numbers, the others with one."""
    rows = ((kind, before.get(kind, 0), after.get(kind, 0)) for kind in dict.fromkeys((*before, *after)))
    return ", ".join(f"{kind} {n}" if n == m else f"{kind} {n}→{m}" for kind, n, m in rows)


if __name__ == "__main__":
    main()
