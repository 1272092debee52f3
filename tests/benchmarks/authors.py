"""What is left of models whose authors merge them by hand: by their code, and by convmerge.

    python tests/benchmarks/authors.py [NAME ...] [--pairs 15] [--threads 2] [--quick]

NAME is any part of a model's name. Counts are calls of convolutions / linear layers / batch norms: of the
original, the authors' merged model, and the fused one. MACs and parameters are relative to the original's.
The error is that of the model in float64, relative to its largest output. Latency: the original and the fused
model run in turn, then the authors' and the fused one; the median of the ratios, with the middle half.
"""

from __future__ import annotations

import copy
import sys
import time
from functools import partial
from pathlib import Path

import torch
from table import attempted, chosen, parsed, parser
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import authored

import convmerge
from convmerge.benchmark import speedup
from convmerge.counts import count
from convmerge.inputs import as_inputs
from convmerge.report import Counts

COLUMNS = "{:24} {:>12} {:>12} {:>12} {:>15} {:>15} {:>19} {:>19} {:>19} {:>7}"
HEAD = COLUMNS.format(
    "conv / linear / norm",
    "before",
    "authors",
    "convmerge",
    "MACs",
    "parameters",
    "float64 error",
    "original / fused",
    "authors / fused",
    "fuse",
)


def main() -> None:
    arguments = parsed(parser(__doc__))
    print(HEAD)
    for name in chosen(authored.AUTHORED, arguments.names):
        attempted(name, partial(row, name, arguments.pairs))


def row(name: str, pairs: int) -> str:
    model, merged, x = authored.build(name)
    start = time.perf_counter()
    fused = convmerge.fuse(model, x).model
    seconds = time.perf_counter() - start
    before, theirs, ours = (count(m, as_inputs(x)) for m in (model, merged, fused))
    return COLUMNS.format(
        name,
        *(words(counts) for counts in (before, theirs, ours)),
        f"{theirs.macs / before.macs:.4f} {ours.macs / before.macs:.4f}",
        f"{theirs.parameters / before.parameters:.4f} {ours.parameters / before.parameters:.4f}",
        errors(model, merged, x),
        ratio(model, fused, x, pairs),
        ratio(merged, fused, x, pairs),
        f"{seconds:.1f} s",
    )


def words(counts: Counts) -> str:
    """``conv/linear/batch_norm``."""
    return "/".join(str(counts.operators.get(kind, 0)) for kind in ("conv", "linear", "batch_norm"))


def errors(model: nn.Module, merged: nn.Module, x: Tensor) -> str:
    """The authors' error, and that of fusing the model in double precision."""
    wide, theirs = copy.deepcopy(model).double(), copy.deepcopy(merged).double()
    x = x.double() if x.is_floating_point() else x
    ours = convmerge.fuse(wide, x).model
    return f"{authored.distance(wide, theirs, x):.1e} {authored.distance(wide, ours, x):.1e}"


def ratio(a: nn.Module, b: nn.Module, x: Tensor, pairs: int) -> str:
    """How much faster ``b`` is."""
    found = speedup(a, b, as_inputs(x), pairs=pairs)
    low, high = found.middle_half
    return f"{found.median:.2f}× ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    with torch.no_grad():
        main()
