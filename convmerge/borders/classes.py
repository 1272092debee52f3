"""Chains whose padding leaks taps, as one kernel for the inside and one for every border class (remedy 3).

Per dimension only the first and the last few output blocks differ from the composition (see
:mod:`convmerge.algebra.ends`). Which intermediate positions exist is decided dimension by dimension, so a
border class of a map is one choice per dimension: a corner, a side, or the inside. The kernel of a class is
the adjoint of the chain applied to unit outputs at one place of that class: what such an output is made of.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from convmerge.affine import Affine, Dims, Geometry
from convmerge.algebra import compose_geometry
from convmerge.algebra.axis import Axis, axes, from_axes, words
from convmerge.algebra.ends import Ends, Offset, Piece, chain_ends
from convmerge.algebra.polyphase import polyphase_axis, polyphase_geometry
from convmerge.errors import Refusal

Key = tuple[int, ...]  # per dimension: which of its segments


@dataclass(frozen=True)
class Side:
    """One dimension: the border blocks, and the axis that computes all blocks between them.

    Attributes:
        ends: the border blocks.
        inner: on the whole input, at the rate of the blocks; its padding is what the first and the last of
            the inner blocks need, negative where these do not reach the ends of the input.
    """

    ends: Ends
    inner: Axis

    @property
    def segments(self) -> tuple[Piece | Axis, ...]:
        """In the order of the output: first blocks, all inner ones, last blocks."""
        return (*self.ends.first, self.inner, *self.ends.last)

    def residues(self, segment: int) -> int:
        """How many kernels the segment has, one for each residue of the input size."""
        return self.ends.residues if segment > len(self.ends.first) else 1


@dataclass(frozen=True)
class Bordered:
    """A chain of forms as interior and border kernels; geometry only.

    Attributes:
        stages: the chain, in the order it runs.
        whole: its composition, which is what the interior computes.
        low: ``whole`` at the rate of the blocks, with a channel for each phase.
        crop: outputs too many at the end of each dimension once the phases are interleaved.
        sides: one for each dimension.
    """

    stages: tuple[Geometry, ...]
    whole: Geometry
    low: Geometry
    crop: Dims
    sides: tuple[Side, ...]

    @property
    def rates(self) -> Dims:
        """By how much the phases are interleaved at the end."""
        return self.whole.up

    @property
    def minimum(self) -> Dims:
        """The smallest input size."""
        return tuple(side.ends.minimum for side in self.sides)

    @property
    def keys(self) -> list[Key]:
        """All classes, the interior included."""
        return list(itertools.product(*(range(len(side.segments)) for side in self.sides)))

    @property
    def interior(self) -> Key:
        """The class of what no padding inside the chain reaches."""
        return tuple(len(side.ends.first) for side in self.sides)

    def residues(self, key: Key) -> Dims:
        """Per dimension the number of kernels that a class has."""
        return tuple(side.residues(k) for side, k in zip(self.sides, key, strict=True))

    def layer(self, key: Key) -> Geometry:
        """The convolution of a class, on the slice of the input that it reads."""
        segments = [side.segments[k] for side, k in zip(self.sides, key, strict=True)]
        dims = [s if isinstance(s, Axis) else Axis(s.length, 1, 1, 1, 0, 0) for s in segments]
        return from_axes(self.low.in_channels, self.low.out_channels, self.low.groups, dims, self.low.bias)

    def layer_size(self, key: Key, size: Sequence[int]) -> Dims:
        """The size of that slice where the input is of ``size``."""
        segments = (side.segments[k] for side, k in zip(self.sides, key, strict=True))
        return tuple(n if isinstance(s, Axis) else s.length for s, n in zip(segments, size, strict=True))

    def __str__(self) -> str:
        g, n = self.low, self.low.spatial
        shuffle = f" → phases interleaved {words(self.rates)}" if max(self.rates) > 1 else ""
        stride = f", stride {words(g.down)}" if max(g.down) > 1 else ""
        kernel = f"Conv{n}d({g.in_channels}, {g.out_channels}, {words(g.kernel)}{stride})"
        bound = [str(side.ends.minimum) if side.ends.blocks else "any" for side in self.sides]
        return f"{len(self.keys)} border classes of {kernel}{shuffle}, for inputs from {'×'.join(bound)} up"


@lru_cache(maxsize=4096)
def bordered(stages: tuple[Geometry, ...]) -> Bordered:
    """Border classes of a chain of forms.

    Raises:
        Refusal: the rates do not compose or cannot be interleaved, or see ``chain_ends``.
        ValueError: the forms do not fit together.
    """
    whole = composition(stages)
    if not 1 <= whole.spatial <= 3:
        raise Refusal(f"torch.nn has no convolution of {whole.spatial} dimensions")
    low = polyphase_geometry(whole, (0,) * whole.spatial)
    crop = tuple(polyphase_axis(axis, 0).crop for axis in axes(whole))
    offsets = tuple(Offset(stage.bias, stage.ones) for stage in stages)
    sides = []
    for chain, axis in zip(zip(*map(axes, stages), strict=True), axes(low), strict=True):
        ends = chain_ends(tuple(chain), offsets)
        lo, hi = axis.lo - axis.down * len(ends.first), axis.hi - axis.down * len(ends.last)
        sides.append(Side(ends, axis._replace(lo=lo, hi=hi)))
    return Bordered(stages, whole, low, crop, tuple(sides))


def composition(stages: Sequence[Geometry]) -> Geometry:
    """The stages as one form, as it is where no border is near: what fades is a bias like any other there."""
    plain = [replace(stage, bias=stage.bias or stage.ones, ones=False) for stage in stages]
    return reduce(lambda inner, outer: compose_geometry(outer, inner), plain)


def class_form(b: Bordered, forms: Sequence[Affine], key: Key, residue: Sequence[int]) -> Affine:
    """The convolution of a class in float64.

    Args:
        forms: the stages with their numbers.
        residue: per dimension the input size modulo its residues, which the last blocks may depend on.
    """
    size = [_canvas(side, r) for side, r in zip(b.sides, residue, strict=True)]
    blocks = b.low.out_size(size)
    at = [_block_of(side, k, n) for side, k, n in zip(b.sides, key, blocks, strict=True)]
    weight = _kernel(b, forms, key, size, at)
    bias = _bias(b, forms, size, at) if b.low.bias else None
    return Affine(b.layer(key), weight, bias)


def _canvas(side: Side, residue: int) -> int:
    """An input size of a residue class with two inner blocks, of which the first is then complete."""
    least = side.ends.minimum + side.inner.down
    return least + (residue - least) % side.ends.residues


def _block_of(side: Side, segment: int, blocks: int) -> int:
    """An output block that the segment computes: the first of those inside."""
    return segment if segment <= len(side.ends.first) else blocks - len(side.segments) + segment


def _kernel(b: Bordered, forms: Sequence[Affine], key: Key, size: Sequence[int], at: Sequence[int]) -> Tensor:
    """The weights of one class: (out * phases, in / groups, *kernel)."""
    # Outside the border classes nothing that is cut off matters, so the inner taps are kept in full.
    whole = [k == len(side.ends.first) for side, k in zip(b.sides, key, strict=True)]
    sizes = [tuple(size)]
    for form in forms:
        sizes.append(form.geometry.out_size(sizes[-1]))
    groups, rate = b.low.groups, b.whole.up
    per_group = b.whole.out_channels // groups
    units = torch.eye(per_group * math.prod(rate), dtype=torch.float64)
    window = units.reshape(-1, per_group, *rate).repeat(1, groups, *(1 for _ in rate))  # every group at once
    start = [q * u for q, u in zip(at, rate, strict=True)]
    for form, below in zip(reversed(forms), reversed(sizes[:-1]), strict=True):
        limits = [None if free else n for free, n in zip(whole, below, strict=True)]
        window, start = _adjoint(form, window, start, limits)
    for dim, (side, k, q, n) in enumerate(zip(b.sides, key, at, size, strict=True)):
        window = _taken(window, dim + 2, [p - start[dim] for p in _read(side, k, q, n)])
    blocks = window.reshape(len(window), groups, -1, *window.shape[2:])
    return blocks.transpose(0, 1).flatten(0, 1).contiguous()


def _read(side: Side, segment: int, block: int, size: int) -> list[int]:
    """The input positions under the taps of a segment's kernel, at one of its blocks."""
    s = side.segments[segment]
    if isinstance(s, Piece):
        origin = 0 if segment < len(side.ends.first) else size
        return [origin + i for i in range(s.start, s.stop)]
    first = s.down * (block - len(side.ends.first)) - s.lo
    return [first + s.dilation * t for t in range(s.kernel)]


