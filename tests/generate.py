"""Random forms with small integer weights, so that every product and sum is exact in float64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from convmerge.affine import Affine, Geometry
from convmerge.algebra.axis import Axis, from_axes


class Draw:
    """A seeded source of forms and inputs that remembers what it gave, for the message of a failed test."""

    def __init__(self, seed: int, spatial: int) -> None:
        self.spatial = spatial
        self.random = random.Random(1_000_003 * seed + spatial)
        self.log: list[str] = []

    def integers(self, *shape: int, zero: bool = True) -> Tensor:
        """Integers from -3..3, or 1..4 where nothing may cancel out."""
        generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        low, high = (-3, 4) if zero else (1, 5)
        return torch.randint(low, high, shape, generator=generator).double()

    def channels(self) -> int:
        return self.random.choice([1, 2, 3, 4, 5, 6, 12])

    def groups(self, in_channels: int, out_channels: int) -> int:
        shared = [g for g in range(1, 13) if in_channels % g == 0 and out_channels % g == 0]
        return self.random.choice(shared)

    def axis(self) -> Axis:
        """One dimension: mostly as the operators of real models have it, sometimes anything at all."""
        choose, k = self.random.choice, self.random.choice([1, 2, 3, 3, 4, 5])
        kind = choose(["point", "point", "same", "valid", "stride", "pool", "nearest", "transposed", "any"])
        rate = choose([2, 2, 3])
        if kind == "point":
            return Axis(1, 1, 1, 1, 0, 0)
        if kind == "same":
            dilation = choose([1, 1, 2])
            reach = dilation * (k - 1)
            return Axis(k, 1, 1, dilation, reach // 2, reach - reach // 2)
        if kind == "valid":
            return Axis(k, 1, 1, choose([1, 2]), 0, 0)
        if kind == "stride":
            return Axis(k, 1, rate, 1, k // 2, k // 2)
        if kind == "pool":
            return Axis(rate, 1, rate, 1, 0, 0)
        if kind == "nearest":
            return Axis(rate, rate, 1, 1, rate - 1, rate - 1)
        if kind == "transposed":
            lo = k - 1 - choose([0, 0, 1]) * (k > 1)
            return Axis(k, rate, 1, 1, lo, lo + choose([0, 0, 1]))
        up, down = choose([(1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (2, 3), (3, 2)])
        dilation = choose([1, 2, 3]) if k > 1 else 1
        return Axis(k, up, down, dilation, self.random.randint(-1, 3), self.random.randint(-1, 3))

    def geometry(
        self,
        in_channels: int,
        out_channels: int,
        dims: Sequence[Axis] | None = None,
        groups: int | None = None,
    ) -> Geometry:
        dims = [self.axis() for _ in range(self.spatial)] if dims is None else dims
        groups = self.groups(in_channels, out_channels) if groups is None else groups
        return from_axes(in_channels, out_channels, groups, dims, bias=self.random.random() < 0.5)

    def numbers(self, g: Geometry, *, zero: bool = True) -> Affine:
        """A form of this geometry; without ``zero`` no weight is zero or negative."""
        weight = self.integers(g.out_channels, g.in_channels // g.groups, *g.kernel, zero=zero)
        bias = self.integers(g.out_channels, zero=zero) if g.bias else None
        self.log.append(repr(g))
        return Affine(g, weight, bias)

    def form(self, in_channels: int, out_channels: int, dims: Sequence[Axis] | None = None) -> Affine:
        return self.numbers(self.geometry(in_channels, out_channels, dims))

    def chain(self, length: int) -> list[Affine]:
        """Forms whose channels fit together, in the order they run."""
        channels = [self.channels() for _ in range(length + 1)]
        return [self.form(i, o) for i, o in itertools.pairwise(channels)]

    def size(self) -> tuple[int, ...]:
        largest = (1, 13, 11, 5)[self.spatial]
        return tuple(self.random.randint(1, largest) for _ in range(self.spatial))

    def input(self, channels: int, size: Sequence[int]) -> Tensor:
        return self.integers(2, channels, *size)


def run(forms: Sequence[Affine], x: Tensor) -> Tensor | None:
    """The forms one after the other; None where the input is too small for one of them."""
    try:
        for form in forms:
            x = form(x)
    except ValueError:
        return None
    return x
