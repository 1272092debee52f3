"""Chains of rates in blocks: as many blocks as outputs need at every size, and the same in each of them."""

from __future__ import annotations

import random

import pytest

from convmerge.algebra.axis import Axis
from convmerge.algebra.blocked import Rates, blocked, out_size, positions_read, rates_of

DRAWS, SIZES = 400, range(1, 40)


def chain_of(draw: random.Random) -> tuple[Axis, ...]:
    """One to four axes, each of which strides or upsamples."""
    rates = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (3, 1)]
    chain = []
    for _ in range(draw.randint(1, 4)):
        up, down = draw.choice(rates)
        dilation = draw.choice([1, 1, 2])
        chain.append(Axis(draw.randint(1, 4), up, down, dilation, draw.randint(-1, 4), draw.randint(-1, 4)))
    return tuple(chain)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_hold_all_outputs_and_are_alike(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(DRAWS // 4):
        chain = chain_of(draw)
        found = blocked(chain)
        block, apart = found.rates
        for size in SIZES:
            count = size
            for step in found.counts:
                count = (step.times * count + step.plus) // step.over
            assert count == out_size(chain, size), (chain, size)
            blocks = found.axis.out_size(size)
            assert blocks == -(-count // block), (chain, size)
            assert found.excess[size % apart] == block * blocks - count, (chain, size)
        for output in range(block):
            here, further = (positions_read(chain, [output + n]) for n in (0, block))
            assert further == {p + apart for p in here}, (chain, output)
            taps = {found.axis.dilation * t - found.axis.lo for t in range(found.axis.kernel)}
            assert here <= taps, (chain, output)


@pytest.mark.parametrize(
    ("chain", "rates"),
    [
        ([(1, 2), (2, 1)], (2, 2)),
        ([(2, 1), (1, 2)], (1, 1)),
        ([(3, 1), (1, 2)], (3, 2)),
        ([(1, 2), (3, 1)], (3, 2)),
        ([(1, 2), (2, 1), (1, 2)], (1, 2)),
        ([(1, 2), (2, 1), (1, 3)], (2, 6)),
        ([(4, 1), (1, 2), (2, 1)], (4, 1)),
        ([(1, 3), (2, 1), (1, 2), (3, 1)], (3, 3)),
    ],
)
def test_blocks_are_as_small_as_the_rates_allow(chain: list[tuple[int, int]], rates: tuple[int, int]) -> None:
    assert rates_of([Axis(3, up, down, 1, 1, 1) for up, down in chain]) == Rates(*rates)
