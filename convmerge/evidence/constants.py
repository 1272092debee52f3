"""Partial evaluation: everything that does not depend on an input is a constant, evaluated in float64.

A model in double precision is evaluated as it is instead: where it rounds to float32 in between, its function
does.

That alone turns weight standardisation, weight_norm, parametrizations, pruning masks, DO-Conv's einsum and
gates of parameters into plain tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.evidence.capture import Call, Evidence, is_tensor, nodes_of


class Constants:
    """Which values of the evidence graph are constant, and their values.

    A value is constant if it depends on parameters, buffers and literals alone and none of what it depends
    on is random, written to by something that depends on an input, or a buffer that every run changes.
    """

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._known: dict[Node, Any] = {}
        self.widened = not any(tensor.dtype == torch.float64 for _, tensor in evidence.tensors.values())
        self._fills = {n: value for n in evidence.calls if (value := _fill_value(evidence, n)) is not None}
        data = set(evidence.inputs)
        changed = True
        while changed:  # a second round only where a constant's memory is written with data
            changed = False
            for node, call in evidence.calls.items():
                if node in data or node in self._fills:
                    continue
                sources = nodes_of((node.args, node.kwargs))
                random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
                if random or any(source in data for source in sources) or _drifts(evidence, call):
                    data.add(node)
                    written = call.mutates and sources and sources[0] not in data
                    if written and sources[0] not in self._fills:
                        data.update(_memory_of(sources[0]))
                        changed = True
        self._data = data
        self._mutable = [node for node, call in evidence.calls.items() if call.mutates and node not in data]

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and node not in self._data

    def uniform(self, node: object) -> bool:
        """Whether a value is one number in whatever shape the data around it has; its value is 0-d then."""
        return node in self._fills

    def value(self, node: Node) -> Any:
        """The constant's value on the CPU; real floating-point tensors of a model in single or half precision
        as float64. Raises KeyError on data.
        """
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
            sources = () if node in self._fills else nodes_of((node.args, node.kwargs))
            missing = [s for s in sources if s not in self._known]
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
            wide = tensor.to(torch.float64) if tensor.is_floating_point() and self.widened else tensor
            return wide.clone() if wide is tensor and self._mutable else wide
        if node in self._fills:
            return torch.tensor(self._fills[node], dtype=torch.float64)
        return run_call(node, self._known.__getitem__, widened=self.widened)


WIDE = {dtype: torch.float64 for dtype in (torch.float16, torch.bfloat16, torch.float32)} | {
    dtype: torch.complex128 for dtype in (torch.complex32, torch.complex64)
}
FILLS = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}
ELEMENTWISE = frozenset({"add", "sub", "rsub", "mul"})


def _fill_value(evidence: Evidence, node: Node) -> float | None:
    """The number of a tensor of zeros or ones that is only ever combined with one other tensor of its shape.

    Such tensors follow the shape of the data; a sum that is accumulated begins with one.
    """
    number = FILLS.get(evidence.calls[node].op)
    if number is None or len(node.users) != 1 or not is_tensor(node):
        return None
    (user,) = node.users
    call, others = evidence.calls.get(user), [n for n in user.all_input_nodes if n is not node]
    alike = (
        call is not None
        and call.op in ELEMENTWISE
        and len(others) == 1
        and all(is_tensor(n) and n.meta["val"].shape == node.meta["val"].shape for n in others)
    )
    return number if alike and node.meta["val"].is_floating_point() else None


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


def run_call(node: Node, lookup: Any, *, widened: bool = True) -> Any:
    """Run one call of the evidence graph on the CPU, with floating point widened to float64."""

    def plain(value: Any) -> Any:
        if isinstance(value, Node):
            return lookup(value)
        if isinstance(value, torch.dtype) and widened:
            return WIDE.get(value, value)
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
    if factory and kwargs.get("dtype") is None and isinstance(val := node.meta.get("val"), Tensor):
        # Or it would follow the global default and be float32.
        kwargs["dtype"] = WIDE.get(val.dtype, val.dtype) if widened else val.dtype
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
