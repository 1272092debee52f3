"""Making a site: the best form for given elements, wherever in them the new layer may stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from convmerge.affine import Geometry
from convmerge.cost.model import Cost, CostModel, Objective
from convmerge.edit.edits import Run
from convmerge.edit.lower import resized_of
from convmerge.emit import Emission, emissions, flattened, swapped
from convmerge.emit.parallel import Branch, Parallel
from convmerge.emit.sized import Sized, check_edge
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence
from convmerge.plan.blockwise import FREE_MACS, in_order, order_cost, relaid
from convmerge.plan.bordered import border_option
from convmerge.plan.costs import edge_cost
from convmerge.plan.dtypes import check_dtypes
from convmerge.plan.homes import Geometries, at_home, homes, passages_cost, with_gaps
from convmerge.plan.site import Site, before_join, check_place, is_same, run_geometries, runs_of
from convmerge.recognise import Filter, Resized
from convmerge.regions.blocks import Patterns, blocks_of, has_structure, moves_channels
from convmerge.regions.elements import Chain, Element, Leaf, Share, calls_of
from convmerge.regions.fold import Place, after, cover_geometry, covers_map, fold_geometry

Ways = Callable[[Geometry], Sequence[Emission]]

# How many times the fastest way a way with half its MACs may take: by a prediction, and by a measurement.
LEEWAY = 1.5
MEASURED_LEEWAY = 1.1
SHORT = 50e-6  # seconds: below, the time is that of the calls rather than of the work


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes sites out of elements that may be merged.

    Attributes:
        evidence: where sizes come from.
        objective: ``latency``, ``macs`` or ``params``; ties go to latency.
        model: what ways to build a form cost.
        patterns: which channels the operators connect.
    """

    evidence: Evidence
    objective: Objective
    model: CostModel
    patterns: Patterns

    def site(self, elements: Chain, place: Place, before: Cost) -> Site:
        """The elements as one operator, or as independent blocks. Raises Refusal."""
        check_dtypes(self.evidence, elements)
        if (resized := resized_of(Run(elements))) is not None:
            return self._sized(elements, resized[1], place, before)
        whole = self._whole(elements, place, before)
        blocks = self.in_blocks(whole)
        if blocks is None or blocks.blocks is None:
            return whole
        if len(blocks.blocks.parts) > 1:
            whole = replace(whole, spare=FREE_MACS)
        affordable = [s for s in (whole, blocks) if s.after.macs <= before.macs + s.spare]
        return min(affordable or (whole, blocks), key=lambda s: s.after.key(self.objective))

    def relaid(self, elements: Chain, before: Cost) -> Site | None:
        """Elements between views that cancel, as one operator without these; None where they are no such
        thing. Raises Refusal.
        """
        found = relaid(self.evidence, elements)
        if found is None:
            return None
        check_dtypes(self.evidence, elements)
        place, geometry = found
        check_place(geometry, place)
        dtype = self.evidence.dtype(elements[0].source)
        emission, cost = self.cheapest(emissions(geometry), place, dtype, before, FREE_MACS)
        run = Run(elements)
        return Site(elements, place, run, (), place, geometry, emission, before, cost, spare=FREE_MACS)

    def alone(self, element: Element) -> bool:
        """Whether an operator can become another one by itself: its channels fall apart into blocks, or it is
        a convolution that covers its map.
        """
        if not isinstance(element, Leaf) or not isinstance(element.step, Filter):
            return False
        if self._covers(element, element.step):
            return True
        by_hand = element.step.kind.endswith("blocks") and element.step.geometry.groups > 1
        return by_hand or (not moves_channels(element) and self.patterns.found(element))

    def _covers(self, leaf: Leaf, step: Filter) -> bool:
        """Whether a convolution that can be one matrix product gives a single position."""
        g, place = step.geometry, Place(step.axis, self.evidence.size(leaf.source))
        if step.kind.split()[0] != "conv" or any(n != 1 for n in g.out_size(place.size)):
            return False
        return any(layer.kind == "unfolded" for way in emissions(g) for layer in way.layers)

    def in_blocks(self, whole: Site, ways_of: Ways = emissions) -> Site | None:
        """The same elements as independent blocks, built in one of some ways; None where there are none."""
        elements, place = whole.home.elements, whole.home_place
        if whole.emptied or covers_map(elements) or not has_structure(elements, self.patterns):
            return None
        dtype = self.evidence.dtype(elements[0].source)
        try:
            blocks = blocks_of(elements, place, self.patterns)
            if blocks is None:
                return None
            groups = blocks.groups
            spare = max(1, FREE_MACS // len(groups))
            ways = [self.cheapest(ways_of(g.geometry), place, dtype, whole.before, spare) for g in groups]
        except Refusal:
            return None
        branches = [Branch(g.inputs, g.outputs, way) for g, (way, _) in zip(groups, ways, strict=True)]
        p = Parallel(whole.geometry, tuple(branches))
        cost = sum((cost for _, cost in ways), order_cost(self.model, p, place, dtype))
        blocks_alone = replace(whole, after=cost, blocks=blocks, spare=FREE_MACS)
        if in_order(p):
            return replace(blocks_alone, geometry=groups[0].geometry, emission=ways[0][0])
        return replace(blocks_alone, emission=p)

    def _whole(self, elements: Chain, place: Place, before: Cost) -> Site:
        elements = with_gaps(elements)
        runs = runs_of(elements)
        geometries = run_geometries(self.evidence, elements, runs)
        possible = [before_join(run) is not None for run in runs]
        options: list[Site] = []
        refusal: Refusal | None = None
        for home in homes(geometries, runs, possible):
            try:
                options.append(self._at(elements, place, before, runs, geometries, home))
            except Refusal as refused:
                refusal = refusal or refused
        if not options and refusal is not None:
            raise refusal
        return min(options, key=lambda site: site.after.key(self.objective))

    def _at(
        self,
        elements: Chain,
        place: Place,
        before: Cost,
        runs: Sequence[Run],
        geometries: Geometries,
        home: int,
    ) -> Site:
        """The elements as one operator in place of the run ``home``. Raises Refusal."""
        geometry = at_home(geometries, home)
        home_place = geometries[home][0]
        if covers_map(elements):
            geometry = cover_geometry(geometry, home_place.size)
        check_place(geometry, home_place)
        ways = (*self.ways(elements, geometry), *self._swapped(elements, runs, home_place))
        spare = FREE_MACS if geometry.spatial == 0 and geometry.groups > 1 and before.macs else 0
        dtype = self.evidence.dtype(elements[0].source)
        emission, cost = self.cheapest(ways, home_place, dtype, before, spare)
        parts = [before_join(run) for run in runs]
        kept = parts[home]
        assert kept is not None
        cost = cost + passages_cost(self.model, self.evidence, elements, kept, geometry)
        rest = [part for index, part in enumerate(parts) if index != home and part is not None]
        emptied = (*(part for part in rest if calls_of(part.elements)), *self._moved(elements))
        return Site(elements, place, kept, emptied, home_place, geometry, emission, before, cost, spare=spare)

    def _sized(self, elements: Chain, resized: Resized, place: Place, before: Cost) -> Site:
        """Nearest upsampling to a given size and what follows it, as one layer. Raises Refusal."""
        behind = after(place, resized.geometry)
        outer = fold_geometry(elements[1:], behind)
        if outer.pointwise:
            raise Refusal("what acts on channels alone moves in front of the upsampling")
        if resized.short:
            check_edge(outer)
        home = before_join(Run(elements))
        if home is None or len(runs_of(elements)) > 1:
            raise Refusal("a relayout or a resampling stands between two filters with spatial extent")
        geometry = fold_geometry(elements, place)
        check_place(geometry, place)
        dtype = self.evidence.dtype(elements[0].source)
        main, cost = self.cheapest(emissions(geometry), place, dtype, before)
        sized = Sized(main, resized.geometry.up, outer if resized.short else None)
        cost = cost + edge_cost(self.model, sized, behind, dtype)
        return Site(elements, place, home, self._moved(elements), place, geometry, sized, before, cost)

    def _moved(self, elements: Chain) -> tuple[Run, ...]:
        """The operators behind a join whose calls a term takes over."""
        moved = tuple(e.of for e in elements if isinstance(e, Share) and e.constant)
        return (Run(moved),) if moved else ()

    def ways(self, elements: Chain, geometry: Geometry) -> tuple[Emission, ...]:
        """Every way to build the elements as one form of ``geometry``. Raises Refusal."""
        ends_flat = covers_map(elements) and len(self.evidence.size(elements[-1].target)) == 2
        return (*([flattened(geometry)] if ends_flat else []), *emissions(geometry))

    def bordered(self, elements: Chain, place: Place, before: Cost) -> Site | None:
        """The elements with a kernel for each border class; None where that is no option. Raises Refusal."""
        check_dtypes(self.evidence, elements)
        if resized_of(Run(elements)) is not None:
            return None
        dtype = self.evidence.dtype(elements[0].source)
        option = border_option(elements, place, before, dtype, self.model)
        if option is None:
            return None
        b, cost = option
        check_place(b.low, place)
        return Site(elements, place, Run(elements), (), place, b.low, b, before, cost)

    def cheapest(
        self, ways: Sequence[Emission], place: Place, dtype: torch.dtype, before: Cost, spare: int = 0
    ) -> tuple[Emission, Cost]:
        """The cheapest of several ways to build a form at a place; ``before``: of what it replaces.

        With ``spare`` the cheapest of those that take no more MACs than that beyond the least. A way of half
        the fastest one's MACs is taken where it is not much slower: operators that are slow here, as the
        average pool is in eager mode, are fast elsewhere, and work is work everywhere.
        """
        costs = self.model.ways(ways, place.size, batch=place.batch, dtype=dtype, before=before)
        pairs = list(zip(ways, costs, strict=True))
        if self.objective != "params":  # a faster way with more MACs than before would not be taken at all
            pairs = [pair for pair in pairs if pair[1].macs <= before.macs + spare] or pairs
        if spare and self.objective != "params":
            least = min(cost.macs for cost in costs)
            pairs = [pair for pair in pairs if pair[1].macs <= least + spare]
        best = min(pairs, key=lambda pair: pair[1].key(self.objective))
        if self.objective != "latency" or best[1].latency < SHORT:
            return best
        limit = min((MEASURED_LEEWAY if best[1].measured else LEEWAY) * best[1].latency, before.latency)
        light = [p for p in pairs if 2 * p[1].macs <= best[1].macs and p[1].latency <= limit]
        return min(light or [best], key=lambda pair: pair[1].latency)

    def _swapped(self, elements: Chain, runs: Sequence[Run], place: Place) -> tuple[Emission, ...]:
        """A channel mix on the other side of an average pool or a nearest upsampling, where the two swap."""
        solid = [e for e in elements if not is_same(e)]
        first, last = _resampling(solid[0]), _resampling(solid[-1])
        if len(runs) != 1 or (first == "nearest") == (last == "avg_pool"):
            return ()
        try:
            parts = (solid[:1], solid[1:]) if first == "nearest" else (solid[:-1], solid[-1:])
            inner = fold_geometry(parts[0], place)
            outer = fold_geometry(parts[1], after(place, inner))
            return (swapped(outer, inner, "nearest" if first == "nearest" else "avg_pool"),)
        except Refusal:
            return ()


def _resampling(element: Element) -> str:
    """The kind of a resampling that treats all channels alike, or the empty string."""
    if not isinstance(element, Leaf) or not isinstance(element.step, Filter):
        return ""
    kind = element.step.kind.split()[0]
    return kind if kind in ("nearest", "avg_pool") else ""
