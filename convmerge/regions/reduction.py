"""From operator calls to regions: series-parallel reduction of the evidence graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch.fx.node import Node

from convmerge.errors import Refusal
from convmerge.evidence.capture import Call, Evidence, live_calls, nodes_of
from convmerge.recognise import BorderFill, Concat, Context, Filter, Scalar, Step, Sum, recognise
from convmerge.recognise.border import overwritten_pads, with_beginnings
from convmerge.regions.elements import (
    CHECKS,
    Block,
    Chain,
    Edge,
    Element,
    Join,
    Leaf,
    Regions,
    Term,
    stale_readers,
)

STALE = "reads memory that was written to in between"


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
        self.open: dict[Node, Join] = {}  # value → what it joins, as far as its terms do not start from one
        self.absorbed: set[int] = set()  # blocks that became branches of larger ones, by id
        self.fills = overwritten_pads(context)
        self.writes = {node for fill in self.fills.values() for node in fill.writes}
        self.live = live_calls(list(self.evidence.calls))
        self.dead = self.evidence.calls.keys() - set(self.live)
        self.uses = self._count_uses()

    def run(self) -> Regions:
        stale = stale_readers(self.evidence, self.context.constants, self.writes)
        for node in self.live:
            call = self.evidence.calls[node]
            if node in self.context.constants or call.op in CHECKS or node in self.writes:
                continue
            self._recognise(node, call, stale)
        through = {n for step in self.steps.values() if isinstance(step, Filter) for n in step.through}
        self._count_readers_through(through)
        for node, step in self.steps.items():
            if node in through:
                continue
            if isinstance(step, Sum):
                self._reduce_sum(node, step)
            elif isinstance(step, Concat):
                self._reduce_cat(node, step)
            else:
                self.element[node] = Leaf(step.source, node, step)
        unknown = tuple(call for call in self.unknown if call.node not in through)
        refused = {node: reason for node, reason in self.refused.items() if node not in through}
        return Regions(self._chains(), self._joins(), refused, unknown)

    def _recognise(self, node: Node, call: Call, stale: set[Node]) -> None:
        if node in stale:
            self.refused[node] = STALE
            return
        try:
            step = self.fills.get(node) or recognise(self.context, call)
        except Refusal as refusal:
            self.refused[node] = refusal.reason
            return
        if step is None:
            self.unknown.append(call)
            return
        if isinstance(step, Filter) and not stale.isdisjoint(step.through):
            self.refused[node] = STALE
            return
        if isinstance(step, BorderFill):
            step = with_beginnings(step, self.steps)
        self.steps[node] = step
        if isinstance(step, Sum | Concat) and step.via:
            self.unknown = [other for other in self.unknown if other.node not in step.via]

    def _count_uses(self) -> Counter[Node]:
        uses: Counter[Node] = Counter()
        for node in self.evidence.graph.nodes:
            call = self.evidence.calls.get(node)
            ignored = node in self.writes or (call is not None and node in self.context.constants)
            if not ignored and (call is None or call.op not in CHECKS):
                uses.update(nodes_of((node.args, node.kwargs)))
        return uses

    def _count_readers_through(self, through: set[Node]) -> None:
        """What is read by way of calls that belong to operators is read by as many as these ways lead to."""
        for value in {source for node in through for source in node.all_input_nodes} - through:
            direct = [node for node in value.users if node in through]
            ends, pending = set[Node](), list(direct)
            while pending:
                for user in pending.pop().users.keys() - self.dead:
                    (pending.append if user in through else ends.add)(user)
            self.uses[value] += len(ends) - len(direct)

    def _walk_back(self, value: Node) -> tuple[Node, Chain]:
        """The elements that lead to ``value``, as far back as nothing else reads the values between."""
        elements: list[Element] = []
        while value in self.element and self.uses[value] == 1:
            elements.append(self.element[value])
            value = elements[-1].source
        return value, tuple(reversed(elements))

    def _reduce_sum(self, node: Node, step: Sum) -> None:
        terms: list[Term] = []
        sums: tuple[Node, ...] = (*step.via, node)
        for index, (value, factor) in enumerate(step.terms):
            inner = self.open.get(value)
            if inner is not None and inner.joined == "sum" and self.uses[value] == 1:
                del self.open[value]
                sums += inner.calls
                terms.extend(replace(term, factor=term.factor * factor) for term in inner.terms)
            else:
                terms.append(Term(*self._walk_back(value), Edge(sums[0], index), factor))
        terms = self._group(terms, node, sums)
        if len(terms) == 1:
            self.element[node] = terms[0].elements[-1]
        else:
            self.open[node] = Join(node, tuple(terms), sums)

    def _group(self, terms: list[Term], node: Node, sums: tuple[Node, ...]) -> list[Term]:
        """Join terms with the same origin into blocks until all origins differ."""
        while True:
            groups: dict[Node, list[Term]] = {}
            for term in terms:
                groups.setdefault(term.origin, []).append(term)
            shared = next((o for o, group in groups.items() if self._is_block(group, len(terms))), None)
            if shared is None:
                return terms
            rest = [term for term in terms if term.origin is not shared]
            joined = self._block(shared, groups[shared], node, sums, partial=bool(rest))
            terms = [joined, *rest]

    def _is_block(self, group: Sequence[Term], terms: int) -> bool:
        return len(group) > 1 and (len(group) == terms or any(term.elements for term in group))

    def _block(
        self, source: Node, group: Sequence[Term], node: Node, sums: tuple[Node, ...], *, partial: bool
    ) -> Term:
        """Terms that start from ``source`` as one; what remains of the sum takes it for one of them."""
        self.uses[source] -= len(group) - 1
        kept, unit = None, 1.0
        if partial:
            kept = next((t for t in group if t.elements and t.factor == 1), None)
            kept = kept or next(t for t in group if t.elements)
            unit = kept.factor
        branches, edges, absorbed = self._flat([_scaled(t, t.factor / unit) for t in group])
        at = next((i for i, edge in enumerate(edges) if kept is not None and edge == kept.edge), 0)
        target = node if kept is None else kept.value
        block = Block(source, target, branches, (*sums, *absorbed), partial, edges, at)
        origin, before = self._walk_back(source)
        edge = Edge(sums[0], 0) if kept is None else kept.edge
        return Term(origin, (*before, block), edge, unit)

    def _flat(self, terms: Sequence[Term]) -> tuple[tuple[Chain, ...], tuple[Edge, ...], list[Node]]:
        """A term that is nothing but a block of a sum counts as its branches; its calls come along."""
        branches: list[Chain] = []
        edges: list[Edge] = []
        sums: list[Node] = []
        for term in terms:
            block = term.elements[0] if len(term.elements) == 1 else None
            if isinstance(block, Block) and block.joined == "sum":
                self.absorbed.add(id(block))
                branches.extend(block.branches)
                edges.extend(block.edges)
                sums.extend(block.sums)
            else:
                branches.append(term.elements)
                edges.append(term.edge)
        return tuple(branches), tuple(edges), sums

    def _reduce_cat(self, node: Node, step: Concat) -> None:
        ends = [self._walk_back(value) for value in step.sources]
        calls = (*step.via, node)
        terms = tuple(Term(*end, Edge(calls[0], index)) for index, end in enumerate(ends))
        origins = {term.origin for term in terms}
        if len(origins) > 1 or not any(term.elements for term in terms):
            if not step.via:  # no operator moves in front of a stack
                self.open[node] = Join(node, terms, calls, "cat", step.axis)
            return
        (source,) = origins
        self.uses[source] -= len(terms) - 1
        branches = tuple(term.elements for term in terms)
        self.element[node] = Block(source, node, branches, calls, joined="cat", axis=step.axis)

    def _joins(self) -> tuple[Join, ...]:
        order = {node: index for index, node in enumerate(self.evidence.graph.nodes)}
        joins = [replace(join, single=self.uses[join.target] == 1) for join in self.open.values()]
        return tuple(sorted(joins, key=lambda join: order[join.target]))

    def _chains(self) -> tuple[Chain, ...]:
        inside = self.absorbed | {id(part) for e in self._all_elements() for part in _inner(e)}
        chains: list[Chain] = []
        ends: list[tuple[Element, ...]] = []
        for join in self.open.values():
            ends.extend(t.elements for t in join.terms if t.elements and _is_partial(t.elements[-1]))
        for end in ends:
            chains.append(end)
            inside.update(id(element) for element in end)
        continued = {
            id(self.element[e.source])
            for e in self.element.values()
            if id(e) not in inside and e.source in self.element and self.uses[e.source] == 1
        }
        for element in self.element.values():
            if id(element) in inside or id(element) in continued:
                continue
            chain: list[Element] = [element]
            while (source := chain[-1].source) in self.element and self.uses[source] == 1:
                if id(self.element[source]) in inside:
                    break
                chain.append(self.element[source])
            chains.append(tuple(reversed(chain)))
        order = {node: index for index, node in enumerate(self.evidence.graph.nodes)}
        return tuple(sorted(chains, key=lambda chain: order[chain[0].target]))

    def _all_elements(self) -> list[Element]:
        found = list(self.element.values())
        for join in self.open.values():
            found.extend(element for term in join.terms for element in term.elements)
        return found


def _scaled(term: Term, factor: float) -> Term:
    """The term with a factor as an element of its own."""
    if factor == 1.0:
        return term
    scalar = Leaf(term.value, term.edge.call, Scalar(term.value, factor, 0.0, "alpha"), implied=True)
    return replace(term, elements=(*term.elements, scalar), factor=1.0)


def _is_partial(element: Element) -> bool:
    return isinstance(element, Block) and element.partial


def _inner(element: Element) -> list[Element]:
    """Every element inside a block, at any depth."""
    found: list[Element] = []
    if isinstance(element, Block):
        for branch in element.branches:
            for part in branch:
                found += [part, *_inner(part)]
    return found
