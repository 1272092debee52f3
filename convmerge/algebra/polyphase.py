"""An upsampling filter as a filter at the input's rate with one output channel per phase.

Source: the polyphase decomposition (P. P. Vaidyanathan, Multirate Systems and Filter Banks, 1993, section
4.3); the interleaving of equal rates in two dimensions is ``torch.nn.PixelShuffle``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from convmerge.affine import Affine, Geometry
from convmerge.algebra.axis import Axis, axes, from_axes
from convmerge.algebra.bias import repeat_phases
from convmerge.errors import Refusal


class Phases(NamedTuple):
    """One dimension in polyphase form.

    Attributes:
        axis: the filter at the input's rate; its output q, phase p is output up*q + p - shift of the
        original. crop: outputs too many at the end; ``shift`` are too many at the start.
        of: for every original tap the phase it belongs to; to: the tap of ``axis`` that it becomes.
    """

    axis: Axis
    crop: int
    of: tuple[int, ...]
    to: tuple[int, ...]


@lru_cache(maxsize=65536)
def polyphase_axis(axis: Axis, shift: int) -> Phases:
    """y[up*q + p - shift] = sum of W[t] x[q + s] over the taps t with up*s = p + dilation*t - (lo + shift).

    So tap t belongs to phase p = (lo + shift - dilation*t) mod up, at s = -floor((lo + shift - dilation*t)
    / up).
    """
    if axis.up == 1:
        return Phases(axis, 0, (0,) * axis.kernel, tuple(range(axis.kernel)))
    if axis.down > 1:
        raise Refusal("no layer of torch.nn upsamples and strides along one dimension")
    starts = [axis.lo + shift - axis.dilation * t for t in range(axis.kernel)]
    reach = [-(s // axis.up) for s in starts]
    dilation = math.gcd(*(r - reach[0] for r in reach)) or 1
    to = tuple((r - reach[0]) // dilation for r in reach)
    lo, slack = -reach[0], (axis.slack + shift) // axis.up
    low = Axis(to[-1] + 1, 1, 1, dilation if to[-1] else 1, lo, slack - lo + dilation * to[-1])
    crop = axis.up * (slack + 1) - (axis.slack + 1) - shift
    return Phases(low, crop, tuple(s % axis.up for s in starts), to)


def polyphase_geometry(g: Geometry, shift: Sequence[int]) -> Geometry:
    """The geometry of :func:`polyphase`."""
    dims = [polyphase_axis(axis, s).axis for axis, s in zip(axes(g), shift, strict=True)]
    return from_axes(g.in_channels, g.out_channels * math.prod(g.up), g.groups, dims, g.bias, g.ones)


def polyphase(form: Affine, shift: Sequence[int]) -> Affine:
    """All phases of an upsampling form as channels (c, *phase) of one form at the input's rate.

    Interleaving the phases, then dropping ``shift`` outputs at the start and ``Phases.crop`` at the end of
    each dimension, gives back ``form``.

    Raises:
        Refusal: the form upsamples and strides along one dimension, or has a bias whose period does not
            divide the rate.
    """
    g = form.geometry
    dims = [polyphase_axis(axis, s) for axis, s in zip(axes(g), shift, strict=True)]
    geometry = polyphase_geometry(g, shift)
    ones = None if form.ones is None else _phases_of(form.ones.unsqueeze(1), g.up, dims).squeeze(1)
    bias = None if form.bias is None else _phase_biases(form.bias, g.up, shift)
    return Affine(geometry, _phases_of(form.weight, g.up, dims), bias, ones)


def _phases_of(weight: Tensor, up: Sequence[int], dims: Sequence[Phases]) -> Tensor:
    """(out, in, *k) → (out * phases, in, *k'), every tap in the phase and place it belongs to."""
    n = len(dims)
    spread = weight.new_zeros(
        *weight.shape[:2], *(size for u, d in zip(up, dims, strict=True) for size in (u, d.axis.kernel))
    )
    index: list[slice | Tensor] = [slice(None), slice(None)]
    for dim, d in enumerate(dims):
        along = [-1 if other == dim else 1 for other in range(n)]
        index += [torch.tensor(d.of).reshape(along), torch.tensor(d.to).reshape(along)]
    spread[tuple(index)] = weight
    phases, taps = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
    return spread.permute(0, *phases, 1, *taps).flatten(0, n)


def _phase_biases(bias: Tensor, up: Sequence[int], shift: Sequence[int]) -> Tensor:
    """(out,) or (out, *period) → (out * phases,)."""
    period = bias.shape[1:] if bias.dim() > 1 else (1,) * len(up)
    if any(u % p for u, p in zip(up, period, strict=True)):
        raise Refusal("the bias has another period than the upsampling")
    full = repeat_phases(bias, up)
    return full.roll(tuple(shift), tuple(range(1, full.dim()))).flatten()
