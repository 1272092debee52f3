"""What fusing costs, as a multiple of what cannot be avoided: loading, tracing, two float64 forward passes.

    python tests/benchmarks/tooltime.py [NAME] [--repeats 3]

Each is done in the same process, after one round that warms up; the medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zoo

import convmerge


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", default="torchvision/resnet50")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    model, x = zoo.build(arguments.name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.save(model, file)

        def unavoidable() -> None:
            loaded = torch.load(file, weights_only=False)
            torch.export.export(loaded, (x,), strict=False)
            double = copy.deepcopy(loaded).double()
            with torch.no_grad():
                double(x.double())
                double(x.double())

        def fuse() -> None:
            nonlocal report
            report = convmerge.fuse(torch.load(file, weights_only=False), x).report

        report = None
        rounds = [(timed(unavoidable), timed(fuse)) for _ in range(arguments.repeats + 1)][1:]
    base = statistics.median(r[0] for r in rounds)
    total = statistics.median(r[1] for r in rounds)
    print(f"{arguments.name}: fuse takes {total / base:.2f}× (load + trace + two float64 forward passes)")
    for stage, spent in report.seconds.items():
        print(f"  {stage:10} {spent / base:.2f}×")


if __name__ == "__main__":
    main()
