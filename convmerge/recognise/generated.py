"""Kernels that are computed in every call: they stay as they are, and are named with what they depend on."""

from __future__ import annotations

import math

from torch.fx.node import Node

from convmerge.errors import Refusal
from convmerge.evidence.capture import Call
from convmerge.recognise.steps import Context, Step, recognises

# Operators that apply a kernel or a matrix.
APPLY = frozenset(
    [
        *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)),
        *("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum"),
    ]
)


def depends(context: Context, what: str, value: object) -> str:
    """``kernel depends on input cond``, or that it is random."""
    names = context.origins(value)
    if not names:
        return f"{what} is another one in every call"
    return f"{what} depends on {'inputs' if len(names) > 1 else 'input'} {' and '.join(names)}"


def refuse_generated(context: Context, left: object, right: object) -> None:
    """Raise Refusal for a product of data with a matrix, the smaller one, that depends on other inputs.

    A product of two values that both depend on all inputs there are, as in self-attention, has no kernel.
    """
    operands = [value for value in (left, right) if isinstance(value, Node) and not context.constant(value)]
    if len(operands) != 2:
        return
    small, large = sorted(operands, key=lambda value: math.prod(context.shape(value)))
    for kernel, data in ((small, large), (large, small)):
        if set(context.origins(data)) - set(context.origins(kernel)):
            raise Refusal(depends(context, "matrix", kernel))


@recognises("bmm", "baddbmm")
def batched(context: Context, call: Call) -> Step | None:
    """Of constants these are part of longer patterns; here only what is generated is told."""
    left, right = ("self", "mat2") if call.op == "bmm" else ("batch1", "batch2")
    refuse_generated(context, call.args[left], call.args[right])
    return None


@recognises("einsum")
def einsum(context: Context, call: Call) -> Step | None:
    """See :func:`batched`."""
    tensors = call.args["tensors"]
    if len(tensors) == 2:
        refuse_generated(context, *tensors)
    return None
