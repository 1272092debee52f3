"""The only module that changes a model, and only ever a copy of the caller's.

Merged layers are fresh torch.nn layers. What no site touches keeps its class, attributes, methods and
state_dict keys.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import fx, nn
from torch.fx.node import Node

from convmerge.edit.cuts import Cut, carries_data, cut, home_of, size_of
from convmerge.edit.edits import GraphEdit, Piece, UnitEdit
from convmerge.edit.regroup import regroup
from convmerge.edit.retrace import Trace
from convmerge.edit.sequential import as_sequential


@dataclass(frozen=True, eq=False)
class Replacement:
    """An edit and the layer that it puts in place; None where the input goes on as it is."""

    edit: UnitEdit | GraphEdit
    layer: nn.Module | None


def apply(model: nn.Module, replacements: Sequence[Replacement], traces: Mapping[str, Trace]) -> nn.Module:
    """Put every replacement into ``model``, which is changed, and return it, or what its root became.

    Args:
        model: a copy of the caller's model.
        replacements: with edits that do not overlap.
        traces: owner path → its trace, for graph edits.
    """
    tree = Tree(model)
    by_owner: dict[str, list[Replacement]] = {}
    for replacement in replacements:
        if isinstance(replacement.edit, GraphEdit):
            by_owner.setdefault(replacement.edit.owner, []).append(replacement)
    # Deepest owners first: an outer trace then refers to the inner module that is already in its new form.
    for owner in sorted(by_owner, key=lambda path: -_depth(path)):
        module = tree.get(owner)
        tree.put(module, _edited(traces[owner], module, by_owner[owner]))
    for replacement in replacements:
        if isinstance(replacement.edit, UnitEdit):
            _apply_units(tree, replacement.edit, replacement.layer or nn.Identity())
    return tree.root


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


class Tree:
    """A module tree in which modules can be replaced, each under all of its names, without a search."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._names: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in root.modules():
            self._note(parent)

    def get(self, path: str) -> nn.Module:
        return self.root.get_submodule(path)

    def put(self, old: nn.Module, new: nn.Module) -> None:
        if old is self.root:
            self.root = new
        for parent, name in self._names.pop(id(old), []):
            parent._modules[name] = new
            self._names.setdefault(id(new), []).append((parent, name))
        for module in new.modules():
            self._note(module)

    def _note(self, parent: nn.Module) -> None:
        for name, child in parent._modules.items():
            if child is not None and (parent, name) not in self._names.setdefault(id(child), []):
                self._names[id(child)].append((parent, name))


def _apply_units(tree: Tree, edit: UnitEdit, layer: nn.Module) -> None:
    for path in edit.emptied:
        old = tree.get(path)
        tree.put(old, stand_in(nn.Identity(), old))
    old = tree.get(edit.survivor)
    if edit.beside is not None:
        layer = nn.Sequential(layer, old) if edit.beside == "front" else nn.Sequential(old, layer)
    tree.put(old, stand_in(layer, old))


# What torch.fx keeps when it deep-copies a traced module (one loaded from a file does not hold it).
PRESERVED = "_user_preserved_attributes"


