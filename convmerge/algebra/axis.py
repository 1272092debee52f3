"""The laws of the form in one spatial dimension, on integers alone.

An :class:`Axis` is one dimension of a :class:`~convmerge.affine.Geometry`: X[down*n + dilation*t - lo],
with X the input zero-stuffed by ``up``. Sources: the noble identities of multirate filters (P. P.
Vaidyanathan, Multirate Systems and Filter Banks, 1993, section 4.2) and the nested floor identity
floor(floor(x / a) / b) = floor(x / (a*b)).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from convmerge.affine import Geometry
from convmerge.errors import Refusal


class Axis(NamedTuple):
    """One spatial dimension of a form; the fields are those of ``Geometry``."""

    kernel: int
    up: int
    down: int
    dilation: int
    lo: int
    hi: int

    @property
    def slack(self) -> int:
        """lo + hi - dilation*(kernel-1): what the output count depends on beside the input size."""
        return self.lo + self.hi - self.dilation * (self.kernel - 1)

    def out_size(self, size: int) -> int:
        """Output count for ``size`` inputs; below 1 where the input is too small."""
        return ((size - 1) * self.up + self.slack) // self.down + 1


POINT = Axis(1, 1, 1, 1, 0, 0)


class Composition(NamedTuple):
    """How the taps of two axes make those of their composition.

    Tap t2 of the outer and t1 of the inner one meet at outer_step*t2 + inner_step*t1; of the taps so made,
    ``start``, ``start + step``, ... are the kernel of ``axis`` (none where start is past the end: the
    composition is zero and its one tap with it).
    """

    axis: Axis
    outer_step: int
    inner_step: int
    start: int
    step: int


def axes(g: Geometry) -> list[Axis]:
    """The spatial dimensions of a geometry."""
    return list(map(Axis, g.kernel, g.up, g.down, g.dilation, g.lo, g.hi))


def from_axes(
    in_channels: int,
    out_channels: int,
    groups: int,
    dims: Iterable[Axis],
    bias: bool = False,
    ones: bool = False,
    phased: bool = False,
) -> Geometry:
    """A geometry with these spatial dimensions."""
    kernel, up, down, dilation, lo, hi = zip(*dims, strict=True) if (dims := tuple(dims)) else ((),) * 6
    return Geometry(in_channels, out_channels, groups, kernel, up, down, dilation, lo, hi, bias, ones, phased)


@lru_cache(maxsize=65536)
def compose_axis(outer: Axis, inner: Axis) -> Composition:
    """outer ∘ inner: y[n] = sum over t2, t1 of X[d1*d2*n + d1*e2*t2 + u2*e1*t1 - (d1*lo2 + u2*lo1)].

    Either u2 = 1, and y1 is read at the positions d1*m, or d1 = 1, and the inner taps spread as the
    zero-stuffing spreads y1. The output counts agree by the nested floor identity.

    Raises:
        Refusal: a stride d1 > 1, then an upsampling u2 > 1. At coprime rates the two commute, but with r of
            the input left unread by the stride one filter would give up to u2*r/d1 >= 1 outputs more. See
            :mod:`convmerge.algebra.blocked` for what does it at any rates.
    """
    if outer.up > 1 and inner.down > 1:
        raise Refusal(f"upsampling by {outer.up} after a stride of {inner.down} is not one filter")
    outer_step = inner.down * outer.dilation if outer.kernel > 1 else 0
    inner_step = outer.up * inner.dilation if inner.kernel > 1 else 0
    dilation = math.gcd(outer_step, inner_step) or 1
    outer_step, inner_step = outer_step // dilation, inner_step // dilation
    full = Axis(
        kernel=outer_step * (outer.kernel - 1) + inner_step * (inner.kernel - 1) + 1,
        up=outer.up * inner.up,
        down=outer.down * inner.down,
        dilation=dilation,
        lo=inner.down * outer.lo + outer.up * inner.lo,
        hi=inner.down * outer.hi + outer.up * inner.hi,
    )
    reduced, start, step = _reduce_rates(full)
    return Composition(reduced, max(outer_step, 1), max(inner_step, 1), start, step)


def _reduce_rates(axis: Axis) -> tuple[Axis, int, int]:
    """Divide up and down by their gcd g: only taps at positions divisible by g ever meet an input.

    Returns the reduced axis, and the first tap kept and the step from one to the next.
    """
    g = math.gcd(axis.up, axis.down)
    if g == 1:
        return axis, 0, 1
    up, down, slack = axis.up // g, axis.down // g, axis.slack // g
    step = g // math.gcd(axis.dilation, g)
    kept = [t for t in range(min(step, axis.kernel)) if (axis.dilation * t - axis.lo) % g == 0]
    if not kept:
        return Axis(1, up, down, 1, 0, slack), axis.kernel, 1
    start = kept[0]
    kernel = (axis.kernel - 1 - start) // step + 1
    dilation = axis.dilation * step // g if kernel > 1 else 1
    lo = (axis.lo - axis.dilation * start) // g
    return Axis(kernel, up, down, dilation, lo, slack - lo + dilation * (kernel - 1)), start, step


class Placement(NamedTuple):
    """Where the taps of one axis go in a longer kernel: ``start``, ``start + step``, ..."""

    start: int
    step: int


@lru_cache(maxsize=65536)
def align_axes(parts: tuple[Axis, ...]) -> tuple[Axis, tuple[Placement, ...]]:
    """The shortest axis that holds the taps of all ``parts``, for sums and concatenations.

    The output counts of the parts must agree at some input size. Where they agree, so does that of the
    result; at other sizes (a 3×3 branch padded by 1 beside a 2×2 average pool, both at stride 2, agree at
    even sizes only) the original cannot be added and the result is not constrained.

    Raises:
        Refusal: the parts differ in stride or upsampling, or in output count at every size.
    """
    if len({part.down for part in parts}) > 1:
        raise Refusal(f"the branches differ in stride: {_listed(part.down for part in parts)}")
    if len({part.up for part in parts}) > 1:
        raise Refusal(f"the branches differ in upsampling: {_listed(part.up for part in parts)}")
    first = parts[0]
    if not any(len({part.out_size(h) for part in parts}) == 1 for h in range(1, first.down + 1)):
        raise Refusal("the branches differ in output size")
    lo = max(part.lo for part in parts)
    spacings = [part.dilation for part in parts if part.kernel > 1] + [lo - part.lo for part in parts]
    dilation = math.gcd(*spacings) or 1
    reach = max(part.dilation * (part.kernel - 1) + lo - part.lo for part in parts)
    # Any slack among the parts' is right where they agree; a symmetric padding needs no operator of its own.
    slack = max((part.slack for part in parts), key=lambda s: (s + reach == 2 * lo, s))
    kernel = reach // dilation + 1
    axis = Axis(kernel, first.up, first.down, dilation, lo, slack - lo + reach)
    steps = (p.dilation // dilation if p.kernel > 1 else 1 for p in parts)
    return axis, tuple(Placement((lo - p.lo) // dilation, step) for p, step in zip(parts, steps, strict=True))


def _listed(values: Iterable[int]) -> str:
    return ", ".join(str(v) for v in sorted(set(values)))


def words(sizes: Sequence[int]) -> str:
    """Sizes as people write them: (3, 5) as 3×5."""
    return "×".join(map(str, sizes))
