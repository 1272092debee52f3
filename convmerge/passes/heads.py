"""Heads: what a model computes between a feature map that it flattens or pools away and its outputs.

A value of the head, (N, F) in the model, becomes a map (N, F, *) with one position for every window of the
feature map. Every call of the head must act on each position by itself and in the same way, as it does on
each sample of a batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.fx.node import Node

from convmerge.affine import Dims
from convmerge.errors import Refusal
from convmerge.evidence.capture import Call, Evidence, is_tensor, nodes_of
from convmerge.passes.edits import Change
from convmerge.passes.headrules import KEPT, Lifted, Weights, rule_for
from convmerge.passes.pools import Pool, flattens, global_pool
from convmerge.recognise import Context
from convmerge.regions.elements import CHECKS


@dataclass(frozen=True, eq=False)
class Head:
    """One output of a model, with everything between the feature maps and it.

    Attributes:
        output: the value that the model returns.
        window: spatial size of the feature maps on the example inputs, which one output looks at.
        maps: the feature maps.
        calls: the calls between, in execution order.
        entries: those of them that read a feature map → how they make (N, F) or (N, F, *) of it.
        changes: what becomes of the calls that cannot stay as they are.
    """

    output: Node
    window: Dims
    maps: tuple[Node, ...]
    calls: tuple[Node, ...]
    entries: dict[Node, Change]
    changes: dict[Node, Change]


@dataclass(eq=False)
class _Walk:
    """Calls on the way back from an output, and the maps where the way ends."""

    calls: set[Node] = field(default_factory=set)
    maps: set[Node] = field(default_factory=set)
    pools: dict[Node, Pool] = field(default_factory=dict)


def find_heads(context: Context, model: nn.Module) -> tuple[list[Head], dict[Node, str]]:
    """The heads that can work on maps, and why the other outputs cannot.

    Outputs that are maps already stay what they are.
    """
    finder = _Finder(context, Weights(context, model))
    heads: list[Head] = []
    refused: dict[Node, str] = {}
    for output in (n for n in context.evidence.graph.nodes if n in context.evidence.outputs):
        if is_tensor(output) and _is_vector(context.evidence, output):
            try:
                heads.append(finder.head(output))
            except Refusal as refusal:
                if len(context.evidence.size(output)) <= 2:
                    refused[output] = refusal.reason
    while True:
        inside = {call for head in heads for call in head.calls}
        problems = {h.output: reason for h in heads if (reason := _read_elsewhere(context, h, inside))}
        if not problems:
            return heads, refused
        refused |= problems
        heads = [head for head in heads if head.output not in problems]


def _is_vector(evidence: Evidence, node: Node) -> bool:
    """Whether a value has no spatial extent."""
    size = evidence.size(node)
    return 0 < len(size) <= 2 or all(n == 1 for n in size[2:])


def _read_elsewhere(context: Context, head: Head, inside: set[Node]) -> str | None:
    for node in head.calls:
        for user in node.users:
            call = context.evidence.calls.get(user)
            if call is not None and user not in inside and call.op not in CHECKS:
                return f"a value of the head is also read by {call.op} of {call.leaf}"
    return None


class _Finder:
    def __init__(self, context: Context, weights: Weights) -> None:
        self.context = context
        self.evidence = context.evidence
        self.weights = weights
        images = [
            i for i in self.evidence.inputs if is_tensor(i) and self.evidence.dtype(i).is_floating_point
        ]
        self.image_ranks = {len(self.evidence.size(image)) for image in images}

    def head(self, output: Node) -> Head:
        """The head of one output. Raises Refusal."""
        walk = self._walk_back(output)
        if not walk.maps:
            raise Refusal("the output does not depend on a map")
        for node in walk.maps:
            if len(self.evidence.size(node)) not in self.image_ranks:
                raise Refusal(
                    f"it starts from {_times(self.evidence.size(node))}, which is no map of the input"
                )
        values: dict[Node, Lifted] = {}
        entries: dict[Node, Change] = {}
        changes: dict[Node, Change] = {}
        calls = tuple(sorted(walk.calls, key=lambda node: self.evidence.calls[node].index))
        for node in calls:
            if (pool := walk.pools.get(node)) is not None:
                values[node] = pool.lifted
                entries[node] = Change(pool.source, pool.calls, pool.on_a_window())
                changes[node] = Change(pool.source, pool.calls, pool.on_windows())
            else:
                self._apply(self.evidence.calls[node], values, entries, changes)
        final = values[output]
        if math.prod(final.kernel) != 1:
            raise Refusal("the flattened map itself is an output")
        every = {call for pool in walk.pools.values() for call in pool.calls}
        calls = tuple(sorted(walk.calls | every, key=lambda node: self.evidence.calls[node].index))
        return Head(output, final.window, tuple(walk.maps), calls, entries, changes)

    def _apply(
        self,
        call: Call,
        values: dict[Node, Lifted],
        entries: dict[Node, Change],
        changes: dict[Node, Change],
    ) -> None:
        """Work out what one call gives, and what becomes of it."""
        sources = self._sources(call)
        if flattens(self.evidence, call):
            source = sources[0]
            if source not in values:  # the map itself
                size = self.evidence.size(source)[2:]
                values[call.node] = Lifted(size, size, (1,) * len(size), None)
                entries[call.node] = Change(source, (call.node,), nn.Flatten(1))
            else:
                values[call.node] = values[source].flattened()
            changes[call.node] = Change(source, (call.node,), None)
            return
        rule = rule_for(call)
        assert rule is not None  # or the walk would not have passed
        values[call.node], layer = rule(self.weights, call, [values[source] for source in sources])
        if layer is not KEPT:
            changes[call.node] = Change(sources[0], (call.node,), layer)

    def _sources(self, call: Call) -> list[Node]:
        """The tensors that a call reads and that depend on an input."""
        return [n for n in nodes_of((call.node.args, call.node.kwargs)) if n not in self.context.constants]

    def _walk_back(self, output: Node) -> _Walk:
        walk, pending = _Walk(), deque([output])  # the nearest calls first: what they lack is the reason
        while pending:
            node = pending.popleft()
            if node in walk.calls:
                continue
            call = self._call(node)
            walk.calls.add(node)
            if (pool := global_pool(self.evidence, call)) is not None:
                walk.pools[node] = pool
                walk.maps.add(pool.source)
            elif flattens(self.evidence, call):
                source = self._sources(call)[0]
                if not self._walk_to_pools(source, walk):
                    walk.maps.add(source)
            elif rule_for(call) is not None:
                self._check_axes(call)
                pending += self._sources(call)
            else:
                raise Refusal(self._no_rule(call))
        return walk

    def _call(self, node: Node) -> Call:
        call = self.evidence.calls.get(node)
        if call is None:
            raise Refusal(f"it also depends on the input {node.name} directly, which has no windows")
        return call

    def _walk_to_pools(self, value: Node, walk: _Walk) -> bool:
        """Whether a map comes from pools through calls that act on each position; then they join the walk."""
        found, pending = _Walk(), [value]
        while pending:
            node = pending.pop()
            if node in found.calls:
                continue
            call = self.evidence.calls.get(node)
            if call is None:
                return False
            found.calls.add(node)
            if (pool := global_pool(self.evidence, call)) is not None:
                found.pools[node] = pool
                found.maps.add(pool.source)
            elif rule_for(call) is not None:
                pending += self._sources(call)
            else:
                return False
        walk.calls |= found.calls
        walk.maps |= found.maps
        walk.pools |= found.pools
        return True

    def _check_axes(self, call: Call) -> None:
        """Raise Refusal where a call leaves a vector of something that is no map."""
        for size in (self.evidence.size(s) for s in self._sources(call) if is_tensor(s)):
            if math.prod(size[2:]) > 1 and is_tensor(call.node) and len(self.evidence.size(call.node)) <= 2:
                where = f"{call.op} of {call.leaf} on {_times(size)}"
                raise Refusal(f"{where} keeps other axes than the channels of a map, as of tokens")

    def _no_rule(self, call: Call) -> str:
        shapes = " and ".join(_times(self.evidence.size(s)) for s in self._sources(call) if is_tensor(s))
        return f"{call.op} of {call.leaf} on {shapes} is not known to act on every window by itself"


def _times(size: Sequence[int]) -> str:
    return "×".join(map(str, size))
