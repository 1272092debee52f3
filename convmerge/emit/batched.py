"""A linear layer of equal blocks as one batched matrix product."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from convmerge.affine import Geometry
from convmerge.emit.interleave import plain_graph_module


def batched_linear(g: Geometry, dtype: torch.dtype, device: torch.device | str) -> fx.GraphModule:
    """A module of class ``BatchedLinear`` on (..., in_channels), block-diagonal with ``groups`` equal blocks.

    Its weight is (groups, out, in) and its bias (groups, out, 1), per block; their values are not set.
    """
    into, out = g.in_channels // g.groups, g.out_channels // g.groups
    root = nn.Module()
    root.register_parameter(
        "weight", nn.Parameter(torch.empty(g.groups, out, into, dtype=dtype, device=device))
    )
    if g.bias:
        root.register_parameter(
            "bias", nn.Parameter(torch.empty(g.groups, out, 1, dtype=dtype, device=device))
        )
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    blocks = graph.call_method("reshape", (x, -1, g.groups, into))
    # Blocks first and positions last: then no block of the weight is copied, and the product is fastest.
    columns = graph.call_method("permute", (blocks, 1, 2, 0))
    if g.bias:
        y = graph.call_function(torch.baddbmm, (graph.get_attr("bias"), weight, columns))
    else:
        y = graph.call_function(torch.bmm, (weight, columns))
    y = graph.call_method("permute", (y, 2, 0, 1))
    shape = graph.call_function(getattr, (x, "shape"))
    shape = graph.call_function(operator.getitem, (shape, slice(None, -1)))
    shape = graph.call_function(operator.add, (shape, (g.out_channels,)))
    graph.output(graph.call_method("reshape", (y, shape)))
    return plain_graph_module(root, graph, "BatchedLinear")
