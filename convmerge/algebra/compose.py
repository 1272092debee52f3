"""Composition: outer ∘ inner as one form, exact wherever the outer one reads no padding.

What happens where it does read padding is the matter of :mod:`convmerge.borders.leaks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from convmerge.affine import Affine, Geometry
from convmerge.algebra.axis import Composition, axes, compose_axis, from_axes
from convmerge.algebra.bias import response, sum_biases
from convmerge.errors import Refusal


@lru_cache(maxsize=65536)
def compose_geometry(outer: Geometry, inner: Geometry) -> Geometry:
    """The geometry of :func:`compose`.

    Raises:
        Refusal: see :func:`convmerge.algebra.axis.compose_axis`; or ``outer`` has a kernel over ones.
        ValueError: the two do not fit together.
    """
    if (outer.in_channels, outer.spatial) != (inner.out_channels, inner.spatial):
        raise ValueError(f"{outer} does not take the output of {inner}")
    if outer.ones:
        raise Refusal("a bias that fades at the borders cannot be pushed through what comes before it")
    dims = [compose_axis(o, i).axis for o, i in zip(axes(outer), axes(inner), strict=True)]
    groups = math.gcd(outer.groups, inner.groups)
    bias = outer.bias or inner.bias
    phased = outer.phased or inner.phased or (inner.bias and math.prod(outer.up) > 1)
    return from_axes(inner.in_channels, outer.out_channels, groups, dims, bias, inner.ones, phased)


def compose(outer: Affine, inner: Affine) -> Affine:
    """outer ∘ inner, where inner's bias is taken to go on beyond its output.

    The result is block-diagonal with gcd(outer.groups, inner.groups) groups; nothing is expanded to a denser
    form than that. Bias: outer's, plus outer's taps applied to inner's bias. After upsampling it depends on
    the output position modulo the rate; it comes out as (out_channels,) where all phases are exactly equal.

    Raises: as :func:`compose_geometry`.
    """
    geometry = compose_geometry(outer.geometry, inner.geometry)
    dims = [compose_axis(o, i) for o, i in zip(axes(outer.geometry), axes(inner.geometry), strict=True)]
    weight = _compose_taps(outer.weight, outer.geometry.groups, inner.weight, inner.geometry.groups, dims)
    ones = None
    if inner.ones is not None:
        ones = _compose_taps(outer.weight, outer.geometry.groups, inner.ones.unsqueeze(1), 1, dims)
        ones = ones.squeeze(1)
    bias = outer.bias if inner.bias is None else sum_biases([outer.bias, response(outer, inner.bias)])
    return Affine(geometry, weight, bias, ones)


def expand_groups(weight: Tensor, groups: int, coarser: int) -> Tensor:
    """The same block-diagonal weight with ``coarser`` groups, a divisor of ``groups``.

    weight: (out, in / groups, *kernel). Returns (out, in / coarser, *kernel), zero off the blocks.
    """
    if groups == coarser:
        return weight
    ratio = groups // coarser
    out, per_group, *kernel = weight.shape
    blocks = weight.new_zeros(coarser, ratio, out // groups, ratio, per_group, *kernel)
    source = weight.reshape(coarser, ratio, out // groups, per_group, *kernel)
    # diagonal() puts the diagonal last; bring the blocks' index there.
    blocks.diagonal(dim1=1, dim2=3).copy_(source.movedim(1, -1))
    return blocks.reshape(out, ratio * per_group, *kernel)


def _compose_taps(
    outer: Tensor, outer_groups: int, inner: Tensor, inner_groups: int, dims: Sequence[Composition]
) -> Tensor:
    """W[o, i, T] = sum over c and outer_step*t2 + inner_step*t1 = T of outer[o, c, t2] * inner[c, i, t1].

    outer: (O, C / outer_groups, *k2). inner: (C, I / inner_groups, *k1).
    Returns (O, I / gcd(outer_groups, inner_groups), *K).
    """
    groups = math.gcd(outer_groups, inner_groups)
    if outer_groups == len(outer) == len(inner) and outer[0].numel() == 1:
        taps = outer * inner
    elif inner_groups == len(inner) and inner[0].numel() == 1:
        factors = inner.reshape(outer_groups, 1, *outer.shape[1:2], *inner.shape[2:])
        taps = (outer.reshape(outer_groups, -1, *outer.shape[1:]) * factors).reshape(outer.shape)
    elif groups in (outer_groups, inner_groups):
        taps = _compose_blocks(outer, outer_groups, inner, inner_groups, dims)
    else:
        outer = expand_groups(outer, outer_groups, groups)
        taps = _compose_blocks(outer, groups, inner, inner_groups, dims)
    return _keep(taps, dims)


def _compose_blocks(
    outer: Tensor, outer_groups: int, inner: Tensor, inner_groups: int, dims: Sequence[Composition]
) -> Tensor:
    """As ``_compose_taps``, where one group count divides the other and before any tap is dropped.

    Every group of the finer side lies inside one of the coarser, so the sum over c runs within ``fine``
    blocks; the inputs of the blocks that share an outer group then stand side by side.
    """
    fine = max(outer_groups, inner_groups)
    (out, _, *outer_kernel), (shared, per_group, *inner_kernel) = outer.shape, inner.shape
    # (C, O / outer_groups, *k2), as a transposed convolution wants it
    by_input = outer.reshape(outer_groups, -1, *outer.shape[1:]).transpose(1, 2)
    by_input = by_input.reshape(shared, -1, *outer_kernel)
    if math.prod(outer_kernel) == 1 or math.prod(inner_kernel) == 1:
        taps = _pointwise_product(by_input, inner, fine)
    else:
        # Every inner tap spreads the outer kernel over the result: a transposed convolution of the weights.
        spread = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(dims) - 1]
        steps = [d.inner_step for d in dims], [d.outer_step for d in dims]
        taps = spread(inner.transpose(0, 1), by_input, stride=steps[0], dilation=steps[1], groups=fine)
    kernel, ratio = taps.shape[2:], fine // outer_groups
    blocks = taps.reshape(per_group, outer_groups, ratio, out // outer_groups, *kernel)
    order = (1, 3, 2, 0, *range(4, blocks.dim()))
    return blocks.permute(order).reshape(out, ratio * per_group, *kernel)


def _pointwise_product(outer: Tensor, inner: Tensor, fine: int) -> Tensor:
    """The product where one of the two has a single tap.

    outer: (C, P, *k2). inner: (C, Q, *k1). Returns (Q, fine * P, *K), summed over the C of each block.
    """
    left = outer.reshape(fine, len(outer) // fine, -1)
    right = inner.reshape(fine, len(inner) // fine, -1)
    blocks = left.transpose(1, 2) @ right
    kernel = [max(a, b) for a, b in zip(outer.shape[2:], inner.shape[2:], strict=True)]
    taps = math.prod(inner.shape[2:])
    blocks = blocks.reshape(fine, outer.shape[1], -1, inner.shape[1], taps)
    return blocks.permute(3, 0, 1, 2, 4).reshape(inner.shape[1], fine * outer.shape[1], *kernel)


def _keep(taps: Tensor, dims: Sequence[Composition]) -> Tensor:
    """The taps that the rates let through; a zero where they let none through."""
    for dim, d in enumerate(dims, start=2):
        if d.start >= taps.shape[dim]:
            taps = torch.zeros_like(taps.narrow(dim, 0, 1))
        elif d.step > 1 or d.start > 0:
            taps = taps[(slice(None),) * dim + (slice(d.start, None, d.step),)]
    return taps
