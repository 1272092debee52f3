"""Chains with padding or several rates inside: a kernel for the inside and one for every border (remedy 3).

A chain in blocks (see :mod:`convmerge.algebra.blocked`) is one strided convolution, but for the first and
the last few blocks of every dimension (see :mod:`convmerge.algebra.ends`). Which intermediate positions
exist is decided dimension by dimension, so a border class of a map is one choice per dimension: a corner, a
side, or the inside. The kernel of a class is the adjoint of the chain applied to unit outputs at its place:
what such outputs are made of. All border blocks at one end are one class, with a channel for each of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from convmerge.affine import Affine, Dims, Geometry
from convmerge.algebra.axis import Axis, axes, from_axes, words
from convmerge.algebra.blocked import Blocked, blocked
from convmerge.algebra.ends import Border, Ends, Offset, chain_ends
from convmerge.errors import Refusal

Key = tuple[int, ...]  # per dimension: which of its segments


@dataclass(frozen=True)
class Side:
    """One dimension: the border blocks, and the axis that computes all blocks between them.

    Attributes:
        ends: the border blocks.
        blocked: the chain in blocks, where nothing is cut off.
    """

    ends: Ends
    blocked: Blocked

    @property
    def inner(self) -> Axis:
        """The blocks between the borders, on the whole input; its padding is what the first and the last of
        them need, negative where these do not reach the ends of the input.
        """
        axis = self.blocked.axis
        lo, hi = axis.lo - axis.down * self.ends.heads, axis.hi - axis.down * self.ends.tails
        return axis._replace(lo=lo, hi=hi)

    @property
    def segments(self) -> tuple[Border | Axis, ...]:
        """In the order of the output: first blocks, all inner ones, last blocks."""
        ends = self.ends
        return tuple(segment for segment in (ends.first, self.inner, ends.last) if segment is not None)

    def residues(self, segment: int) -> int:
        """How many kernels the segment has, one for each residue of the input size."""
        return self.ends.residues if segment > bool(self.ends.first) else 1

    def start(self, segment: int, blocks: int) -> int:
        """The first of ``blocks`` output blocks that a segment computes."""
        if segment > bool(self.ends.first):
            return blocks - self.ends.tails
        return segment * self.ends.heads

    def together(self, segment: int) -> int:
        """How many blocks one position of the segment's output holds."""
        found = self.segments[segment]
        return found.blocks if isinstance(found, Border) else 1

    @property
    def period(self) -> int:
        """Input sizes that agree modulo this are treated alike."""
        return max(self.ends.residues, len(self.blocked.excess) if self.excess is None else 1)

    @property
    def excess(self) -> int | None:
        """Outputs too many in the last block; None where that depends on the input size."""
        found = set(self.blocked.excess)
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class Bordered:
    """A chain of forms as interior and border kernels; geometry only.

    Attributes:
        stages: the chain, in the order it runs.
        low: the chain in blocks where nothing is cut off, which is what the interior computes; it has a
            channel (c, *phase) for each output of a block.
        sides: one for each dimension.
    """

    stages: tuple[Geometry, ...]
    low: Geometry
    sides: tuple[Side, ...]

    @property
    def rates(self) -> Dims:
        """By how much the phases are interleaved at the end."""
        return tuple(side.blocked.rates.outputs for side in self.sides)

    @property
    def out_channels(self) -> int:
        """Number of channels after that."""
        return self.stages[-1].out_channels

    @property
    def minimum(self) -> Dims:
        """The smallest input size."""
        return tuple(side.ends.minimum for side in self.sides)

    @property
    def keys(self) -> list[Key]:
        """All classes, the interior included."""
        return list(itertools.product(*(range(len(side.segments)) for side in self.sides)))

    @property
    def weights(self) -> int:
        """Number of weights of all kernels, biases included."""
        return sum(self.layer(key).weights * math.prod(self.residues(key)) for key in self.keys)

    def residues(self, key: Key) -> Dims:
        """Per dimension the number of kernels that a class has."""
        return tuple(side.residues(k) for side, k in zip(self.sides, key, strict=True))

    def together(self, key: Key) -> Dims:
        """Per dimension how many blocks one position of a class holds, as channels (c, *phase, *block)."""
        return tuple(side.together(k) for side, k in zip(self.sides, key, strict=True))

    def layer(self, key: Key) -> Geometry:
        """The convolution of a class, on the slice of the input that it reads."""
        segments = [side.segments[k] for side, k in zip(self.sides, key, strict=True)]
        dims = [s if isinstance(s, Axis) else Axis(s.length, 1, 1, 1, 0, 0) for s in segments]
        out = self.low.out_channels * math.prod(self.together(key))
        return from_axes(self.low.in_channels, out, self.low.groups, dims, self.low.bias)

    def layer_size(self, key: Key, size: Sequence[int]) -> Dims:
        """The size of that slice where the input is of ``size``."""
        segments = (side.segments[k] for side, k in zip(self.sides, key, strict=True))
        return tuple(n if isinstance(s, Axis) else s.length for s, n in zip(segments, size, strict=True))

    def __str__(self) -> str:
        g, n = self.low, self.low.spatial
        shuffle = f" → phases interleaved {words(self.rates)}" if max(self.rates) > 1 else ""
        stride = f", stride {words(g.down)}" if max(g.down) > 1 else ""
        kernel = f"Conv{n}d({g.in_channels}, {g.out_channels}, {words(g.kernel)}{stride})"
        if len(self.keys) == 1:
            return f"{kernel}{shuffle}"
        bound = [str(side.ends.minimum) if len(side.segments) > 1 else "any" for side in self.sides]
        return f"{len(self.keys)} border classes of {kernel}{shuffle}, for inputs from {'×'.join(bound)} up"