def _adjoint(
    form: Affine, window: Tensor, start: Sequence[int], limits: Sequence[int | None]
) -> tuple[Tensor, list[int]]:
    """What combinations of outputs are made of, as combinations of inputs.

    window: (N, out_channels, *sizes), coefficients of the outputs from position ``start`` on, all others
    being zero. Returns the same for the inputs, which are cut to 0..limit-1 where there is a limit.
    """
    g = form.geometry
    if window.numel():
        spread = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[g.spatial - 1]
        window = spread(window, form.weight, stride=g.down, groups=g.groups, dilation=g.dilation)
    else:
        window = window.new_zeros(len(window), g.in_channels, *(0 for _ in g.kernel))
    begin = []
    for dim, (axis, at, limit) in enumerate(zip(axes(g), start, limits, strict=True)):
        at = axis.down * at - axis.lo
        skipped = -at % axis.up
        at = (at + skipped) // axis.up
        window = window[(slice(None),) * (dim + 2) + (slice(skipped, None, axis.up),)]
        length = window.shape[dim + 2]
        low, high = (0, length) if limit is None else (max(0, -at), min(length, limit - at))
        window = window.narrow(dim + 2, min(low, length), max(0, high - low))
        begin.append(at + low)
    return window, begin


def _taken(window: Tensor, dim: int, positions: Sequence[int]) -> Tensor:
    """The entries at ``positions`` along ``dim``, zero where there are none."""
    length = window.shape[dim]
    hits = [(t, p) for t, p in enumerate(positions) if 0 <= p < length]
    taken = window.new_zeros([*window.shape[:dim], len(positions), *window.shape[dim + 1 :]])
    into, source = (torch.tensor([hit[i] for hit in hits], dtype=torch.long) for i in (0, 1))
    return taken.index_copy(dim, into, window.index_select(dim, source))


def _bias(b: Bordered, forms: Sequence[Affine], size: Sequence[int], at: Sequence[int]) -> Tensor:
    """What the chain makes of zeros in a block: (out * phases,)."""
    y = torch.zeros(1, b.whole.in_channels, *size, dtype=torch.float64)
    for form in forms:
        y = form(y)
    bias = y.new_zeros(b.whole.out_channels, *b.whole.up)
    block = y[0]
    for dim, (q, u) in enumerate(zip(at, b.whole.up, strict=True)):
        block = block.narrow(dim + 1, q * u, min(u, block.shape[dim + 1] - q * u))
    bias[(slice(None), *(slice(n) for n in block.shape[1:]))] = block
    return bias.flatten()


def residues_of(b: Bordered, key: Key) -> Iterator[tuple[int, ...]]:
    """The residues that a class has a kernel for, the last dimension fastest."""
    return itertools.product(*(range(n) for n in b.residues(key)))
