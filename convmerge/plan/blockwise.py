"""Blocks of channels in planning, and views around what acts on channels alone."""

from __future__ import annotations

import math

import torch

from convmerge.affine import Geometry
from convmerge.algebra import lift_geometry
from convmerge.borders.leaks import join_geometry
from convmerge.cost.model import ZERO, Cost, CostModel
from convmerge.emit.parallel import Parallel, run_of
from convmerge.evidence.capture import Evidence
from convmerge.plan.site import is_passage, run_geometries, runs_of
from convmerge.recognise.channels import RESHAPES, VIEWS, drops_ones
from convmerge.regions.elements import Chain, Leaf
from convmerge.regions.fold import Place, axes_along

# A dense product of no more MACs than this takes no longer than the calls that would save them.
FREE_MACS = 1 << 17


def order_cost(model: CostModel, p: Parallel, place: Place, dtype: torch.dtype) -> Cost:
    """What it costs to take the channels apart and to put them together."""
    total, positions = ZERO, place.batch * math.prod(place.size)
    for branch in p.branches:
        name = "narrow" if run_of(branch.inputs) is not None else "index_select"
        if not (name == "narrow" and len(branch.inputs) == p.whole.in_channels):
            total = total + model.operator(name, positions * len(branch.inputs), dtype=dtype)
    outputs = positions * len(p.order)
    if len(p.branches) > 1:
        total = total + model.operator("cat", outputs, dtype=dtype)
    if run_of(p.order) != 0:
        total = total + model.operator("index_select", outputs, dtype=dtype)
    return total


def in_order(p: Parallel) -> bool:
    """Whether all channels stand in the order that the one branch wants."""
    first = p.branches[0].inputs
    return run_of(p.order) == 0 and run_of(first) == 0 and len(first) == p.whole.in_channels


def relaid(evidence: Evidence, elements: Chain) -> tuple[Place, Geometry] | None:
    """Pointwise elements between views that give back the layout they take, as a form on that layout.

    A 1×1 convolution on a sequence of length one between ``unsqueeze`` and ``squeeze``, or between two
    transposes, is a linear layer. None where the elements are nothing of this kind. Raises Refusal.
    """
    axis = axes_along(elements)[0]
    runs = runs_of(elements)
    if axis is None or not runs or not _comes_back(evidence, elements, axis):
        return None
    place = Place(axis, evidence.size(elements[0].source))
    folded: Geometry | None = None
    for _, geometry in run_geometries(evidence, elements, runs):
        if not geometry.pointwise or geometry.ones:
            return None
        lifted = lift_geometry(geometry, len(place.size))
        folded = lifted if folded is None else join_geometry(lifted, folded)
    return None if folded is None else (place, folded)


def _comes_back(evidence: Evidence, elements: Chain, axis: int) -> bool:
    """Whether views lead from a shape back to it, channels aside, axes of size one not counted."""
    source, target = (list(evidence.size(n)) for n in (elements[0].source, elements[-1].target))
    if len(source) != len(target):
        return False
    order: list[int | None] | None = [a if n > 1 or a == axis else None for a, n in enumerate(source)]
    for element in elements:
        if is_passage(element) and order is not None:
            order = _through(evidence, element, order, axis)
    if order is None or axis not in order:
        return False
    target[order.index(axis)] = source[axis]
    return target == source and [a for a in order if a is not None] == sorted(
        a for a in order if a is not None
    )


def _through(
    evidence: Evidence, element: object, order: list[int | None], axis: int
) -> list[int | None] | None:
    """Which axis of the source each axis is after a view; None where more than the order of axes changes."""
    assert isinstance(element, Leaf)
    call = evidence.calls[element.node]
    shape = evidence.size(element.node)
    if call.op not in VIEWS or len(order) != len(evidence.size(element.source)):
        return None
    if drops_ones(call):
        return None
    if call.op in RESHAPES:
        before = [(a, n) for a, n in zip(order, evidence.size(element.source), strict=True) if a is not None]
        kept = iter(before)
        after: list[int | None] = []
        pending = next(kept, None)
        for n in shape:
            if pending is not None and n == pending[1]:
                after.append(pending[0])
                pending = next(kept, None)
            elif n == 1:
                after.append(None)
            else:
                return None
        return after if pending is None else None
    step = element.step
    moved: list[int | None] = [None] * len(shape)
    for a, at in getattr(step, "axis_map", {}).items():
        moved[at] = order[a]
    return moved
