"""Operators that put channels elsewhere: other axes, concatenation, slices, shuffles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch.fx.node import Node

from convmerge.errors import Refusal
from convmerge.evidence.capture import Call
from convmerge.evidence.constants import run_call
from convmerge.passes.channels.alignment import (
    Alignment,
    Channels,
    EqualParts,
    Facts,
    Source,
    Step,
    followed,
    follows,
    unknown,
)

PERMUTATIONS = ("permute", "transpose", "swapaxes", "movedim", "t")
RESHAPES = ("flatten", "squeeze", "unsqueeze", "unflatten", "view", "reshape", "_unsafe_view", "view_as")
TWO_AXES = frozenset({*PERMUTATIONS, *RESHAPES, "contiguous", "clone"})  # follow channels on two axes


@follows(*PERMUTATIONS)
def permuted(alignment: Alignment, call: Call) -> Step | None:
    """Axes in another order."""
    node, channels = followed(alignment, call.args["self"])
    sizes = {channels.axis: 2, channels.inner: 3}
    marked = torch.empty([sizes.get(axis, 1) for axis in range(len(alignment.size(node)))])
    shape = list(run_call(call.node, lambda _: marked).shape)
    inner = None if channels.inner is None else shape.index(3)
    return alignment.lanes(call, [Source(node)], Channels(shape.index(2), channels.ids, inner))


@follows(*RESHAPES)
def reshaped(alignment: Alignment, call: Call) -> Step | None:
    """Channels stay whole, or each becomes as many as it has positions; or groups of them get an axis."""
    node, channels = followed(alignment, call.args["self"])
    before, after = alignment.size(node), alignment.size(call.node)
    if channels.inner is not None:
        return _joined(alignment, call, node, channels)
    if (place := _groups_at(before, after, channels.axis)) is not None:
        return _grouped(alignment, call, node, place)
    axis, count = channels.axis, before[channels.axis]
    outer, inner = math.prod(before[:axis]), math.prod(before[axis + 1 :])
    for place, size in enumerate(after):
        rest = math.prod(after[place + 1 :])
        if math.prod(after[:place]) == outer and size % count == 0 and size // count * rest == inner:
            break
    else:
        raise Refusal("it takes channels apart, or joins them with another axis")
    asked = _asked(call)
    if len(asked) == len(after) and asked[place] != -1:
        alignment.assume(call, channels.ids, f"asks for a size of {size}")
    if size == count:
        return alignment.same(call, node, place)
    index = torch.arange(count).repeat_interleave(size // count)
    return alignment.lanes(call, [Source(node, index)], Channels(place, channels.ids[index]), None)


def _asked(call: Call) -> Sequence[int]:
    """The shape that a call names, with -1 where it names none; empty where it names no shape."""
    asked = call.args.get("size", call.args.get("shape", call.args.get("sizes")))
    return asked if isinstance(asked, Sequence) else ()


def _groups_at(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """The first of the two axes that take the place of ``axis``; None where something else happens."""
    parts, rest = after[axis : axis + 2], math.prod(before[axis + 1 :])
    kept = tuple(after[:axis]) == tuple(before[:axis]) and math.prod(after[axis + 2 :]) == rest
    apart = len(parts) == 2 and min(parts) > 1 and math.prod(parts) == before[axis]
    return axis if kept and apart else None


def _grouped(alignment: Alignment, call: Call, node: Node, place: int) -> Step:
    """Channels at equal places of all groups go together: there are as many groups as before.

    The groups are the smaller axis, unless the call asks for a fixed size of the larger one alone.
    """
    ids, shape = alignment.channels[node].ids, alignment.size(call.node)[place : place + 2]
    asked = call.args.get("sizes") or _asked(call)[place : place + 2]
    first = shape[0] <= shape[1] if -1 not in asked else asked[1] == -1
    grid = ids.reshape(shape) if first else ids.reshape(shape).t()
    for group in grid[1:]:
        alignment.tie(grid[0], group)
    if -1 not in asked:
        alignment.assume(call, ids, f"asks for a size of {max(shape)}")
    return alignment.lanes(call, [Source(node)], Channels(place, ids, place + 1))


def _joined(alignment: Alignment, call: Call, node: Node, channels: Channels) -> Step:
    """Channels on two axes, as one again."""
    before, after = alignment.size(node), alignment.size(call.node)
    assert channels.inner is not None
    place, last = sorted((channels.axis, channels.inner))
    count = before[place] * before[last]
    whole = tuple(after[: place + 1]) == (*before[:place], count)
    if last != place + 1 or not whole:
        raise Refusal("it takes channels apart, or joins them with another axis")
    asked = _asked(call)
    if asked and asked[place] != -1:
        alignment.assume(call, channels.ids, f"asks for a size of {count}")
    index = torch.arange(count).reshape(before[channels.axis], before[channels.inner])
    index = (index if place == channels.axis else index.t()).flatten()
    return alignment.lanes(call, [Source(node, index)], Channels(place, channels.ids[index]))


@follows("expand", "expand_as", "broadcast_to")
def expanded(alignment: Alignment, call: Call) -> Step | None:
    """Copies along axes of size one; a single channel may become many."""
    node, channels = followed(alignment, call.args["self"])
    before, after = alignment.size(node), alignment.size(call.node)
    axis = channels.axis + len(after) - len(before)
    asked = call.args.get("size")
    literal = isinstance(asked, Sequence) and asked[axis] != -1
    if len(channels.ids) == after[axis]:
        if literal:
            alignment.assume(call, channels.ids, f"asks for a size of {after[axis]}")
        return alignment.same(call, node, axis)
    ids = alignment.fresh(after[axis])
    if literal:
        alignment.assume(call, ids, f"asks for a size of {after[axis]}")
    index = torch.zeros(after[axis], dtype=torch.int64)
    return alignment.lanes(call, [Source(node, index)], Channels(axis, ids))


@follows("cat", "concat", "concatenate")
def cat(alignment: Alignment, call: Call) -> Step | None:
    """One after the other along the channels, or along another axis with equal channels."""
    tensors, rank = call.args["tensors"], len(alignment.size(call.node))
    dim = int(call.args["dim"]) % rank
    if any(not alignment.is_data(t) for t in tensors):
        raise Refusal("it concatenates a constant")
    axes = {alignment.channels[t].axis for t in tensors if t in alignment.channels}
    if len(axes) != 1:
        raise Refusal("it combines values whose channels lie on different axes, or are not followed")
    found = [alignment.on(t, axis) for axis in axes for t in tensors]
    if axes != {dim}:
        for channels in found[1:]:
            alignment.tie(found[0].ids, channels.ids)
        return alignment.lanes(call, [Source(t) for t in tensors], found[0], _agreed)
    sizes = [len(channels.ids) for channels in found]
    sources = []
    for tensor, size, end in zip(tensors, sizes, itertools.accumulate(sizes), strict=True):
        index = torch.full((sum(sizes),), -1)
        index[end - size : end] = torch.arange(size)
        sources.append(Source(tensor, index))
    ids = torch.cat([channels.ids for channels in found])
    return alignment.lanes(call, sources, Channels(dim, ids), _either)


def _agreed(found: Sequence[Facts]) -> Facts:
    known = found[0].known
    for other in found[1:]:
        known = known & other.known & (other.value == found[0].value)
    return Facts.of(known, found[0].value)


def _either(found: Sequence[Facts]) -> Facts:
    known, value = found[0].known, found[0].value
    for other in found[1:]:
        known, value = known | other.known, value + other.value
    return Facts(known, value)


@follows("chunk", "split", "split_with_sizes", "tensor_split")
def taken_apart(alignment: Alignment, call: Call) -> Step | None:
    """A list of slices; :func:`picked` gives its items."""
    node, channels = followed(alignment, call.args.get("self", call.args.get("input")))
    axis = int(call.args["dim"]) % len(alignment.size(node))
    if axis == channels.axis:
        sizes = {int(part.shape[axis]) for part in call.node.meta["val"]}
        if call.op == "chunk" and len(sizes) == 1:
            parts = channels.ids.reshape(-1, sizes.pop())
            alignment.parts.append(EqualParts(parts, f"{call.leaf} takes equal parts"))
        else:
            alignment.fix(channels.ids, f"{call.leaf} splits at fixed places")
    return alignment.same(call, node)


@follows("getitem")
def picked(alignment: Alignment, call: Call) -> Step | None:
    """One of several results."""
    source, item = call.node.args
    parent = alignment.evidence.calls.get(source) if isinstance(source, Node) else None
    if parent is None or source not in alignment.channels or not isinstance(item, int):
        return None
    assert isinstance(source, Node)
    channels = alignment.channels[source]
    if parent.op not in ("chunk", "split", "split_with_sizes", "tensor_split"):
        return alignment.same(call, source, None, None if item == 0 else unknown)
    if int(parent.args["dim"]) % len(alignment.size(call.node)) != channels.axis:
        return alignment.same(call, source)
    sizes = [int(part.shape[channels.axis]) for part in source.meta["val"]]
    item %= len(sizes)
    return _sliced(alignment, call, source, sum(sizes[:item]), sizes[item])


def _sliced(alignment: Alignment, call: Call, source: Node, start: int, count: int) -> Step:
    channels, index = alignment.channels[source], torch.arange(start, start + count)
    return alignment.lanes(call, [Source(source, index)], Channels(channels.axis, channels.ids[index]))


@follows("slice", "narrow")
def sliced(alignment: Alignment, call: Call) -> Step | None:
    """Part of an axis; of the channels at fixed places only."""
    node, channels = followed(alignment, call.args["self"])
    dim = int(call.args["dim"]) % len(alignment.size(node))
    count = alignment.size(call.node)[dim]
    if dim != channels.axis or count == alignment.size(node)[dim]:
        return alignment.same(call, node)
    if call.args.get("step", 1) != 1:
        raise Refusal("it takes channels in steps")
    start = int(call.args["start"] or 0)
    alignment.fix(channels.ids, f"{call.leaf} slices channels at fixed places")
    return _sliced(alignment, call, node, start % len(channels.ids), count)


@follows("select")
def selected(alignment: Alignment, call: Call) -> Step | None:
    """One place of another axis."""
    node, channels = followed(alignment, call.args["self"])
    dim = int(call.args["dim"]) % len(alignment.size(node))
    if dim == channels.axis:
        raise Refusal("it picks one channel")
    return alignment.same(call, node, channels.axis - (dim < channels.axis))


@follows("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(alignment: Alignment, call: Call) -> Step | None:
    """y[i * groups + g] = x[g * (C / groups) + i]: the same i goes in every group."""
    source, groups = call.args["self"], int(call.args["groups"])
    ids = alignment.on(source, 1).ids
    apart = torch.arange(len(ids)).reshape(groups, -1)
    for group in apart[1:]:
        alignment.tie(ids[apart[0]], ids[group])
    index = apart.t().reshape(-1)
    return alignment.lanes(call, [Source(source, index)], Channels(1, ids[index]))


@follows("pixel_shuffle")
def pixel_shuffle(alignment: Alignment, call: Call) -> Step | None:
    """r² channels become one; they go together."""
    source, square = call.args["self"], int(call.args["upscale_factor"]) ** 2
    ids = alignment.on(source, len(alignment.size(source)) - 3).ids.reshape(-1, square)
    for column in ids.t()[1:]:
        alignment.tie(ids[:, 0], column)
    places = torch.arange(ids.numel()).reshape(-1, square).t()
    sources = [Source(source, index) for index in places]
    axis = len(alignment.size(source)) - 3
    return alignment.lanes(call, sources, Channels(axis, ids[:, 0]), _agreed)


@follows("pixel_unshuffle")
def pixel_unshuffle(alignment: Alignment, call: Call) -> Step | None:
    """One channel becomes r², which go together."""
    source, square = call.args["self"], int(call.args["downscale_factor"]) ** 2
    axis = len(alignment.size(source)) - 3
    ids = alignment.on(source, axis).ids
    index = torch.arange(len(ids)).repeat_interleave(square)
    return alignment.lanes(call, [Source(source, index)], Channels(axis, ids[index]))
