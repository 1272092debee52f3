"""Biases: constants per channel, or periodic in the output position where upsampling makes them so."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convmerge.affine import Affine
from convmerge.algebra.axis import Axis, axes


def response(outer: Affine, bias: Tensor) -> Tensor:
    """What ``outer``'s taps make of a map that is ``bias`` everywhere, outside its domain too.

    bias: (in_channels,) or (in_channels, *period). Returns (out_channels,) where all output positions get
    exactly the same, else (out_channels, *period).
    """
    g = outer.geometry
    blocks = outer.weight.reshape(g.groups, -1, *outer.weight.shape[1:])
    if bias.dim() == 1 and math.prod(g.up) == 1:
        sums = blocks.flatten(3).sum(3) if g.spatial else blocks
        return (sums @ bias.reshape(g.groups, -1, 1)).reshape(-1)
    period = bias.shape[1:] if bias.dim() > 1 else (1,) * g.spatial
    reads = [_reads(axis, p).to(bias) for axis, p in zip(axes(g), period, strict=True)]
    taps, out, into = "uvw"[: g.spatial], "xyz"[: g.spatial], "pqr"[: g.spatial]
    operands = [f"goc{taps}", *map("".join, zip(out, taps, into, strict=True)), f"gc{into}"]
    by_group = bias.reshape(g.groups, -1, *period)
    result = torch.einsum(f"{','.join(operands)}->go{out}", blocks, *reads, by_group)
    return _collapse(result.reshape(g.out_channels, *result.shape[2:]))


def sum_biases(biases: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of biases, whose periods may differ; None where all are None."""
    present = [b for b in biases if b is not None]
    return _collapse(torch.stack(_common_period(present)).sum(0)) if present else None


def concatenate_biases(biases: Sequence[Tensor]) -> Tensor:
    """The biases of concatenated outputs."""
    return torch.cat(_common_period(biases))


def repeat_phases(bias: Tensor, period: Sequence[int]) -> Tensor:
    """The same bias, (C,) or (C, *p), written out over a multiple of its period: (C, *period)."""
    bias = bias if bias.dim() > 1 else bias.reshape(-1, *(1 for _ in period))
    return bias.repeat(1, *(p // q for p, q in zip(period, bias.shape[1:], strict=True)))


def _common_period(biases: Sequence[Tensor]) -> list[Tensor]:
    periods = [b.shape[1:] for b in biases if b.dim() > 1]
    if not periods:
        return list(biases)
    period = [math.lcm(*sizes) for sizes in zip(*periods, strict=True)]
    return [repeat_phases(b, period) for b in biases]


def _reads(axis: Axis, period: int) -> Tensor:
    """reads[n, t, q] = 1 where at output position n tap t meets an input position of phase q, else 0.

    Shape (p, kernel, period), p being the period of the output.
    """
    cycle = period * axis.up
    n = torch.arange(cycle // math.gcd(cycle, axis.down)).reshape(-1, 1)
    position = axis.down * n + axis.dilation * torch.arange(axis.kernel) - axis.lo
    phase = position.div(axis.up, rounding_mode="floor") % period
    hit = (position % axis.up == 0).unsqueeze(-1)
    return hit & (phase.unsqueeze(-1) == torch.arange(period))


def _collapse(bias: Tensor) -> Tensor:
    """Drop the period where every phase is exactly the same."""
    for dim in range(1, bias.dim()):
        first = bias.narrow(dim, 0, 1)
        bias = first if torch.equal(bias, first.expand_as(bias)) else bias
    return bias.flatten() if bias.shape[1:].numel() == 1 else bias
