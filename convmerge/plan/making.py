"""Making a site: the best form for given elements, wherever in them the new layer may stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from convmerge.borderplan import border_option
from convmerge.capture import Evidence
from convmerge.cost import Cost, CostModel, Objective
from convmerge.emit import Emission, emissions, swapped
from convmerge.errors import Refusal
from convmerge.fold import Place, after, cover_geometry, covers_map, fold_geometry
from convmerge.lower import Run
from convmerge.plan.site import Site, at_home, before_join, check_place, is_same, run_geometries, runs_of
from convmerge.recognise import Filter
from convmerge.regions import Chain, Element, Leaf, Share


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes sites out of elements that may be merged.

    Attributes:
        evidence: where sizes come from.
        objective: ``latency``, ``macs`` or ``params``; ties go to latency.
        model: what ways to build a form cost.
    """

    evidence: Evidence
    objective: Objective
    model: CostModel

    def site(self, elements: Chain, place: Place, before: Cost) -> Site:
        """The elements as one operator. Raises Refusal."""
        runs = runs_of(elements)
        geometries = run_geometries(self.evidence, elements, runs)
        parts = [before_join(run) for run in runs]
        home, geometry = at_home(geometries, [part is not None for part in parts])
        home_place = geometries[home][0]
        if covers_map(elements):
            geometry = cover_geometry(geometry, home_place.size)
        check_place(geometry, home_place)
        ways = (*emissions(geometry), *self._swapped(elements, runs, home_place))
        emission, cost = self.cheapest(ways, home_place, self.evidence.dtype(elements[0].source), before)
        kept = parts[home]
        assert kept is not None
        emptied = [part for index, part in enumerate(parts) if index != home and part is not None]
        if moved := tuple(e.of for e in elements if isinstance(e, Share) and e.constant):
            emptied.append(Run(moved))
        return Site(elements, place, kept, tuple(emptied), home_place, geometry, emission, before, cost)

    def bordered(self, elements: Chain, place: Place, before: Cost) -> Site | None:
        """The elements with a kernel for each border class; None where that is no option. Raises Refusal."""
        dtype = self.evidence.dtype(elements[0].source)
        option = border_option(elements, place, before, dtype, self.model)
        if option is None:
            return None
        b, cost = option
        check_place(b.whole, place)
        return Site(elements, place, Run(elements), (), place, b.whole, b, before, cost)

    def cheapest(
        self, ways: Sequence[Emission], place: Place, dtype: torch.dtype, before: Cost
    ) -> tuple[Emission, Cost]:
        """The cheapest of several ways to build a form at a place; ``before``: of what it replaces."""
        costs = self.model.ways(ways, place.size, batch=place.batch, dtype=dtype, before=before)
        return min(zip(ways, costs, strict=True), key=lambda pair: pair[1].key(self.objective))

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
            return swapped(outer, inner, "nearest" if first == "nearest" else "avg_pool")
        except Refusal:
            return ()


def _resampling(element: Element) -> str:
    """The kind of a resampling that treats all channels alike, or the empty string."""
    if not isinstance(element, Leaf) or not isinstance(element.step, Filter):
        return ""
    kind = element.step.kind.split()[0]
    return kind if kind in ("nearest", "avg_pool") else ""
