"""Which elements become one operator, and why: interval dynamic programming on geometry alone.

Composition is associative, so the best segmentation of a chain of n elements follows from the cost of its
O(n²) intervals. A block (a sum of branches) is an element whose own best plan is found the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx.node import Node

from convmerge.affine import Affine, Geometry
from convmerge.algebra import lift, lift_geometry
from convmerge.borderclasses import Bordered
from convmerge.borderplan import border_option, border_pays, border_words
from convmerge.borders import join, join_geometry
from convmerge.capture import Evidence, is_tensor
from convmerge.cost import ZERO, Cost, Objective, cheapest, emission_cost, operator_cost
from convmerge.emit import Emission, swapped
from convmerge.errors import Refusal
from convmerge.fold import (
    Place,
    after,
    axes_along,
    cover,
    cover_geometry,
    covers_map,
    fold_geometry,
    fold_numbers,
    place_of,
)
from convmerge.lower import Frames, Run
from convmerge.recognise import Filter, Passage, Same, Scalar
from convmerge.regions import Block, Chain, Element, Leaf, leaves

# Longer runs of mergeable operators are planned as if cut: intervals beyond this are not looked at, which
# keeps the time linear in the model's length. The longest chains in real models have about ten operators.
WINDOW = 48
LESS = 1 - 1e-3  # a merge must gain more than the cost model can tell
ROUNDING = 1e-9  # of sums of costs
BORDERED_WINDOW = 12  # border classes of more than a few filters with padding do not pay

Forbidden = Mapping[tuple[Node, Node], str]


@dataclass(frozen=True, eq=False)
class Site:
    """Elements that become one operator.

    Attributes:
        elements: in execution order; with ``place`` at their source.
        home: the part that the new layer replaces; ``emptied``: the parts that vanish into it.
        geometry: the merged form at home; ``emission``: what it is built as.
        before, after: predicted cost of the elements as they are, and of the new layer.
    """

    elements: tuple[Element, ...]
    place: Place
    home: Run
    emptied: tuple[Run, ...]
    home_place: Place
    geometry: Geometry
    emission: Emission | Bordered
    before: Cost
    after: Cost

    @property
    def ends(self) -> tuple[Node, Node]:
        """Source and target: what names the site."""
        return ends_of(self.elements)


@dataclass(frozen=True, eq=False)
class Denial:
    """Two neighbouring parts that stay apart: not exact (``cost`` is None), or exact but dearer."""

    elements: tuple[Element, ...]
    place: Place
    reason: str
    before: Cost | None = None
    after: Cost | None = None


@dataclass(frozen=True)
class ChainPlan:
    """What becomes of one chain."""

    sites: tuple[Site, ...] = ()
    denials: tuple[Denial, ...] = ()


@dataclass(frozen=True, eq=False)
class _Part:
    """A segment of the best plan: elements first..last, merged if ``site`` is given."""

    first: int
    last: int
    cost: Cost
    site: Site | None


@dataclass(eq=False)
class Planner:
    """Plans chains for one model.

    Attributes:
        frames: which calls ran in which module.
        objective: ``latency``, ``macs`` or ``params``; ties go to latency.
        forbidden: (source, target) of merges that may not be made → why.
        allowed: whether the user wants this merge (--only, --skip).
        spare_macs: by how much a merge may raise the MACs where that is predicted to be faster.
    """

    frames: Frames
    objective: Objective = "latency"
    forbidden: Forbidden = field(default_factory=dict)
    allowed: Callable[[Sequence[Element]], bool] = lambda elements: True
    spare_macs: float = 0.0

    @property
    def evidence(self) -> Evidence:
        """Where sizes come from."""
        return self.frames.evidence

    def plan(self, chain: Chain) -> ChainPlan:
        """The cheapest exact segmentation of a chain, blocks inside included."""
        place = place_of(self.evidence, chain)
        if place is None:
            return ChainPlan()
        parts = self._best(chain, place)
        sites = [site for part in parts for site in self._sites_of(chain, part)]
        return ChainPlan(tuple(sites), tuple(self._denials(chain, parts)))

    def _best(self, chain: Chain, place: Place) -> list[_Part]:
        best: list[tuple[tuple[float, float], _Part | None]] = [((0.0, 0.0), None)]
        best += [((float("inf"), float("inf")), None)] * len(chain)
        for first in range(len(chain)):
            reached = best[first][0]
            for part in self._parts_from(chain, first):
                key = part.cost.key(self.objective)
                total = (reached[0] + key[0], reached[1] + key[1])
                known = best[part.last + 1][0]
                # Identities in front belong to the site: a module that begins so is then replaced whole.
                split = first > 0 and _is_same(chain[first - 1])
                if _less(total, known) or (not split and _at_most(total, known)):
                    best[part.last + 1] = (total, part)
        parts: list[_Part] = []
        at = len(chain)
        while at > 0:
            last = best[at][1]
            assert last is not None  # every element can stay as it is
            parts.append(last)
            at = last.first
        return parts[::-1]

    def _parts_from(self, chain: Chain, first: int) -> list[_Part]:
        """Every segment that begins at ``first`` and can be one operator, or one element left as it is."""
        parts = [_Part(first, first, self._cost_as_is(chain[first]), None)]
        if _is_passage(chain[first]):
            return parts
        before = ZERO
        solid = 0
        for last in range(first, min(first + WINDOW, len(chain))):
            before = before + self._cost_as_is(chain[last])
            if _is_filler(chain[last]):
                continue
            solid += 1
            if solid == 1 and isinstance(chain[last], Leaf) and not self._computed(chain[last]):
                continue
            # Identities behind belong to the site: a module that ends in one can then be replaced whole.
            end = last
            while end + 1 < len(chain) and _is_same(chain[end + 1]):
                end += 1
            elements = chain[first : end + 1]
            try:
                site = self._site(elements, before)
            except Refusal:
                if not any(_is_passage(e) for e in elements):
                    parts.extend(self._bordered_parts(chain, first, last))
                    break
                continue
            if site is not None and self._affordable(site) and self._cheaper(site.after, site.before):
                parts.append(_Part(first, end, site.after, site))
        return parts

    def _cheaper(self, after: Cost, before: Cost) -> bool:
        """Whether a merge gains anything: what is rebuilt as it was must not count as one."""
        (new, new_latency), (old, old_latency) = after.key(self.objective), before.key(self.objective)
        return new < old * LESS or (new <= old and new_latency < old_latency * LESS)

    def _bordered_parts(self, chain: Chain, first: int, least: int) -> list[_Part]:
        """Segments that begin at ``first``, end at ``least`` or later, and pay as border classes."""
        parts: list[_Part] = []
        for last in range(least, min(first + BORDERED_WINDOW, len(chain))):
            elements = chain[first : last + 1]
            following = chain[last + 1] if last + 1 < len(chain) else None
            if _is_filler(chain[last]) and not _is_same(chain[last]):
                break
            if following is not None and _is_same(following):
                continue  # identities behind belong to the site
            before = sum((self._cost_as_is(element) for element in elements), ZERO)
            try:
                site = self._bordered_site(elements, before)
            except Refusal:
                break
            if site is not None and (self.objective == "params" or border_pays(before, site.after)):
                parts.append(_Part(first, last, site.after, site))
        return parts

    def _bordered_site(self, elements: Chain, before: Cost) -> Site | None:
        """The elements with a kernel for each border class; None where that is no option. Raises Refusal."""
        place = place_of(self.evidence, elements)
        if place is None or ends_of(elements) in self.forbidden or not self.allowed(elements):
            return None
        option = border_option(elements, place, before, self.evidence.dtype(elements[0].source))
        if option is None:
            return None
        b, cost = option
        _check_place(b.whole, place)
        return Site(elements, place, Run(elements), (), place, b.whole, b, before, cost)

    def _affordable(self, site: Site) -> bool:
        """Predicted time decides only among merges that do not raise the MACs by more than a trifle.

        More work in fewer calls can be faster, but not on every machine, and never for a compiler that fuses
        the calls anyway.
        """
        return self.objective == "params" or site.after.macs <= site.before.macs + self.spare_macs

    def _site(self, elements: Chain, before: Cost) -> Site | None:
        """The elements as one operator; None if that was forbidden. Raises Refusal."""
        place = place_of(self.evidence, elements)
        if place is None or ends_of(elements) in self.forbidden or not self.allowed(elements):
            return None
        runs = _runs(elements)
        geometries = run_geometries(self.evidence, elements, runs)
        home, geometry = _at_home(geometries)
        home_place = geometries[home][0]
        if covers_map(elements):
            geometry = cover_geometry(geometry, home_place.size)
        emission, cost = self.cheapest(geometry, home_place)
        if (other := self._swapped(elements, runs, home_place)) is not None:
            emission, cost = min((emission, cost), other, key=lambda pair: pair[1].key(self.objective))
        emptied = tuple(run for index, run in enumerate(runs) if index != home)
        return Site(elements, place, runs[home], emptied, home_place, geometry, emission, before, cost)

    def _swapped(self, elements: Chain, runs: Sequence[Run], place: Place) -> tuple[Emission, Cost] | None:
        """A channel mix on the other side of an average pool or a nearest upsampling, where the two swap."""
        solid = [e for e in elements if not _is_same(e)]
        first, last = _resampling(solid[0]), _resampling(solid[-1])
        if len(runs) != 1 or (first == "nearest") == (last == "avg_pool"):
            return None
        try:
            parts = (solid[:1], solid[1:]) if first == "nearest" else (solid[:-1], solid[-1:])
            inner = fold_geometry(parts[0], place)
            outer = fold_geometry(parts[1], after(place, inner))
            emission = swapped(outer, inner, "nearest" if first == "nearest" else "avg_pool")
        except Refusal:
            return None
        return emission, emission_cost(emission, place.size, batch=place.batch)

    def cheapest(self, geometry: Geometry, place: Place) -> tuple[Emission, Cost]:
        """The cheapest way to build a form at a place. Raises Refusal where there is none."""
        _check_place(geometry, place)
        return cheapest(geometry, place.size, objective=self.objective, batch=place.batch)

    def macs(self, chain: Chain) -> int:
        """Multiply-accumulates of a chain as it is."""
        return sum(self._leaf_cost(leaf).macs for leaf in leaves(chain))

    def _cost_as_is(self, element: Element) -> Cost:
        """Cost of an element that is not merged with its neighbours; a block may merge inside."""
        if isinstance(element, Leaf):
            return self._leaf_cost(element)
        total = ZERO
        for branch in element.branches:
            place = place_of(self.evidence, branch)
            parts = self._best(branch, place) if place is not None and branch else []
            for part in parts:
                total = total + part.cost
        adds = len(element.branches) - 1
        shape = self.evidence.size(element.target)
        for _ in range(adds):
            total = total + operator_cost("add", math.prod(shape))
        return total

    def _computed(self, element: Element) -> list[Node]:
        """Calls that compute an operator's weights anew in every forward pass."""
        if not isinstance(element, Leaf) or not isinstance(element.step, Filter):
            return []
        unit = self.frames.unit_of(element.node)
        return [n for n in self.frames.calls[unit] if n not in self.frames.data[unit]]

    def _leaf_cost(self, leaf: Leaf) -> Cost:
        if isinstance(leaf.step, Same | Passage):
            return ZERO
        weights = ZERO
        for node in self._computed(leaf):
            volume = math.prod(self.evidence.size(node)) if is_tensor(node) else 0
            weights = weights + operator_cost("mul", volume)
        return weights + self._operator_cost(leaf, leaf.step)

    def _operator_cost(self, leaf: Leaf, step: Filter | Scalar) -> Cost:
        shape = self.evidence.size(leaf.source)
        if isinstance(step, Scalar):
            return operator_cost("mul", math.prod(shape))
        place = Place(step.axis, shape)
        name = step.kind.split()[0]
        return operator_cost(
            name, math.prod(shape), geometry=step.geometry, size=place.size, batch=place.batch
        )

    def _sites_of(self, chain: Chain, part: _Part) -> list[Site]:
        """The sites in a part: itself, or those inside the branches of a block that stays."""
        if part.site is not None:
            return [part.site]
        element = chain[part.first]
        if isinstance(element, Leaf):
            return []
        sites: list[Site] = []
        for branch in element.branches:
            sites.extend(self.plan(branch).sites)
        return sites

    def _denials(self, chain: Chain, parts: Sequence[_Part]) -> list[Denial]:
        """Why neighbouring parts, and the branches of blocks that stay, are not one operator."""
        denials: list[Denial] = []
        for part in parts:
            element = chain[part.first]
            if part.site is None and isinstance(element, Block):
                denials.append(self._denial((element,)))
                for branch in element.branches:
                    denials.extend(self.plan(branch).denials)
        solid = [p for p in parts if not _is_filler(chain[p.first]) or p.site is not None]
        for left, right in itertools.pairwise(solid):
            denials.append(self._denial(chain[left.first : right.last + 1]))
        return denials

    def _denial(self, elements: Chain) -> Denial:
        place = place_of(self.evidence, elements) or Place(0, (1,))
        ends = ends_of(elements)
        before = ZERO
        for element in elements:
            before = before + self._cost_as_is(element)
        if ends in self.forbidden:
            return Denial(elements, place, self.forbidden[ends])
        try:
            site = self._site(elements, before)
        except Refusal as refusal:
            dtype = self.evidence.dtype(elements[0].source)
            return Denial(elements, place, refusal.reason + border_words(elements, place, before, dtype))
        if site is None:
            return Denial(elements, place, "left out by --only or --skip")
        if self._affordable(site) and self._cheaper(site.after, before):
            return Denial(elements, place, "another grouping is cheaper", before, site.after)
        return Denial(elements, place, "costs more as one operator", before, site.after)


