"""How much faster real models become: original and fused run in turn, in pairs.

    python tests/benchmarks/latency.py [NAME ...] [--size N] [--pairs 15] [--threads 2] [--quick]

NAME is any part of a model's name; --size is for super resolution and decoders, where 192 matters as well.
The speed-up is the median of the ratios within a pair, its spread the middle half; absolute times are of one
machine on one day, and not printed. Peak memory is that of the tensors alive at one time, weights not
counted. The last column has operator calls.
"""

from __future__ import annotations

from functools import partial

import catalogue
import models
from table import HEAD, attempted, chosen, compared, parsed, parser

import convmerge


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--size", type=int)
    arguments = parsed(found)
    print(HEAD, " operator calls")
    for name in chosen(catalogue.NAMES, arguments.names):
        attempted(name, partial(row, name, arguments.size, arguments.pairs))


def row(name: str, size: int | None, pairs: int) -> str:
    model, x = catalogue.build(name, size)
    result = convmerge.fuse(model, x)
    calls = changed(models.operators(model, x), models.operators(result.model, x))
    return f"{compared(name, model, result.model, result.report, x, pairs)}  {calls}"


def changed(before: dict[str, int], after: dict[str, int]) -> str:
    """``conv 53, batch_norm 53→0``: the kinds that change with both numbers, the others with one."""
    rows = ((kind, before.get(kind, 0), after.get(kind, 0)) for kind in dict.fromkeys((*before, *after)))
    return ", ".join(f"{kind} {n}" if n == m else f"{kind} {n}→{m}" for kind, n, m in rows)


if __name__ == "__main__":
    main()
