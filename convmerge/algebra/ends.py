"""What zero padding inside a chain does to its first and last outputs, in one dimension, on integers alone.

A chain of axes, each of which pads with zeros, equals the chain on maps without ends except near both ends,
where a later axis reads padding and would see the earlier one's extension. Which outputs differ, and how, is
decided here by comparing two computation trees: the chain's, cut off outside every intermediate map, and the
one that is not. Equal subtrees get equal numbers (hash-consing), and a subtree that reaches no input and no
bias is zero, so that the comparison is exact for all weights at once.

Outputs are taken in the blocks of :mod:`convmerge.algebra.blocked`: a block further, the input is read
``rates.inputs`` further. Growing the input by so much adds a block and moves the last ones as they are, so
that sizes fall into as many residue classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from convmerge.algebra.axis import Axis
from convmerge.algebra.blocked import Rates, rates_of
from convmerge.errors import Refusal

BLOCKS = 48  # the most border blocks in one dimension, both ends together
RESIDUES = 12  # the most residue classes of input sizes


class Piece(NamedTuple):
    """Inputs: a slice, counted from the end where negative or zero."""

    start: int
    stop: int


class Border(NamedTuple):
    """The blocks at one end of the output, and the slice of the input that they read together."""

    blocks: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of inputs."""
        return self.stop - self.start


class Offset(NamedTuple):
    """What an axis adds to its taps.

    Attributes:
        bias: a bias, the same at all positions of a phase.
        fades: one that depends on which taps are inside the map (the kernel over a channel of ones).
    """

    bias: bool = False
    fades: bool = False


class Ends(NamedTuple):
    """The border blocks of a chain in one dimension.

    Attributes:
        first, last: at either end; None where no padding reaches it.
        minimum: from this input size on there are exactly these, and at least one other block.
        residues: the last blocks are the same for all input sizes that agree modulo this; a stride leaves
            some inputs unread behind them, and which outer taps fall into padding can differ too.
    """

    first: Border | None
    last: Border | None
    minimum: int
    residues: int

    @property
    def heads(self) -> int:
        """Number of first blocks."""
        return self.first.blocks if self.first else 0

    @property
    def tails(self) -> int:
        """Number of last blocks."""
        return self.last.blocks if self.last else 0


@lru_cache(maxsize=4096)
def chain_ends(chain: tuple[Axis, ...], offsets: tuple[Offset, ...]) -> Ends:
    """The ends of a chain of axes, the first of which runs first; ``offsets`` is what each of them adds.

    Raises:
        Refusal: too many border blocks, or residue classes of input sizes.
    """
    rates = rates_of(chain)
    trees = _Trees(chain, offsets, rates)
    longest = 2 * _reach(chain) + 4 * rates.inputs
    large = range(longest, longest + rates.inputs)
    found = [trees.differing(size) for size in large]
    if None in found:
        raise Refusal("the borders meet at every input size")
    first, last = (max(counts) for counts in zip(*(f for f in found if f is not None), strict=True))
    if not first and not last:
        return Ends(None, None, next(size for size in range(1, longest + 1) if trees.differing(size)), 1)
    if first + last > BLOCKS:
        raise Refusal(f"{first + last} outputs in a row would need kernels of their own at the borders")
    residues = rates.inputs if last else 1
    if residues > RESIDUES:
        raise Refusal(f"the last outputs depend on the input size modulo {residues}")
    size = max(_least(trees, size, first, last, rates.inputs) for size in large)
    head = _hull(trees.read(size, q, from_end=False) for size in large for q in range(first))
    tail = _hull(trees.read(size, -q, from_end=True) for size in large for q in range(last, 0, -1))
    borders = Border(first, *(head or Piece(0, 1))), Border(last, *(tail or Piece(-1, 0)))
    return _ends(*borders, size, residues, lambda size: trees.blocks(size) > first + last)


def _ends(first: Border, last: Border, least: int, residues: int, fits: Callable[[int], bool]) -> Ends:
    """The ends from ``least`` on; ``fits``: whether a size has an inner block.

    Operators are to fail by themselves below, where an assertion is not run: a slice is as long as the
    smallest size where no slice would be too long, and the inner blocks not too few, for a smaller one.
    """
    needed = max(1, *([first.stop] if first.blocks else []), *([-last.start] if last.blocks else []))
    minimum = max(least, needed)
    if any(map(fits, range(needed, minimum))):
        if first.blocks:
            first = first._replace(stop=minimum)
        else:
            last = last._replace(start=-minimum)
    return Ends(first if first.blocks else None, last if last.blocks else None, minimum, residues)


def _least(trees: _Trees, large: int, first: int, last: int, period: int) -> int:
    """The first size from which on the borders of all sizes of a residue are those of a ``large`` one.

    What is so at some size is so at all larger ones of its residue: a longer input only moves the ends apart.
    """
    wanted = trees.borders(large, first, last)
    if wanted is None:
        raise Refusal("outputs between the borders would need kernels of their own")
    low, high = 0, (large - 1) // period + 1  # so many periods less are right, and are not
    while high - low > 1:
        middle = (low + high) // 2
        if trees.borders(large - middle * period, first, last) == wanted:
            low = middle
        else:
            high = middle
    return max(1, large - (low + 1) * period + 1)


