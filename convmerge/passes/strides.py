"""How positions of a feature map lie in the input, and whether what leads to it looks the same everywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch.fx.node import Node

from convmerge.affine import Dims
from convmerge.evidence.capture import Call, is_tensor, nodes_of
from convmerge.passes.headrules import rule_for
from convmerge.recognise import Context

SLIDING = re.compile(r"(conv|avg_pool|max_pool)[123]d")
BY_CHANNEL = frozenset(["cat", "slice", "chunk", "split", "split_with_sizes", "getitem", "batch_norm"])


@dataclass(frozen=True)
class Strides:
    """Of a feature map.

    Attributes:
        steps: distance of its positions in the input; None where that is not known.
        borders: why a window of the input, taken by itself, gives another map; None where it gives the same.
    """

    steps: Dims | None
    borders: str | None


def strides_to(context: Context, feature_map: Node) -> Strides:
    """Follow the calls from the inputs to ``feature_map``, (N, C, *size)."""
    evidence = context.evidence
    spatial = len(evidence.size(feature_map)) - 2
    steps: dict[Node, Dims | None] = {}
    borders: str | None = None
    for node in _ancestors(context, feature_map):
        call = evidence.calls.get(node)
        if call is None:
            steps[node] = (
                (1,) * spatial if is_tensor(node) and len(evidence.size(node)) == spatial + 2 else None
            )
            continue
        before = {steps[s] for s in nodes_of((node.args, node.kwargs)) if s in steps}
        known = before - {None}
        steps[node] = known.pop() if len(known) == 1 else None
        if SLIDING.fullmatch(call.op) and (so_far := steps[node]) is not None:
            stride = _dims(call.args["stride"] or call.args["kernel_size"], spatial)
            steps[node] = tuple(a * b for a, b in zip(so_far, stride, strict=True))
        borders = borders or _border(call)
        if not _keeps_steps(call):
            steps[node] = None
    return Strides(steps[feature_map], borders)


def _ancestors(context: Context, node: Node) -> list[Node]:
    """What a value depends on, itself included, without constants, in execution order."""
    found, pending = {node}, [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found and source not in context.constants:
                found.add(source)
                pending.append(source)
    return [n for n in context.evidence.graph.nodes if n in found]


def _border(call: Call) -> str | None:
    """Why a call sees where the border is, or None."""
    if SLIDING.fullmatch(call.op):
        padding: Any = call.args["padding"]
        padded = padding == "same" if isinstance(padding, str) else any(padding)
        if call.args.get("ceil_mode"):
            return f"{call.leaf} rounds sizes up"
        return f"{call.leaf} pads" if padded else None
    if rule_for(call) is None and call.op not in BY_CHANNEL:
        return f"{call.op} of {call.leaf} does not look at windows alone"
    return None


def _keeps_steps(call: Call) -> bool:
    return bool(SLIDING.fullmatch(call.op)) or rule_for(call) is not None or call.op in BY_CHANNEL


def _dims(value: Any, spatial: int) -> Dims:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(int(v) for v in (values * spatial if len(values) == 1 else values))
