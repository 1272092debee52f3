"""Branches: sums, concatenated outputs and concatenated inputs as one form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from convmerge.affine import Affine, Geometry
from convmerge.algebra.axis import Axis, Placement, align_axes, axes, from_axes
from convmerge.algebra.bias import concatenate_biases, sum_biases
from convmerge.algebra.compose import expand_groups
from convmerge.errors import Refusal


def add_geometry(forms: Sequence[Geometry]) -> Geometry:
    """The geometry of :func:`add`.

    Raises:
        Refusal: the branches differ in channels or dimensions, or see ``align_axes``.
    """
    return _add_geometry(tuple(forms))


def add(forms: Sequence[Affine]) -> Affine:
    """The sum of forms of one input: kernels placed on their common support, gcd of the group counts.

    Equal to the sum of the parts at every size where these have the same output size.

    Raises: as :func:`add_geometry`.
    """
    geometry = add_geometry([f.geometry for f in forms])
    weights, ones = _on_common_support(forms, geometry.groups)
    faded = torch.stack(ones).sum(0) if geometry.ones else None
    return Affine(geometry, torch.stack(weights).sum(0), sum_biases([f.bias for f in forms]), faded)


def stack_geometry(forms: Sequence[Geometry]) -> Geometry:
    """The geometry of :func:`stack`.

    Raises:
        Refusal: the branches differ in input channels or dimensions, or see ``align_axes``.
    """
    return _stack_geometry(tuple(forms))


def stack(forms: Sequence[Affine]) -> Affine:
    """cat([f(x) for f in forms]) over channels, as one form with concatenated outputs.

    Several grouped branches interleave their groups, so that the result is dense.

    Raises: as :func:`stack_geometry`.
    """
    geometry = stack_geometry([f.geometry for f in forms])
    weights, ones = _on_common_support(forms, geometry.groups)
    faded = torch.cat(ones) if geometry.ones else None
    biases = [w.new_zeros(len(w)) if f.bias is None else f.bias for f, w in zip(forms, weights, strict=True)]
    bias = concatenate_biases(biases) if geometry.bias else None
    return Affine(geometry, torch.cat(weights), bias, faded)


def split(form: Affine, sizes: Sequence[int]) -> list[Affine]:
    """Forms whose sum is F(cat(x1, x2, ...)): one per input, of ``sizes`` channels each.

    The bias goes with the first. The parts are dense, whatever the groups of ``form``.

    Raises:
        ValueError: ``sizes`` do not add up to the input channels.
    """
    g = form.geometry
    if sum(sizes) != g.in_channels:
        raise ValueError(f"sizes {tuple(sizes)} do not add up to {g.in_channels} channels")
    weights = torch.split(expand_groups(form.weight, g.groups, 1), list(sizes), dim=1)
    parts = [Affine(from_axes(w.shape[1], g.out_channels, 1, axes(g)), w) for w in weights]
    first = from_axes(sizes[0], g.out_channels, 1, axes(g), g.bias, g.ones)
    return [Affine(first, weights[0], form.bias, form.ones), *parts[1:]]


@lru_cache(maxsize=65536)
def _add_geometry(forms: tuple[Geometry, ...]) -> Geometry:
    if len({(f.in_channels, f.out_channels) for f in forms}) > 1:
        raise Refusal("the branches differ in channels")
    return _aligned_geometry(forms, forms[0].out_channels, math.gcd(*(f.groups for f in forms)))


@lru_cache(maxsize=65536)
def _stack_geometry(forms: tuple[Geometry, ...]) -> Geometry:
    if len({f.in_channels for f in forms}) > 1:
        raise Refusal("the branches differ in input channels")
    groups = forms[0].groups if len(forms) == 1 else 1
    return _aligned_geometry(forms, sum(f.out_channels for f in forms), groups)


def _aligned_geometry(forms: Sequence[Geometry], out_channels: int, groups: int) -> Geometry:
    dims, _ = _align(forms)
    bias, ones = any(f.bias for f in forms), any(f.ones for f in forms)
    phased = any(g.phased for g in forms)
    return from_axes(forms[0].in_channels, out_channels, groups, dims, bias, ones, phased)


def _align(forms: Sequence[Geometry]) -> tuple[list[Axis], list[tuple[Placement, ...]]]:
    """The common axes, and for each form the placement of its taps in each dimension."""
    if len({f.spatial for f in forms}) > 1:
        raise Refusal("the branches differ in the number of dimensions")
    aligned = [align_axes(parts) for parts in zip(*map(axes, forms), strict=True)]
    placements = [tuple(p[i] for _, p in aligned) for i in range(len(forms))]
    return [axis for axis, _ in aligned], placements


def _on_common_support(forms: Sequence[Affine], groups: int) -> tuple[list[Tensor], list[Tensor]]:
    """Every form's weight, with ``groups`` groups, and its kernel over ones (or zeros), equally long."""
    dims, placements = _align([f.geometry for f in forms])
    weights, ones = [], []
    for form, where in zip(forms, placements, strict=True):
        weights.append(place(expand_groups(form.weight, form.geometry.groups, groups), dims, where))
        faded = torch.zeros_like(form.weight[:, 0]) if form.ones is None else form.ones
        ones.append(place(faded.unsqueeze(1), dims, where).squeeze(1))
    return weights, ones


def place(weight: Tensor, dims: Sequence[Axis], where: Sequence[Placement]) -> Tensor:
    """Put the taps of weight (out, in, *k) into zeros of shape (out, in, *kernel of dims)."""
    shape = (*weight.shape[:2], *(axis.kernel for axis in dims))
    if weight.shape == shape:
        return weight
    slots = (
        slice(p.start, p.start + p.step * (k - 1) + 1, p.step)
        for p, k in zip(where, weight.shape[2:], strict=True)
    )
    out = weight.new_zeros(shape)
    out[(slice(None), slice(None), *slots)] = weight
    return out
