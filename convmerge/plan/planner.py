"""Which elements become one operator: interval dynamic programming on geometry alone.

Composition is associative, so the best segmentation of a chain of n elements follows from the cost of its
O(n²) intervals. A block (a sum of branches) is an element whose own best plan is found the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx.node import Node

from convmerge.affine import Geometry
from convmerge.cost.model import ZERO, Cost, CostModel, Objective, Roofline
from convmerge.edit.frames import Frames
from convmerge.emit import Emission
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence
from convmerge.plan.bordered import border_pays
from convmerge.plan.branches import Inside, joining_cost, plan_inside
from convmerge.plan.costs import LeafCosts
from convmerge.plan.denials import denials
from convmerge.plan.dtypes import widens
from convmerge.plan.homes import as_filter
from convmerge.plan.making import Maker
from convmerge.plan.site import ChainPlan, Part, Site, ends_of, is_filler, is_passage, is_same
from convmerge.plan.table import Table
from convmerge.recognise import Filter
from convmerge.regions.blocks import Patterns
from convmerge.regions.elements import Block, Chain, Element, Leaf, leaves
from convmerge.regions.fold import place_of

# Longer runs of mergeable operators are planned as if cut: intervals beyond this are not looked at, which
# keeps the time linear in the model's length. The longest chains in real models have about ten operators.
WINDOW = 48
LESS = 1 - 1e-3  # a merge must gain more than the cost model can tell
BORDERED_WINDOW = 12  # border classes of more than a few filters with padding do not pay

Forbidden = Mapping[tuple[Node, Node], str]


@dataclass(eq=False)
class Planner:
    """Plans chains for one model.

    Attributes:
        frames: which calls ran in which module.
        objective: ``latency``, ``macs`` or ``params``; ties go to latency.
        forbidden: (source, target) of merges that may not be made → why.
        allowed: whether the user wants this merge (--only, --skip).
        spare_macs: by how much a merge may raise the MACs where that is predicted to be faster.
        window: the most elements that one operator is made of.
        cost_model: what operators, and ways to build a form, cost.
    """

    frames: Frames
    objective: Objective = "latency"
    forbidden: Forbidden = field(default_factory=dict)
    allowed: Callable[[Sequence[Element]], bool] = lambda elements: True
    spare_macs: float = 0.0
    window: int = WINDOW
    cost_model: CostModel = field(default_factory=Roofline)

    def __post_init__(self) -> None:
        self.costs = LeafCosts(self.frames, self.cost_model)
        patterns = Patterns(self.frames.evidence, self.frames.constants)
        self.maker = Maker(self.frames.evidence, self.objective, self.cost_model, patterns)
        self._inside: dict[Block, Inside] = {}
        self._stamp = 0

    @property
    def evidence(self) -> Evidence:
        """Where sizes come from."""
        return self.frames.evidence

    def plan(self, chain: Chain) -> ChainPlan:
        """The cheapest exact segmentation of a chain, blocks inside included."""
        if place_of(self.evidence, chain) is None:
            chain = chain[_after_passages(chain) :]  # what flattens a map loses the axis of the next filter
        if place_of(self.evidence, chain) is None:
            return ChainPlan()
        return self.as_planned(chain, self.table(chain).parts(len(chain)))

    def as_planned(self, chain: Chain, parts: Sequence[Part]) -> ChainPlan:
        """The sites in the parts of a chain, and why the parts stay apart."""
        sites = [site for part in parts for site in self._sites_of(chain, part)]
        return ChainPlan(tuple(sites), tuple(denials(self, chain, parts)))

    def table(self, chain: Chain) -> Table:
        """The best plan of every beginning of a chain."""
        table = Table(len(chain), self.objective)
        for first in range(len(chain)):
            for part in (*self._sized_parts(chain, first), *self._parts_from(chain, first)):
                # Identities in front belong to the site: a module that begins so is then replaced whole.
                table.offer(part, split=first > 0 and is_same(chain[first - 1]))
        return table

    def _sized_parts(self, chain: Chain, first: int) -> list[Part]:
        """Segments that begin with nearest upsampling to a given size, taken for a filter."""
        if (resized := as_filter(chain[first])) is None:
            return []
        filtered = (*chain[:first], resized, *chain[first + 1 :])
        return [part for part in self._parts_from(filtered, first) if part.site is not None]

    def _parts_from(self, chain: Chain, first: int) -> list[Part]:
        """Every segment that begins at ``first`` and can be one operator, or one element left as it is."""
        parts = [Part(first, first, self._cost_as_is(chain[first]), None)]
        if is_passage(chain[first]):
            return [*parts, *self._relaid_parts(chain, first), *self._moved_parts(chain, first)]
        before = ZERO
        solid = 0
        for last in range(first, min(first + self.window, len(chain))):
            before = before + self._cost_as_is(chain[last])
            moves = is_passage(chain[last]) and solid > 0  # what is before it could run behind it
            if is_filler(chain[last]) and not moves:
                continue
            solid += not moves
            if solid == 1 and not moves and isinstance(chain[last], Leaf) and not self._alone(chain[last]):
                continue
            # Identities behind belong to the site: a module that ends in one can then be replaced whole.
            end = last
            while end + 1 < len(chain) and is_same(chain[end + 1]):
                end += 1
            elements = chain[first : end + 1]
            if widens(self.evidence, elements):
                continue
            try:
                site = self.site(elements, before)
            except Refusal:
                if moves:
                    continue
                if not any(is_passage(e) for e in elements):
                    parts.extend(self._bordered_parts(chain, first, last))
                    break
                continue
            if site is not None and self.pays(site):
                parts.append(Part(first, end, site.after, site))
        return parts

    def gains(self, after: Cost, before: Cost, spare: int = 0) -> bool:
        """Whether something costs less, and does not raise the MACs by more than a trifle, or ``spare``."""
        return self._affordable(after, before, spare) and self._cheaper(after, before)

    def _cheaper(self, after: Cost, before: Cost) -> bool:
        """Whether a merge gains anything: what is rebuilt as it was must not count as one."""
        (new, new_latency), (old, old_latency) = after.key(self.objective), before.key(self.objective)
        return new < old * LESS or (new <= old and new_latency < old_latency * LESS)

    def _bordered_parts(self, chain: Chain, first: int, least: int) -> list[Part]:
        """Segments that begin at ``first``, end at ``least`` or later, and pay as border classes."""
        parts: list[Part] = []
        for last in range(least, min(first + BORDERED_WINDOW, len(chain))):
            elements = chain[first : last + 1]
            following = chain[last + 1] if last + 1 < len(chain) else None
            if is_filler(chain[last]) and not is_same(chain[last]):
                break
            if following is not None and is_same(following):
                continue  # identities behind belong to the site
            before = sum((self._cost_as_is(element) for element in elements), ZERO)
            try:
                site = self._bordered_site(elements, before)
            except Refusal:
                break
            if site is not None and (self.objective == "params" or border_pays(before, site.after)):
                parts.append(Part(first, last, site.after, site))
        return parts

    def _relaid_parts(self, chain: Chain, first: int) -> list[Part]:
        """Segments from one view to another that gives the layout back, and that pay without them."""
        parts: list[Part] = []
        before = self._cost_as_is(chain[first])
        for last in range(first + 1, min(first + self.window, len(chain))):
            elements = chain[first : last + 1]
            before = before + self._cost_as_is(chain[last])
            if not is_passage(chain[last]) or self._unwanted(elements):
                continue
            try:
                site = self.maker.relaid(elements, before)
            except Refusal:
                break
            if site is not None and self.pays(site):
                parts.append(Part(first, last, site.after, site))
        return parts

    def _moved_parts(self, chain: Chain, first: int) -> list[Part]:
        """Segments that begin with a passage, where what follows it pays in front of it."""
        parts: list[Part] = []
        before = self._cost_as_is(chain[first])
        for last in range(first + 1, min(first + self.window, len(chain))):
            before = before + self._cost_as_is(chain[last])
            if is_filler(chain[last]):
                continue
            end = last
            while end + 1 < len(chain) and is_same(chain[end + 1]):
                end += 1
            try:
                site = self.site(chain[first : end + 1], before)
            except Refusal:
                break
            if site is not None and self.pays(site):
                parts.append(Part(first, end, site.after, site))
        return parts

    def _alone(self, element: Element) -> bool:
        """Whether one operator can become another one."""
        return bool(self.costs.computed(element)) or self.maker.alone(element)

    def _unwanted(self, elements: Chain) -> bool:
        return ends_of(elements) in self.forbidden or not self.allowed(elements)

    def site(self, elements: Chain, before: Cost) -> Site | None:
        """The elements as one operator; None if that was forbidden. Raises Refusal."""
        place = place_of(self.evidence, elements)
        if place is None or self._unwanted(elements):
            return None
        return self.maker.site(elements, place, before)

    def _bordered_site(self, elements: Chain, before: Cost) -> Site | None:
        place = place_of(self.evidence, elements)
        if place is None or self._unwanted(elements):
            return None
        return self.maker.bordered(elements, place, before)

    def pays(self, site: Site) -> bool:
        """Whether a merge gains anything."""
        return self.gains(site.after, site.before, site.spare) or self._plainly_less(site)

    def _plainly_less(self, site: Site) -> bool:
        """One layer for several operators, and more of nothing: a gain, however small a part of the whole."""
        single = isinstance(site.emission, Emission) and len(site.emission.layers) == 1
        several = sum(not is_filler(element) for element in site.elements) > 1
        no_more = (
            site.after.macs <= site.before.macs
            and site.after.weights <= site.before.weights
            and site.after.latency <= site.before.latency
        )
        return single and several and no_more

    def _affordable(self, after: Cost, before: Cost, spare: int = 0) -> bool:
        """Predicted time decides only among merges that do not raise the MACs by more than a trifle.

        More work in fewer calls can be faster, but not on every machine, and never for a compiler that fuses
        the calls anyway.
        """
        return self.objective == "params" or after.macs <= before.macs + max(self.spare_macs, spare)

    def way_to_build(self, geometry: Geometry, site: Site) -> Emission:
        """The cheapest way to build a form of some geometry where a site stands. Raises Refusal."""
        dtype = self.evidence.dtype(site.home.source)
        ways = self.maker.ways(site.elements, geometry)
        return self.maker.cheapest(ways, site.home_place, dtype, site.before)[0]

    def macs(self, chain: Chain) -> int:
        """Multiply-accumulates of a chain as it is."""
        return self.costs.macs(chain)

    def cost_as_is(self, elements: Chain) -> Cost:
        """Cost of elements that are not merged with one another; a block may merge inside."""
        return sum((self._cost_as_is(element) for element in elements), ZERO)

    def _cost_as_is(self, element: Element) -> Cost:
        """Cost of an element that is not merged with its neighbours; a block may merge inside."""
        return self.costs.of(element) if isinstance(element, Leaf) else self.inside(element).cost

    def as_written(self, site: Site) -> Cost:
        """What the model spends on a site now; planning compares with the best plan inside of blocks."""
        if site.joint is not None or not any(isinstance(element, Block) for element in site.elements):
            return site.before
        return sum((self._written(element) for element in site.elements), ZERO)

    def _written(self, element: Element) -> Cost:
        if isinstance(element, Leaf):
            return self.costs.of(element)
        joins = len(element.branches) - 1 if element.joined == "sum" else 1
        inner = [self._written(e) for branch in element.branches for e in branch]
        return sum([*inner, *[joining_cost(self, element)] * joins], ZERO)

    def inside(self, block: Block) -> Inside:
        """The best plan of a block's branches, of which some may merge with one another."""
        if self._stamp != len(self.forbidden):
            self._stamp, self._inside = len(self.forbidden), {}
        if block not in self._inside:
            self._inside[block] = plan_inside(self, block)
        return self._inside[block]

    def _sites_of(self, chain: Chain, part: Part) -> list[Site]:
        """The sites in a part: itself, or those inside the branches of a block that stays."""
        if part.site is not None:
            return [part.site]
        element = chain[part.first]
        if isinstance(element, Leaf):
            return []
        inside = self.inside(element)
        return [*inside.sites, *(site for branch in inside.apart for site in self.plan(branch).sites)]


def _after_passages(chain: Chain) -> int:
    """Where the first filter and what leads to it without another passage begin."""
    filters = (i for i, e in enumerate(chain) if any(isinstance(leaf.step, Filter) for leaf in leaves([e])))
    first = next(filters, len(chain))
    return max((i + 1 for i in range(first) if is_passage(chain[i])), default=0)