def _reach(chain: Sequence[Axis]) -> int:
    """More inputs than lie between an end and what the padding of any axis has to do with it."""
    reach, scale = Fraction(0), Fraction(1)  # inputs for a position of the map
    for axis in chain:
        taps = axis.dilation * (axis.kernel - 1) + abs(axis.lo) + abs(axis.hi) + axis.up + axis.down
        reach += scale * taps / axis.up
        scale = scale * axis.down / axis.up
    return math.ceil(reach)


Trees = tuple[tuple[int, ...], ...]  # by block and output: the number of its tree


class _Trees:
    """Numbers for the computation trees of one chain; equal trees have equal numbers at all input sizes."""

    def __init__(self, chain: Sequence[Axis], offsets: Sequence[Offset], rates: Rates) -> None:
        self._chain = chain
        self._offsets = offsets
        self._period = rates.outputs
        self._numbers: dict[tuple[int, tuple[int, ...], tuple[bool, ...]], int] = {}
        self._known: dict[int, tuple[Trees, Trees] | None] = {}

    def differing(self, size: int) -> tuple[int, int] | None:
        """The fewest first and last blocks that hold all that differ from maps without ends.

        None where there are no blocks, or the one in the middle differs.
        """
        trees = self._trees(size)
        if trees is None:
            return None
        middle = len(trees[0]) // 2
        apart = [q for q, (cut, free) in enumerate(zip(*trees, strict=True)) if cut != free]
        first = max((q + 1 for q in apart if q < middle), default=0)
        last = max((len(trees[0]) - q for q in apart if q > middle), default=0)
        return None if middle in apart else (first, last)

    def borders(self, size: int, first: int, last: int) -> tuple[Trees, Trees] | None:
        """The first and the last blocks, if all between them, at least one, are as without ends."""
        trees = self._trees(size)
        if trees is None or len(trees[0]) <= first + last:
            return None
        cut, free = trees
        end = len(cut) - last
        return (cut[:first], cut[end:]) if cut[first:end] == free[first:end] else None

    def read(self, size: int, q: int, *, from_end: bool) -> Piece | None:
        """The inputs that block q reads (negative: counted from the last), None where it reads none."""
        maps = self._maps(size)
        positions = set(self._block(q % self.blocks(size)))
        for k in range(len(self._chain), 0, -1):
            below = {p for m in positions for p in self._taps(k, m) if p is not None}
            positions = {p for p in below if 0 <= p < maps[k - 1]}
        if not positions:
            return None
        shift = size if from_end else 0
        return Piece(min(positions) - shift, max(positions) + 1 - shift)

    def _trees(self, size: int) -> tuple[Trees, Trees] | None:
        """All blocks of the chain, and without ends; None where a map is empty."""
        if size not in self._known:
            maps = self._maps(size)
            if min(maps) < 1:
                self._known[size] = None
            else:
                self._known[size] = self._all_blocks(maps, cut=True), self._all_blocks(maps, cut=False)
        return self._known[size]

    def _all_blocks(self, maps: Sequence[int], *, cut: bool) -> Trees:
        number = self._numbering(maps, cut=cut)
        blocks = map(self._block, range(self.blocks(maps[0])))
        return tuple(tuple(number(len(self._chain), m) for m in block) for block in blocks)

    def _maps(self, size: int) -> list[int]:
        """The sizes of the input and of all maps after it."""
        maps = [size]
        for axis in self._chain:
            maps.append(axis.out_size(maps[-1]))
        return maps

    def blocks(self, size: int) -> int:
        """The number of blocks."""
        return -(-self._maps(size)[-1] // self._period)

    def _block(self, q: int) -> range:
        return range(self._period * q, self._period * (q + 1))

    def _numbering(self, maps: Sequence[int], *, cut: bool) -> Callable[[int, int], int]:
        """The number of the tree at position m of map k; with ``cut``, zero outside intermediate maps."""
        known: dict[tuple[int, int], int] = {}

        def number(k: int, m: int) -> int:
            if k == 0:
                return int(0 <= m < maps[0])
            if cut and k < len(self._chain) and not 0 <= m < maps[k]:
                return 0
            if (k, m) not in known:
                taps, offset = self._taps(k, m), self._offsets[k - 1]
                below = tuple(0 if p is None else number(k - 1, p) for p in taps)
                last = maps[k - 1] if cut else math.inf  # ones go on where nothing is cut off
                first = 0 if cut else -math.inf
                ones = tuple(p is not None and first <= p < last for p in taps) if offset.fades else ()
                alive = any(below) or offset.bias or any(ones)
                tree = (k, below, ones)
                known[k, m] = self._numbers.setdefault(tree, len(self._numbers) + 2) if alive else 0
            return known[k, m]

        return number

    def _taps(self, k: int, m: int) -> list[int | None]:
        """Where every tap of position m of map k stands in map k - 1; None between stuffed positions."""
        axis = self._chain[k - 1]
        at = (axis.down * m + axis.dilation * t - axis.lo for t in range(axis.kernel))
        return [p // axis.up if p % axis.up == 0 else None for p in at]


def _hull(pieces: Iterable[Piece | None]) -> Piece | None:
    """The shortest piece that holds all of them."""
    known = [p for p in pieces if p is not None]
    return Piece(min(p.start for p in known), max(p.stop for p in known)) if known else None
