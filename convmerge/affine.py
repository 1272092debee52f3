"""The one form: a multirate filter with a bias, in any number of spatial dimensions.

With the input x[0..H-1] taken as zero outside, and X its zero-stuffed version (X[up*j] = x[j]), in every
spatial dimension::

    y[n] = b + sum_t W[t] * X[down*n + dilation*t - lo]
    N    = floor(((H-1)*up + lo + hi - dilation*(k-1)) / down) + 1

``lo`` and ``hi`` are zero padding before and after (negative: crop). Conv, transposed conv, linear, batch
norm, average pooling, nearest upsampling, pixel shuffle, padding and channel selection are all of this form.

A form may also have a kernel V over a channel of ones, which is 1 inside the input and 0 in its padding. It
adds sum_t V[t] * 1[down*n + dilation*t - lo], a bias that fades at the borders as the input does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Everything of a form but its numbers; what planning works on.

    Attributes:
        in_channels, out_channels, groups: as in ``torch.nn.Conv2d``.
        kernel, up, down, dilation, lo, hi: one int per spatial dimension; empty for a linear layer.
        bias: whether the bias can differ from zero.
        phased: whether the bias can depend on the output position (after upsampling).
        ones: whether there is a kernel over a channel of ones.
    """

    in_channels: int
    out_channels: int
    groups: int
    kernel: Dims
    up: Dims
    down: Dims
    dilation: Dims
    lo: Dims
    hi: Dims
    bias: bool = False
    ones: bool = False
    phased: bool = False

    @property
    def spatial(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel)

    @property
    def pointwise(self) -> bool:
        """Whether every output position depends on the input at that same position only."""
        return all(
            (k, u, d, lo, hi) == (1, 1, 1, 0, 0)
            for k, u, d, lo, hi in zip(self.kernel, self.up, self.down, self.lo, self.hi, strict=True)
        )

    @property
    def diagonal(self) -> bool:
        """Whether every channel stays by itself (as in batch norm and depthwise filters)."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def weights(self) -> int:
        """Number of weights, the bias included."""
        inputs = self.in_channels // self.groups + self.ones
        return self.out_channels * (inputs * math.prod(self.kernel) + self.bias)

    @property
    def slack(self) -> Dims:
        """Per dimension lo + hi - dilation*(k-1): what the output count depends on beside the input size."""
        return tuple(
            lo + hi - d * (k - 1)
            for lo, hi, d, k in zip(self.lo, self.hi, self.dilation, self.kernel, strict=True)
        )

    def out_size(self, size: Sequence[int]) -> Dims:
        """Spatial output size for a spatial input size; below 1 where the input is too small."""
        return tuple(
            ((h - 1) * u + s) // d + 1
            for h, u, s, d in zip(size, self.up, self.slack, self.down, strict=True)
        )

    def macs(self, size: Sequence[int]) -> int:
        """Multiply-accumulates for one sample of spatial input size ``size``, stuffed zeros not counted."""
        taps = self.out_channels * (self.in_channels // self.groups + self.ones) * math.prod(self.kernel)
        return taps * math.prod(self.out_size(size)) // math.prod(self.up)

    @staticmethod
    def channelwise(
        in_channels: int, out_channels: int, groups: int, spatial: int, *, bias: bool = False
    ) -> Geometry:
        """A form that acts on channels alone, seen in ``spatial`` dimensions."""
        one, zero = (1,) * spatial, (0,) * spatial
        return Geometry(in_channels, out_channels, groups, one, one, one, one, zero, zero, bias)


@dataclass(frozen=True, eq=False)
class Affine:
    """A form with its numbers, in float64.

    Attributes:
        geometry: see :class:`Geometry`; ``geometry.bias`` is whether ``bias`` is not None.
        weight: float64, shape (out_channels, in_channels / groups, *kernel), a cross-correlation kernel.
        bias: float64, shape (out_channels,), or (out_channels, *period) where it depends on the output
            position modulo ``period`` (after upsampling), or None.
        ones: float64, shape (out_channels, *kernel), the kernel over the channel of ones, or None.
    """

    geometry: Geometry
    weight: Tensor
    bias: Tensor | None = None
    ones: Tensor | None = None

    def __post_init__(self) -> None:
        g = self.geometry
        shape = (g.out_channels, g.in_channels // g.groups, *g.kernel)
        if tuple(self.weight.shape) != shape:
            raise ValueError(f"weight of shape {tuple(self.weight.shape)} for a form of shape {shape}")
        if (g.bias, g.ones) != (self.bias is not None, self.ones is not None):
            raise ValueError("geometry does not say whether there is a bias and a kernel over ones")
        phased = self.bias is not None and self.bias.dim() > 1
        if g.phased != phased:  # decided on geometry alone, it is a guess on the safe side
            object.__setattr__(self, "geometry", replace(g, phased=phased))

    def with_bias(self, bias: Tensor | None) -> Affine:
        """The same filter with another bias."""
        return Affine(replace(self.geometry, bias=bias is not None), self.weight, bias, self.ones)

    def seen_as(self, geometry: Geometry) -> Affine:
        """The same numbers with another padding."""
        return Affine(geometry, self.weight, self.bias, self.ones)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to x of shape (N, in_channels, *spatial); the meaning of the form, written for clarity.

        Returns (N, out_channels, *out_size) in x's dtype. Raises ValueError where the input is too small.
        """
        g = self.geometry
        size = x.shape[2:]
        if min(g.out_size(size), default=1) < 1:
            raise ValueError(f"input of size {tuple(size)} is too small for {g}")
        y = _filter(x, self.weight.to(x.dtype), g, g.groups)
        if self.ones is not None:
            inside = x.new_ones((1, 1, *size))
            y = y + _filter(inside, self.ones.unsqueeze(1).to(x.dtype), g, 1)
        return y if self.bias is None else y + tile_bias(self.bias.to(x.dtype), y.shape[2:])


