"""Swapping a channel mix with a spatial filter that treats every channel alike, so that the mix runs at the
lower resolution: mean(W x) = W mean(x).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convmerge.affine import Affine, Geometry
from convmerge.algebra.axis import POINT, axes
from convmerge.algebra.bias import response, sum_biases
from convmerge.algebra.edges import axis_edges
from convmerge.errors import Refusal


def commutes_geometry(outer: Geometry, inner: Geometry) -> tuple[Geometry, Geometry]:
    """The geometries (outer, inner) of :func:`commute`, as far as they can be told without the numbers.

    Raises:
        Refusal: not a channel mix and a channelwise filter, or the mix's bias would meet the filter's
        padding. ValueError: the two do not fit together.
    """
    if (outer.in_channels, outer.spatial) != (inner.out_channels, inner.spatial):
        raise ValueError(f"{outer} does not take the output of {inner}")
    if outer.ones or inner.ones:
        raise Refusal("a bias that fades at the borders does not swap")
    if inner.pointwise and _channelwise_filter(outer):
        if inner.bias and _reads_padding(outer):
            raise Refusal("the filter pads with zeros where the bias of the channel mix would not be zero")
        mix = replace(inner, bias=outer.bias or inner.bias)
        return mix, _over(outer, inner.in_channels, bias=False)
    if outer.pointwise and _channelwise_filter(inner):
        bias = outer.bias or inner.bias
        faded = bias and _reads_padding(inner)
        return _over(inner, outer.out_channels, bias=faded), replace(outer, bias=bias and not faded)
    raise Refusal("only a channel mix and a filter that acts on each channel alone swap")


def commute(outer: Affine, inner: Affine) -> tuple[Affine, Affine]:
    """A pair (outer', inner') with outer' ∘ inner' = outer ∘ inner, in swapped order.

    One of the two is pointwise, the other a channelwise spatial filter with the same taps in every channel.
    The bias goes with the mix: where the filter comes last it must scale constants by one number
    everywhere, else it carries the bias itself.

    Raises:
        Refusal: as :func:`commutes_geometry`; the taps differ between channels; or the mix would need a bias
            that depends on the position.
    """
    first, second = commutes_geometry(outer.geometry, inner.geometry)
    spatial_filter = outer if inner.geometry.pointwise else inner
    taps = spatial_filter.weight[:1]
    if not torch.equal(spatial_filter.weight, taps.expand_as(spatial_filter.weight)):
        raise Refusal("the filter's weights differ between channels")
    bias = outer.bias if inner.bias is None else sum_biases([outer.bias, response(outer, inner.bias)])
    if spatial_filter is outer:
        if bias is not None and bias.dim() > 1:
            raise Refusal("after the swap the bias would depend on the position")
        return Affine(first, inner.weight, bias), Affine(second, _copies(taps, second))
    plain = Affine(replace(first, bias=False), _copies(taps, first))
    gain = None if first.bias else _gain(taps, inner.geometry)
    if bias is None or gain is None or bias.dim() > 1:
        return plain.with_bias(bias), Affine(replace(second, bias=False), outer.weight)
    return plain, Affine(second, outer.weight, bias / gain)


def _channelwise_filter(g: Geometry) -> bool:
    return g.diagonal and not g.pointwise


def _reads_padding(g: Geometry) -> bool:
    return any(axis_edges(axis, POINT).reads for axis in axes(g))


def _over(g: Geometry, channels: int, *, bias: bool) -> Geometry:
    """The channelwise filter ``g`` on another number of channels."""
    return replace(g, in_channels=channels, out_channels=channels, groups=channels, bias=bias)


def _copies(taps: Tensor, g: Geometry) -> Tensor:
    return taps.expand(g.out_channels, *taps.shape[1:]).contiguous()


def _gain(taps: Tensor, g: Geometry) -> float | None:
    """What the filter multiplies a constant by, or None where that depends on the position or is zero."""
    sums = response(Affine(_over(g, 1, bias=False), taps), taps.new_ones(1))
    return float(sums) or None if sums.dim() == 1 else None
