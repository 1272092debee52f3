"""Batch norm, and sums and products with constants, as affine forms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.errors import Refusal
from convmerge.evidence.capture import Call, is_tensor
from convmerge.recognise.steps import (
    Context,
    Scalar,
    Step,
    Sum,
    channelwise_filter,
    recognises,
)


@recognises("batch_norm", "_native_batch_norm_legit_no_training")
def batch_norm(context: Context, call: Call) -> Step | None:
    """Inference: (x - mean) / sqrt(var + eps) * weight + bias, per channel on axis 1."""
    source = call.args["input"]
    if context.constant(source):
        return None
    args = call.args
    if args.get("training") or args["running_mean"] is None or args["running_var"] is None:
        raise Refusal("this batch norm uses the statistics of the batch, not running ones")
    names = ("weight", "bias", "running_mean", "running_var")
    if not all(context.constant(args[name]) for name in names):
        raise Refusal("the parameters of this batch norm depend on an input")

    def scale() -> Tensor:
        factor: Tensor = (context.tensor(args["running_var"]) + args["eps"]).rsqrt()
        return factor * context.tensor(1 if args["weight"] is None else args["weight"])

    def shift() -> Tensor:
        moved: Tensor = -context.tensor(args["running_mean"]) * scale()
        return moved + context.tensor(0 if args["bias"] is None else args["bias"])

    return channelwise_filter(source, 1, context.shape(source), scale, shift, "batch_norm")


def _channel_axis(context: Context, source: Node, other: object) -> int | None:
    """The axis of ``source`` along which a constant varies; None for a single number.

    Raises Refusal where it varies along several axes or makes the result larger than ``source``.
    """
    shape, constant = context.shape(source), context.shape(other)
    if np.broadcast_shapes(shape, constant) != shape:
        raise Refusal("a constant broadcasts the tensor to a larger shape")
    offset = len(shape) - len(constant)
    varying = [offset + axis for axis, size in enumerate(constant) if size != 1]
    if len(varying) > 1:
        raise Refusal("a constant differs from position to position, not from channel to channel")
    return varying[0] if varying else None


def _with_constant(
    context: Context,
    source: Node,
    other: object,
    kind: str,
    scale: Callable[[Tensor], Tensor] | None,
    shift: Callable[[Tensor], Tensor] | None,
    factor: float = 1.0,
) -> Step:
    """scale(c) * x + shift(c) for a constant c, or factor * x + shift(c)."""
    axis = _channel_axis(context, source, other)
    if axis is None:
        number = context.tensor(other)
        times = float(scale(number)) if scale is not None else factor
        return Scalar(source, times, float(shift(number)) if shift is not None else 0.0, kind)
    weights = (lambda: scale(context.tensor(other)).reshape(-1)) if scale is not None else None
    if scale is None and factor != 1.0:
        weights = lambda: torch.full((1,), factor, dtype=torch.float64)  # noqa: E731
    bias = (lambda: shift(context.tensor(other)).reshape(-1)) if shift is not None else None
    return channelwise_filter(source, axis, context.shape(source), weights, bias, kind)


def _floating(context: Context, call: Call) -> bool:
    """Whether the call's result and its data are floating-point numbers, maybe of several dtypes."""
    tensors = [a for a in call.args.values() if is_tensor(a) and not context.constant(a)]
    return is_tensor(call.node) and all(
        context.evidence.dtype(a).is_floating_point for a in (call.node, *tensors)
    )


@recognises("add", "sub", "rsub")
def add(context: Context, call: Call) -> Step | None:
    """a + alpha * b, a - alpha * b, or b - alpha * a; with a constant a shift, with data a sum of terms."""
    if not _floating(context, call):
        return None
    left, right, alpha = call.args["self"], call.args["other"], float(call.args["alpha"])
    if call.op == "rsub":
        left, right = right, left
    sign = 1.0 if call.op == "add" else -1.0
    if context.constant(left):
        if context.constant(right):
            return None
        return _with_constant(context, right, left, call.op, None, lambda c: c, sign * alpha)
    if context.constant(right):
        return _with_constant(context, left, right, call.op, None, lambda c: sign * alpha * c)
    if context.shape(left) != context.shape(right):
        raise Refusal("adds tensors of different shapes")
    return Sum(((left, 1.0), (right, sign * alpha)))


@recognises("mul", "div", "true_divide")
def mul(context: Context, call: Call) -> Step | None:
    """x * c, c * x, or x / c."""
    if not _floating(context, call) or call.args.get("rounding_mode"):
        return None
    left, right = call.args["self"], call.args["other"]
    if call.op == "mul" and context.constant(left):
        left, right = right, left
    if context.constant(left) or not context.constant(right):
        return None
    scale: Callable[[Tensor], Tensor] = (lambda c: c) if call.op == "mul" else torch.reciprocal
    return _with_constant(context, left, right, call.op, scale, None)


@recognises("neg")
def neg(context: Context, call: Call) -> Step | None:
    """-x."""
    source = call.args["self"]
    return None if context.constant(source) else Scalar(source, -1.0, 0.0, "neg")
