"""A torch.fx trace of one module, matched call by call with the evidence.

The trace is what gets edited; the evidence is what is known to be true. Each node of the trace is run as a
module of its own under torch.export, so that every exported call names the node that made it; the exported
calls must then be the same, in the same order and with the same data flow, as those the evidence shows for
that module.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.node import Node, map_arg

from convmerge.edit.tracer import arguments, trace_all_ways
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence, Frame, Signature, live_calls
from convmerge.evidence.constants import Constants, memory_root, view_of
from convmerge.evidence.tracing import VisibleData, drop_idle, must_be, quiet, unmarked


@dataclass(frozen=True, eq=False)
class Trace:
    """A traced module.

    Attributes:
        graph: its torch.fx graph, whose calls refer to the module's own submodules by path.
        made_by: position among the module's evidence calls → the trace node that made the call; those that
            nobody reads the result of are left out.
        constant: positions of the calls that do not depend on the model's inputs.
        numbers: parameters that were given numbers, such as sizes, and no tensors.
    """

    graph: fx.Graph
    made_by: dict[int, Node]
    constant: frozenset[int]
    numbers: frozenset[Node] = frozenset()


def retrace(
    module: nn.Module,
    frame: Frame,
    evidence: Evidence,
    constants: Constants,
    calls: Sequence[Node],
    opened: frozenset[str],
) -> Trace:
    """Trace ``module``; ``opened`` are the paths (from the module) whose own code is traced too.

    Raises Refusal where its code cannot be traced, or its trace is not what the evidence shows.
    """
    signature = evidence.signatures[frame.path]
    name = type(module).__name__
    try:
        graph = _trace(module, signature, opened)
    except Exception as error:  # torch.fx raises many types on code it cannot follow
        raise Refusal(f"the code of {name} cannot be traced: {_first_line(error)}") from error
    try:
        exported, made_by = _export_stepwise(module, graph, signature)
    except Exception as error:
        raise Refusal(f"the trace of {name} cannot be run by itself: {_first_line(error)}") from error
    by_step = dict(zip(exported, made_by, strict=True))
    live, live_exported = live_calls(calls), live_calls(exported)
    if not same_calls(live, live_exported):
        raise Refusal(f"a trace of {name} alone does not make the calls that the whole model makes in it")
    made = {call: by_step[other] for call, other in zip(live, live_exported, strict=True)}
    position = {call: p for p, call in enumerate(calls)}
    constant = frozenset(position[call] for call in live if call in constants)
    at = {position[call]: node for call, node in made.items()}
    return Trace(graph, at, constant, _numbers(module, graph, signature))


def _numbers(module: nn.Module, graph: fx.Graph, signature: Signature) -> frozenset[Node]:
    given = arguments(module, signature).items()
    plain = {name for name, value in given if isinstance(value, bool | int | float)}
    return frozenset(n for n in graph.nodes if n.op == "placeholder" and n.target in plain)


def _trace(module: nn.Module, signature: Signature, opened: frozenset[str]) -> fx.Graph:
    graph = trace_all_ways(module, signature, opened)
    for node in graph.find_nodes(op="call_function", target=_assert_is_none):
        _spell_out(graph, node)
    given = arguments(module, signature)
    for node in graph.find_nodes(op="call_function", target=torch._assert):
        name = str(node.args[1]).partition(" has been specialized ")[0]  # in the words of torch.fx
        if name in given:
            node.update_arg(1, must_be(name, given[name]))
    return graph


def _spell_out(graph: fx.Graph, node: Node) -> None:
    """Say that an argument is None in a way that torch.fx can trace again when a file is loaded."""
    value, message = node.args
    with graph.inserting_before(node):
        absent = graph.call_function(operator.eq, (value, None))
        graph.call_function(torch._assert, (absent, message))
    graph.erase_node(node)


class _Step(nn.Module):
    """One node of a trace, run as a module so that what it calls carries its name."""

    def __init__(self, node: Node, owner: nn.Module) -> None:
        super().__init__()
        self.node = node
        object.__setattr__(self, "owner_ref", [owner])

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node = self.node
        owner: nn.Module = cast(Any, self.owner_ref)[0]
        assert isinstance(node.target, str) or callable(node.target)
        if node.op == "call_module":
            return owner.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return _attribute(owner, str(node.target))
        return node.target(*args, **kwargs)  # type: ignore[operator]


class _Stepwise(nn.Module):
    def __init__(self, owner: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self.owner = owner
        self.graph = graph
        self.steps = nn.ModuleList(
            _Step(n, owner) for n in graph.nodes if n.op not in ("placeholder", "output")
        )

    def forward(self, *inputs: Any) -> Any:
        values: dict[Node, Any] = {}
        remaining, steps = iter(inputs), iter(self.steps)
        result = None

        def look_up(value: Any) -> Any:
            return map_arg(value, values.__getitem__)

        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(remaining)
            elif node.op == "output":
                result = look_up(node.args[0])
            else:
                values[node] = next(steps)(look_up(node.args), look_up(node.kwargs))
        return result


def _export_stepwise(
    module: nn.Module, graph: fx.Graph, signature: Signature
) -> tuple[list[Node], list[Node]]:
    inputs = tuple(arguments(module, signature).values())
    with quiet(), unmarked(module), VisibleData(), torch.no_grad():
        program = torch.export.export(_Stepwise(module, graph), inputs, strict=False)
    drop_idle(program.graph)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    exported, made_by = [], []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        step = _step_of(node)
        if step is None:
            raise ValueError(f"{node.name} was made by no step")
        exported.append(node)
        made_by.append(nodes[step])
    return exported, made_by


def _step_of(node: Node) -> int | None:
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        parts = path.split("@")[0].split(".")
        if len(parts) == 2 and parts[0] == "steps":
            return int(parts[1])
    return None


def _attribute(owner: nn.Module, path: str) -> Any:
    value: Any = owner
    for name in path.split("."):
        value = getattr(value, name)
    return value


def same_calls(left: Sequence[Node], right: Sequence[Node]) -> bool:
    """Whether two sequences of calls are the same operators on the same values.

    Values made outside match if they are used alike everywhere.
    """
    if len(left) != len(right):
        return False
    matched: dict[Node, Node] = {}
    back: dict[Node, Node] = {}
    made_here = set(left)
    for a, b in zip(left, right, strict=True):
        if not same_operator(a, b, made_here) or not _same_value(
            (a.args, a.kwargs), (b.args, b.kwargs), matched, back
        ):
            return False
        matched[a], back[b] = b, a
    return True


def same_operator(a: Node, b: Node, made_here: set[Node]) -> bool:
    """The same target, or its out-of-place form where what was written to is the module's own.

    ``y += x`` under torch.fx becomes ``y + x``: the same value, and nobody else can tell.
    """
    if a.target is b.target:
        return True
    if view_of(a) is None or memory_root(a) not in made_here:
        return False
    return str(a.target).replace("_.", ".") == str(b.target)


def _same_value(a: Any, b: Any, matched: dict[Node, Node], back: dict[Node, Node]) -> bool:
    if isinstance(a, Node) and isinstance(b, Node):
        if a.op == "call_function" and a not in matched and b.op == "call_function":
            return False
        known = matched.setdefault(a, b)
        return known is b and back.setdefault(b, a) is a
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same_value(x, y, matched, back) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same_value(a[k], b[k], matched, back) for k in a)
    return type(a) is type(b) and bool(a == b)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__
