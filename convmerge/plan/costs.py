"""What operators cost as a model has them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.fx.node import Node

from convmerge.cost.model import ZERO, Cost, CostModel
from convmerge.edit.frames import Frames
from convmerge.emit.sized import Sized, edge_size
from convmerge.evidence.capture import Evidence, is_tensor
from convmerge.recognise import Filter, Passage, Same, Scalar
from convmerge.recognise.channels import MOVES
from convmerge.recognise.rows import ROWS, macs_of
from convmerge.regions.elements import CHECKS, Chain, Element, Leaf, leaves
from convmerge.regions.fold import Place

# What goes over its input and its output once, by the ATen name or its end; other passages are views.
_RESAMPLING = {
    "bicubic2d": "bicubic",
    "bicubic2d_aa": "bicubic",
    "bilinear2d_aa": "bilinear",
    "linear1d": "bilinear",
    "bilinear2d": "bilinear",
    "trilinear3d": "bilinear",
    **{f"{name}{n}d": "nearest" for name in ("nearest", "exact") for n in (1, 2, 3)},
    **{f"pool{n}d": "avg_pool" for n in (1, 2, 3)},
    "mean": "mean",
    "pad": "pad",
}


def passage_cost(
    model: CostModel, evidence: Evidence, leaf: Leaf, axis: int | None = None, channels: int | None = None
) -> Cost:
    """What a passage costs: as it is, or with another number of channels on ``axis`` of its input."""
    call = evidence.calls[leaf.node]
    name = _RESAMPLING.get(call.op.split("_")[-1]) or _RESAMPLING.get("_".join(call.op.split("_")[-2:]))
    if name is None:
        return ZERO
    before, after = evidence.size(leaf.source), evidence.size(leaf.node)
    numbers = (math.prod(before) + math.prod(after)) / 2
    share = 1.0 if axis is None or channels is None else channels / before[axis]
    return model.operator(name, round(numbers * share), dtype=evidence.dtype(leaf.source))


def edge_cost(model: CostModel, s: Sized, place: Place, dtype: torch.dtype) -> Cost:
    """What it costs to compute anew the last outputs behind an upsampling to the size at ``place``."""
    total, g = ZERO, s.edge
    for dim, rows in enumerate(s.rows):
        if g is None or not rows:
            continue
        size = edge_size(g, dim, place.size)
        lo = tuple(0 if d == dim else n for d, n in enumerate(g.lo))
        total = total + model.operator(
            "conv", 0, geometry=replace(g, lo=lo), size=size, batch=place.batch, dtype=dtype
        )
        numbers = place.batch * g.in_channels * math.prod(size)
        total = total + model.operator("nearest", numbers, dtype=dtype)
        for _ in range(2):
            total = total + model.operator("pad", numbers, dtype=dtype)
        for _ in range(5):
            total = total + model.operator("narrow", 0, dtype=dtype)
    if g is not None and any(s.rows):
        numbers = place.batch * g.out_channels * math.prod(g.out_size(place.size))
        total = total + model.operator("pad", numbers, dtype=dtype)
    # The same weights serve all sides.
    sides = sum(rows > 0 for rows in s.rows)
    return replace(total, weights=total.weights // max(1, sides))


@dataclass(frozen=True, eq=False)
class LeafCosts:
    """The cost of single operators, by ``model``; ``frames`` say which calls compute their weights."""

    frames: Frames
    model: CostModel

    def of(self, leaf: Leaf) -> Cost:
        """An operator's cost, and that of computing its weights anew in every forward pass."""
        if isinstance(leaf.step, Same):
            return ZERO
        if isinstance(leaf.step, Passage):
            return passage_cost(self.model, self.frames.evidence, leaf)
        weights, dtype = ZERO, self.frames.evidence.dtype(leaf.source)
        for node in self.computed(leaf):
            volume = math.prod(self.frames.evidence.size(node)) if is_tensor(node) else 0
            weights = weights + self.model.operator("mul", volume, dtype=dtype)
        return weights + self._operator(leaf, leaf.step)

    def computed(self, element: Element) -> list[Node]:
        """Calls that compute an operator's weights anew in every forward pass."""
        if not isinstance(element, Leaf) or not isinstance(element.step, Filter):
            return []
        unit = self.frames.unit_of(element.node)
        calls = [n for n in self.frames.calls[unit] if n not in self.frames.data[unit]]
        return [n for n in calls if self.frames.call(n).op not in CHECKS]

    def macs(self, chain: Chain) -> int:
        """Multiply-accumulates of a chain as it is."""
        return sum(self.of(leaf).macs for leaf in leaves(chain))

    def _operator(self, leaf: Leaf, step: Filter | Scalar) -> Cost:
        shape, dtype = self.frames.evidence.size(leaf.source), self.frames.evidence.dtype(leaf.source)
        if isinstance(step, Scalar):
            return self.model.operator("mul", math.prod(shape), dtype=dtype)
        place = Place(step.axis, shape)
        name = step.kind.split()[0]
        if name == ROWS:
            return sum((self._call(node, dtype) for node in (*step.through, leaf.node)), ZERO)
        cost = self.model.operator(
            name,
            math.prod(shape),
            geometry=step.geometry,
            size=place.size,
            batch=place.batch,
            dtype=dtype,
        )
        added = [n for n in step.through if self.frames.evidence.calls[n].op == "add"]
        sums = (
            self.model.operator("add", math.prod(self.frames.evidence.size(n)), dtype=dtype) for n in added
        )
        return sum(sums, cost)

    def _call(self, node: Node, dtype: torch.dtype) -> Cost:
        """One call of a linear map that is written with several."""
        evidence = self.frames.evidence
        volume = math.prod(evidence.size(node)) if is_tensor(node) else 0
        name = "narrow" if evidence.calls[node].op in MOVES else "mul"
        read = [n for n in node.all_input_nodes if n in self.frames.constants and is_tensor(n)]
        weights = sum(math.prod(evidence.size(n)) for n in read)
        cost = self.model.operator(name, volume, dtype=dtype)
        return replace(cost, macs=macs_of(evidence, node), weights=weights)
