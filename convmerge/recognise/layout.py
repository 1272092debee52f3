"""Operators that move or rename values: identities, and relayouts that keep the channels together."""

from __future__ import annotations

import math
from typing import Any

from torch.fx.node import Node

from convmerge.errors import Refusal
from convmerge.evidence.capture import Call, is_tensor
from convmerge.recognise.channels import data_of, drops_ones, moved_channels
from convmerge.recognise.filters import _padding
from convmerge.recognise.products import blockwise
from convmerge.recognise.stacked import flattened_stack
from convmerge.recognise.steps import Context, Passage, Same, Scalar, Step, recognises

LAST = 2**31


def _source(context: Context, call: Call) -> Node | None:
    source = next(iter(call.args.values()), None)
    return source if is_tensor(source) and not context.constant(source) else None


@recognises("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(context: Context, call: Call) -> Step | None:
    """Nothing at inference; F.dropout without ``training=self.training`` stays random."""
    source = _source(context, call)
    if source is None:
        return None
    if call.args["train"] and call.args["p"] != 0:
        raise Refusal("this dropout is active at inference too")
    return Same(source)


@recognises("contiguous", "detach", "alias", "clone", "lift_fresh_copy", "detach_copy")
def identity(context: Context, call: Call) -> Step | None:
    """The same values."""
    source = _source(context, call)
    return None if source is None else Same(source)


@recognises("to", "_to_copy", "type_as")
def cast(context: Context, call: Call) -> Step | None:
    """A cast to the dtype that the value has already, or between floating-point dtypes.

    Whether the latter rounds depends on what stands around it: see :mod:`convmerge.plan.dtypes`.
    """
    source = _source(context, call)
    if source is None or not is_tensor(call.node):
        return None
    before, after = context.evidence.dtype(source), context.evidence.dtype(call.node)
    if before == after:
        return Same(source)
    if not (before.is_floating_point and after.is_floating_point) or data_of(context, call.node) is None:
        raise Refusal("casts to another dtype, which rounds")
    return Scalar(source, 1.0, 0.0, "cast")


@recognises(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "expand",
    "view_as",
    "reshape_as",
)
def reshape(context: Context, call: Call) -> Step | None:
    """A reshape keeps a channel axis if the sizes before it, at it and after it are unchanged."""
    source = _source(context, call)
    if source is None:
        return None
    before, after = context.shape(source), context.shape(call.node)
    if before == after:
        kept = {axis: axis for axis in range(len(before))}  # where one of them has size one, it may go
        return Passage(source, kept, call.op) if call.op == "squeeze" else Same(source)
    if not drops_ones(call):
        if (joined := flattened_stack(context, call)) is not None:
            return joined
        if (form := blockwise(context, call) or moved_channels(context, call)) is not None:
            return form
    if math.prod(before) != math.prod(after):
        return None
    kept = {}
    for i, size in enumerate(before):
        for j, other in enumerate(after):
            if size == other != 1 and math.prod(before[:i]) == math.prod(after[:j]):
                kept[i] = j
    return Passage(source, kept, call.op) if kept else None


@recognises("permute", "transpose", "movedim", "swapaxes", "t")
def permute(context: Context, call: Call) -> Step | None:
    """Axes in another order."""
    source = _source(context, call)
    if source is None:
        return None
    rank = len(context.shape(source))
    order = list(range(rank))
    if call.op == "permute":
        order = [int(d) % rank for d in call.args["dims"]]
    elif call.op == "t" and rank == 2:
        order = [1, 0]
    elif "dim0" in call.args:
        i, j = int(call.args["dim0"]) % rank, int(call.args["dim1"]) % rank
        order[i], order[j] = j, i
    elif call.op == "movedim":
        moves = zip(_listed(call.args["destination"]), _listed(call.args["source"]), strict=True)
        placed = {to % rank: at % rank for to, at in moves}
        rest = iter(axis for axis in order if axis not in placed.values())
        order = [placed[axis] if axis in placed else next(rest) for axis in range(rank)]
    else:
        return None
    if order == list(range(rank)):
        return Same(source)
    return Passage(source, {axis: at for at, axis in enumerate(order)}, call.op)


def _listed(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


@recognises("slice")
def crop(context: Context, call: Call) -> Step | None:
    """x[..., a:] and x[..., a:-b] along a spatial dimension are negative padding."""
    source = _source(context, call)
    if source is None:
        return None
    shape = context.shape(source)
    if context.shape(call.node) == shape:
        return Same(source) if (call.args["end"] or LAST) >= LAST and not call.args["start"] else None
    if (picked := moved_channels(context, call)) is not None:
        return picked
    dim, start, end = call.args["dim"] % len(shape), call.args["start"] or 0, call.args["end"]
    end = LAST if end is None else end
    if dim < 2 or len(shape) > 5 or call.args["step"] != 1:
        return None
    if start < 0 or 0 <= end < LAST:
        raise Refusal("a slice whose ends follow from the input's size is a filter at that size only")
    lo, hi = [0] * (len(shape) - 2), [0] * (len(shape) - 2)
    lo[dim - 2], hi[dim - 2] = -start, (end if end < 0 else 0)
    return _padding(source, shape, tuple(lo), tuple(hi), "crop")
