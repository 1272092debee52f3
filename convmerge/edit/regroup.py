"""Taking terms out of sums in the code of a traced module."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import Node

from convmerge.edit.edits import Regroup
from convmerge.edit.retrace import Trace
from convmerge.errors import Refusal

# Additions of two operands → the same out of place, and the sign of the second operand.
_BINARY: dict[Any, tuple[Any, float]] = {
    operator.add: (operator.add, 1.0),
    operator.iadd: (operator.add, 1.0),
    operator.sub: (operator.sub, -1.0),
    operator.isub: (operator.sub, -1.0),
    torch.add: (torch.add, 1.0),
    torch.sub: (torch.sub, -1.0),
    "add": ("add", 1.0),
    "add_": ("add", 1.0),
    "sub": ("sub", -1.0),
    "sub_": ("sub", -1.0),
}


def check_regroup(trace: Trace, regroup: Regroup) -> None:
    """Raise Refusal where the sum is written in a way that no terms can be taken out of."""
    sums = [trace.made_by[position] for position in regroup.sums]
    for node in sums:
        if not (_is_binary(node) or _is_stack(node) or _is_total(node, sums)):
            raise Refusal("the sum is written in a way that single terms cannot be taken out of")
    for position, index in regroup.dropped:
        if not index < len(terms_of(trace.made_by[position])):
            raise Refusal("the code adds up in another order than it runs")


def terms_of(node: Node) -> Sequence[Node]:
    """The values that a call adds up, or collects to be added up."""
    return node.args[0] if _is_stack(node) else node.args[:2]  # type: ignore[return-value]


def _is_binary(node: Node) -> bool:
    known = node.op in ("call_function", "call_method") and node.target in _BINARY
    operands = len(node.args) == 2 and all(isinstance(a, Node) for a in node.args)
    return known and operands and set(node.kwargs) <= {"alpha"}


def _is_stack(node: Node) -> bool:
    listed = bool(node.args) and isinstance(node.args[0], list | tuple)
    return node.target is torch.stack and listed and all(isinstance(a, Node) for a in node.args[0])  # type: ignore[union-attr]


def _is_total(node: Node, sums: Sequence[Node]) -> bool:
    """A sum over a stack of terms; a mean would change with their number."""
    return node.target in (torch.sum, "sum") and node.all_input_nodes[0] in sums


def regroup(graph: fx.Graph, trace: Trace, copies: dict[Node, Node], parts: Sequence[Regroup]) -> None:
    """Take terms out of the sums in a copy of a traced graph.

    copies: node of the trace → what stands for it in ``graph``; changed for sums of which one term is left.
    """
    dropped = {(trace.made_by[p], index) for part in parts for p, index in part.dropped}
    sums = {trace.made_by[p] for part in parts for p in part.sums}
    empty: list[Node] = []
    for node in trace.graph.nodes:
        if node not in sums:
            continue
        terms = list(terms_of(node))
        left = [i for i, term in enumerate(terms) if (node, i) not in dropped and term not in empty]
        if not left:
            empty.append(node)
        elif _is_stack(node):
            copies[node].args = ([copies[terms[i]] for i in left], *copies[node].args[1:])
        elif _is_binary(node):
            _shorten(graph, node, copies, left)
    for node in reversed(empty):
        graph.erase_node(copies[node])


def _shorten(graph: fx.Graph, node: Node, copies: dict[Node, Node], left: Sequence[int]) -> None:
    new, (target, sign) = copies[node], _BINARY[node.target]
    if len(left) == 2:
        new.target = target  # in place, it could write to a term that became its first operand
        return
    value = copies[node.args[left[0]]]  # type: ignore[index]
    factor = sign * float(node.kwargs.get("alpha", 1.0)) if left == [1] else 1.0  # type: ignore[arg-type]
    if factor != 1.0:
        with graph.inserting_before(new):
            value = graph.call_function(operator.mul, (value, factor))
    new.replace_all_uses_with(value)
    graph.erase_node(new)
    copies[node] = value
