"""Operators after a join of chains: whether they run once after it, or merged into each of its terms.

F(t1 + t2) = F t1 + F t2, with the response to zeros counted once; F(cat(t1, t2)) = Fa t1 + Fb t2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from convmerge.affine import Affine
from convmerge.algebra import split
from convmerge.cost.model import ZERO, Cost
from convmerge.errors import Refusal
from convmerge.plan.homes import as_filter, not_filter
from convmerge.plan.site import ChainPlan, Denial, Part, Site, is_same
from convmerge.recognise import BorderFill, Filter, Same, Scalar
from convmerge.regions.elements import Chain, Element, Join, Leaf, Regions, Share, Via, leaves
from convmerge.regions.fold import Place, place_of

if TYPE_CHECKING:
    from convmerge.plan.planner import Planner

LESS_WORK = 0.98
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
        if following is None:
            continue
        terms = tuple(ending.get(id(t.elements[-1]), ()) if t.elements else () for t in join.terms)
        chains = {id(chain) for chain in (*terms, following) if chain}
        if not chains & taken and any(terms):
            taken |= chains
            found.append(Junction(join, terms, following))
    return [chain for chain in regions.chains if id(chain) not in taken] + found


def plan_junction(planner: Planner, junction: Junction) -> ChainPlan:
    """The cheaper of both: the operators after the join where they are, or the first few in its terms."""
    chains = [chain for chain in (*junction.terms, junction.following) if chain]
    kept = [planner.plan(chain) for chain in chains]
    before = best = _cost(planner, chains) + _joining(planner, junction)
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
        if not _is_less_work(junction, spread.cost, before):
            continue
        considered = considered or spread
        if planner.gains(spread.cost, best):
            best, chosen = spread.cost, spread
    if chosen is None:
        return _merged([*kept, ChainPlan((), tuple(_denied(planner, junction, reason, considered)))])
    rest = junction.following[chosen.count :]
    return _merged([*chosen.plans(planner), *([planner.plan(rest)] if rest else [])])


def _is_less_work(junction: Junction, after: Cost, before: Cost) -> bool:
    """A concatenation is given up for fewer MACs only: saving the copy is not worth more calls."""
    return junction.join.joined == "sum" or after.macs < LESS_WORK * before.macs


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
    join, moved = junction.join, junction.following[:count]
    if all(is_same(e) for e in moved):
        return None
    if join.joined == "sum" and not all(junction.terms):
        return None
    home = _with_bias(junction)
    chains, parts = [], []
    start = 0
    for index, (term, chain) in enumerate(zip(join.terms, junction.terms, strict=True)):
        constant = 1 / term.factor if index == home else 0.0
        if join.joined == "sum":
            via = Via(term.value, join.target, Same(term.value), True)
            shares = [_share(e, constant) for e in moved]
        else:
            assert join.axis is not None
            channels = planner.evidence.size(term.value)[join.axis]
            via = Via(term.value, join.target, Same(term.value), True, term.edge)
            shares = _shares_of_channels(moved, constant, join.axis, start, channels)
            start += channels
        whole = (*chain, via, *shares)
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
    cost = cost + _cost(planner, [rest] if rest else []) + _adding(planner, junction, moved[-1])
    return _Spread(count, tuple(chains), tuple(parts), cost)


def _joining(planner: Planner, junction: Junction) -> Cost:
    """What a concatenation costs that would become a sum."""
    join = junction.join
    volume, dtype = math.prod(planner.evidence.size(join.target)), planner.evidence.dtype(join.target)
    return ZERO if join.joined == "sum" else planner.cost_model.operator("cat", volume, dtype=dtype)


def _adding(planner: Planner, junction: Junction, last: Element) -> Cost:
    """What the additions cost that a concatenation becomes, behind the operators up to ``last``."""
    if junction.join.joined == "sum":
        return ZERO
    volume, dtype = math.prod(planner.evidence.size(last.target)), planner.evidence.dtype(last.target)
    add = planner.cost_model.operator("add", volume, dtype=dtype)
    return sum((add for _ in junction.terms[1:]), ZERO)


def _shares_of_channels(moved: Chain, constant: float, axis: int, start: int, channels: int) -> list[Leaf]:
    """Operators after a concatenation on one of its terms; the first filter mixes the channels of all.

    Raises Refusal.
    """
    first = next(i for i, e in enumerate(moved) if not is_same(e))
    filter_ = moved[first]
    assert isinstance(filter_, Leaf)
    step = filter_.step
    if not isinstance(step, Filter) or step.axis != axis or step.geometry.groups > 1:
        raise Refusal("what follows does not mix the channels that are concatenated")
    whole = step
    geometry = replace(step.geometry, in_channels=channels, bias=step.geometry.bias and constant != 0)

    def numbers() -> Affine:
        form = whole.numbers()
        rest = form.geometry.in_channels - start - channels
        part = split(form, [n for n in (start, channels, rest) if n])[start > 0]
        return part.with_bias(form.bias * constant if form.bias is not None and constant else None)

    restricted = replace(step, geometry=geometry, numbers=numbers)
    share = Share(
        filter_.source, filter_.node, restricted, not constant, of=filter_, constant=constant, start=start
    )
    return [
        *(_share(e, constant) for e in moved[:first]),
        share,
        *(_share(e, constant) for e in moved[first + 1 :]),
    ]


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
    via = chain[own]
    alone = isinstance(via, Via) and via.edge is not None
    for first in reversed(range(max(0, own - planner.window), own + alone)):
        if first < own and all(is_same(e) for e in chain[first:own]):
            continue
        resized = as_filter(chain[first])
        ways = [chain[first:], *([(resized, *chain[first + 1 :])] if resized is not None else [])]
        for elements in ways:
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
    if first is None or not _is_operator(first):
        return []
    if junction.join.joined == "cat" and considered is None:
        return _denied_upsampling(planner, junction, first)
    if last is None:
        return []
    elements = (last, first)
    place = place_of(planner.evidence, elements) or Place(0, (1,))
    words = "sum" if junction.join.joined == "sum" else "concatenation"
    if considered is not None:
        before = sum((site.before for site in considered.sites), ZERO)
        after = sum((site.after for site in considered.sites), ZERO)
        return [Denial(elements, place, f"costs more in every term of the {words}", before, after)]
    return [Denial(elements, place, reason)]


def _denied_upsampling(planner: Planner, junction: Junction, first: Element) -> list[Denial]:
    """Why a filter behind a concatenation does not run on the smaller maps of terms that are upsampled."""
    found = []
    for term in junction.terms:
        if term and (reason := not_filter(term[-1])) is not None:
            elements = (term[-1], first)
            found.append(Denial(elements, place_of(planner.evidence, elements) or Place(0, (1,)), reason))
    return found


def _is_operator(element: Element) -> bool:
    return not isinstance(element, Leaf) or isinstance(element.step, Filter)


def _merged(plans: Sequence[ChainPlan]) -> ChainPlan:
    return ChainPlan(
        tuple(site for plan in plans for site in plan.sites),
        tuple(denial for plan in plans for denial in plan.denials),
    )