def stand_in(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give a new module the plain attributes that a parent may read off the old one, and its train flag."""
    for name, value in vars(old).items():
        if not name.startswith("_") and name != "training" and not hasattr(new, name) and _is_plain(value):
            setattr(new, name, value)
            if isinstance(new, fx.GraphModule):
                new.meta.setdefault(PRESERVED, {})[name] = value
    return new.train(old.training)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str | None)


def _edited(trace: Trace, owner: nn.Module, replacements: Sequence[Replacement]) -> nn.Module:
    """The owner as a GraphModule with the replacements made."""
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    output = graph.graph_copy(trace.graph, copies)
    source_output = next(n for n in trace.graph.nodes if n.op == "output")
    graph.output(output, type_expr=source_output.type)
    taken: set[str] = set()
    edits = [r.edit for r in replacements if isinstance(r.edit, GraphEdit)]
    regroup(graph, trace, copies, [edit.regroup for edit in edits if edit.regroup is not None])
    for index, replacement in enumerate(replacements):
        edit = replacement.edit
        assert isinstance(edit, GraphEdit)
        for run in edit.emptied:
            replace_part(graph, cut(trace, run), copies, None)
        home = home_of(trace, edit)
        if replacement.layer is None:
            replace_part(graph, home, copies, None)
            continue
        name = _place_name(owner, trace, home, index, taken)
        old = _child(owner, name)
        _place(owner, name, stand_in(replacement.layer, old) if old is not None else replacement.layer)
        if edit.beside is not None:
            _insert_beside(graph, home, copies, edit.beside[1], name)
        elif edit.operand is not None:
            insert_before(graph, copies[trace.made_by[edit.operand[0]]], edit.operand[1], name)
        elif edit.pieces:
            _replace_by_parts(graph, home, copies, name, edit.pieces)
        elif edit.sized is not None:
            replace_part(graph, home, copies, name, _sizes(graph, trace, edit, copies))
        else:
            replace_part(graph, home, copies, name)
    for edit in edits:
        if edit.added is not None:
            _add_up(graph, copies[trace.made_by[edit.added]])
    _drop_dead(graph, owner)
    graph.lint()
    if (chain := as_sequential(owner, graph)) is not None:
        return stand_in(chain, owner)
    module = fx.GraphModule(owner, graph, class_name=type(owner).__name__)
    module.graph._tracer_cls = fx.Tracer  # a tracer of our own class would make the file need convmerge
    module._tracer_cls = fx.Tracer
    return stand_in(module, owner)


def replace_part(
    graph: fx.Graph,
    part: Cut,
    copies: dict[Node, Node],
    name: str | None,
    sizes: Sequence[Node | int] = (),
) -> None:
    """Put a call of the module ``name``, or nothing, in place of the nodes of a cut.

    ``sizes`` are further arguments; what computes them stays.
    """
    nodes = [copies[node] for node in part.nodes]
    result = copies[part.result]
    source = copies[part.source]
    with graph.inserting_after(result):
        new = source if name is None else graph.call_module(name, (source, *sizes))
    result.replace_all_uses_with(new)
    kept = _leading_to(sizes)
    for node in reversed(nodes):
        if node not in kept:
            graph.erase_node(node)
    copies[part.result] = new  # another replacement may begin here


def _leading_to(values: Sequence[Node | int]) -> set[Node]:
    """The nodes among some values, and all that they are computed from."""
    found: set[Node] = set()
    pending = [value for value in values if isinstance(value, Node)]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _sizes(graph: fx.Graph, trace: Trace, edit: GraphEdit, copies: dict[Node, Node]) -> list[Node | int]:
    """The size that the upsampling of an edit is given, one number per dimension."""
    assert edit.sized is not None
    position, dimensions = edit.sized
    size = size_of(trace, position)
    if not isinstance(size, Node):
        return [copies[n] if isinstance(n, Node) else n for n in size]
    with graph.inserting_before(copies[trace.made_by[position]]):
        return [graph.call_function(operator.getitem, (copies[size], d)) for d in range(dimensions)]


def insert_before(graph: fx.Graph, node: Node, index: int, name: str) -> None:
    """Put a call of the module ``name`` in front of one of the values that a node concatenates."""
    parts = list(cast(Sequence[Node], node.args[0]))
    with graph.inserting_before(node):
        parts[index] = graph.call_module(name, (parts[index],))
    node.args = (parts, *node.args[1:])


def _insert_beside(
    graph: fx.Graph, part: Cut, copies: dict[Node, Node], side: Literal["front", "behind"], name: str
) -> None:
    """Put a call of the module ``name`` in front of the nodes of a cut, which stay, or behind them."""
    if side == "front":
        with graph.inserting_before(copies[part.entries[0][0]]):
            new = graph.call_module(name, (copies[part.source],))
        for node, read in part.entries:
            copies[node].replace_input_with(copies[read], new)
        return
    result = copies[part.result]
    with graph.inserting_after(result):
        new = graph.call_module(name, (result,))
    result.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    copies[part.result] = new  # another replacement may begin here


def _add_up(graph: fx.Graph, node: Node) -> None:
    """Put a sum of the values in place of their concatenation."""
    total, *rest = cast(Sequence[Node], node.args[0])
    with graph.inserting_before(node):
        for value in rest:
            total = graph.call_function(operator.add, (total, value))
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _replace_by_parts(
    graph: fx.Graph, whole: Cut, copies: dict[Node, Node], name: str, pieces: Sequence[Piece]
) -> None:
    """Put parts of the output of the module ``name`` in place of the results of a cut."""
    start = 0
    with graph.inserting_before(copies[whole.nodes[0]]):
        value = graph.call_module(name, (copies[whole.source],))
        parts = []
        for piece in pieces:
            parts.append(graph.call_method("narrow", (value, piece.axis, start, piece.size)))
            start += piece.size
    for result, part in zip(whole.results, parts, strict=True):
        copies[result].replace_all_uses_with(part)
    for node in reversed(whole.nodes):
        graph.erase_node(copies[node])
    copies.update(zip(whole.results, parts, strict=True))


def _drop_dead(graph: fx.Graph, owner: nn.Module) -> None:
    """Erase what computed weights for calls that are gone, and modules that led to them and do nothing."""
    for node in reversed(list(graph.nodes)):
        weight = node.op in ("get_attr", "call_function", "call_method") and not carries_data(node)
        if not node.users and (weight or _is_identity(owner, node)):
            graph.erase_node(node)


def _is_identity(owner: nn.Module, node: Node) -> bool:
    return node.op == "call_module" and type(owner.get_submodule(str(node.target))) is nn.Identity


def _place_name(owner: nn.Module, trace: Trace, home: Cut, index: int, taken: set[str]) -> str:
    """The name of the submodule with the most weights that vanishes: the new layer stands where it stood."""
    sizes: dict[str, int] = {}
    for node in home.nodes:
        name = str(node.target)
        calls = sum(n.op == "call_module" and n.target == name for n in trace.graph.nodes)
        if node.op == "call_module" and calls == 1 and name not in taken:
            sizes[name] = sum(p.numel() for p in owner.get_submodule(name).parameters())
    if any(sizes.values()):
        name = max(sizes, key=lambda n: sizes[n])
        taken.add(name)
        return name
    name = f"merged_{index}"
    while hasattr(owner, name):
        name += "_"
    return name


def _child(owner: nn.Module, name: str) -> nn.Module | None:
    try:
        return owner.get_submodule(name)
    except AttributeError:
        return None


def _place(owner: nn.Module, name: str, layer: nn.Module) -> None:
    *parents, last = name.split(".")
    owner.get_submodule(".".join(parents))._modules[last] = layer
