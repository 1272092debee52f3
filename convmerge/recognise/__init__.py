"""From operator calls to affine forms: adding an operator is one function here and one row in its test."""

from __future__ import annotations

from convmerge.errors import Refusal
from convmerge.evidence.capture import Call
from convmerge.recognise import border, filters, generated, layout, pointwise, stacked  # noqa: F401  (registers)
from convmerge.recognise.channels import VIEWS
from convmerge.recognise.rows import linear_rows
from convmerge.recognise.steps import (
    RECOGNISERS,
    BorderFill,
    Concat,
    Context,
    Filter,
    Passage,
    Resized,
    Same,
    Scalar,
    Step,
    Sum,
)

__all__ = [
    "RECOGNISERS",
    "BorderFill",
    "Concat",
    "Context",
    "Filter",
    "Passage",
    "Resized",
    "Same",
    "Scalar",
    "Step",
    "Sum",
    "recognise",
]


def recognise(context: Context, call: Call) -> Step | None:
    """The step that ``call`` is, or None where there is no rule for it.

    Raises Refusal where there is a rule for the operator but not for this use of it.
    """
    recogniser = RECOGNISERS.get(call.op)
    step = recogniser(context, call) if recogniser is not None else None
    if isinstance(step, Filter | Scalar | Sum) and context.evidence.dtype(call.node).is_complex:
        raise Refusal("computes with complex numbers")
    if step is None or (isinstance(step, Passage) and call.op in VIEWS):
        return linear_rows(context, call) or step
    return step
