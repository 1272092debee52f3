"""A linear layer of equal blocks as one batched matrix product."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.fx.node import Node

from convmerge.affine import Dims, Geometry
from convmerge.emit.interleave import plain_graph_module


def batched_linear(g: Geometry, dtype: torch.dtype, device: torch.device | str) -> fx.GraphModule:
    """A module of class ``BatchedLinear`` on (..., in_channels), block-diagonal with ``groups`` equal blocks.

    Its weight is (groups, out, in) and its bias (groups, out, 1), per block; their values are not set. Rows
    come last in the product, which is the fastest for many of them.
    """
    into, out = g.in_channels // g.groups, g.out_channels // g.groups
    root = _root((g.groups, out, into), (g.groups, out, 1) if g.bias else None, dtype, device)
    graph = fx.Graph()
    x, columns = _blocks(graph, g, (1, 2, 0))
    y = _product(graph, g, graph.get_attr("weight"), columns)
    return _finished(root, graph, g, x, graph.call_method("permute", (y, 2, 0, 1)))


def batched_rows(g: Geometry, dtype: torch.dtype, device: torch.device | str) -> fx.GraphModule:
    """As :func:`batched_linear`, with the weight as (groups, in, out) and the bias as (groups, 1, out): the
    fastest for a few rows.
    """
    into, out = g.in_channels // g.groups, g.out_channels // g.groups
    root = _root((g.groups, into, out), (g.groups, 1, out) if g.bias else None, dtype, device)
    graph = fx.Graph()
    x, rows = _blocks(graph, g, (1, 0, 2))
    y = _product(graph, g, rows, graph.get_attr("weight"))
    return _finished(root, graph, g, x, graph.call_method("permute", (y, 1, 0, 2)))


def _root(weight: Dims, bias: Dims | None, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    root = nn.Module()
    for name, shape in (("weight", weight), ("bias", bias)):
        if shape is not None:
            root.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
    return root


def _blocks(graph: fx.Graph, g: Geometry, order: Dims) -> tuple[Node, Node]:
    """The input, and its rows as blocks, (rows, groups, in), with the axes in another order."""
    x = graph.placeholder("x")
    blocks = graph.call_method("reshape", (x, -1, g.groups, g.in_channels // g.groups))
    return x, graph.call_method("permute", (blocks, *order))


def _product(graph: fx.Graph, g: Geometry, left: Node, right: Node) -> Node:
    if g.bias:
        return graph.call_function(torch.baddbmm, (graph.get_attr("bias"), left, right))
    return graph.call_function(torch.bmm, (left, right))


def _finished(root: nn.Module, graph: fx.Graph, g: Geometry, x: Node, y: Node) -> fx.GraphModule:
    """With the result (rows, groups, out) in the shape of the input."""
    shape = graph.call_function(getattr, (x, "shape"))
    shape = graph.call_function(operator.getitem, (shape, slice(None, -1)))
    shape = graph.call_function(operator.add, (shape, (g.out_channels,)))
    graph.output(graph.call_method("reshape", (y, shape)))
    return plain_graph_module(root, graph, "BatchedLinear")
