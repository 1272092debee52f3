"""Channels picked out of a tensor or put in another order, however the code says it.

Slices, chunks, ``unbind`` and ``select`` of a view, ``index_select``, a shuffle by view and transpose: all of
them only move numbers, so running them on the numbers' own positions tells what they do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.affine import Affine, Geometry
from convmerge.algebra import selection
from convmerge.evidence.capture import Call, is_tensor
from convmerge.evidence.constants import run_call
from convmerge.recognise.steps import Context, Filter, Same, recognises

RESHAPES = frozenset(["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"])
VIEWS = RESHAPES | {
    *("transpose", "permute", "movedim", "swapaxes", "t", "contiguous", "clone", "alias", "detach")
}
PARTS = frozenset(["split", "split_with_sizes", "chunk", "tensor_split", "unbind", "getitem"])
PICKS = frozenset(["slice", "select", "narrow", "index_select", "flip", "roll"])
MOVES = VIEWS | PARTS | PICKS
LONGEST = 8  # calls from a tensor to its channels in another order


def drops_ones(call: Call) -> bool:
    """Whether a call drops all axes of size one, so that the axis of a batch of one goes as well."""
    return call.op == "squeeze" and "dim" not in call.args


@recognises("getitem", "select", "narrow", "index_select", "flip", "roll")
def moved_channels(context: Context, call: Call) -> Filter | Same | None:
    """The value as channels of a tensor that calls in a row lead back to; None where it is no such thing.

    What is read is that tensor's channels on axis 1, or those on the last axis, as they are used next.
    """
    way = [call.node]
    while len(way) <= LONGEST and (source := data_of(context, way[0])) is not None:
        for axis in _axes(context, source):
            if fits(context, call.node, source, axis) and _reads_channels(context, call.node, axis):
                found = _selected(context, source, way, axis)
                if found is not None:
                    return found
        made = context.evidence.calls.get(source)
        if made is None or made.op not in MOVES or drops_ones(made):
            break
        way.insert(0, source)
    return None


def data_of(context: Context, node: Node) -> Node | None:
    """The one tensor, or tuple of tensors, that a call moves."""
    data = [n for n in node.all_input_nodes if not context.constant(n)]
    return data[0] if len(data) == 1 else None


def _axes(context: Context, source: Node) -> tuple[int, ...]:
    """Where a tensor can have its channels; nowhere in a tuple of tensors."""
    if not is_tensor(source):
        return ()
    last = len(context.shape(source)) - 1
    return tuple(dict.fromkeys((1, last))) if last > 0 else ()


def fits(context: Context, node: Node, source: Node, axis: int) -> bool:
    """Whether two values are of one shape but for the channels on ``axis``."""
    if not is_tensor(source) or not is_tensor(node):
        return False
    before, after = context.shape(source), context.shape(node)
    alike = len(before) == len(after) and 1 <= axis < len(before)
    return alike and before[:axis] == after[:axis] and before[axis + 1 :] == after[axis + 1 :]


def positions(context: Context, source: Node, axis: int) -> Tensor:
    """int64, of the shape of ``source``: row * channels + channel, the channels being on ``axis``."""
    shape = context.shape(source)
    rest = [*shape[:axis], *shape[axis + 1 :], shape[axis]]
    return torch.arange(math.prod(shape)).reshape(rest).movedim(-1, axis)


def move(context: Context, way: Sequence[Node], source: Node, value: Tensor) -> Tensor:
    """Run calls that only move numbers on other numbers in the place of ``source``."""
    values: dict[Node, object] = {source: value}
    for node in way:
        values[node] = run_call(node, lambda n: values[n] if n in values else context.constants.value(n))
    moved = values[way[-1]] if way else value
    assert isinstance(moved, Tensor)
    return moved


def rows_of(table: Tensor, channels: int) -> tuple[Tensor, Tensor] | None:
    """Row of each row, and channel of each column, of a matrix of positions; None where these are mixed."""
    row, channel = table[:, 0] // channels, table[0] % channels
    return (row, channel) if torch.equal(table, row.unsqueeze(1) * channels + channel) else None


def _reads_channels(context: Context, node: Node, axis: int) -> bool:
    """Whether something that reads the value takes ``axis`` for the channels'."""
    last = len(context.shape(node)) - 1
    for user in node.users:
        call = context.evidence.calls.get(user)
        if call is None:
            continue
        if call.op in ("linear", "matmul", "mm", "addmm") and axis == last:
            return True
        if call.op in ("conv1d", "conv2d", "conv3d", "batch_norm") and axis == 1:
            return True
        if call.op in PARTS | {"cat", "concat", "concatenate"} and int(call.args["dim"]) % (last + 1) == axis:
            return True
    return False


def _selected(context: Context, source: Node, way: Sequence[Node], axis: int) -> Filter | Same | None:
    shape = context.shape(source)
    channels, spatial = shape[axis], len(shape) - axis - 1
    moved = move(context, way, source, positions(context, source, axis)).movedim(axis, -1)
    found = rows_of(moved.reshape(-1, moved.shape[-1]), channels)
    if found is None or not torch.equal(found[0], torch.arange(len(found[0]))):
        return None
    picked = found[1].tolist()
    if picked == list(range(channels)):
        return Same(source) if len(way) == 1 else None
    geometry = Geometry.channelwise(channels, len(picked), 1, spatial)

    def numbers() -> Affine:
        return selection(channels, picked, spatial)

    return Filter(source, axis, geometry, numbers, _words(picked), tuple(way[:-1]))


def _words(picked: Sequence[int]) -> str:
    start, stop = picked[0], picked[0] + len(picked)
    return f"channels {start}…{stop - 1}" if list(picked) == list(range(start, stop)) else "permuted channels"
