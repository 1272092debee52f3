"""What ATen operators do along channels: functions of numbers, normalisation, pooling, padding.

Relayouts are in :mod:`.relayouts`, convolutions and linear layers in :mod:`.filters`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.errors import Refusal
from convmerge.evidence.capture import Call, is_tensor
from convmerge.evidence.constants import run_call
from convmerge.passes.channels import filters, relayouts
from convmerge.passes.channels.alignment import (
    RULES,
    Alignment,
    Channels,
    Facts,
    Slot,
    Source,
    Step,
    followed,
    follows,
    on_one_axis,
    unknown,
)

__all__ = ["along", "filters", "relayouts"]

# Applied to each number by itself, though the operator's tags do not say so.
ELEMENTWISE = frozenset({"hardswish", "relu6", "log_sigmoid", "rsub", "square", "leaky_relu", "celu", "selu"})
# Not continuous: the model's rounding may fall on the other side of a step.
JUMPS = frozenset(
    {"round", "floor", "ceil", "trunc", "frac", "sign", "sgn", "heaviside", "fmod", "remainder"}
    | {"floor_divide", "hardshrink", "threshold"}
)


def along(alignment: Alignment, call: Call) -> Step | None:
    """What a call on data does along channels; None where there is no rule. Raises Refusal."""
    if any(0 in alignment.size(n) for n in (*alignment.data(call), call.node) if is_tensor(n)):
        raise Refusal("a value without elements")
    if call.op not in relayouts.TWO_AXES and not on_one_axis(alignment, call):
        raise Refusal(f"{call.op} reads groups of channels on an axis of their own")
    rule = RULES.get(call.op)
    if rule is not None:
        return rule(alignment, call)
    if not any(node in alignment.channels for node in alignment.data(call)):
        return None
    if call.op in ELEMENTWISE or torch.Tag.pointwise in getattr(call.node.target, "tags", ()):
        return elementwise(alignment, call)
    return None


def elementwise(alignment: Alignment, call: Call) -> Step | None:
    """Any function of numbers at equal places, with broadcasting."""
    if torch.Tag.nondeterministic_seeded in call.node.target.tags:  # type: ignore[union-attr]
        raise Refusal("it is random")
    shape, data = alignment.size(call.node), alignment.data(call)
    followed = {n: alignment.channels[n] for n in data if n in alignment.channels}
    places = {channels.axis - len(alignment.size(n)) for n, channels in followed.items()}
    if len(places) > 1:
        raise Refusal("it combines values whose channels lie on different axes")
    place = places.pop()
    count = shape[place]
    sources, full, opaque = [], [], False
    for node in data:
        size = alignment.size(node)
        if node not in followed and (len(size) < -place or size[place] == 1):
            opaque = True
            continue
        ids = alignment.on(node, place).ids
        sources.append(Source(node, None if len(ids) == count else torch.zeros(count, dtype=torch.int64)))
        full += [ids] if len(ids) == count else []
    if not full:
        raise Refusal("it repeats a single channel")
    for ids in full[1:]:
        alignment.tie(full[0], ids)
    slots = _slots(alignment, call, place, full[0])
    varies = opaque or call.op in JUMPS or call.args.get("rounding_mode") is not None

    def evaluate(found: Sequence[Facts]) -> Facts:
        facts = dict(zip([source.node for source in sources], found, strict=True))
        return _computed(alignment, call, facts, place, count, varies)

    out = Channels(len(shape) + place, full[0])
    loses = f"{call.op} joins them with channels that vary"
    return alignment.lanes(call, sources, out, evaluate, slots, loses)


def _slots(alignment: Alignment, call: Call, place: int, ids: Tensor) -> list[Slot]:
    """Constant operands with a number per channel."""
    slots = []
    for node in call.node.all_input_nodes:
        if node in alignment.constants and is_tensor(node):
            size = alignment.size(node)
            if len(size) >= -place and size[place] > 1:
                slots.append(Slot(node, len(size) + place, ids))
    return slots


def _computed(
    alignment: Alignment, call: Call, facts: dict[Node, Facts], place: int, count: int, varies: bool
) -> Facts:
    """Run an elementwise call on one number per channel."""
    known = torch.full((count,), not varies)
    for found in facts.values():
        known = known & found.known

    def number(node: Node) -> Any:
        nonlocal known
        if node in facts:
            return facts[node].value.clone()
        if alignment.is_data(node):
            return torch.zeros(count, dtype=torch.float64)
        value = alignment.constants.value(node)
        if not isinstance(value, Tensor) or value.numel() == 1:
            return value.flatten() if isinstance(value, Tensor) else value
        if value.numel() == count and _per_channel(value, place):
            return value.flatten()
        known = known & False
        return value.flatten()[:1].expand(count)

    if known.any():
        result = run_call(call.node, number)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return Facts.unknown(count)
        found = Facts.of(known, result.double().expand(count))
    else:
        found = Facts.unknown(count)
    return _with_zeros(alignment, call, found, facts, place) if call.op == "mul" else found


def _per_channel(constant: Tensor, place: int) -> bool:
    """Whether a constant varies along the channels' axis, counted from the end, alone."""
    return constant.dim() >= -place and constant.shape[place] == constant.numel()