def _filter(x: Tensor, weight: Tensor, g: Geometry, groups: int) -> Tensor:
    """Run the taps ``weight`` over x at the rates and padding of ``g``."""
    for dim, u in enumerate(g.up):
        x = _zero_stuff(x, dim + 2, u)
    pads = [p for lo, hi in zip(reversed(g.lo), reversed(g.hi), strict=True) for p in (lo, hi)]
    if any(pads):
        # F.pad crops first, and cannot where a crop is longer than the input that padding makes up for.
        x = F.pad(F.pad(x, [max(p, 0) for p in pads]), [min(p, 0) for p in pads])
    if g.spatial == 0:
        blocks = weight.reshape(groups, -1, weight.shape[1])
        return torch.einsum("ngi,goi->ngo", x.reshape(len(x), groups, -1), blocks).reshape(len(x), -1)
    conv = (F.conv1d, F.conv2d, F.conv3d)[g.spatial - 1]
    return conv(x, weight, stride=g.down, dilation=g.dilation, groups=groups)


def tile_bias(bias: Tensor, size: Sequence[int]) -> Tensor:
    """Broadcast a bias of shape (C,) or (C, *period) over a map: shape (1, C, 1, ...) or (1, C, *size)."""
    if bias.dim() == 1:
        return bias.reshape(1, -1, *(1 for _ in size))
    for dim, n in enumerate(size):
        bias = bias.index_select(dim + 1, torch.arange(n) % bias.shape[dim + 1])
    return bias.unsqueeze(0)


def _zero_stuff(x: Tensor, dim: int, up: int) -> Tensor:
    """Insert up-1 zeros between neighbours along ``dim``."""
    if up == 1:
        return x
    shape = list(x.shape)
    shape[dim] = (shape[dim] - 1) * up + 1
    out = x.new_zeros(shape)
    out[(slice(None),) * dim + (slice(None, None, up),)] = x
    return out
