"""Which calls of the evidence ran in which module call."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx.node import Node

from convmerge.evidence.capture import ROOT, Call, Evidence, Frame, live_calls
from convmerge.evidence.constants import Constants
from convmerge.regions.elements import CHECKS


class Frames:
    """Which calls ran in which module call.

    Attributes:
        calls: by module call, in order.
        data: those that depend on the model's inputs and that something depends on.
        by_path: by module path, its calls.
    """

    def __init__(self, evidence: Evidence, constants: Constants) -> None:
        self.evidence = evidence
        self.constants = constants
        self.calls: dict[Frame, list[Node]] = {}
        self.data: dict[Frame, set[Node]] = {}
        self.by_path: dict[str, list[Frame]] = {}
        live = set(live_calls(list(evidence.calls)))
        for node, call in evidence.calls.items():
            for frame in call.stack:
                if frame not in self.calls:
                    self.calls[frame] = []
                    self.data[frame] = set()
                    self.by_path.setdefault(frame.path, []).append(frame)
                self.calls[frame].append(node)
                if node in live and node not in constants and call.op not in CHECKS:
                    self.data[frame].add(node)

    def call(self, node: Node) -> Call:
        """The call of a node."""
        return self.evidence.calls[node]

    def around(self, frame: Frame) -> tuple[Frame, ...]:
        """The module calls that a module call was made in, outermost first."""
        stack = self.call(self.calls[frame][0]).stack
        return stack[: stack.index(frame)]

    def unit_of(self, node: Node) -> Frame:
        """The module call whose code made a call; a wider one if all it adds is computing weights."""
        *outer, unit = self.call(node).stack
        for frame in reversed(outer):
            if self.data[frame] != self.data[unit]:
                break
            if len(self.calls[frame]) > len(self.calls[unit]):
                unit = frame
        return unit


def innermost_common(frames: Frames, nodes: Iterable[Node]) -> Frame:
    """The innermost module call in which all calls were made."""
    stacks = [frames.call(node).stack for node in nodes]
    common = ROOT
    for level in zip(*stacks, strict=False):
        if any(frame != level[0] for frame in level):
            break
        common = level[0]
    return common
