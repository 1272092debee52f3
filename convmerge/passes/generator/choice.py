"""Which pointwise operators around a computed kernel move into it, and who computes the merged kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx.node import Node

from convmerge.affine import Geometry
from convmerge.cost.model import ZERO, Cost
from convmerge.evidence.capture import Evidence
from convmerge.passes.generator.kernels import Computed, Selection, ends, last_linear, pointwise, relayouts
from convmerge.passes.generator.numbers import merged_geometry
from convmerge.plan import Planner
from convmerge.regions.elements import Chain, Leaf, Regions
from convmerge.regions.fold import Place, after, fold_geometry


@dataclass(frozen=True, eq=False)
class Fold:
    """A computed kernel with operators around it that move into it.

    Attributes:
        before, after: the operators; ``geometry``: the merged layer's; ``place``: at its input.
        generator: the linear layer that then computes the merged kernel; None: it is composed in every call.
        numbers: how many it computes, a computed bias included.
        old, new: cost of the operators, the layer and what computes its kernel, as they are and merged.
        total: ``new`` with the rest of both chains.
    """

    layer: Computed
    before: Chain
    after: Chain
    geometry: Geometry
    place: Place
    generator: Leaf | None
    numbers: int
    old: Cost
    new: Cost
    total: Cost


@dataclass(frozen=True, eq=False)
class Chooser:
    """Compares the ways to merge a computed kernel with its neighbours, by the planner's costs."""

    evidence: Evidence
    regions: Regions
    planner: Planner

    def best(self, layer: Computed) -> tuple[Fold | None, bool]:
        """The cheapest way, if there is one, and whether it gains anything."""
        last = last_linear(layer, self.evidence, self.regions)
        as_it_is = self._made_by(last) + self._layer(layer, layer.geometry, layer.place)
        as_it_is = as_it_is + self._planned(layer.before) + self._planned(layer.after)
        folds = [
            fold for fold in self._folds(layer, last) if self.planner.allowed((*fold.before, *fold.after))
        ]
        objective = self.planner.objective
        best = min(folds, key=lambda fold: fold.total.key(objective), default=None)
        gaining = [fold for fold in folds if self.planner.gains(fold.total, as_it_is)]
        if not gaining:
            return best, False
        return min(gaining, key=lambda fold: fold.total.key(objective)), True

    def _folds(self, layer: Computed, last: Leaf | None) -> Iterator[Fold]:
        leading = tuple(pointwise(layer, layer.before[::-1]))
        following = tuple(pointwise(layer, layer.after))
        for first in ends(leading):
            for count in ends(following):
                before = layer.before[len(layer.before) - first :]
                shape = self.evidence.size(before[0].source) if before else layer.place.shape
                start = Place(layer.place.axis, shape)
                bias = bool(before) and fold_geometry(before, start).bias
                if not (first or count) or (bias and any((*layer.geometry.lo, *layer.geometry.hi))):
                    continue  # a bias would end where the layer pads
                plain = layer.geometry.groups == 1 and not relayouts((*before, *layer.after[:count]))
                for generator in [last] * (last is not None) + [None] * plain:
                    yield self._fold(layer, before, layer.after[:count], start, last, generator)

    def _fold(
        self, layer: Computed, before: Chain, taken: Chain, start: Place, last: Leaf | None, new: Leaf | None
    ) -> Fold:
        g = layer.geometry
        first = fold_geometry(before, start) if before else None
        end = fold_geometry(taken, after(layer.place, g)) if taken else None
        merged = merged_geometry(g, first, end)
        old_cost = self._made_by(last) + self._layer(layer, g, layer.place)
        old_cost = old_cost + self.planner.cost_as_is((*before, *taken))
        computed_bias = isinstance(layer.bias, Selection) or (first is not None and first.bias)
        numbers = merged.out_channels * (_inputs(merged) + computed_bias)
        if new is None:
            made = self._made_by(last) + self._composing(layer, first, end)
        else:
            made = self._linear(self.evidence.size(new.source)[-1], numbers, new.node)
        new_cost = made + self._layer(layer, merged, start)
        rest = layer.before[: len(layer.before) - len(before)], layer.after[len(taken) :]
        total = new_cost + self._planned(rest[0]) + self._planned(rest[1])
        return Fold(layer, before, taken, merged, start, new, numbers, old_cost, new_cost, total)

    def _planned(self, chain: Chain) -> Cost:
        return self.planner.table(chain).cost(len(chain)) if chain else ZERO

    def _layer(self, layer: Computed, g: Geometry, place: Place) -> Cost:
        """The layer alone; its weights are no parameters."""
        name, dtype = "conv" if g.spatial else "linear", self.evidence.dtype(layer.node)
        elements = math.prod(place.shape)
        cost = self.planner.cost_model.operator(
            name, elements, geometry=g, size=place.size, batch=place.batch, dtype=dtype
        )
        return replace(cost, weights=0)

    def _made_by(self, last: Leaf | None) -> Cost:
        """The linear layer that computes a kernel, as it is."""
        if last is None:
            return ZERO
        return self._linear(self.evidence.size(last.source)[-1], self.evidence.size(last.node)[-1], last.node)

    def _linear(self, into: int, out: int, call: Node, rows: int = 1) -> Cost:
        geometry, dtype = Geometry.channelwise(into, out, 1, 0, bias=True), self.evidence.dtype(call)
        return self.planner.cost_model.operator(
            "linear", into * rows, geometry=geometry, batch=rows, dtype=dtype
        )

    def _composing(self, layer: Computed, first: Geometry | None, end: Geometry | None) -> Cost:
        """Products of kernels in every call, the layouts around them included; the last operator first."""
        g, call, cost = layer.geometry, layer.node, ZERO
        taps = math.prod(g.kernel)
        for form, other in ((end, _inputs(g)), (first, (end or g).out_channels * taps)):
            if form is None:
                continue
            size, dtype = form.out_channels * other, self.evidence.dtype(layer.node)
            moved = self.planner.cost_model.operator("mul", size, dtype=dtype)
            cost = cost + moved
            if not form.diagonal:
                cost = cost + moved + self._linear(form.in_channels, form.out_channels, call, other)
        return cost


def _inputs(g: Geometry) -> int:
    """How many products make up one output."""
    return g.in_channels // g.groups * math.prod(g.kernel)
