"""Removed channels, and silenced ones that stay, in the terms of the report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.fx.node import Node

from convmerge.affine import Geometry
from convmerge.cost.model import layer_cost
from convmerge.emit.layer import Kind, Layer
from convmerge.passes.channels.alignment import Alignment, Lanes, Mix, Wall
from convmerge.passes.channels.liveness import Liveness, weight_of
from convmerge.recognise import RECOGNISERS, Context, Filter
from convmerge.report import SiteReport
from convmerge.sites import describe_geometry

SCATTERED = "its mask becomes part of the weight; the zeros are scattered, so no channel can go"
FIGURES = ("macs", "weights", "latency")
LAYERS = frozenset({"linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))})
SILENCED = "that were silenced"
FOLDED = "its mask becomes part of the weight"
TOO_FEW = "too few channels for the model to be faster"


def rows(
    live: Liveness, folded: set[str], *, static: bool, why: str = SILENCED, stay: bool = False
) -> tuple[SiteReport, ...]:
    """A row for every layer that changes, and for every reason why silenced channels of a layer stay.

    Args:
        folded: paths of the layers whose masks become part of their weights.
        static: whether the calls of the model are the same on all inputs.
        why: what the channels that go were.
        stay: the channels that could go stay all the same.
    """
    kind = "static" if static else "observed"
    found: list[SiteReport] = []
    for step in live.alignment.steps.values():
        if isinstance(step, Wall):
            found += _walled(live.alignment, step)
        if isinstance(step, Mix) or (isinstance(step, Lanes) and step.call.op.startswith("conv")):
            made = _rows_of(live, step, step.call.path in folded, kind, why)
            found += _staying(made, step.call.path in folded) if stay else made
    return tuple(found)


def _staying(made: Iterator[SiteReport], masked: bool) -> Iterator[SiteReport]:
    """The rows of a layer that keeps its channels."""
    for site in made:
        if site.action != "merge" or site.reason in (FOLDED, SCATTERED):
            yield site
            continue
        if masked:
            unchanged = {f"{name}_after": getattr(site, f"{name}_before") for name in FIGURES}
            yield replace(site, reason=FOLDED, **unchanged)
        yield replace(site, action="keep", reason=f"{TOO_FEW}: {site.reason}")


def _rows_of(
    live: Liveness, step: Mix | Lanes, masked: bool, evidence: Any, why: str
) -> Iterator[SiteReport]:
    alignment, call = live.alignment, step.call
    outputs = alignment.channels[call.node].ids
    inputs = step.inputs.ids if isinstance(step, Mix) else outputs
    before = geometry_of(alignment, step)
    gone_in, gone_out = (int((~live.kept(ids)).sum()) for ids in (inputs, outputs))
    after = _smaller(live, step, before, gone_in, gone_out)
    operator = f"{call.op.rstrip('123d')} {'×'.join(map(str, before.kernel))}".strip()
    silent = ~live.active[call.node] & live.kept(outputs)
    if gone_in or gone_out or masked:
        layer = Layer(_kind(call.op), after)
        what = f"{layer}, {_removed(gone_in, gone_out)} {why}"
        if not gone_in and not gone_out:
            what = FOLDED if silent.any() else SCATTERED
        yield SiteReport(
            call.leaf,
            (operator,),
            describe_geometry(before),
            "merge",
            what,
            evidence=evidence,
            modules=(call.path,),
            **_figures(alignment, step, before, after),
        )
    for reason, count in live.reasons(outputs[silent]).items():
        words = f"{count} of {len(outputs)} output channels silenced"
        yield SiteReport(call.leaf, (operator,), words, "refuse", f"silenced channels stay: {reason}")


def _walled(alignment: Alignment, wall: Wall) -> Iterator[SiteReport]:
    """A layer with silenced channels that is not followed."""
    call, weight = wall.call, wall.call.args.get("weight")
    if call.op not in LAYERS or not isinstance(weight, Node) or weight not in alignment.constants:
        return
    outputs = 1 if "transpose" in call.op else 0
    used = weight_of(alignment, weight).transpose(0, outputs).flatten(1).ne(0).any(1)
    alignment.constants.release()
    if not used.all():
        words = f"{int((~used).sum())} of {len(used)} output channels silenced"
        yield SiteReport(call.leaf, (call.op,), words, "refuse", f"silenced channels stay: {wall.reason}")


def _removed(inputs: int, outputs: int) -> str:
    parts = [f"{n} {name}" for n, name in ((outputs, "output"), (inputs, "input")) if n]
    return f"without {' and '.join(parts)} channels"


def _kind(op: str) -> Kind:
    return "linear" if op == "linear" else "conv_transpose" if "transpose" in op else "conv"


def geometry_of(alignment: Alignment, step: Mix | Lanes) -> Geometry:
    """The geometry of a convolution or linear layer."""
    call = step.call
    if call.op == "linear":
        outputs, inputs = alignment.size(call.args["weight"])
        return Geometry.channelwise(inputs, outputs, 1, 0, bias=call.args["bias"] is not None)
    found = RECOGNISERS[call.op](Context(alignment.evidence, alignment.constants), call)
    assert isinstance(found, Filter)
    return found.geometry


def _smaller(live: Liveness, step: Mix | Lanes, g: Geometry, gone_in: int, gone_out: int) -> Geometry:
    ids = live.alignment.channels[step.call.node].ids
    groups = int(live.kept(ids).reshape(g.groups, -1).any(1).sum())
    inputs, outputs = g.in_channels - gone_in, g.out_channels - gone_out
    return replace(g, in_channels=inputs, out_channels=outputs, groups=groups)


def _figures(alignment: Alignment, step: Mix | Lanes, before: Geometry, after: Geometry) -> dict[str, Any]:
    """Costs for one sample at the example inputs' size."""
    shape = alignment.size(step.call.args["input"])
    spatial, kind = before.spatial, _kind(step.call.op)
    batch = 1 if spatial else math.prod(shape[1:-1])
    size = shape[len(shape) - spatial :] if spatial else ()
    old, new = (layer_cost(Layer(kind, g), size, batch=batch) for g in (before, after))
    return {
        "macs_before": old.macs,
        "macs_after": new.macs,
        "weights_before": old.weights,
        "weights_after": new.weights,
        "latency_before": old.latency,
        "latency_after": new.latency,
    }
