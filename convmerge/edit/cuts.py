"""Which nodes of a trace one layer can stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import Node

from convmerge.edit.edits import GraphEdit, Piece, Regroup
from convmerge.edit.regroup import check_regroup, terms_of
from convmerge.edit.retrace import Trace
from convmerge.errors import Refusal


@dataclass(frozen=True, eq=False)
class Cut:
    """Trace nodes that one layer can stand for: one value of data in, one value out, or parts of one.

    ``entries`` are the nodes among them that read the source, each with what it reads, which may be the
    source as handed on by something that does nothing.
    """

    nodes: tuple[Node, ...]
    source: Node
    results: tuple[Node, ...]
    entries: tuple[tuple[Node, Node], ...] = ()

    @property
    def result(self) -> Node:
        """The one value."""
        (result,) = self.results
        return result


def home_of(trace: Trace, edit: GraphEdit) -> Cut:
    """What the merged layer of an edit stands for. Raises Refusal as :func:`cut`."""
    if edit.added is not None:
        parts_of(trace, edit.added)
    if edit.operand is not None:
        position, index = edit.operand
        value = parts_of(trace, position)[index]
        return Cut((), value, (value,))
    if edit.beside is not None:
        return cut(trace, edit.beside[:1])
    if edit.sized is not None:
        size_of(trace, edit.sized[0])
    return cut(trace, edit.home, edit.regroup, edit.pieces)


def parts_of(trace: Trace, position: int) -> list[Node]:
    """What the concatenation at a position joins. Raises Refusal where the code writes it in another way."""
    node = trace.made_by[position]
    parts = node.args[0] if node.target in (torch.cat, torch.concat) and node.args else None
    if not isinstance(parts, list | tuple) or not all(isinstance(part, Node) for part in parts):
        raise Refusal("the code concatenates in a way that its terms cannot be told from")
    return [part for part in parts if isinstance(part, Node)]


def size_of(trace: Trace, position: int) -> Node | tuple[Node | int, ...]:
    """The size that the upsampling at a position is given. Raises Refusal where the code hides it."""
    node = trace.made_by[position]
    size = node.kwargs.get("size", node.args[1] if len(node.args) > 1 else None)
    if node.target is F.interpolate and isinstance(size, Node):
        return size
    if node.target is not F.interpolate or not isinstance(size, list | tuple):
        raise Refusal("the code gives the size to upsample to in a way that is not followed")
    return tuple(n for n in size if isinstance(n, Node | int))


def cut(
    trace: Trace, positions: Sequence[int], regroup: Regroup | None = None, pieces: Sequence[Piece] = ()
) -> Cut:
    """The trace nodes that make the calls at ``positions``.

    Where these are terms of a larger sum, the value that they give is that of the term which is kept; where
    they are siblings, the values are those of ``pieces``.

    Raises Refusal where they also make other calls, or share values with the rest of the code.
    """
    inside = {trace.made_by[p] for p in positions}
    covered = set(positions)
    for position, node in trace.made_by.items():
        if node in inside and position not in covered and position not in trace.constant:
            raise Refusal("one expression of the code computes part of it and something else")
    silent = _silent(trace)
    handing = {node for node in silent if _hands_on(node)}
    inside |= _between(trace.graph, inside, handing)
    inside |= _checks(trace.graph, inside, silent)
    sizes = _sizes(trace.graph, silent, trace.numbers)
    inside |= _only_for(trace.graph, inside, sizes)
    nodes = tuple(node for node in trace.graph.nodes if node in inside)
    known = inside | sizes
    looked = ((n, s) for n in nodes if n not in sizes for s in n.all_input_nodes)
    entries = tuple((n, s) for n, s in looked if s not in known and carries_data(s))
    sources = {_through(s, handing) for _, s in entries}
    results = [n for n in nodes if any(user not in inside for user in n.users)]
    if regroup is not None:
        results = _kept(trace, regroup, results, inside)
    wanted = [trace.made_by[piece.position] for piece in pieces] or results[:1]
    if len(sources) != 1 or not results or set(results) != set(wanted):
        raise Refusal("the code uses a value inside it elsewhere too")
    return Cut(nodes, sources.pop(), tuple(wanted), entries)


def _kept(trace: Trace, regroup: Regroup, results: Sequence[Node], inside: set[Node]) -> list[Node]:
    """Of values that are read outside, those that remain when terms are taken out of a sum."""
    check_regroup(trace, regroup)
    kept = trace.made_by[regroup.kept]
    dropped = {terms_of(trace.made_by[p])[index] for p, index in regroup.dropped}
    sums = {trace.made_by[p] for p in regroup.sums}
    gone = {n for n in dropped if n is not kept and all(user in inside or user in sums for user in n.users)}
    return [n for n in results if n not in gone]


def _silent(trace: Trace) -> set[Node]:
    """Nodes that make no call at all, such as an ``nn.Identity``, or a look at a tensor's rank."""
    loud = set(trace.made_by.values())
    calls = ("call_module", "call_function", "call_method")
    return {node for node in trace.graph.nodes if node.op in calls and node not in loud}


