"""Operators after a join of chains: whether they run once after it, or merged into each of its terms.

F(t1 + t2) = F t1 + F t2, with the response to zeros counted once; F(cat(t1, t2)) = Fa t1 + Fb t2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from convmerge.affine import Affine
from convmerge.cost import ZERO, Cost
from convmerge.errors import Refusal
from convmerge.fold import Place, place_of
from convmerge.plan.site import ChainPlan, Denial, Part, Site, is_passage, is_same
from convmerge.recognise import BorderFill, Filter, Same, Scalar
from convmerge.regions import Chain, Element, Join, Leaf, Regions, Share, Via, leaves

if TYPE_CHECKING:
    from convmerge.plan.planner import Planner

MOVED = 8  # operators in a row after a join that may move into its terms
APART = "adds a tensor that depends on another input"


@dataclass(frozen=True, eq=False)
class Junction:
    """A join, the chains that end in its terms (empty for a term that no element leads to), and the chain
    that goes on from it.
    """

    join: Join
    terms: tuple[Chain, ...]
    following: Chain


def units(regions: Regions) -> list[Chain | Junction]:
    """What to plan together: chains, and junctions of chains where one goes on from a join."""
    ending = {id(chain[-1]): chain for chain in regions.chains}
    beginning = {chain[0].source: chain for chain in regions.chains}
    taken: set[int] = set()
    found: list[Chain | Junction] = []
    for join in reversed(regions.joins):
        following = beginning.get(join.target) if join.single else None
        if following is None or join.joined != "sum":
            continue
        terms = tuple(ending.get(id(t.elements[-1]), ()) if t.elements else () for t in join.terms)
        chains = {id(chain) for chain in (*terms, following) if chain}
        if not chains & taken and len(chains) > sum(not chain for chain in terms):
            taken |= chains
            found.append(Junction(join, terms, following))
    return [chain for chain in regions.chains if id(chain) not in taken] + found


def plan_junction(planner: Planner, junction: Junction) -> ChainPlan:
    """The cheaper of both: the operators after the join where they are, or the first few in its terms."""
    chains = [chain for chain in (*junction.terms, junction.following) if chain]
    kept = [planner.plan(chain) for chain in chains]
    best = _cost(planner, chains)
    chosen: _Spread | None = None
    reason, considered = APART, None
    for count in range(1, min(_movable(junction.following), MOVED) + 1):
        try:
            spread = _spread(planner, junction, count)
        except Refusal as refusal:
            reason = refusal.reason
            continue
        if spread is None:
            continue
        considered = considered or spread
        if planner.gains(spread.cost, best):
            best, chosen = spread.cost, spread
    if chosen is None:
        return _merged([*kept, ChainPlan((), tuple(_denied(planner, junction, reason, considered)))])
    rest = junction.following[chosen.count :]
    return _merged([*chosen.plans(planner), *([planner.plan(rest)] if rest else [])])


@dataclass(frozen=True, eq=False)
class _Spread:
    """The first ``count`` operators after the join in all of its terms.

    Attributes:
        chains: by term, its elements, the join, and its shares of the operators.
        parts: by term, the plan; the last part includes the shares.
        cost: of all terms, and of what remains after the join.
    """

    count: int
    chains: tuple[Chain, ...]
    parts: tuple[tuple[Part, ...], ...]
    cost: Cost

    @property
    def sites(self) -> list[Site]:
        """The sites with shares."""
        return [parts[-1].site for parts in self.parts if parts[-1].site is not None]

    def plans(self, planner: Planner) -> list[ChainPlan]:
        return [planner.as_planned(c, p) for c, p in zip(self.chains, self.parts, strict=True)]


def _movable(chain: Chain) -> int:
    """How many elements from the first on act on single terms as well as on their sum."""
    for index, element in enumerate(chain):
        step = element.step if isinstance(element, Leaf) else None
        if isinstance(step, BorderFill) or not isinstance(step, Filter | Scalar | Same):
            return index
        if isinstance(step, Filter) and step.through:
            return index
    return len(chain)


def _spread(planner: Planner, junction: Junction, count: int) -> _Spread | None:
    """None where a part of it is not wanted, or a term has nothing to merge with. Raises Refusal."""
    moved = junction.following[:count]
    if all(is_same(e) for e in moved) or not all(junction.terms):
        return None
    home = _with_bias(junction)
    chains, parts = [], []
    for index, (term, chain) in enumerate(zip(junction.join.terms, junction.terms, strict=True)):
        constant = 1 / term.factor if index == home else 0.0
        via = Via(chain[-1].target, junction.join.target, Same(chain[-1].target), implied=True)
        whole = (*chain, via, *(_share(e, constant) for e in moved))
        found = _ended(planner, whole, len(chain), planner.cost_as_is(moved) if constant else ZERO)
        if found is None:
            return None
        last = found[-1]
        assert last.site is not None
        site = replace(last.site, joint=junction.join)
        chains.append(whole)
        parts.append((*found[:-1], replace(last, site=site)))
    cost = sum((part.cost for found in parts for part in found), ZERO)
    rest = junction.following[count:]
    return _Spread(count, tuple(chains), tuple(parts), cost + _cost(planner, [rest] if rest else []))


def _with_bias(junction: Junction) -> int:
    """The term to add the operators' response to zeros to: one that has a bias already, if there is any."""
    for index, chain in enumerate(junction.terms):
        if any(isinstance(leaf.step, Filter) and leaf.step.geometry.bias for leaf in leaves(chain[-1:])):
            return index
    return 0


