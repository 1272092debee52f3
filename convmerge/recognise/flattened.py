"""Linear layers on a flattened map, as filters whose kernel covers the map."""

from __future__ import annotations

import math
from dataclasses import replace

from torch.fx.node import Node

from convmerge.affine import Geometry
from convmerge.algebra import compose, unflatten, unflatten_geometry
from convmerge.errors import Refusal
from convmerge.recognise.steps import RECOGNISERS, Context, Filter


def after_flatten(context: Context, step: Filter) -> Filter:
    """A linear layer on a flattened map (N, C, *size) is a filter whose kernel covers the map.

    A batch norm of the flattened features in between belongs to it where the map comes from a filter too, and
    the whole is no more to compute than the two.
    """
    flat, between = step.source, None
    call = context.evidence.calls.get(flat)
    if call is not None and call.op == "batch_norm" and len(flat.users) == 1:
        between = _recognised(context, flat)
        flat = flat if between is None else between.source
        call = context.evidence.calls.get(flat)
    if call is None or call.op not in ("flatten", "view", "reshape") or len(flat.users) != 1:
        return step
    source = call.args["self"]
    batch, *rest = context.shape(source)
    flattened = (batch, math.prod(rest))
    if not 2 <= len(rest) <= 4 or context.shape(flat) != flattened or math.prod(rest[1:]) == 1:
        return step
    size = tuple(rest[1:])
    geometry = unflatten_geometry(step.geometry, size)
    kind = f"linear on {'×'.join(map(str, size))}"
    if between is None:
        return Filter(source, 1, geometry, lambda: unflatten(step.numbers(), size), kind, (flat,))
    norm = between
    if not _pays(context, source, step.geometry):
        return step
    return Filter(
        source,
        1,
        replace(geometry, bias=True),
        lambda: unflatten(compose(step.numbers(), norm.numbers()), size),
        f"batch_norm and {kind}",
        (flat, step.source),
    )


def _recognised(context: Context, node: Node) -> Filter | None:
    call = context.evidence.calls[node]
    try:
        found = RECOGNISERS[call.op](context, call) if call.op in RECOGNISERS else None
    except Refusal:
        return None
    return found if isinstance(found, Filter) else None


def _pays(context: Context, source: Node, linear: Geometry) -> bool:
    """Whether what makes the map and the linear layer have more MACs than one filter in their place."""
    maker = _recognised(context, source) if source in context.evidence.calls else None
    if maker is None or len(source.users) != 1 or maker.axis != 1:
        return False
    g, before, after = maker.geometry, context.shape(maker.source)[1:], context.shape(source)[1:]
    apart = math.prod(after) * (g.in_channels // g.groups * math.prod(g.kernel) + linear.out_channels)
    return math.prod(before) * linear.out_channels < apart
