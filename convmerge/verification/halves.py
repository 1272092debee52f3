"""Models in half precision, compared more sharply than their own rounding allows.

In bfloat16 a weight can be wrong by many times its size, and the outputs differ by no more than rounding
makes them. The merged layers are known before they are rounded: with these, both models in single precision
must be the same function too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from convmerge.errors import ConvmergeError
from convmerge.report import Verification
from convmerge.verification.compare import compare
from convmerge.verification.errormodel import private

if TYPE_CHECKING:
    from convmerge.inputs import Inputs

HALVES = (torch.float16, torch.bfloat16)


def unequal_in_single(a: nn.Module, b: nn.Module, inputs: Inputs, *, seed: int = 0) -> Verification | None:
    """The verdict on both models in single precision where that is that they differ; None for any other.

    Args:
        a: the original.
        b: with its merged layers as they are before rounding, in float64.

    None too where single precision tells nothing: code that casts to half precision does so in any model.
    """
    if any(_casts_to_half(m) for m in b.modules() if isinstance(m, fx.GraphModule)):
        return None
    try:
        single, merged = private(a, torch.float32), private(b, torch.float32)
        verdict = compare(single, merged, inputs.to(torch.float32), seed=seed, more=False)
    except ConvmergeError:
        return None
    return verdict if verdict.comparisons and not verdict.equal else None


def _casts_to_half(module: fx.GraphModule) -> bool:
    given = (value for node in module.graph.nodes for value in (*node.args, *node.kwargs.values()))
    return any(isinstance(value, torch.dtype) and value in HALVES for value in given)