@lru_cache(maxsize=4096)
def bordered(stages: tuple[Geometry, ...]) -> Bordered:
    """A chain of forms in blocks, with border classes where padding inside the chain makes a difference.

    Raises:
        Refusal: see ``chain_ends``; or a number of dimensions that torch.nn has no convolution of.
        ValueError: the forms do not fit together.
    """
    low = blocked_geometry(stages)
    if not 1 <= low.spatial <= 3:
        raise Refusal(f"torch.nn has no convolution of {low.spatial} dimensions")
    offsets = tuple(Offset(stage.bias, stage.ones) for stage in stages)
    chains = zip(*map(axes, stages), strict=True)
    return Bordered(stages, low, tuple(Side(chain_ends(chain, offsets), blocked(chain)) for chain in chains))


@lru_cache(maxsize=4096)
def blocked_geometry(stages: tuple[Geometry, ...]) -> Geometry:
    """The stages in blocks, as they are where no border is near: what fades is a bias like any other there.

    Raises ValueError where they do not fit together.
    """
    for inner, outer in itertools.pairwise(stages):
        if (outer.in_channels, outer.spatial) != (inner.out_channels, inner.spatial):
            raise ValueError(f"{outer} does not take the output of {inner}")
    dims = [blocked(chain) for chain in zip(*map(axes, stages), strict=True)]
    out = stages[-1].out_channels * math.prod(d.rates.outputs for d in dims)
    groups = math.gcd(*(stage.groups for stage in stages))
    bias = any(stage.bias or stage.ones for stage in stages)
    return from_axes(stages[0].in_channels, out, groups, [d.axis for d in dims], bias)


def class_form(b: Bordered, forms: Sequence[Affine], key: Key, residue: Sequence[int]) -> Affine:
    """The convolution of a class in float64.

    Args:
        forms: the stages with their numbers.
        residue: per dimension the input size modulo its residues, which the last blocks may depend on.
    """
    size = [_canvas(side, r) for side, r in zip(b.sides, residue, strict=True)]
    blocks = b.low.out_size(size)
    at = [side.start(k, n) for side, k, n in zip(b.sides, key, blocks, strict=True)]
    weight = _kernel(b, forms, key, size, at)
    bias = _bias(b, forms, key, size, at) if b.low.bias else None
    return Affine(b.layer(key), weight, bias)


