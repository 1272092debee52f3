"""The affine regions of a model: elements, chains of them, and joins of chains.

An element takes one value to another: an operator (a leaf), or branches that start from one value and are
added up or concatenated (a block). A chain is a sequence of elements whose values in between have no other
reader. A join adds up or concatenates the ends of chains that start from different values.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

from torch.fx.node import Node

from convmerge.evidence.capture import Call, Evidence, is_tensor, nodes_of
from convmerge.evidence.constants import Constants, memory_root
from convmerge.recognise import BorderFill, Filter, Passage, Same, Scalar


@dataclass(frozen=True, eq=False)
class Leaf:
    """One operator call, or a factor that a sum puts on a branch (then ``node`` is the sum's call)."""

    source: Node
    node: Node
    step: Filter | Scalar | Same | Passage
    implied: bool = False

    @property
    def target(self) -> Node:
        """The value after the operator."""
        return self.node

    @property
    def calls(self) -> tuple[Node, ...]:
        """The graph calls that it stands for."""
        if self.implied:
            return ()
        through = self.step.through if isinstance(self.step, Filter) else ()
        return (*through, self.node, *(self.step.writes if isinstance(self.step, BorderFill) else ()))


@dataclass(frozen=True)
class Edge:
    """One operand of a join: number ``index`` of the tensors that ``call`` adds up or concatenates."""

    call: Node
    index: int


@dataclass(frozen=True, eq=False)
class Via(Leaf):
    """Where a term joins others: alone, it goes through unchanged. Stands for no call.

    Attributes:
        edge: for a term of a concatenation, the operand that it is: a new layer can stand there.
    """

    edge: Edge | None = None


@dataclass(frozen=True, eq=False)
class Gap(Leaf):
    """A value beside an operator that pointwise forms move past: a new layer can stand there. No call.

    Attributes:
        beside: the operator.
        behind: whether the value is what the operator gives; else it is what the operator takes.
    """

    beside: Leaf = field(kw_only=True)
    behind: bool = field(kw_only=True)

    @property
    def kind(self) -> str:
        """The operator in words."""
        return getattr(self.beside.step, "kind", "operator")


@dataclass(frozen=True, eq=False)
class Share(Leaf):
    """What an operator after a join makes of one of the joined terms; ``node`` is the operator's call.

    The shares of all terms add up to the operator: its response to zeros belongs to one of them.

    Attributes:
        of: the operator.
        constant: how many times its response to zeros comes with this term: 1 over the factor that the
            sum puts on the term, or 0.
        start: for a concatenation, the first of the term's channels among the operator's.
    """

    of: Leaf = field(kw_only=True)
    constant: float = 0.0
    start: int | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """Branches from ``source``, each a sequence of elements, that are added up or concatenated.

    Attributes:
        target: the value of the whole; for a part of a larger sum, that of the branch ``kept``.
        branches: with the factors that the sum puts on them; in a part of a larger sum these are relative
            to the factor of the branch ``kept``.
        sums: the calls that join the branches; of a part of a larger sum, all calls of that sum.
        partial: whether other terms remain in the sum.
        edges: by branch, which operand of which sum it is; empty for a concatenation.
        kept: the branch whose place in the larger sum the value of this part takes.
        joined: how the branches become one value.
        axis: along which they are concatenated.
    """

    source: Node
    target: Node
    branches: tuple[tuple[Element, ...], ...]
    sums: tuple[Node, ...]
    partial: bool = False
    edges: tuple[Edge, ...] = ()
    kept: int = 0
    joined: Literal["sum", "cat"] = "sum"
    axis: int | None = None


@dataclass(frozen=True, eq=False)
class Fork(Block):
    """Operators on one value that stand by themselves; as one operator its outputs are theirs in a row."""


Element = Leaf | Block
Chain = tuple[Element, ...]

# Calls that only check something about their argument and return nothing.
CHECKS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"})


@dataclass(frozen=True, eq=False)
class Term:
    """One operand of a join: ``factor`` times the last value of ``elements``, which start at ``origin``."""

    origin: Node
    elements: Chain
    edge: Edge
    factor: float = 1.0

    @property
    def value(self) -> Node:
        """The last value."""
        return self.elements[-1].target if self.elements else self.origin


@dataclass(frozen=True, eq=False)
class Join:
    """Terms that start from different values, added up or concatenated along ``axis``.

    Attributes:
        target: the value of the whole.
        calls: the calls that make it of the terms.
        single: whether it has one reader only.
    """

    target: Node
    terms: tuple[Term, ...]
    calls: tuple[Node, ...]
    joined: Literal["sum", "cat"] = "sum"
    axis: int | None = None
    single: bool = False


@dataclass(frozen=True, eq=False)
class Regions:
    """The affine regions of a model.

    Attributes:
        chains: maximal chains, in execution order.
        joins: where they meet; in execution order.
        refused: calls of known operators that are not affine forms here → why.
        unknown: calls that there is no rule for.
    """

    chains: tuple[Chain, ...]
    joins: tuple[Join, ...]
    refused: dict[Node, str]
    unknown: tuple[Call, ...]


def leaves(elements: Sequence[Element]) -> list[Leaf]:
    """Every operator in a sequence of elements, those inside blocks included."""
    found: list[Leaf] = []
    for element in elements:
        if isinstance(element, Leaf):
            found.append(element)
        else:
            found.extend(leaf for branch in element.branches for leaf in leaves(branch))
    return found


def blocks(elements: Sequence[Element]) -> list[Block]:
    """Every block in a sequence of elements, at any depth."""
    found: list[Block] = []
    for element in elements:
        if isinstance(element, Block):
            found.append(element)
            for branch in element.branches:
                found.extend(blocks(branch))
    return found


def calls_of(elements: Sequence[Element]) -> list[Node]:
    """The graph calls that a sequence of elements stands for, sums included unless they are larger."""
    nodes = [node for leaf in leaves(elements) for node in leaf.calls]
    nodes += [node for block in blocks(elements) if not block.partial for node in block.sums]
    return list(dict.fromkeys(nodes))


def stale_readers(evidence: Evidence, constants: Constants, understood: Set[Node] = frozenset()) -> set[Node]:
    """Calls on data that read a value after its memory was written to through another name.

    The graph connects a write's result to its later readers, but not its effect on older names and views of
    the same memory; what such a reader sees cannot be told from the graph's edges. The value of a constant
    is what all writes have left in its memory, so it is wrong for whoever reads it before the last of them.
    Writes that are ``understood`` as part of what makes the value do not count.
    """
    writes: dict[Node, list[int]] = {}
    for node, call in evidence.calls.items():
        if call.mutates and node not in understood and (sources := nodes_of(node.args[:1])):
            writes.setdefault(memory_root(sources[0]), []).append(call.index)
    stale: set[Node] = set()
    if not writes:
        return stale
    for node, call in evidence.calls.items():
        for source in nodes_of((node.args, node.kwargs)):
            if node in constants or not is_tensor(source) or constants.uniform(source):
                continue
            since, until = _as_of(source, evidence), call.index
            if source in constants:
                since, until = until, sys.maxsize
            if any(since < write < until for write in writes.get(memory_root(source), ())):
                stale.add(node)
    return stale


def _as_of(node: Node, evidence: Evidence) -> int:
    """The time at which a name's content was last known: its own call."""
    call = evidence.calls.get(node)
    return call.index if call is not None else -1
