"""A convolution as one matrix product: the numbers under every position of the kernel, side by side in a row.

The weights are read as they are, where torch's own convolutions lay those of large kernels out anew in every
call. For a kernel that covers its map that takes ten times as long as the product.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Node

from convmerge.affine import Geometry
from convmerge.algebra.axis import axes
from convmerge.emit.interleave import plain_graph_module


def unfolded_conv(g: Geometry, dtype: torch.dtype, device: torch.device | str) -> fx.GraphModule:
    """A module of class ``UnfoldedConv1d``, ``2d`` or ``3d`` on (N, C, *spatial) or (C, *spatial).

    It takes every size that a convolution of this geometry takes. Its weight is (out, in * kernel), in the
    order of a convolution's, and its bias (out,); their values are not set.

    Args:
        g: without groups, padding and upsampling.
    """
    root = nn.Module()
    weight = torch.empty(g.out_channels, g.in_channels * math.prod(g.kernel), dtype=dtype, device=device)
    root.register_parameter("weight", nn.Parameter(weight))
    root.register_parameter("bias", nn.Parameter(weight[:, 0].clone()) if g.bias else None)
    graph = fx.Graph()
    rows = _rows(graph, g, graph.placeholder("x"))
    bias = graph.get_attr("bias") if g.bias else None
    y = graph.call_function(F.linear, (rows, graph.get_attr("weight"), bias))
    graph.output(graph.call_method("movedim", (y, -1, -1 - g.spatial)))
    return plain_graph_module(root, graph, f"UnfoldedConv{g.spatial}d")


def _rows(graph: fx.Graph, g: Geometry, x: Node) -> Node:
    """(..., C, *spatial) → (..., *positions, C * kernel)."""
    n = g.spatial
    for axis in axes(g):  # the last spatial axes move up as those of the windows come behind them
        x = graph.call_method("unfold", (x, -n, axis.dilation * (axis.kernel - 1) + 1, axis.down))
    if max(g.dilation) > 1:
        index: Any = (..., *(slice(None, None, d) for d in g.dilation))
        x = graph.call_function(operator.getitem, (x, index))
    x = graph.call_method("movedim", (x, -2 * n - 1, -n - 1))
    return graph.call_method("flatten", (x, -n - 1))
