"""Any chain of axes as one strided convolution, with a channel for each output of a block.

Strides and upsamplings in a row are periodic: so many outputs further the chain reads the input so many
positions further, and does the same there. In blocks of that many outputs it is a plain filter, whatever the
order and the common factors of the rates. Source: blocking of periodically time-varying filters (P. P.
Vaidyanathan, Multirate Systems and Filter Banks, 1993, section 10.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from convmerge.algebra.axis import Axis


class Rates(NamedTuple):
    """A block of so many ``outputs`` further, so many ``inputs`` further are read."""

    outputs: int
    inputs: int


class Count(NamedTuple):
    """floor((times * size + plus) / over)."""

    times: int
    plus: int
    over: int


class Blocked(NamedTuple):
    """A chain in blocks.

    Attributes:
        rates: the size of a block, and how far apart blocks read.
        axis: the convolution with one output position per block, on the whole input.
        excess: outputs too many in the last block, by input size modulo ``rates.inputs``.
        counts: what takes the input size to the output size, one after the other.
    """

    rates: Rates
    axis: Axis
    excess: tuple[int, ...]
    counts: tuple[Count, ...]


@lru_cache(maxsize=65536)
def blocked(chain: tuple[Axis, ...]) -> Blocked:
    """A chain of axes, the first of which runs first, in the smallest blocks that are all alike."""
    rates = rates_of(chain)
    taps = positions_read(chain, range(rates.outputs)) or {0}
    first, last = min(taps), max(taps)
    dilation = math.gcd(*(t - first for t in taps)) or 1
    counts = [out_size(chain, size) for size in range(rates.inputs, 2 * rates.inputs)]
    blocks = [-(-n // rates.outputs) for n in counts]
    # One slack gives as many blocks at all sizes: both numbers grow by one in a period, at the same size.
    slack = max(rates.inputs * (b - 1) - size for size, b in enumerate(blocks, start=rates.inputs - 1))
    lo, reach = -first, last - first
    axis = Axis(reach // dilation + 1, 1, rates.inputs, dilation, lo, slack - lo + reach)
    excess = tuple(rates.outputs * b - n for b, n in zip(blocks, counts, strict=True))
    return Blocked(rates, axis, excess, _counts(chain))


def rates_of(chain: Sequence[Axis]) -> Rates:
    """The smallest blocks in which a chain does the same everywhere."""
    outputs = inputs = 1
    for axis in chain:
        shared = math.gcd(axis.up, axis.down)
        up, down = axis.up // shared, axis.down // shared
        between = math.lcm(outputs, down)
        outputs, inputs = up * between // down, inputs * between // outputs
    return Rates(outputs, inputs)


def positions_read(chain: Sequence[Axis], outputs: Iterable[int]) -> set[int]:
    """The inputs under the taps of some outputs, where no map ends."""
    positions = set(outputs)
    for axis in reversed(chain):
        starts = (axis.down * m - axis.lo for m in positions)
        taps = {s + axis.dilation * t for s in starts for t in range(axis.kernel)}
        positions = {p // axis.up for p in taps if p % axis.up == 0}
    return positions


def out_size(chain: Sequence[Axis], size: int) -> int:
    """Output count for ``size`` inputs."""
    for axis in chain:
        size = axis.out_size(size)
    return size


def _counts(chain: Sequence[Axis]) -> tuple[Count, ...]:
    """The output size of every axis after another, in as few steps as nested floors allow."""
    steps: list[Count] = []
    for axis in chain:
        times, plus, over = axis.up, axis.slack - axis.up + axis.down, axis.down
        before = steps[-1] if steps else Count(1, 0, 1)
        if times == 1:
            times, plus, over = before.times, before.plus + plus * before.over, over * before.over
        elif before.over == 1:
            times, plus = times * before.times, times * before.plus + plus
        else:
            steps.append(Count(1, 0, 1))
        shared = math.gcd(times, over)
        steps[-1:] = [Count(times // shared, plus // shared, over // shared)]
    return tuple(steps)
