"""Every way to build a form of a given geometry, so that planning can compare their costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from convmerge.affine import Geometry
from convmerge.algebra import commutes_geometry
from convmerge.algebra.axis import Axis, axes, from_axes
from convmerge.algebra.polyphase import polyphase_axis, polyphase_geometry
from convmerge.emit.interleave import Interleaving, interleaving_geometry
from convmerge.emit.layer import Emission, Kind, Layer
from convmerge.errors import Refusal

HEAD = 16  # taps; those with fewer, 3×3 most often, are made for maps larger than an example may be


@lru_cache(maxsize=65536)
def emissions(g: Geometry) -> tuple[Emission, ...]:
    """Every way to build a form of this geometry as plain layers, at least one.

    Raises:
        Refusal: no layer of torch.nn computes it.
    """
    if g.spatial > 3:
        raise Refusal(f"torch.nn has no convolution of {g.spatial} dimensions")
    if g.spatial == 0:
        return tuple(_products(g))
    if math.prod(g.up) == 1:
        return (*_convolutions(g), *_unfolded(g))
    phases = tuple(_phases(g))
    # No transposed convolution strides, or has a bias that depends on the position.
    return phases if g.phased or math.prod(g.down) > 1 else (_transposed(g), *phases)


def _products(g: Geometry) -> Iterator[Emission]:
    """The dense matrix, and batches of blocks; of fewer and larger ones too, as small ones are slow."""
    for groups in range(1, 2 if g.diagonal else g.groups + 1):
        if g.groups % groups == 0:
            kinds: tuple[Kind, ...] = ("batched_linear", "batched_rows") if groups > 1 else ("linear",)
            for kind in kinds:
                yield Emission((Layer(kind, replace(g, groups=groups)),), (), ())


def _convolutions(g: Geometry) -> Iterator[Emission]:
    """With what padding the convolution has itself, the rest by a layer before it or by zero taps."""
    dims = axes(g)
    none = (0,) * g.spatial
    own = [max(0, min(a.lo, a.hi)) for a in dims]
    rest = [(a.lo - p, a.hi - p) for a, p in zip(dims, own, strict=True)]
    plain = [a._replace(lo=p, hi=p) for a, p in zip(dims, own, strict=True)]
    conv = _conv(g, plain)
    # Ones stand inside the input alone, so they come before its padding.
    yield Emission((*_ones(g), *_pads(conv.geometry.in_channels, rest), conv), none, none)
    if any(lo != hi for lo, hi in rest):
        yield from _widened(g)


def _widened(g: Geometry) -> Iterator[Emission]:
    """Zero taps in front raise lo, zero taps behind raise hi: both paddings become the larger one."""
    front, back, dims = [], [], []
    for a in axes(g):
        padding, dilation = max(a.lo, a.hi), a.dilation if a.kernel > 1 else abs(a.hi - a.lo) or 1
        if padding < 0 or (a.hi - a.lo) % dilation:
            return
        front.append((padding - a.lo) // dilation)
        back.append((padding - a.hi) // dilation)
        dims.append(Axis(a.kernel + front[-1] + back[-1], 1, a.down, dilation, padding, padding))
    yield Emission((*_ones(g), _conv(g, dims)), tuple(front), tuple(back))


def _unfolded(g: Geometry) -> Iterator[Emission]:
    """One matrix product; for kernels such as those of heads, whose maps are small."""
    plain = g.groups == 1 and not g.ones and not any(g.lo) and not any(g.hi)
    if plain and math.prod(g.kernel) >= HEAD:
        none = (0,) * g.spatial
        yield Emission((Layer("unfolded", g),), none, none)


def _transposed(g: Geometry) -> Emission:
    """lo = dilation*(k-1) - padding and hi = lo + output_padding, with zero taps where these do not fit."""
    front, back, dims = [], [], []
    for a in axes(g):
        behind = max(0, -((a.dilation * (a.kernel - 1) - a.lo) // a.dilation))
        extra = a.hi + a.dilation * behind - a.lo  # output_padding, to be within 0..limit
        limit = max(a.up, a.dilation) - 1
        behind += max(0, -(extra // a.dilation))
        before = max(0, -((limit - extra) // a.dilation))
        front.append(before)
        back.append(behind)
        lo, hi = a.lo + a.dilation * before, a.hi + a.dilation * behind
        dims.append(a._replace(kernel=a.kernel + before + behind, lo=lo, hi=hi))
    layer = Layer("conv_transpose", _with_ones(g, dims))
    return Emission((*_ones(g), layer), tuple(front), tuple(back))


def _phases(g: Geometry) -> Iterator[Emission]:
    """Polyphase form, then the phases interleaved and what does not belong to the output dropped.

    The shift that makes the phases' kernel shortest drops outputs at both ends; without it there may be
    nothing to drop.
    """
    best = tuple(_shortest_shift(axis) for axis in axes(g))
    for shift in dict.fromkeys(((0,) * g.spatial, best)):
        low = polyphase_geometry(g, shift)
        crop = [polyphase_axis(axis, s).crop for axis, s in zip(axes(g), shift, strict=True)]
        dims = [Interleaving(*d) for d in zip(g.up, shift, crop, strict=True)]
        for emission, after in itertools.product(_convolutions(low), _interleaved(g.out_channels, dims)):
            yield replace(emission, layers=emission.layers + after, shift=shift)


def _interleaved(channels: int, dims: Sequence[Interleaving]) -> Iterator[tuple[Layer, ...]]:
    """PixelShuffle and a crop where torch has one at these rates, or all at once."""
    if len(dims) == 2 and dims[0].up == dims[1].up:
        whole = [d._replace(start=0, end=0) for d in dims]
        crop = _pads(channels, [(-d.start, -d.end) for d in dims])
        yield Layer("shuffle", interleaving_geometry(channels, whole)), *crop
        if dims == whole:
            return
    yield (Layer("interleave", interleaving_geometry(channels, dims)),)


def _shortest_shift(axis: Axis) -> int:
    return min(range(axis.up), key=lambda shift: polyphase_axis(axis, shift).axis.kernel)


def _conv(g: Geometry, dims: Sequence[Axis]) -> Layer:
    return Layer("conv", _with_ones(g, dims))


def _with_ones(g: Geometry, dims: Sequence[Axis]) -> Geometry:
    """The layer's own geometry: with one more input channel in each group where there are ones."""
    return from_axes(g.in_channels + g.ones * g.groups, g.out_channels, g.groups, dims, g.bias)


