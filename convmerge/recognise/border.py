"""Padding by bias: a border that holds what the operators before it would make of zeros.

Diverse branch blocks and edge-oriented blocks pad between a 1×1 conv and a k×k one with the value that the
first gives to zero input: a zero pad whose border strips are then overwritten, or strips of that value
concatenated around the map. With the value v that is y = pad(x) + v (1 - pad(1)), and where v is what the
operators before it give to zeros, it is the same as padding their input with zeros.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.affine import Affine, Dims, Geometry
from convmerge.evidence.capture import Call
from convmerge.evidence.constants import run_call
from convmerge.recognise.stacked import concatenation
from convmerge.recognise.steps import BorderFill, Context, Filter, Same, Scalar, Step, recognises

END = 2**31  # slices to the end have an end at least as large
ROUNDING = 16 * 2.0**-53


def overwritten_pads(context: Context) -> dict[Node, BorderFill]:
    """Zero pads whose whole border, and nothing else, is overwritten with one constant per channel."""
    found = {}
    for node, call in context.evidence.calls.items():
        if call.op in ("pad", "constant_pad_nd") and (fill := _overwritten(context, call)) is not None:
            found[node] = fill
    return found


def _overwritten(context: Context, call: Call) -> BorderFill | None:
    source, pads = call.args["self"], [int(p) for p in call.args["pad"]]
    shape, calls = context.shape(call.node), context.evidence.calls
    n, spatial = len(pads) // 2, len(shape) - 2
    zeros = call.args.get("mode", "constant") == "constant" and not call.args.get("value")
    if context.constant(source) or not zeros or min(pads) < 0 or not 1 <= n <= spatial <= 3:
        return None
    lo = (0,) * (spatial - n) + tuple(pads[2 * i] for i in reversed(range(n)))
    hi = (0,) * (spatial - n) + tuple(pads[2 * i + 1] for i in reversed(range(n)))
    writes = [w for user in call.node.users for w in _writes(context, user, (0, 0, *lo), (0, 0, *hi))]
    if not writes:
        return None
    writes.sort(key=lambda node: calls[node].index)
    readers = [user for user in call.node.users if user not in writes and user in calls]
    if any(calls[reader].index < calls[writes[-1]].index for reader in readers):
        return None
    value = _value(context, call.node, writes, lo, hi)
    return None if value is None else border_fill(source, lo, hi, value, tuple(writes))


def _writes(context: Context, view: Node, lo: Dims, hi: Dims) -> list[Node]:
    """``view`` and the calls that write constants into it, or nothing where it is anything but written to.

    Only views that are the same strip at every size count: counted from the first position within ``lo``, or
    from the last within ``hi``.
    """
    call = context.evidence.calls.get(view)
    if call is None or call.op not in ("slice", "select") or not view.users:
        return []
    dim = int(call.args["dim"]) % len(lo)
    if call.op == "select":
        at = int(call.args["index"])
        lo, hi, fits = (*lo[:dim], *lo[dim + 1 :]), (*hi[:dim], *hi[dim + 1 :]), -hi[dim] <= at < lo[dim]
    else:
        start, end = call.args["start"] or 0, call.args["end"]
        end = END if end is None else end
        fits = -hi[dim] <= start <= lo[dim] and (end >= END or -hi[dim] <= end <= lo[dim])
        fits = fits and call.args["step"] == 1
    found = [view]
    for user in view.users:
        other = context.evidence.calls.get(user)
        if other is not None and other.mutates and other.op in ("copy", "fill") and not user.users:
            written = user.args[1]
            fits = fits and user.args[0] is view and context.constant(written)
            found.append(user)
        else:
            deeper = _writes(context, user, lo, hi)
            fits = fits and bool(deeper)
            found += deeper
    return found if fits else []


def _value(context: Context, pad: Node, writes: Sequence[Node], lo: Dims, hi: Dims) -> Tensor | None:
    """What the writes leave in the border, shape (channels,); None if they leave anything else."""
    shape = context.shape(pad)
    values: dict[Node, object] = {pad: torch.full(shape, math.nan, dtype=torch.float64)}

    def look_up(node: Node) -> object:
        return values[node] if node in values else context.constants.value(node)

    for node in writes:
        values[node] = run_call(node, look_up)
    filled = values[pad]
    assert isinstance(filled, Tensor)
    inside = [slice(a, size - b) for a, b, size in zip(lo, hi, shape[2:], strict=True)]
    border = torch.ones(shape[2:], dtype=torch.bool)
    border[tuple(inside)] = False
    strips = filled[:, :, border]
    uniform = bool((strips == strips[:1, :, :1]).all()) and bool(filled[:, :, ~border].isnan().all())
    return strips[0, :, 0].clone() if uniform and strips.numel() else None


@recognises("cat", "concat", "concatenate")
def cat(context: Context, call: Call) -> Step | None:
    """A concatenation of data; or data between strips of constants."""
    return concatenation(context, call) or _surrounded(context, call)


def _surrounded(context: Context, call: Call) -> BorderFill | None:
    """Data between strips of one constant per channel, along a spatial dimension."""
    tensors = call.args["tensors"]
    data = [index for index, value in enumerate(tensors) if not context.constant(value)]
    if len(data) != 1 or len(tensors) < 2:
        return None
    source, shape = tensors[data[0]], context.shape(call.node)
    dim, spatial = int(call.args["dim"]) % len(shape), len(shape) - 2
    if dim < 2 or spatial > 3:
        return None
    strips = torch.cat([context.tensor(v) for i, v in enumerate(tensors) if i != data[0]], dim)
    value = strips.movedim(1, 0).flatten(1)
    if not bool((value == value[:, :1]).all()):
        return None
    before = sum(context.shape(v)[dim] for v in tensors[: data[0]])
    lo, hi = [0] * spatial, [0] * spatial
    lo[dim - 2], hi[dim - 2] = before, strips.shape[dim] - before
    return border_fill(source, tuple(lo), tuple(hi), value[:, 0].clone())


def border_fill(
    source: Node, lo: Dims, hi: Dims, value: Tensor, writes: tuple[Node, ...] = (), *, any_size: bool = False
) -> BorderFill:
    """Padding of every dimension after axis 1 with ``value``, one number per channel."""
    kind = "pad" if any_size else "pad by bias"
    channels, one = len(value), (1,) * len(lo)
    geometry = Geometry(channels, channels, channels, one, one, one, one, lo, hi, bias=True, ones=True)

    def numbers() -> Affine:
        weight = torch.ones(channels, 1, *one, dtype=torch.float64)
        return Affine(geometry, weight, value, -value.reshape(channels, *one))

    return BorderFill(source, 1, geometry, numbers, kind, value=value, writes=writes, any_size=any_size)


def with_beginnings(fill: BorderFill, steps: Mapping[Node, Step]) -> BorderFill:
    """The fill with the values from which the operators up to it turn zeros into its value.

    ``steps`` are those that are known so far: value → the step that makes it.
    """
    passed: list[Affine | Scalar] = []
    beginnings: set[Node] = set()
    at = fill.source
    while (step := steps.get(at)) is not None and isinstance(step, Filter | Scalar | Same):
        if isinstance(step, BorderFill):
            if _agree(step.value, fill.value, fill.value.abs()):
                beginnings |= step.beginnings if not passed else set()
            break
        if not isinstance(step, Same):
            if isinstance(step, Filter) and step.axis != fill.axis:
                break
            passed.insert(0, step if isinstance(step, Scalar) else step.numbers())
            if _gives(passed, fill.value):
                beginnings.add(step.source)
            if isinstance(step, Filter) and not step.geometry.pointwise:
                break
        at = step.source
    return dataclasses.replace(fill, beginnings=frozenset(beginnings))


def _gives(forms: Sequence[Affine | Scalar], value: Tensor) -> bool:
    """Whether the forms in a row, all but the first one pointwise, turn zeros into ``value`` everywhere."""
    made = size = torch.zeros(1, dtype=torch.float64)
    for index, form in enumerate(forms):
        if isinstance(form, Scalar):
            made, size = made * form.factor + form.offset, size * abs(form.factor) + abs(form.offset)
            continue
        shift = made.new_zeros(1) if form.bias is None else form.bias
        if form.ones is not None or shift.dim() > 1:
            return False
        if index == 0:
            made, size = shift, shift.abs()
            continue
        taps = form.weight.flatten(1)
        made, size = (_mixed(taps, form, made) + shift, _mixed(taps.abs(), form, size) + shift.abs())
    return _agree(made.expand_as(value), value, size.expand_as(value))


def _mixed(taps: Tensor, form: Affine, x: Tensor) -> Tensor:
    """Pointwise taps of shape (out, in / groups) on one number per channel (or one for all)."""
    g = form.geometry
    blocks = x.expand(g.in_channels).reshape(g.groups, 1, -1)
    return (taps.reshape(g.groups, -1, taps.shape[1]) * blocks).sum(2).flatten()


def _agree(a: Tensor, b: Tensor, size: Tensor) -> bool:
    """Equal up to rounding, relative to the largest channel: terms that cancel in one are lost by now."""
    return bool(((a - b).abs() <= ROUNDING * (size.max() + b.abs().max())).all())