def _with_zeros(
    alignment: Alignment, call: Call, found: Facts, factors: dict[Node, Facts], place: int
) -> Facts:
    """A product is zero where one of its factors is."""
    zero = torch.zeros_like(found.known)
    for factor in factors.values():
        zero = zero | (factor.known & (factor.value == 0))
    for other in (call.args["self"], call.args["other"]):
        constant = None if alignment.is_data(other) else alignment.constants.tensor(other)
        if constant is not None and (constant.numel() == 1 or _per_channel(constant, place)):
            zero = zero | (constant.flatten() == 0)
    return Facts(found.known | zero, found.value.where(~zero, 0.0))


@follows("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
def dropout(alignment: Alignment, call: Call) -> Step | None:
    """Nothing, in eval mode."""
    if call.args["train"]:
        raise Refusal("dropout that is on")
    return alignment.same(call, followed(alignment, call.args["input"])[0])


@follows("contiguous", "clone", "detach", "alias", "to", "type_as", "float", "double", "half", "_to_copy")
def relayout(alignment: Alignment, call: Call) -> Step | None:
    """The same numbers in other memory."""
    if not alignment.evidence.dtype(call.node).is_floating_point:
        raise Refusal("it converts to integers")
    return alignment.same(call, followed(alignment, call.args["self"])[0])


@follows("batch_norm")
def batch_norm(alignment: Alignment, call: Call) -> Step | None:
    """w (x - mean) / sqrt(var + eps) + b, with the running statistics."""
    a = call.args
    if a["training"] or not isinstance(a["running_mean"], Node):
        raise Refusal("batch norm with the statistics of its input")
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = [a[name] for name in names]
    if any(alignment.is_data(t) for t in tensors):
        raise Refusal("batch norm with numbers that depend on an input")
    channels = alignment.on(a["input"], 1)
    count = len(channels.ids)

    def evaluate(found: Sequence[Facts]) -> Facts:
        weight, bias, mean, var = (alignment.constants.tensor(t) for t in tensors)
        assert mean is not None and var is not None
        scale = torch.ones(count, dtype=torch.float64) if weight is None else weight
        value = (found[0].value - mean) / (var + a["eps"]).sqrt() * scale
        known = found[0].known | (scale == 0)
        value = value.where(scale != 0, 0.0)
        return Facts.of(known, value if bias is None else value + bias)

    slots = [Slot(t, 0, channels.ids) for t in tensors if isinstance(t, Node)]
    return alignment.lanes(call, [Source(a["input"])], channels, evaluate, slots)


@follows("prelu")
def prelu(alignment: Alignment, call: Call) -> Step | None:
    """max(x, 0) + w min(x, 0), with one w or one per channel on axis 1."""
    source, weight = call.args["self"], call.args["weight"]
    if alignment.is_data(weight):
        raise Refusal("the slopes depend on an input")
    single = math.prod(alignment.size(weight)) == 1
    _, channels = followed(alignment, source)
    channels = channels if single else alignment.on(source, 1)

    def evaluate(found: Sequence[Facts]) -> Facts:
        slope = alignment.constants.tensor(weight)
        assert slope is not None
        x = found[0].value
        return Facts.of(found[0].known, x.where(x > 0, x * slope.flatten()))

    slots = [] if single else [Slot(weight, 0, channels.ids)]
    return alignment.lanes(call, [Source(source)], channels, evaluate, slots)


@follows("instance_norm")
def instance_norm(alignment: Alignment, call: Call) -> Step | None:
    """Every channel of every sample by itself; what it makes of a constant is rounding noise."""
    a = call.args
    tensors = [a[name] for name in ("weight", "bias", "running_mean", "running_var")]
    slots = [t for t in tensors if isinstance(t, Node)]
    if any(alignment.is_data(t) for t in slots):
        raise Refusal("instance norm with numbers that depend on an input")
    channels = alignment.on(a["input"], 1)
    return alignment.lanes(
        call, [Source(a["input"])], channels, unknown, [Slot(t, 0, channels.ids) for t in slots]
    )


@follows("softmax", "log_softmax", "cumsum", "flip", "roll", "logsumexp", "std", "var", "sum", "norm")
def within(alignment: Alignment, call: Call) -> Step | None:
    """Something within every channel. What becomes of a constant is not told."""
    return _reduced(alignment, call, unknown)


@follows("mean", "amax", "amin")
def reduction(alignment: Alignment, call: Call) -> Step | None:
    """A mean, maximum or minimum within every channel."""
    return _reduced(alignment, call, None)


def _reduced(alignment: Alignment, call: Call, evaluate: Any) -> Step | None:
    node, channels = followed(alignment, call.args["self"])
    before, after = alignment.size(node), alignment.size(call.node)
    dims = call.args.get("dim", call.args.get("dims"))
    if dims is None or dims == []:
        raise Refusal("it combines all channels")
    over = {int(d) % len(before) for d in (dims if isinstance(dims, Sequence) else [dims])}
    if channels.axis in over:
        raise Refusal("it combines channels")
    gone = sum(d < channels.axis for d in over) if len(after) < len(before) else 0
    return alignment.same(call, node, channels.axis - gone, evaluate)


@follows(*(f"adaptive_avg_pool{n}d" for n in (1, 2, 3)), *(f"max_pool{n}d" for n in (1, 2, 3)))
@follows(*(f"adaptive_max_pool{n}d" for n in (1, 2, 3)), *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)))
@follows("_adaptive_avg_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
@follows("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
@follows("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa")
def windows(alignment: Alignment, call: Call) -> Step | None:
    """A maximum or a weighted mean over windows that keeps constants: max pooling pads with -inf."""
    node, channels = followed(alignment, call.args.get("self", call.args.get("input")))
    spatial = 3 if "3d" in call.op else 2 if "2d" in call.op else 1
    _beside(alignment, node, channels, spatial)
    return alignment.same(call, node)


def _beside(alignment: Alignment, node: Node, channels: Channels, spatial: int) -> None:
    if channels.axis >= len(alignment.size(node)) - spatial:
        raise Refusal("its windows go over channels")


@follows("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(alignment: Alignment, call: Call) -> Step | None:
    """A mean over windows; zeros that are padded and counted make another value of a constant."""
    a = call.args
    node, channels = followed(alignment, a.get("self", a.get("input")))
    _beside(alignment, node, channels, int(call.op[-2]))
    padding = a["padding"] if isinstance(a["padding"], Sequence) else [a["padding"]]
    counted = any(padding) and a["count_include_pad"]
    if not counted and a.get("divisor_override") is None:
        return alignment.same(call, node)
    loses = f"{call.leaf} counts zeros beyond the border"
    return alignment.lanes(call, [Source(node)], channels, _zeros_only, loses=loses)


def _zeros_only(found: Sequence[Facts]) -> Facts:
    return Facts(found[0].known & (found[0].value == 0), found[0].value * 0)


@follows("constant_pad_nd", "pad")
def pad(alignment: Alignment, call: Call) -> Step | None:
    """Padding within channels; constants stay where the border repeats them, or is the same number."""
    node, channels = followed(alignment, call.args["self"])
    pads = [int(p) for p in call.args["pad"]]
    _beside(alignment, node, channels, len(pads) // 2)
    if call.op == "pad" and call.args["mode"] != "constant":
        return alignment.same(call, node)
    filler = float(call.args.get("value") or 0)

    def evaluate(found: Sequence[Facts]) -> Facts:
        kept = found[0].known & ((found[0].value == filler) | (max(pads) <= 0))
        return Facts.of(kept, found[0].value)

    loses = f"{call.leaf} pads with {filler:g}"
    return alignment.lanes(call, [Source(node)], channels, evaluate, loses=loses)
