"""What happens at the two ends of one spatial dimension, decided on integers for every input size.

Write m for a position of the intermediate map, which is 0..M-1 for M outputs of the inner axis. The outer
axis reads m where u2*m = d2*n + e2*t2 - lo2 for one of its outputs n and taps t2. The inner axis, evaluated
at m, touches input j where u1*j = d1*m + e1*t1 - lo1 for one of its taps t1 and 0 <= j < H.

Two facts reduce all sizes H to finitely many:

- Growing H by a period of the output counts moves the right end as a whole and only lifts the limits n >= 0
  and j >= 0 seen from there; so what happens at some size happens at all larger ones of the same residue,
  and each end can be judged on an input without another end.
- Read backwards, an axis is an axis again, with ``lo`` replaced by hi - r, where r = ((H-1)*up + slack) mod
  down is the remainder that the stride leaves unread. So the right end is the left end of the mirrored
  pair, once for every pair of remainders that occurs.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from convmerge.algebra.axis import Axis


class Edge(NamedTuple):
    """What the outer axis meets outside the intermediate map, at some input size.

    reads: it reads positions there. touches: at one of them the inner axis would still see input.
    ragged: it touches, but only at sizes where a stride leaves a rest of its input unread.
    """

    reads: bool
    touches: bool
    ragged: bool = False


@lru_cache(maxsize=65536)
def axis_edges(outer: Axis, inner: Axis) -> Edge:
    """Both ends of outer ∘ inner at every input size."""
    flush = [_left_end(outer, inner)]
    ragged: list[Edge] = []
    for inner_rest, outer_rest in _remainders(outer, inner):
        mirrored = outer._replace(lo=outer.hi - outer_rest), inner._replace(lo=inner.hi - inner_rest)
        (ragged if inner_rest or outer_rest else flush).append(_left_end(*mirrored))
    reads = any(end.reads for end in flush + ragged)
    always, sometimes = any(end.touches for end in flush), any(end.touches for end in ragged)
    return Edge(reads, always or sometimes, sometimes and not always)


def _remainders(outer: Axis, inner: Axis) -> set[tuple[int, int]]:
    """What the inner and the outer stride leave unread at the end, over a period of input sizes."""
    seen = set()
    for last in range(inner.down * outer.down):
        rest = last * inner.up + inner.slack
        middle = rest // inner.down
        seen.add((rest % inner.down, (middle * outer.up + outer.slack) % outer.down))
    return seen


def _left_end(outer: Axis, inner: Axis) -> Edge:
    """The positions m < 0 that the outer axis reads, on an input without right end."""
    reads = False
    for m in range(-(outer.lo // outer.up), 0):
        steps = (outer.up * m + outer.lo - outer.dilation * t for t in range(outer.kernel))
        if any(s >= 0 and s % outer.down == 0 for s in steps):
            reads = True
            places = (inner.down * m + inner.dilation * t - inner.lo for t in range(inner.kernel))
            if any(p >= 0 and p % inner.up == 0 for p in places):
                return Edge(True, True)
    return Edge(reads, False)


@lru_cache(maxsize=65536)
def inside_taps(axis: Axis) -> tuple[int, ...] | None:
    """For every output phase a tap that meets the input at all output positions of that phase, at every size.

    Output position m has the phase m mod (up / gcd(up, down)); without upsampling there is one phase. None
    where a phase has no such tap, as with a 1×1 kernel that pads, or a kernel padded by its own length.
    """
    period = axis.up // math.gcd(axis.up, axis.down)
    taps = []
    for phase in range(period):
        inside = (t for t in range(axis.kernel) if _always_inside(axis, t, phase, period))
        tap = next(inside, None)
        if tap is None:
            return None
        taps.append(tap)
    return tuple(taps)


def _always_inside(axis: Axis, tap: int, phase: int, period: int) -> bool:
    first = axis.down * phase + axis.dilation * tap - axis.lo
    if first < 0 or first % axis.up:
        return False
    for size in range(1, axis.down + 1):
        end = axis.out_size(size) - 1
        last = end - (end - phase) % period
        if axis.down * last + axis.dilation * tap - axis.lo > (size - 1) * axis.up:
            return False
    return True
