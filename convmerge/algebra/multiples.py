"""Forms whose input sizes are known to be multiples of a number, as those of PixelUnshuffle are."""

from __future__ import annotations

from dataclasses import replace

from convmerge.affine import Geometry


def with_fill(g: Geometry, multiple: int) -> Geometry:
    """The form with padding behind for the inputs that its stride leaves unread, of which there are none.

    At sizes that are multiples of ``multiple``, which divides the stride and without padding is it, this is
    the same, and what comes after it can be composed without a thought for a rest.
    """
    return g if multiple == 1 else replace(g, hi=tuple(hi + multiple - 1 for hi in g.hi))


def without_fill(g: Geometry, multiple: int) -> Geometry:
    """The same at sizes that are multiples of ``multiple``, with the padding behind most like that in front.

    The output count there, floor((multiple * j + slack - 1) / down) + 1, depends on
    floor((slack - 1) / multiple) alone if ``multiple`` divides ``down``.
    """
    if multiple == 1 or any(u > 1 or d % multiple for u, d in zip(g.up, g.down, strict=True)):
        return g
    spare = [(s - 1) % multiple for s in g.slack]
    sides = zip(g.lo, g.hi, spare, strict=True)
    return replace(g, hi=tuple(min(max(lo, hi - less), hi) for lo, hi, less in sides))
