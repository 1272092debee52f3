"""Convolutions and linear layers: where channels begin, and what reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.errors import Refusal
from convmerge.evidence.capture import Call
from convmerge.passes.channels.alignment import (
    Alignment,
    Channels,
    EqualParts,
    Facts,
    Mix,
    Slot,
    Source,
    Step,
    follows,
)


def _dims(value: object, n: int) -> tuple[int, ...]:
    values: list[Any] = list(value) if isinstance(value, Sequence) else [value]
    return tuple(int(v) for v in (values * n if len(values) == 1 else values))


def _interior(kernel: Sequence[int], dilation: Sequence[int], padding: object) -> Tensor:
    """Which taps never read padding: d t >= lo and d (k - 1 - t) >= hi, at every stride and size."""
    inside = torch.ones(1, dtype=torch.bool)
    for dim, (k, d) in enumerate(zip(kernel, dilation, strict=True)):
        reach = d * (k - 1)
        if padding == "same":
            lo, hi = reach // 2, reach - reach // 2
        else:
            lo = hi = 0 if padding == "valid" else _dims(padding, len(kernel))[dim]
        taps = torch.arange(k) * d
        axis = (taps >= lo) & (reach - taps >= hi)
        inside = (inside.unsqueeze(1) & axis).reshape(-1)
    return inside


@follows("conv1d", "conv2d", "conv3d")
def conv(alignment: Alignment, call: Call) -> Step | None:
    """A convolution: depthwise ones work on channels one by one."""
    n, a = int(call.op[4]), call.args
    kernel = _constant_size(alignment, a["weight"], a["bias"])[2:]
    interior = _interior(kernel, _dims(a["dilation"], n), a["padding"])
    return _filter(alignment, call, n, interior, transposed=False)


@follows("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(alignment: Alignment, call: Call) -> Step | None:
    """A transposed convolution: some of its outputs see fewer taps than others."""
    kernel = _constant_size(alignment, call.args["weight"], call.args["bias"])[2:]
    interior = torch.zeros(math.prod(kernel), dtype=torch.bool)
    return _filter(alignment, call, int(call.op[-2]), interior, transposed=True)


def _constant_size(alignment: Alignment, weight: object, bias: object) -> tuple[int, ...]:
    if alignment.is_data(weight) or alignment.is_data(bias):
        raise Refusal("its weight depends on an input")
    assert isinstance(weight, Node)
    return alignment.size(weight)


def _filter(alignment: Alignment, call: Call, n: int, interior: Tensor, *, transposed: bool) -> Step:
    a = call.args
    source = a["input"]
    inputs = alignment.on(source, -n - 1)
    outputs = alignment.size(call.node)[inputs.axis]
    bias = a["bias"] if isinstance(a["bias"], Node) else None
    if int(a["groups"]) == len(inputs.ids) == outputs > 1:
        return _depthwise(alignment, call, inputs, bias, interior)
    return _mix(alignment, call, inputs, outputs, bias, interior, transposed=transposed)


def _mix(
    alignment: Alignment,
    call: Call,
    inputs: Channels,
    outputs: int,
    bias: Node | None,
    interior: Tensor,
    *,
    transposed: bool = False,
) -> Mix:
    out = Channels(inputs.axis, alignment.fresh(outputs))
    groups = int(call.args.get("groups", 1))
    alignment.channels[call.node] = out
    if groups > 1:
        parts = out.ids.reshape(groups, -1), inputs.ids.reshape(groups, -1)
        reason = f"the groups of {call.leaf} keep equal sizes"
        alignment.parts.append(EqualParts(parts[0], reason, parts[1]))
    source, weight = call.args["input"], call.args["weight"]
    return Mix(call, source, inputs, out, weight, bias, groups, transposed, interior)


def _depthwise(
    alignment: Alignment, call: Call, channels: Channels, bias: Node | None, interior: Tensor
) -> Step:
    weight = call.args["weight"]

    def evaluate(found: Sequence[Facts]) -> Facts:
        taps = alignment.constants.tensor(weight)
        shift = None if bias is None else alignment.constants.tensor(bias)
        assert taps is not None
        taps = taps.reshape(len(channels.ids), -1)
        border = taps[:, ~interior].ne(0).any(1)
        value = taps.sum(1) * found[0].value
        known = taps.eq(0).all(1) | (found[0].known & ((found[0].value == 0) | ~border))
        return Facts.of(known, value if shift is None else value + shift)

    slots = [Slot(weight, 0, channels.ids), *([Slot(bias, 0, channels.ids)] if bias is not None else [])]
    loses = f"{call.leaf} pads with zeros where it is a constant"
    return alignment.lanes(call, [Source(call.args["input"])], channels, evaluate, slots, loses)


@follows("linear")
def linear(alignment: Alignment, call: Call) -> Step | None:
    """A linear layer on the last axis."""
    a = call.args
    if len(_constant_size(alignment, a["weight"], a["bias"])) != 2:
        raise Refusal("its weight is no matrix")
    inputs = alignment.on(a["input"], -1)
    bias = a["bias"] if isinstance(a["bias"], Node) else None
    outputs = alignment.size(call.node)[-1]
    return _mix(alignment, call, inputs, outputs, bias, torch.ones(1, dtype=torch.bool))
