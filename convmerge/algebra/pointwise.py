"""Forms that act on channels alone, and changes of view."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convmerge.affine import Affine, Geometry
from convmerge.errors import Refusal


def diagonal(factor: Tensor, shift: Tensor | None = None, *, spatial: int) -> Affine:
    """x * factor + shift per channel; both of shape (C,), taken to float64."""
    weight = factor.double().reshape(-1, 1, *(1,) * spatial)
    channels = len(weight)
    geometry = Geometry.channelwise(channels, channels, channels, spatial, bias=shift is not None)
    return Affine(geometry, weight, None if shift is None else shift.double())


def identity(channels: int, spatial: int) -> Affine:
    """x as it is."""
    return diagonal(torch.ones(channels, dtype=torch.float64), spatial=spatial)


def selection(in_channels: int, indices: Sequence[int], spatial: int) -> Affine:
    """Channels ``indices`` of the input in that order: slices, permutations and repetitions."""
    weight = torch.zeros(len(indices), in_channels, dtype=torch.float64)
    weight[torch.arange(len(indices)), torch.tensor(indices)] = 1
    geometry = Geometry.channelwise(in_channels, len(indices), 1, spatial)
    return Affine(geometry, weight.reshape(*weight.shape, *(1,) * spatial))


def scale(form: Affine, factor: float | Tensor) -> Affine:
    """factor * F(x), with a number or one factor per output channel, shape (out_channels,)."""
    factors = torch.as_tensor(factor, dtype=torch.float64)

    def scaled(values: Tensor | None) -> Tensor | None:
        return None if values is None else values * factors.reshape(-1, *(1,) * (values.dim() - 1))

    weight = form.weight * factors.reshape(-1, *(1,) * (form.weight.dim() - 1))
    return Affine(form.geometry, weight, scaled(form.bias), scaled(form.ones))


def lift_geometry(g: Geometry, spatial: int) -> Geometry:
    """The geometry of :func:`lift`."""
    if g.spatial == spatial:
        return g
    if not g.pointwise or g.ones:
        raise ValueError(f"{g} is not pointwise: it has {g.spatial} dimensions, not {spatial}")
    return Geometry.channelwise(g.in_channels, g.out_channels, g.groups, spatial, bias=g.bias)


def lift(form: Affine, spatial: int) -> Affine:
    """A pointwise form, such as a linear layer on the channels, seen in ``spatial`` dimensions.

    Raises:
        ValueError: the form is not pointwise and has another number of dimensions.
    """
    if form.geometry.spatial == spatial:
        return form
    geometry = lift_geometry(form.geometry, spatial)
    return Affine(geometry, form.weight.reshape(*form.weight.shape[:2], *geometry.kernel), form.bias)


def unflatten_geometry(g: Geometry, size: Sequence[int]) -> Geometry:
    """The geometry of :func:`unflatten`."""
    one, zero, kernel = (1,) * len(size), (0,) * len(size), tuple(size)
    channels, rest = divmod(g.in_channels, math.prod(size))
    if g.spatial or rest:
        raise ValueError(f"{g} does not take a flattened map of size {kernel}")
    if channels % g.groups:
        raise Refusal("the groups of the linear layer cut through channels")
    return Geometry(channels, g.out_channels, g.groups, kernel, one, one, one, zero, zero, g.bias)


def unflatten(form: Affine, size: Sequence[int]) -> Affine:
    """flatten → Linear on a map of spatial size ``size`` as one filter that covers the map: (N, out, 1, ...).

    The linear weight (out, C*h*w) is viewed as the kernel (out, C, h, w).

    Raises:
        ValueError: the input features are no multiple of the map.
        Refusal: the groups cut through channels.
    """
    geometry = unflatten_geometry(form.geometry, size)
    return Affine(geometry, form.weight.reshape(form.geometry.out_channels, -1, *size), form.bias)