IDLE_FUNCTIONS = frozenset({F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout})
IDLE_METHODS = frozenset({"to", "type_as", "type", "float", "double", "half", "bfloat16"})


def _hands_on(node: Node) -> bool:
    """Whether a silent node gives its first argument on; other functions may pick one of several values."""
    if node.op == "call_module":
        return len(node.all_input_nodes) == 1
    idle = node.target in (IDLE_METHODS if node.op == "call_method" else IDLE_FUNCTIONS)
    return idle and isinstance(node.args[0] if node.args else None, Node)


def _through(node: Node, handing: set[Node]) -> Node:
    """The value that silent nodes hand on."""
    while node in handing:
        node = node.args[0] if node.args and isinstance(node.args[0], Node) else node.all_input_nodes[0]
    return node


def _between(graph: fx.Graph, inside: set[Node], silent: set[Node]) -> set[Node]:
    """Silent nodes on a way from ``inside`` to ``inside``."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        leads_in = any(user in inside or user in found for user in node.users)
        if node in silent and leads_in and _through(node, silent) in inside:
            found.add(node)
    return found


def _checks(graph: fx.Graph, inside: set[Node], silent: set[Node]) -> set[Node]:
    """Silent nodes that look at values inside and lead to nothing: assertions about shapes that vanish."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in silent and all(user in found for user in node.users):
            found.add(node)
    touched: set[Node] = set()
    for node in graph.nodes:
        if node in found and any(n in inside or n in touched for n in node.all_input_nodes):
            touched.add(node)
    return touched


def _sizes(graph: fx.Graph, silent: set[Node], numbers: frozenset[Node]) -> set[Node]:
    """Numbers, silent nodes that look at the shape of a tensor, and what is computed from those alone."""
    found: set[Node] = set(numbers)
    for node in graph.nodes:
        method = node.op == "call_method" and node.target in ("size", "dim", "numel")
        attribute = node.target is getattr and node.args[1] in ("shape", "ndim")
        derived = bool(node.all_input_nodes) and all(n in found for n in node.all_input_nodes)
        if node in silent and (method or attribute or node.target is len or derived):
            found.add(node)
    return found


def _only_for(graph: fx.Graph, inside: set[Node], nodes: set[Node]) -> set[Node]:
    """Those of ``nodes`` that nothing reads but what is inside."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in nodes and node.users and all(user in inside or user in found for user in node.users):
            found.add(node)
    return found


def carries_data(node: Node) -> bool:
    """Whether a trace value can depend on the traced module's inputs."""
    seen, pending = set(), [node]
    while pending:
        current = pending.pop()
        if current.op in ("placeholder", "call_module"):
            return True
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False
