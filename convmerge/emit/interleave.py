"""Channels that are phases of an upsampled map, put where they belong, in any number of dimensions."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Node

from convmerge.affine import Geometry
from convmerge.algebra.axis import Axis, axes, from_axes


class Interleaving(NamedTuple):
    """One dimension: output up*q + p - start of the result is phase p at position q of the input.

    Attributes:
        up: number of phases.
        start, end: outputs dropped before and after.
    """

    up: int
    start: int
    end: int

    @property
    def whole(self) -> bool:
        """Whether what is dropped is as many positions of every phase."""
        return (self.start + self.end) % self.up == 0

    def phases(self) -> list[tuple[int, slice]]:
        """In the order of the output each phase, and which positions of it are kept: all if not ``whole``."""
        if not self.whole:
            return [(phase, slice(None)) for phase in range(self.up)]
        dropped = (self.start + self.end) // self.up
        turns = (divmod(p, self.up) for p in range(self.start, self.start + self.up))
        return [(phase, slice(first or None, (first - dropped) or None)) for first, phase in turns]


def interleaving_geometry(channels: int, dims: Sequence[Interleaving]) -> Geometry:
    """Interleaving as a form: (channels * phases) in, ``channels`` out, the phases of a channel in a row."""
    shuffles = (Axis(d.up, d.up, 1, 1, d.up - 1 - d.start, d.up - 1 - d.end) for d in dims)
    return from_axes(channels * math.prod(d.up for d in dims), channels, channels, shuffles)


def interleavings(g: Geometry) -> list[Interleaving]:
    """The dimensions of :func:`interleaving_geometry`."""
    return [Interleaving(a.up, a.up - 1 - a.lo, a.up - 1 - a.hi) for a in axes(g)]


def interleave(graph: fx.Graph, y: Node, channels: int, dims: Sequence[Interleaving]) -> Node:
    """Write the calls that interleave the phases of (..., channels * phases, *spatial) into a graph.

    One dimension after the other, the last first: stack its phases behind it, and flatten. What is dropped is
    sliced off before anything is copied wherever all phases are then of one size.
    """
    n, up = len(dims), [d.up for d in dims]
    if n == 2 and up[0] == up[1] and not any(d.start or d.end for d in dims):
        return graph.call_function(F.pixel_shuffle, (y, up[0]))
    # (..., channels, u1, ..., un, s1, ..., sn): whichever phases are the last stand at -n-1.
    y = graph.call_method("unflatten", (y, -n - 1, (channels, *up)))
    for at, dim in reversed(list(enumerate(dims, start=-n))):
        parts = [_phase(graph, y, n, at, *phase) for phase in dim.phases()]
        y = graph.call_function(torch.stack, (parts, at))
        y = graph.call_method("flatten", (y, at - 1, at))
    if all(d.whole for d in dims):
        return y
    kept: Any = (..., *(slice(None) if d.whole else slice(d.start or None, -d.end or None) for d in dims))
    y = graph.call_function(operator.getitem, (y, kept))
    return graph.call_method("contiguous", (y,))


def interleaver(g: Geometry) -> fx.GraphModule:
    """A module that computes :func:`interleaving_geometry`; takes inputs without a batch as well."""
    graph = fx.Graph()
    graph.output(interleave(graph, graph.placeholder("x"), g.out_channels, interleavings(g)))
    return plain_graph_module(nn.Module(), graph, f"Interleave{g.spatial}d")


def plain_graph_module(root: nn.Module, graph: fx.Graph, class_name: str) -> fx.GraphModule:
    """A GraphModule that loads with torch alone, whatever tracer its graph becomes part of."""
    graph.lint()
    module = fx.GraphModule(root, graph, class_name=class_name)
    module.graph._tracer_cls = fx.Tracer
    module._tracer_cls = fx.Tracer
    return module


def _phase(graph: fx.Graph, y: Node, n: int, at: int, phase: int, kept: slice) -> Node:
    """One phase of those at -n-1, and of its positions along ``at`` (negative) those to be kept."""
    where = [slice(None)] * n
    where[at] = kept
    index: Any = (..., phase, *where)
    return graph.call_function(operator.getitem, (y, index))