def _ones(g: Geometry) -> tuple[Layer, ...]:
    if not g.ones:
        return ()
    return (
        Layer("ones", Geometry.channelwise(g.in_channels, g.in_channels + g.groups, g.groups, g.spatial)),
    )


def _pads(channels: int, sides: Sequence[tuple[int, int]]) -> Iterator[Layer]:
    """Padding, then cropping; in one layer unless a dimension needs both, since F.pad crops first."""
    both = any(min(side) < 0 < max(side) for side in sides)
    steps = [[(max(lo, 0), max(hi, 0)) for lo, hi in sides], [(min(lo, 0), min(hi, 0)) for lo, hi in sides]]
    for step in steps if both else [sides]:
        if any(lo or hi for lo, hi in step):
            dims = [Axis(1, 1, 1, 1, lo, hi) for lo, hi in step]
            yield Layer("pad", from_axes(channels, channels, channels, dims))


def flattened(g: Geometry) -> Emission:
    """A form whose kernel covers the map, without padding, as a linear layer on all of its numbers.

    Its output has no positions. torch lays the weights of a convolution out anew in every call, which takes
    about ten times as long as this product with a vector.
    """
    linear = Geometry.channelwise(g.in_channels * math.prod(g.kernel), g.out_channels, 1, 0, bias=g.bias)
    return Emission((Layer("flatten", g), Layer("linear", linear)), (), ())


def swapped(outer: Geometry, inner: Geometry, kind: Literal["avg_pool", "nearest"]) -> Emission:
    """outer ∘ inner, a channel mix and a resampling of ``kind``, with the mix at the lower resolution.

    Raises:
        Refusal: the two do not swap, or already stand in that order.
    """
    if inner.pointwise != (kind == "avg_pool"):
        raise Refusal("the channel mix runs at the lower resolution already")
    second, first = commutes_geometry(outer, inner)
    mix = Layer("conv", second if kind == "avg_pool" else first)
    none = (0,) * outer.spatial
    layers = (Layer(kind, first), mix) if kind == "avg_pool" else (mix, Layer(kind, second))
    return Emission(layers, none, none)