def run_geometries(evidence: Evidence, elements: Chain, runs: Sequence[Run]) -> list[tuple[Place, Geometry]]:
    """Where each run stands, and its geometry there. Raises Refusal."""
    axes = dict(zip(map(id, elements), axes_along(elements), strict=True))
    found = []
    for run in runs:
        axis = axes[id(run.elements[0])]
        if axis is None:
            raise Refusal("the channels are split or joined in between")
        place = Place(axis, evidence.size(run.source))
        found.append((place, fold_geometry(run.elements, place)))
    return found


def ends_of(elements: Sequence[Element]) -> tuple[Node, Node]:
    """Source and target of elements, identities at either end not counted."""
    solid = [e for e in elements if not _is_same(e)] or list(elements)
    return solid[0].source, solid[-1].target


def site_numbers(site: Site, evidence: Evidence) -> Affine:
    """The merged form of a site in float64."""
    runs = sorted([site.home, *site.emptied], key=lambda run: site.elements.index(run.elements[0]))
    folded: Affine | None = None
    for run, (place, _) in zip(runs, run_geometries(evidence, site.elements, runs), strict=True):
        form = fold_numbers(run.elements, place)
        if len(runs) > 1 and form.geometry.spatial != site.geometry.spatial:
            form = lift(form, site.geometry.spatial)
        folded = form if folded is None else join(form, folded)
    assert folded is not None
    return cover(folded, site.home_place.size) if covers_map(site.elements) else folded