def _share(element: Element, constant: float) -> Leaf:
    """The operator as it acts on one term; ``constant`` times its response to zeros included."""
    assert isinstance(element, Leaf)
    step = element.step
    if isinstance(step, Scalar):
        step = replace(step, offset=step.offset * constant)
    elif isinstance(step, Filter):
        step = _restricted(step, constant)
    return Share(element.source, element.node, step, not constant, of=element, constant=constant)


def _restricted(step: Filter, constant: float) -> Filter:
    geometry = replace(step.geometry, bias=step.geometry.bias and constant != 0)

    def numbers() -> Affine:
        form = step.numbers()
        bias = form.bias * constant if form.bias is not None and constant else None
        return form.with_bias(bias)

    return replace(step, geometry=geometry, numbers=numbers)


def _ended(planner: Planner, chain: Chain, own: int, moved: Cost) -> list[Part] | None:
    """The cheapest plan of a term whose last part includes its shares and begins within its ``own`` elements.

    moved: what the operators cost after the join, for the term that takes over their calls.
    """
    table = planner.table(chain[:own])
    options: list[tuple[Cost, Part]] = []
    refusal: Refusal | None = None
    for first in reversed(range(max(0, own - planner.window), own)):
        elements = chain[first:]
        if is_passage(chain[first]) or all(is_same(e) for e in chain[first:own]):
            continue
        try:
            site = planner.site(elements, planner.cost_as_is(chain[first:own]) + moved)
        except Refusal as refused:
            refusal = refusal or refused
            continue
        if site is not None:
            part = Part(first, len(chain) - 1, site.after, site)
            options.append((table.cost(first) + site.after, part))
    if not options:
        if refusal is not None:
            raise refusal
        return None
    _, last = min(options, key=lambda option: option[0].key(planner.objective))
    return [*table.parts(last.first), last]


def _cost(planner: Planner, chains: Sequence[Chain]) -> Cost:
    known = [chain for chain in chains if place_of(planner.evidence, chain) is not None]
    return sum((planner.table(chain).cost(len(chain)) for chain in known), ZERO)


def _denied(planner: Planner, junction: Junction, reason: str, considered: _Spread | None) -> list[Denial]:
    """Why the first operator after the join did not move into its terms."""
    first = next((e for e in junction.following if not is_same(e)), None)
    last = next((chain[-1] for chain in junction.terms if chain and _is_operator(chain[-1])), None)
    if first is None or last is None or not _is_operator(first):
        return []
    elements = (last, first)
    place = place_of(planner.evidence, elements) or Place(0, (1,))
    if considered is not None:
        before = sum((site.before for site in considered.sites), ZERO)
        after = sum((site.after for site in considered.sites), ZERO)
        return [Denial(elements, place, "costs more in every term of the sum", before, after)]
    return [Denial(elements, place, reason)]


def _is_operator(element: Element) -> bool:
    return not isinstance(element, Leaf) or isinstance(element.step, Filter)


def _merged(plans: Sequence[ChainPlan]) -> ChainPlan:
    return ChainPlan(
        tuple(site for plan in plans for site in plan.sites),
        tuple(denial for plan in plans for denial in plan.denials),
    )
