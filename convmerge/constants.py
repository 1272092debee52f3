"""Partial evaluation: everything that does not depend on an input is a constant, evaluated in float64.

That alone turns weight standardisation, weight_norm, parametrizations, pruning masks, DO-Conv's einsum and
gates of parameters into plain tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.capture import Call, Evidence, nodes_of


class Constants:
    """Which values of the evidence graph are constant, and their values.

    A value is constant if it depends on parameters, buffers and literals alone and none of what it depends
    on is random, written to by something that depends on an input, or a buffer that every run changes.
    """

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._known: dict[Node, Any] = {}
        data = set(evidence.inputs)
        changed = True
        while changed:  # a second round only where a constant's memory is written with data
            changed = False
            for node, call in evidence.calls.items():
                if node in data:
                    continue
                sources = nodes_of((node.args, node.kwargs))
                random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
                if random or any(source in data for source in sources) or _drifts(evidence, call):
                    data.add(node)
                    if call.mutates and sources and sources[0] not in data:
                        data.update(_memory_of(sources[0]))
                        changed = True
        self._data = data
        self._mutable = [node for node, call in evidence.calls.items() if call.mutates and node not in data]

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and node not in self._data

    def value(self, node: Node) -> Any:
        """The constant's value on the CPU; floating-point tensors as float64. Raises KeyError on data."""
        if node in self._data:
            raise KeyError(node)
        if node not in self._known:
            if self._mutable:
                self._run_in_order()
            else:
                self._run_for(node)
        return self._known[node]

    def tensor(self, value: object) -> Tensor | None:
        """A constant argument (a node or a number) as a float64 tensor; None if it is data."""
        if isinstance(value, bool | int | float):
            return torch.tensor(float(value), dtype=torch.float64)
        if value in self and isinstance(result := self.value(value), Tensor):  # type: ignore[arg-type]
            return result.to(torch.float64)
        return None

    def release(self) -> None:
        """Forget evaluated values, so that a whole model never stands in memory in float64."""
        if not self._mutable:
            self._known.clear()

    def _run_for(self, wanted: Node) -> None:
        pending = [wanted]
        while pending:
            node = pending[-1]
            missing = [s for s in nodes_of((node.args, node.kwargs)) if s not in self._known]
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            self._known[node] = self._evaluate(node)

    def _run_in_order(self) -> None:
        # Where constants are written in place, only execution order gives every value its true content.
        for node in self._evidence.graph.nodes:
            if node in self._data or node.op == "output":
                continue
            self._known[node] = self._evaluate(node)

    def _evaluate(self, node: Node) -> Any:
        if node in self._evidence.tensors:
            tensor = self._evidence.tensors[node][1].detach().cpu()
            wide = tensor.to(torch.float64) if tensor.is_floating_point() else tensor
            return wide.clone() if wide is tensor and self._mutable else wide
        return run_call(node, self._known.__getitem__)


OVERWRITES = frozenset({"copy", "fill", "zero"})


def _drifts(evidence: Evidence, call: Call) -> bool:
    """Whether a call makes a parameter or a buffer another one after every run of the model.

    Overwriting it with what does not depend on it leaves the same every time.
    """
    sources = nodes_of((call.node.args, call.node.kwargs)) if call.mutates else []
    if not sources or (written := memory_root(sources[0])) not in evidence.tensors:
        return False
    return call.op not in OVERWRITES or any(_depends(other, written) for other in sources[1:])


def _depends(node: Node, on: Node) -> bool:
    seen: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current is on:
            return True
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False


def run_call(node: Node, lookup: Any) -> Any:
    """Run one call of the evidence graph with floating point widened to float64, on the CPU."""

    def plain(value: Any) -> Any:
        if isinstance(value, Node):
            return lookup(value)
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, list | tuple):
            return type(value)(plain(v) for v in value)
        return value

    args = tuple(plain(a) for a in node.args)
    kwargs = {key: plain(value) for key, value in node.kwargs.items()}
    schema = getattr(node.target, "_schema", None)
    factory = (
        schema is not None and "dtype" in {a.name for a in schema.arguments} and not node.all_input_nodes
    )
    if factory and kwargs.get("dtype") is None and node.meta["val"].dtype.is_floating_point:
        kwargs["dtype"] = torch.float64  # or it would follow the global default and be float32
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _memory_of(node: Node) -> set[Node]:
    """The node whose memory a value shares, found through views, with every view of it."""
    root = memory_root(node)
    found, pending = {root}, [root]
    while pending:
        for user in pending.pop().users:
            if view_of(user) in found and user not in found:
                found.add(user)
                pending.append(user)
    return found


def memory_root(node: Node) -> Node:
    """The value whose memory ``node`` shares through views and in-place writes."""
    while (base := view_of(node)) is not None:
        node = base
    return node


def view_of(node: Node) -> Node | None:
    """The value whose memory ``node`` may share, by the operator's schema; None for fresh memory."""
    if node.op != "call_function":
        return None
    if getattr(node.target, "__name__", "") == "getitem":
        source = node.args[0]
        return source if isinstance(source, Node) else None
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else ""
    if name == "pad" and any(node.args[1]):  # type: ignore[arg-type]
        return None
    aliased = schema is not None and any(r.alias_info is not None for r in schema.returns)
    if aliased or name in MAY_ALIAS:
        for value in (*node.args, *node.kwargs.values()):
            for source in nodes_of(value):
                return source
    return None


# Composite operators that return their input or a view of it without saying so in their schema.
MAY_ALIAS = frozenset(
    [
        "contiguous",
        "reshape",
        "flatten",
        "to",
        "type_as",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "unflatten",
        "chunk",
        "split",
        "tensor_split",
        "unbind",
        "movedim",
        "swapaxes",
        "moveaxis",
        "expand_as",
        "view_as",
        "float",
        "double",
        "half",
        "squeeze",
        "unsqueeze",
        "narrow",
        "pad",
        "broadcast_to",
        "_to_copy",
    ]
)
