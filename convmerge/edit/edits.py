"""Edits of the module tree, as facts: which modules or calls of it a merged layer takes the place of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch.fx.node import Node

from convmerge.regions.elements import Element


@dataclass(frozen=True, eq=False)
class Run:
    """Elements in a row that are replaced together, by a new layer or by nothing."""

    elements: tuple[Element, ...]

    @property
    def source(self) -> Node:
        """The value that goes in."""
        return self.elements[0].source

    @property
    def target(self) -> Node:
        """The value that comes out."""
        return self.elements[-1].target


@dataclass(frozen=True)
class UnitEdit:
    """``survivor`` becomes the merged layer, the modules in ``emptied`` become identities.

    With ``beside`` it stays, with the merged layer in front of it or behind it.
    """

    survivor: str
    emptied: tuple[str, ...]
    beside: Literal["front", "behind"] | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module path that changes."""
        return (self.survivor, *self.emptied)


@dataclass(frozen=True)
class Regroup:
    """Terms of a larger sum that give way to one of them.

    Attributes:
        sums: positions of the calls that add up.
        dropped: the terms that vanish, by the position of the call that adds one and which operand it is.
        kept: position of the call whose value stays in the sum.
    """

    sums: tuple[int, ...]
    dropped: frozenset[tuple[int, int]]
    kept: int


@dataclass(frozen=True)
class Piece:
    """A part of a layer's output: the value of the call at ``position``, ``size`` channels on ``axis``."""

    position: int
    size: int
    axis: int


@dataclass(frozen=True)
class GraphEdit:
    """Calls inside the code of the module at ``owner``, by their position among all calls made in it.

    Attributes:
        home: positions of the calls that the merged layer replaces.
        emptied: positions of the calls that vanish, one tuple for each run.
        opened: paths of submodules whose own code is edited too.
        regroup: for a part of a larger sum, what becomes of that.
        pieces: for siblings, the values that are parts of the merged layer's output, in its order.
        operand: where the merged layer replaces no calls but stands in front of an operand: the position of
            the call that concatenates, and which operand it is.
        added: position of a call that concatenates and is to add up.
        sized: an upsampling to a given size that the merged layer replaces, and whose size it takes: its
            position, and how many dimensions the size has.
        beside: where the merged layer stands beside a call that stays: its position, and on which side of it.
    """

    owner: str
    home: tuple[int, ...]
    emptied: tuple[tuple[int, ...], ...]
    opened: frozenset[str] = field(default_factory=frozenset)
    regroup: Regroup | None = None
    pieces: tuple[Piece, ...] = ()
    operand: tuple[int, int] | None = None
    added: int | None = None
    beside: tuple[int, Literal["front", "behind"]] | None = None
    sized: tuple[int, int] | None = None


Edit = UnitEdit | GraphEdit
# Of a site: the first one puts the merged layer in place, the others nothing.
Edits = tuple[Edit, ...]
