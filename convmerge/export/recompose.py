"""Convolutions and batch norms of decomposed programs (``run_decompositions``) as what they came from.

Each is one operator again, which computes the same by the same kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

aten = torch.ops.aten


def recompose(graph: fx.Graph) -> None:
    """Replace them in a graph of ATen calls."""
    for node in list(graph.nodes):
        replace = _REPLACED.get(node.target)
        if replace is not None and not node.kwargs:
            replace(graph, node)


def _convolution(graph: fx.Graph, node: Node) -> None:
    source, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    n = len(stride)  # type: ignore[arg-type]
    with graph.inserting_before(node):
        if transposed:
            target = getattr(aten, f"conv_transpose{n}d").input
            args: tuple[Any, ...] = (source, weight, bias, stride, padding, output_padding, groups, dilation)
        else:
            target = getattr(aten, f"conv{n}d").default
            args = (source, weight, bias, stride, padding, dilation, groups)
        _put(graph, node, graph.call_function(target, args))


def _batch_norm(graph: fx.Graph, node: Node) -> None:
    """Of its three results the first is the output; the others are empty."""
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return
    source, weight, bias, mean, variance, momentum, eps = node.args
    args = (source, weight, bias, mean, variance, False, momentum, eps, False)
    with graph.inserting_before(node):
        made = graph.call_function(aten.batch_norm.default, args)
    for user in list(node.users):
        _put(graph, user, made)
    graph.erase_node(node)


def _put(graph: fx.Graph, old: Node, new: Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


_REPLACED: dict[Any, Callable[[fx.Graph, Node], None]] = {
    aten.convolution.default: _convolution,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
}