def _canvas(side: Side, residue: int) -> int:
    """An input size of a residue class with two inner blocks, of which the first is then complete."""
    least = side.ends.minimum + side.inner.down
    return least + (residue - least) % side.ends.residues


def _kernel(b: Bordered, forms: Sequence[Affine], key: Key, size: Sequence[int], at: Sequence[int]) -> Tensor:
    """The weights of one class: (out * phases * blocks, in / groups, *kernel)."""
    # Inside, nothing that is cut off matters, so the inner taps are kept in full.
    whole = [isinstance(side.segments[k], Axis) for side, k in zip(b.sides, key, strict=True)]
    sizes = [tuple(size)]
    for form in forms:
        sizes.append(form.geometry.out_size(sizes[-1]))
    groups, rate, together = b.low.groups, b.rates, b.together(key)
    per_group = b.out_channels // groups
    outputs = [u * a for u, a in zip(rate, together, strict=True)]
    units = torch.eye(per_group * math.prod(outputs), dtype=torch.float64)
    units = _by_phase(units.reshape(per_group, *outputs, -1), rate, together).flatten(0, -2)
    window = units.reshape(-1, per_group, *outputs).repeat(
        1, groups, *(1 for _ in rate)
    )  # all groups at once
    start = [q * u for q, u in zip(at, rate, strict=True)]
    for form, below in zip(reversed(forms), reversed(sizes[:-1]), strict=True):
        limits = [None if free else n for free, n in zip(whole, below, strict=True)]
        window, start = _adjoint(form, window, start, limits)
    for dim, (side, k, q, n) in enumerate(zip(b.sides, key, at, size, strict=True)):
        window = _taken(window, dim + 2, [p - start[dim] for p in _read(side, k, q, n)])
    blocks = window.reshape(len(window), groups, -1, *window.shape[2:])
    return blocks.transpose(0, 1).flatten(0, 1).contiguous()


def _by_phase(outputs: Tensor, rates: Sequence[int], together: Sequence[int]) -> Tensor:
    """(c, *positions, ...) → (c, *phase, *block, ...), where positions are blocks of phases in a row."""
    n = len(rates)
    turns = (size for u, a in zip(rates, together, strict=True) for size in (a, u))
    outputs = outputs.reshape(len(outputs), *turns, *outputs.shape[n + 1 :])
    return outputs.movedim(tuple(range(2, 2 * n + 1, 2)), tuple(range(1, n + 1)))


def _read(side: Side, segment: int, block: int, size: int) -> list[int]:
    """The input positions under the taps of a segment's kernel, at one of its blocks."""
    s = side.segments[segment]
    if isinstance(s, Border):
        origin = size if segment > bool(side.ends.first) else 0
        return [origin + i for i in range(s.start, s.stop)]
    first = s.down * (block - side.ends.heads) - s.lo
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


def _bias(b: Bordered, forms: Sequence[Affine], key: Key, size: Sequence[int], at: Sequence[int]) -> Tensor:
    """What the chain makes of zeros in the blocks of a class: (out * phases * blocks,)."""
    y = torch.zeros(1, b.low.in_channels, *size, dtype=torch.float64)
    for form in forms:
        y = form(y)
    together = b.together(key)
    counts = [u * a for u, a in zip(b.rates, together, strict=True)]
    bias = y.new_zeros(b.out_channels, *counts)
    found = y[0]
    for dim, (q, u, n) in enumerate(zip(at, b.rates, counts, strict=True)):
        found = found.narrow(dim + 1, q * u, min(n, found.shape[dim + 1] - q * u))
    bias[(slice(None), *(slice(n) for n in found.shape[1:]))] = found
    return _by_phase(bias, b.rates, together).flatten()


def residues_of(b: Bordered, key: Key) -> Iterator[tuple[int, ...]]:
    """The residues that a class has a kernel for, the last dimension fastest."""
    return itertools.product(*(range(n) for n in b.residues(key)))
