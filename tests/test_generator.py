"""Kernels computed from inputs: named with what they depend on, and merged with pointwise layers around."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from captured import Pair, random, regions_of
from torch import Tensor, nn

import convmerge

W = nn.Parameter(random(4, 3, 1, 1))


def _reasons(model: nn.Module, *inputs: Tensor) -> set[str]:
    """What inspect says of the operators whose kernel is computed."""
    sites = convmerge.inspect(model, inputs).sites
    return {site.reason for site in sites if "depends" in site.reason or "every call" in site.reason}


def test_kernels_are_named_with_the_inputs_they_depend_on() -> None:
    x, y = random(1, 3, 5, 7), random(4, 3, seed=1)
    cases = {
        lambda m, x, y: F.conv2d(x, y[:, :, None, None]): "kernel depends on input y",
        lambda m, x, y: F.conv2d(x, W, y[:, 0]): "bias depends on input y",
        lambda m, x, y: F.conv2d(x, y[:, :, None, None] * x.mean()): "kernel depends on inputs x and y",
        lambda m, x, y: F.conv2d(x, W * x.mean((2, 3))[:, :, None, None]): "kernel depends on input x",
        lambda m, x, y: F.conv_transpose2d(x, y.t()[:, :, None, None]): "kernel depends on input y",
        lambda m, x, y: F.linear(x.movedim(1, -1), y): "kernel depends on input y",
        lambda m, x, y: x.movedim(1, -1) @ y.t(): "matrix depends on input y",
        lambda m, x, y: torch.einsum("bchw,oc->bohw", x, y): "matrix depends on input y",
        lambda m, x, y: torch.bmm(y[None], x.flatten(2)): "matrix depends on input y",
        lambda m, x, y: F.conv2d(x + y.sum(), W * torch.rand_like(W)): "kernel is another one in every call",
    }
    for forward, reason in cases.items():
        assert _reasons(Pair(forward), x, y) == {reason}


def test_attention_has_no_kernel() -> None:
    _, regions = regions_of(Pair(lambda m, x, y: x @ x.mT + y), random(5, 7), random(5, 5))
    assert not regions.refused and "matmul" in {call.op for call in regions.unknown}