def _runs(elements: Chain) -> list[Run]:
    """The stretches between passages that have something besides identities."""
    runs: list[Run] = []
    current: list[Element] = []
    for element in (*elements, None):
        if element is None or _is_passage(element):
            if not all(_is_same(e) for e in current):
                runs.append(Run(tuple(current)))
            current = []
        else:
            current.append(element)
    return runs


def _at_home(geometries: Sequence[tuple[Place, Geometry]]) -> tuple[int, Geometry]:
    """Which run keeps the merged operator, and its geometry there.

    Everything pointwise can move past a passage; what is not pointwise stays where it is.
    """
    fixed = [index for index, (_, geometry) in enumerate(geometries) if not geometry.pointwise]
    if len(fixed) > 1:
        raise Refusal("a relayout or a resampling stands between two filters with spatial extent")
    home = fixed[0] if fixed else _smallest(geometries)
    spatial = geometries[home][1].spatial
    folded: Geometry | None = None
    for index, (_, geometry) in enumerate(geometries):
        moved = geometry if index == home else lift_geometry(geometry, spatial)
        folded = moved if folded is None else join_geometry(moved, folded)
    assert folded is not None
    return home, folded


def _smallest(geometries: Sequence[tuple[Place, Geometry]]) -> int:
    """The run with the fewest positions; the last of equals, so that nothing large is computed early."""
    positions = [math.prod(place.size) * place.batch for place, _ in geometries]
    return min(range(len(positions)), key=lambda index: (positions[index], -index))


