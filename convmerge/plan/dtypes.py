"""Casts on the way: what one layer may stand for where dtypes differ."""

from __future__ import annotations

import torch

from convmerge.edit.lower import open_block
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence, is_tensor
from convmerge.plan.site import runs_of
from convmerge.regions.elements import Chain, blocks, calls_of


def check_dtypes(evidence: Evidence, elements: Chain) -> None:
    """Raise Refusal unless elements in a row end in the dtype they begin with and are nowhere narrower.

    One layer in that dtype then rounds less than they do: half-precision models with adapters in single
    precision cast on the way. What rounds in between may do so on purpose.
    """
    for run in runs_of(elements):
        dtype = evidence.dtype(run.source)
        within = (evidence.dtype(n) for n in calls_of(run.elements) if is_tensor(n))
        if any(torch.promote_types(inner, dtype) != inner for inner in within if inner.is_floating_point):
            raise Refusal("casts to another dtype, which rounds")
        left = open_block(run)  # what else the sum adds up must not come to another dtype
        branches = [branch for block in blocks([left] if left else []) for branch in block.branches]
        if any(evidence.dtype(n) != dtype for n in (run.target, *(b[-1].target for b in branches if b))):
            raise Refusal("ends in another dtype than it begins with")


def widens(evidence: Evidence, elements: Chain) -> bool:
    """Whether elements end in another dtype than they begin with, as they do before they are cast back."""
    return evidence.dtype(elements[0].source) != evidence.dtype(elements[-1].target)
