"""Do two captures make the same calls on what depends on their inputs?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.edit.retrace import same_operator
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence, is_tensor, live_calls
from convmerge.evidence.constants import Constants
from convmerge.regions.elements import CHECKS


def agreement(
    left: Evidence, left_constants: Constants, right: Evidence, right_constants: Constants
) -> dict[Node, Node]:
    """The constants that the calls of ``left`` read → those that ``right`` has in their places.

    Raises Refusal where the calls on data are not the same operators, in the same order and with the same
    data flow, or read constants of other values.
    """
    return _Matching(left, left_constants, right, right_constants).run()


def resolutions(evidence: Evidence) -> dict[Node, float]:
    """Value → the largest rounding unit (``eps``) of the floating-point numbers that it is computed from."""
    found: dict[Node, float] = {}
    for node in evidence.graph.nodes:
        eps = [found[source] for source in node.all_input_nodes if source in found]
        if is_tensor(node) and evidence.dtype(node).is_floating_point:
            eps.append(torch.finfo(evidence.dtype(node)).eps)
        if eps:
            found[node] = max(eps)
    return found


class _Matching:
    def __init__(
        self, left: Evidence, left_constants: Constants, right: Evidence, right_constants: Constants
    ) -> None:
        self._sides = (left, left_constants), (right, right_constants)
        self._data: dict[Node, Node] = {}
        self._back: dict[Node, Node] = {}
        self._constants: dict[Node, Node] = {}
        self._resolutions = resolutions(right)

    def run(self) -> dict[Node, Node]:
        calls = [_data_calls(*side) for side in self._sides]
        made_here = set(calls[0]) | set(calls[1])
        if len(calls[0]) != len(calls[1]):
            raise _other()
        for a, b in zip(*calls, strict=True):
            same = same_operator(a, b, made_here) or same_operator(b, a, made_here)
            if not same or not self._same((a.args, a.kwargs), (b.args, b.kwargs)):
                raise _other()
            self._data[a], self._back[b] = b, a
        for a, b in self._constants.items():
            self._check_values(a, b)
        return self._constants

    def _same(self, a: Any, b: Any) -> bool:
        if isinstance(a, Node) and isinstance(b, Node):
            return self._same_node(a, b)
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return len(a) == len(b) and all(map(self._same, a, b))
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            return a.keys() == b.keys() and all(self._same(a[k], b[k]) for k in a)
        return type(a) is type(b) and bool(a == b)

    def _same_node(self, a: Node, b: Node) -> bool:
        constant = [node in constants for node, (_, constants) in zip((a, b), self._sides, strict=True)]
        if all(constant):
            self._constants[a] = b
            return True
        if any(constant) or (a.op == "call_function" and a not in self._data):
            return False
        return self._data.setdefault(a, b) is b and self._back.setdefault(b, a) is a

    def _check_values(self, a: Node, b: Node) -> None:
        (left, left_constants), (right, right_constants) = self._sides
        if a in left.tensors and b in right.tensors and _same_weight(left.tensors[a], right.tensors[b]):
            return
        x, y = left_constants.value(a), right_constants.value(b)
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            same = type(x) is type(y) and bool(x == y)
        else:
            same = left.dtype(a) == right.dtype(b) and _close(x, y, self._resolutions.get(b, 0.0))
        if not same:
            raise Refusal("a trace of the model computes other values from them than the model does")


def _data_calls(evidence: Evidence, constants: Constants) -> list[Node]:
    return [
        node
        for node in live_calls(list(evidence.calls))
        if node not in constants and evidence.calls[node].op not in CHECKS
    ]


def _same_weight(a: tuple[str, Tensor], b: tuple[str, Tensor]) -> bool:
    return a[1].shape == b[1].shape and a[1].dtype == b[1].dtype and torch.equal(a[1], b[1])


def _close(x: Tensor, y: Tensor, eps: float) -> bool:
    """Equal up to what rounding may do on the way; a batch of one stands for equal samples."""
    try:
        shape = np.broadcast_shapes(x.shape, y.shape)
        x, y = x.expand(shape), y.expand(shape)
    except ValueError:
        return False
    if not x.is_floating_point() and not x.is_complex():
        return torch.equal(x, y.to(x.dtype))
    scale = float(y.abs().nan_to_num().max()) if y.numel() else 0.0
    return torch.allclose(x, y.to(x.dtype), rtol=0.0, atol=scale * eps**0.5, equal_nan=True)


def _other() -> Refusal:
    return Refusal("a trace of the model does not make the calls that the model makes")
