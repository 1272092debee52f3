"""Where a model is affine: chains of elements, found by series-parallel reduction of the evidence graph.

An element takes one value to another: an operator (a leaf), or a sum of branches that start from one value
(a block). A chain is a sequence of elements whose values in between have no other reader.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch.fx.node import Node

from convmerge.capture import Call, Evidence, is_tensor, live_calls, nodes_of
from convmerge.constants import Constants, memory_root
from convmerge.errors import Refusal
from convmerge.recognise import BorderFill, Context, Filter, Passage, Same, Scalar, Step, Sum, recognise
from convmerge.recognise.border import overwritten_pads, with_beginnings


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
        through = self.step.through if isinstance(self.step, Filter) else ()
        return (*through, self.node, *(self.step.writes if isinstance(self.step, BorderFill) else ()))


@dataclass(frozen=True, eq=False)
class Block:
    """A sum of branches, each a sequence of elements from ``source``.

    Attributes:
        target: the sum's value; for a part of a larger sum, the call in which that part is complete.
        sums: the calls that add the branches up.
        partial: whether other terms that start elsewhere remain in the sum.
    """

    source: Node
    target: Node
    branches: tuple[tuple[Element, ...], ...]
    sums: tuple[Node, ...]
    partial: bool = False


Element = Leaf | Block
Chain = tuple[Element, ...]

# Calls that only check something about their argument and return nothing.
CHECKS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"})


@dataclass(frozen=True, eq=False)
class _Term:
    """One summand: elements from ``origin``, and the value they end in."""

    origin: Node
    elements: tuple[Element, ...]


@dataclass(frozen=True, eq=False)
class Regions:
    """The affine regions of a model.

    Attributes:
        chains: maximal chains, in execution order.
        refused: calls of known operators that are not affine forms here → why.
        unknown: calls that there is no rule for.
    """

    chains: tuple[Chain, ...]
    refused: dict[Node, str]
    unknown: tuple[Call, ...]


def find_regions(context: Context) -> Regions:
    """Recognise every call of the evidence graph and reduce what is affine to chains."""
    return _Reduction(context).run()


class _Reduction:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.evidence: Evidence = context.evidence
        self.steps: dict[Node, Step] = {}
        self.refused: dict[Node, str] = {}
        self.unknown: list[Call] = []
        self.element: dict[Node, Element] = {}  # value → the element that produces it
        self.open_sums: dict[Node, tuple[list[_Term], tuple[Node, ...]]] = {}
        self.absorbed: set[int] = set()  # blocks that became branches of larger ones, by id
        self.fills = overwritten_pads(context)
        self.writes = {node for fill in self.fills.values() for node in fill.writes}
        self.uses = self._count_uses()

    def run(self) -> Regions:
        stale = stale_readers(self.evidence, self.context.constants, self.writes)
        for node in live_calls(list(self.evidence.calls)):
            call = self.evidence.calls[node]
            if node in self.context.constants or call.op in CHECKS or node in self.writes:
                continue
            self._recognise(node, call, stale)
        through = {n for step in self.steps.values() if isinstance(step, Filter) for n in step.through}
        for node, step in self.steps.items():
            if node in through:
                continue
            if isinstance(step, Sum):
                self._reduce_sum(node, step)
            else:
                self.element[node] = Leaf(step.source, node, step)
        unknown = tuple(call for call in self.unknown if call.node not in through)
        return Regions(self._chains(), self.refused, unknown)

    def _recognise(self, node: Node, call: Call, stale: set[Node]) -> None:
        if node in stale:
            self.refused[node] = "reads memory that was written to in between"
            return
        try:
            step = self.fills.get(node) or recognise(self.context, call)
        except Refusal as refusal:
            self.refused[node] = refusal.reason
            return
        if step is None:
            self.unknown.append(call)
            return
        if isinstance(step, BorderFill):
            step = with_beginnings(step, self.steps)
        self.steps[node] = step
        if isinstance(step, Sum) and step.via:
            self.unknown = [other for other in self.unknown if other.node not in step.via]

    def _count_uses(self) -> Counter[Node]:
        uses: Counter[Node] = Counter()
        for node in self.evidence.graph.nodes:
            call = self.evidence.calls.get(node)
            if (call is None or call.op not in CHECKS) and node not in self.writes:
                uses.update(nodes_of((node.args, node.kwargs)))
        return uses

    def _walk_back(self, value: Node) -> _Term:
        """The elements that lead to ``value``, as far back as nothing else reads the values between."""
        elements: list[Element] = []
        while value in self.element and self.uses[value] == 1:
            elements.append(self.element[value])
            value = elements[-1].source
        return _Term(value, tuple(reversed(elements)))

    def _reduce_sum(self, node: Node, step: Sum) -> None:
        terms: list[_Term] = []
        sums: tuple[Node, ...] = (*step.via, node)
        for value, factor in step.terms:
            inner, inner_sums = self.open_sums.get(value, ([], ()))
            if inner and self.uses[value] == 1:
                del self.open_sums[value]
                sums += inner_sums
            else:
                inner = [self._walk_back(value)]
            terms.extend(_scaled(term, factor, node) for term in inner)
        terms = self._group(terms, node, sums)
        if len(terms) == 1 and isinstance(terms[0].elements[-1], Block):
            block = terms[0].elements[-1]
            self.element[node] = Block(block.source, node, block.branches, block.sums)
        else:
            self.open_sums[node] = terms, sums

    def _group(self, terms: list[_Term], node: Node, sums: tuple[Node, ...]) -> list[_Term]:
        """Join terms with the same origin into blocks until all origins differ."""
        while True:
            origins = Counter(term.origin for term in terms)
            shared = next((origin for origin, count in origins.items() if count > 1), None)
            if shared is None:
                return terms
            branches = [term.elements for term in terms if term.origin is shared]
            rest = [term for term in terms if term.origin is not shared]
            self.uses[shared] -= len(branches) - 1
            flat, absorbed = self._flat(branches)
            block = Block(shared, node, flat, (*sums, *absorbed), partial=bool(rest))
            before = self._walk_back(shared)
            terms = [_Term(before.origin, (*before.elements, block)), *rest]

    def _flat(self, branches: list[Chain]) -> tuple[tuple[Chain, ...], list[Node]]:
        """A branch that is nothing but a block counts as that block's branches; its sums come along."""
        flat: list[Chain] = []
        sums: list[Node] = []
        for branch in branches:
            if len(branch) == 1 and isinstance(block := branch[0], Block):
                self.absorbed.add(id(block))
                flat.extend(block.branches)
                sums.extend(block.sums)
            else:
                flat.append(branch)
        return tuple(flat), sums

    def _chains(self) -> tuple[Chain, ...]:
        inside = self.absorbed | {id(part) for e in self._all_elements() for part in _inner(e)}
        chains: list[Chain] = []
        ends: list[tuple[Element, ...]] = []
        for terms, _ in self.open_sums.values():
            ends.extend(t.elements for t in terms if t.elements and isinstance(t.elements[-1], Block))
        for end in ends:
            chains.append(end)
            inside.update(id(element) for element in end)
        continued = {
            id(self.element[e.source])
            for e in self.element.values()
            if id(e) not in inside and e.source in self.element and self.uses[e.source] == 1
        }
        for value, element in self.element.items():
            if id(element) in inside or id(element) in continued:
                continue
            chain: list[Element] = [element]
            while (source := chain[-1].source) in self.element and self.uses[source] == 1:
                if id(self.element[source]) in inside:
                    break
                chain.append(self.element[source])
            chains.append(tuple(reversed(chain)))
            del value
        order = {node: index for index, node in enumerate(self.evidence.graph.nodes)}
        return tuple(sorted(chains, key=lambda chain: order[chain[0].target]))

    def _all_elements(self) -> list[Element]:
        found = list(self.element.values())
        for terms, _ in self.open_sums.values():
            found.extend(element for term in terms for element in term.elements)
        return found


def _scaled(term: _Term, factor: float, node: Node) -> _Term:
    if factor == 1.0:
        return term
    end = term.elements[-1].target if term.elements else term.origin
    scalar = Leaf(end, node, Scalar(end, factor, 0.0, "alpha"), implied=True)
    return _Term(term.origin, (*term.elements, scalar))


def _inner(element: Element) -> list[Element]:
    """Every element inside a block, at any depth."""
    found: list[Element] = []
    if isinstance(element, Block):
        for branch in element.branches:
            for part in branch:
                found += [part, *_inner(part)]
    return found


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
    """The graph calls that a sequence of elements stands for, sums included."""
    nodes = [node for leaf in leaves(elements) if not leaf.implied for node in leaf.calls]
    nodes += [node for block in blocks(elements) for node in block.sums]
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
            if node in constants or not is_tensor(source):
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
