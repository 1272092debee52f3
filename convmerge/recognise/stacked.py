"""Sums written as ``torch.stack(values).sum(dim)`` or ``.mean(dim)``, and concatenations."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx.node import Node

from convmerge.evidence.capture import Call
from convmerge.recognise.steps import Concat, Context, Step, Sum, recognises


def sum_of_stack(context: Context, call: Call) -> Sum | None:
    """A sum or a mean over the axis that stacking made is a sum of what was stacked; None for any other."""
    stack, dims = call.args["self"], call.args.get("dim")
    made = context.evidence.calls.get(stack) if isinstance(stack, Node) else None
    if made is None or made.op != "stack" or len(made.node.users) != 1 or call.args["keepdim"]:
        return None
    dtype, rank = context.evidence.dtype(made.node), len(context.shape(made.node))
    if not dtype.is_floating_point or call.args.get("dtype") not in (None, dtype):
        return None
    values = made.args["tensors"]
    over = {int(d) % rank for d in dims or range(rank)}
    if over != {made.args["dim"] % rank} or any(context.constant(value) for value in values):
        return None
    if any(context.evidence.dtype(value) != dtype for value in values):
        return None
    factor = 1.0 / len(values) if call.op == "mean" else 1.0
    return Sum(tuple((value, factor) for value in values), via=(made.node,))


@recognises("sum")
def total(context: Context, call: Call) -> Step | None:
    """A sum over the axis of a stack."""
    return None if "dim" not in call.args else sum_of_stack(context, call)


def concatenation(context: Context, call: Call) -> Concat | None:
    """Values of one dtype one after the other along an axis; None where one is empty or a constant."""
    return _in_a_row(context, call.args["tensors"], int(call.args["dim"]))


def flattened_stack(context: Context, call: Call) -> Concat | None:
    """A view that joins the axis of a stack with the one after it: what was stacked, one after the other."""
    stack = call.args.get("self")
    made = context.evidence.calls.get(stack) if isinstance(stack, Node) else None
    if made is None or made.op != "stack" or len(made.node.users) != 1:
        return None
    shape = list(context.shape(made.node))
    axis = int(made.args["dim"]) % len(shape)
    if axis == len(shape) - 1 or min(shape) == 0:
        return None
    joined = [*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]]
    if joined != list(context.shape(call.node)):
        return None
    return _in_a_row(context, made.args["tensors"], axis, (made.node,))


def _in_a_row(
    context: Context, values: Sequence[Node], dim: int, via: tuple[Node, ...] = ()
) -> Concat | None:
    shapes = [context.shape(value) for value in values]
    if any(context.constant(value) or shape == (0,) for value, shape in zip(values, shapes, strict=True)):
        return None
    dtypes = {context.evidence.dtype(value) for value in values}
    if len(values) < 2 or len(dtypes) > 1 or not dtypes.pop().is_floating_point:
        return None
    return Concat(tuple(values), dim % len(shapes[0]), via)
