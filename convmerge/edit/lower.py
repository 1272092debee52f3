"""Carrying a site back from the evidence graph to the module tree.

Three ways, the least intrusive first: whole module calls in a row (one is replaced, the others become
identities); one module that is nothing but the site (replaced whatever its class); a part of one module's
code (that module is traced by torch.fx, and its trace must agree with the evidence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import nn
from torch.fx.node import Node

from convmerge.edit.edits import Edit, GraphEdit, Piece, Regroup, Run, UnitEdit
from convmerge.edit.frames import Frames, innermost_common
from convmerge.errors import Refusal
from convmerge.evidence.capture import ROOT, Call, Evidence, Frame, is_tensor, nodes_of
from convmerge.evidence.constants import memory_root
from convmerge.evidence.memory import check_sums, check_views
from convmerge.recognise import Resized, Same
from convmerge.regions.elements import Block, Edge, Fork, Gap, Leaf, Via, calls_of, leaves


def lower(
    frames: Frames, home: Run, emptied: Sequence[Run], model: nn.Module, added: Node | None = None
) -> Edit:
    """How a site is written back; ``added`` is a concatenation that is to become a sum with it.

    Raises Refusal where no way is known to be exact.
    """
    check_memory(frames.evidence, home, emptied)
    gap, sized = gap_of(home), resized_of(home)
    try:
        if added is not None or edge_of(home) is not None:
            raise Refusal("the code that concatenates is not known")
        if open_block(home) is not None:
            raise Refusal("the sum has a term that starts from another value")
        if fork_of(home) is not None:
            raise Refusal("the code that calls the siblings is not known")
        if sized is not None:
            raise Refusal("the code that gives the size is not known")
        if gap is not None:
            return _as_units_beside(frames, gap, emptied, model)
        return _as_units(frames, home, emptied, model)
    except Refusal as refusal:
        unit_reason = refusal.reason
    joins = _joining_calls(home, added)
    owner = innermost_common(frames, [*joins, *(n for r in (home, *emptied) for n in calls_of(r.elements))])
    if owner.path not in frames.evidence.signatures:
        raise Refusal(unit_reason)
    edit = _as_graph(frames, owner, home, emptied, model)
    position = {node: index for index, node in enumerate(frames.calls[owner])}
    opened = edit.opened | {f.path for node in joins for f in _below(frames.call(node), owner)}
    edge = edge_of(home)
    return replace(
        edit,
        opened=opened,
        operand=None if edge is None else (position[edge.call], edge.index),
        added=None if added is None else position[added],
        sized=None if sized is None else (position[sized[0]], sized[1].geometry.spatial),
        beside=None if gap is None else (position[gap.beside.node], _side(gap)),
    )


def _joining_calls(home: Run, added: Node | None) -> list[Node]:
    """Calls that stay and are edited with a run: that add up, or concatenate, or that it stands beside."""
    block, edge = open_block(home), edge_of(home)
    calls = list(block.sums) if block is not None else []
    if edge is not None:
        calls.append(edge.call)
    if (gap := gap_of(home)) is not None:
        calls.append(gap.beside.node)
    return calls if added is None else [*calls, added]


def check_memory(evidence: Evidence, home: Run, emptied: Sequence[Run]) -> None:
    """Raise Refusal where what a new layer, or a call that stays, reads is written to before it reads it.

    It reads its input at another time than some of the old calls.
    """
    writes = [
        (memory_root(nodes_of(c.args)[0]), c)
        for c in evidence.calls.values()
        if c.mutates and nodes_of(c.args)
    ]
    if not writes:
        return
    ends = [n for run in (home, *emptied) for n in (*calls_of(run.elements), run.target)]
    last = max(evidence.calls[n].index for n in ends if n in evidence.calls)
    for run in (home, *emptied):
        nodes = set(calls_of(run.elements))
        if not nodes:
            continue
        indices = [evidence.calls[node].index for node in nodes]
        root, until = memory_root(run.source), max(indices) if run is home else last
        for written, call in writes:
            if written is root and call.node not in nodes and min(indices) < call.index < until:
                raise Refusal(f"its input is changed in place by {call.op} before all of it has run")


def _as_units(frames: Frames, home: Run, emptied: Sequence[Run], model: nn.Module) -> UnitEdit:
    units = _units(frames, home)
    gone = [frame for run in emptied for frame in _units(frames, run)]
    survivor = _survivor(units, model)
    if not gone and any(_read_by_name(model, unit) for unit in units if unit is not survivor):
        units = _enclosing(frames, units)
        survivor = _survivor(units, model)
    for frame in (*units, *gone):
        _check_module(model, frame.path)
    paths = [frame.path for frame in (*units, *gone)]
    if len(set(paths)) != len(paths):
        raise Refusal(f"{_duplicate(paths)} is called twice with different neighbours")
    return UnitEdit(survivor.path, tuple(path for path in paths if path != survivor.path))


def _as_units_beside(frames: Frames, gap: Gap, emptied: Sequence[Run], model: nn.Module) -> UnitEdit:
    """The module of the operator that stays, with the merged layer on one side of it."""
    kept, *more = _units(frames, Run((gap.beside,)))
    if more or len(frames.by_path[kept.path]) > 1:
        raise Refusal(f"{kept.path} is called twice with different neighbours")
    gone = [frame for run in emptied for frame in _units(frames, run)]
    for frame in (kept, *gone):
        _check_module(model, frame.path)
    paths = [frame.path for frame in gone]
    if len({kept.path, *paths}) != len(paths) + 1:
        raise Refusal(f"{_duplicate([kept.path, *paths])} is called twice with different neighbours")
    return UnitEdit(kept.path, tuple(paths), _side(gap))


def _side(gap: Gap) -> Literal["front", "behind"]:
    return "behind" if gap.behind else "front"


def _read_by_name(model: nn.Module, unit: Frame) -> bool:
    """Whether a module is of a class of its own with weights, off which the code around it may read more."""
    module = model.get_submodule(unit.path)
    plain = isinstance(module, nn.modules.batchnorm._NormBase) or type(module).__module__.startswith(
        "torch.nn."
    )
    return not plain and next(module.parameters(), None) is not None


def _enclosing(frames: Frames, units: list[Frame]) -> list[Frame]:
    """The one module that consists of the units, where there is such; else the units."""
    inside = set().union(*(frames.data[unit] for unit in units))
    for frame in reversed(frames.around(units[0])):
        if frames.data[frame] == inside and frame.path and _signature_fits(frames.evidence, frame):
            return [frame]
    return units


def _duplicate(paths: Sequence[str]) -> str:
    return next(path for path in paths if paths.count(path) > 1)


def _units(frames: Frames, run: Run) -> list[Frame]:
    """The module calls that make up a run, in order, each feeding the next one and nothing else."""
    calls = set(calls_of(run.elements))
    skipped = {leaf.node for leaf in leaves(run.elements) if isinstance(leaf.step, Same)}
    units: dict[Frame, None] = {}
    for node in sorted(calls, key=lambda n: frames.call(n).index):
        frame = frames.unit_of(node)
        if frames.data[frame] <= calls and not frames.data[frame] <= skipped:
            units[frame] = None
        elif node not in skipped:
            raise Refusal("part of it stands in the code of a module that does more")
    outer = [u for u in units if not any(v in frames.around(u) for v in units)]
    value = run.source
    for unit in outer:
        inside = frames.data[unit]
        if {_before(v, skipped) for v in _read(frames, inside)} != {_before(value, skipped)}:
            raise Refusal("its modules do not feed one another in a row")
        if not _signature_fits(frames.evidence, unit):
            raise Refusal(f"{unit.path or 'the model'} is called with more than one tensor")
        value = _result(frames, unit)
    if _before(run.target, skipped) is not _before(value, skipped):
        raise Refusal("its modules do not feed one another in a row")
    return outer


def _before(value: Node, skipped: set[Node]) -> Node:
    """The value before the identities that stay where they are."""
    while value in skipped:
        value = value.all_input_nodes[0]
    return value


def _read(frames: Frames, inside: set[Node]) -> set[Node]:
    """Data values that a set of calls reads from outside."""
    found: set[Node] = set()
    for node in inside:
        found.update(n for n in node.all_input_nodes if n not in inside and _is_data(frames, n))
    return found


def _is_data(frames: Frames, node: Node) -> bool:
    return node in frames.evidence.inputs or node in frames.data[ROOT]


def _result(frames: Frames, unit: Frame) -> Node:
    """The one value that a module call gives to the outside."""
    inside = frames.data[unit]
    given = [
        n
        for n in inside
        if n in frames.evidence.outputs or any(u not in inside and _reads(frames, u) for u in n.users)
    ]
    if len(given) != 1 or not is_tensor(given[0]):
        raise Refusal(f"a value inside {unit.path or 'the model'} is read elsewhere too")
    return given[0]


def _reads(frames: Frames, user: Node) -> bool:
    return user not in frames.evidence.calls or user in frames.data[ROOT]


def _signature_fits(evidence: Evidence, unit: Frame) -> bool:
    signature = evidence.signatures.get(unit.path)
    return signature is not None and signature.unary


def _survivor(units: Sequence[Frame], model: nn.Module) -> Frame:
    """The module with the most weights keeps its place; the first of equals."""
    if not units:
        raise Refusal("its modules do not feed one another in a row")
    sizes = {u: sum(p.numel() for p in model.get_submodule(u.path).parameters()) for u in units}
    return max(units, key=lambda u: (sizes[u], -units.index(u)))


# Hooks that only compute a weight, which the evidence graph has seen and evaluated.
WEIGHT_HOOKS = frozenset({"WeightNorm", "SpectralNorm", "BasePruningMethod"})


def _check_module(model: nn.Module, path: str) -> None:
    """Site conditions on a module that is to be replaced, with all that is in it."""
    for name, module in model.get_submodule(path).named_modules():
        check_hooks(module, f"{path}.{name}".strip("."))


def check_hooks(module: nn.Module, path: str) -> None:
    """Raise Refusal where a module has hooks that do more than computing a weight."""
    hooks = [
        *module._forward_hooks.values(),
        *module._backward_hooks.values(),
        *module._forward_pre_hooks.values(),
    ]
    for hook in hooks:
        if not WEIGHT_HOOKS & {cls.__name__ for cls in type(hook).__mro__}:
            raise Refusal(f"{path or 'the model'} has a hook, which would be lost")


def _as_graph(frames: Frames, owner: Frame, home: Run, emptied: Sequence[Run], model: nn.Module) -> GraphEdit:
    if any(open_block(run) is not None for run in emptied):
        raise Refusal("the sum has a term that starts from another value")
    position = {node: index for index, node in enumerate(frames.calls[owner])}
    calls = {node for run in (home, *emptied) for node in calls_of(run.elements)}
    for path in {frame.path for node in calls for frame in (owner, *_below(frames.call(node), owner))}:
        check_hooks(model.get_submodule(path), path)
    opened: set[str] = set()
    for node in calls:
        opened.update(f.path for f in _below(frames.call(node), owner) if not frames.data[f] <= calls)
    regroup = None
    if (block := open_block(home)) is not None:
        check_sums(frames.evidence, block.sums)
        dropped = frozenset((position[edge.call], edge.index) for edge in dropped_edges(block))
        sums = tuple(sorted(position[node] for node in block.sums))
        regroup = Regroup(sums, dropped, position[block.target])

    def where(run: Run) -> tuple[int, ...]:
        return tuple(sorted(position[n] for n in calls_of(run.elements)))

    gone = tuple(where(run) for run in emptied)
    pieces: tuple[Piece, ...] = ()
    if (fork := fork_of(home)) is not None:
        pieces = tuple(_piece(frames.evidence, fork, branch[-1].target, position) for branch in fork.branches)
    return GraphEdit(owner.path, where(home), gone, frozenset(opened), regroup, pieces)


def _below(call: Call, owner: Frame) -> tuple[Frame, ...]:
    """The module calls inside ``owner`` that a call ran in."""
    return call.stack[call.stack.index(owner) + 1 :]


def open_block(run: Run) -> Block | None:
    """The part of a larger sum in which a run ends."""
    last = run.elements[-1]
    return last if isinstance(last, Block) and last.partial and not isinstance(last, Fork) else None


def edge_of(run: Run) -> Edge | None:
    """The operand of a concatenation that a run is, which has no calls then."""
    return run.elements[0].edge if isinstance(run.elements[0], Via) else None


def gap_of(run: Run) -> Gap | None:
    """The gap that a run is, which has no calls then."""
    return run.elements[0] if isinstance(run.elements[0], Gap) else None


def resized_of(run: Run) -> tuple[Node, Resized] | None:
    """The call that upsamples to a given size at the beginning of a run, taken for a filter."""
    first = run.elements[0]
    return (first.node, first.step) if isinstance(first, Leaf) and isinstance(first.step, Resized) else None


def fork_of(run: Run) -> Fork | None:
    """The siblings that a run is."""
    return run.elements[0] if isinstance(run.elements[0], Fork) else None


def _piece(evidence: Evidence, fork: Fork, value: Node, position: dict[Node, int]) -> Piece:
    assert fork.axis is not None
    channels = sum(evidence.size(branch[-1].target)[fork.axis] for branch in fork.branches)
    check_views(evidence, value, fork.axis, channels)
    return Piece(position[value], evidence.size(value)[fork.axis], fork.axis)


def dropped_edges(block: Block) -> list[Edge]:
    """The operands of a larger sum that vanish when a part of it becomes one operator."""
    found: list[Edge] = []
    for index, (branch, edge) in enumerate(zip(block.branches, block.edges, strict=True)):
        inner = next((e for e in reversed(branch) if not (isinstance(e, Leaf) and e.implied)), None)
        if isinstance(inner, Block) and inner.partial:
            found += dropped_edges(inner)
        if index != block.kept:
            found.append(edge)
    return found