def _check_place(geometry: Geometry, place: Place) -> None:
    """The layers of torch.nn take channels on axis 1 (0 without a batch), or on the last axis."""
    rank = len(place.shape)
    if geometry.spatial and (
        place.axis > 1 or geometry.spatial > 3 or rank - place.axis - 1 != geometry.spatial
    ):
        raise Refusal("no layer of torch.nn takes channels on this axis")
    if geometry.spatial == 0 and place.axis != rank - 1:
        raise Refusal("no layer of torch.nn takes channels on this axis")


def _is_filler(element: Element) -> bool:
    return isinstance(element, Leaf) and isinstance(element.step, Same | Passage)


def _is_same(element: Element) -> bool:
    return isinstance(element, Leaf) and isinstance(element.step, Same)


def _at_most(total: tuple[float, float], best: tuple[float, float]) -> bool:
    """Whether a cost is lower; of equals the later counts, so that a batch norm joins what precedes it."""
    return _less(total, best) or (
        total[0] <= best[0] * (1 + ROUNDING) and total[1] <= best[1] * (1 + ROUNDING)
    )


def _less(total: tuple[float, float], best: tuple[float, float]) -> bool:
    """Whether a cost is lower by more than rounding."""
    if best[0] == math.inf or total[0] < best[0] * (1 - ROUNDING):
        return True
    return total[0] <= best[0] * (1 + ROUNDING) and total[1] < best[1] * (1 - ROUNDING)


def _resampling(element: Element) -> str:
    """The kind of a resampling that treats all channels alike, or the empty string."""
    if not isinstance(element, Leaf) or not isinstance(element.step, Filter):
        return ""
    kind = element.step.kind.split()[0]
    return kind if kind in ("nearest", "avg_pool") else ""


def _is_passage(element: Element) -> bool:
    return isinstance(element, Leaf) and isinstance(element.step, Passage)
