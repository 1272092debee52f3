"""Layers side by side, each on channels of its own: blocks that differ, or that a permutation hides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Node

from convmerge.affine import Affine, Geometry
from convmerge.algebra.components import Channels
from convmerge.emit.build import build
from convmerge.emit.interleave import plain_graph_module
from convmerge.emit.layer import Emission


@dataclass(frozen=True)
class Branch:
    """Some of the outputs, from some of the inputs, in the order that their layers want.

    Attributes:
        inputs, outputs: channels.
        emission: what computes one from the other.
    """

    inputs: Channels
    outputs: Channels
    emission: Emission

    @property
    def geometry(self) -> Geometry:
        """The last layer's geometry, which has the groups and the bias."""
        return self.emission.layers[-1].geometry


@dataclass(frozen=True)
class Parallel:
    """A form as layers side by side, each on channels of its own; every output belongs to one of them.

    Attributes:
        whole: the geometry of all of them as one dense form.
        branches: at least one.
    """

    whole: Geometry
    branches: tuple[Branch, ...]

    @property
    def order(self) -> Channels:
        """The outputs in the order in which the branches give them."""
        return tuple(channel for branch in self.branches for channel in branch.outputs)

    def __str__(self) -> str:
        parts = [f"{_taken(branch.inputs)}{branch.emission}" for branch in self.branches]
        shown = ", ".join(parts) if len(parts) <= 3 else f"{parts[0]}, … ({len(parts)} branches)"
        return shown if run_of(self.order) == 0 else f"{shown} → index_select"


def _taken(inputs: Channels) -> str:
    return "" if run_of(inputs) is not None else "index_select → "


def run_of(channels: Channels) -> int | None:
    """The first of channels that follow one another; None where they do not."""
    start = channels[0]
    return start if channels == tuple(range(start, start + len(channels))) else None


def build_parallel(
    p: Parallel,
    forms: Sequence[Affine],
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> fx.GraphModule:
    """A module of class ``BlockDiagonal`` that computes ``forms``, one for each branch, side by side.

    Raises:
        Refusal: as :func:`convmerge.emit.build`.
    """
    style: dict[str, Any] = {
        "device": device,
        "requires_grad": requires_grad,
        "memory_format": memory_format,
    }
    root = nn.Module()
    writer = _Writer(root, p, device)
    for index, (branch, form) in enumerate(zip(p.branches, forms, strict=True)):
        root.add_module(f"block_{index}", build(form, branch.emission, dtype, **style))
    return plain_graph_module(root, writer.write(), "BlockDiagonal")


class _Writer:
    """Writes the graph of layers side by side; index buffers go into ``root``."""

    def __init__(self, root: nn.Module, p: Parallel, device: torch.device | str) -> None:
        self.root = root
        self.p = p
        self.device = device
        self.dim = -p.whole.spatial - 1  # from the end, so that inputs without a batch work as well
        self.graph = fx.Graph()

    def write(self) -> fx.Graph:
        x = self.graph.placeholder("x")
        parts = []
        for index, branch in enumerate(self.p.branches):
            part = self._taken(x, branch.inputs, self.p.whole.in_channels, f"inputs_{index}")
            parts.append(self.graph.call_module(f"block_{index}", (part,)))
        y = parts[0] if len(parts) == 1 else self.graph.call_function(torch.cat, (parts, self.dim))
        order = self.p.order
        back = sorted(range(len(order)), key=order.__getitem__)
        self.graph.output(self._taken(y, tuple(back), len(back), "outputs"))
        return self.graph

    def _taken(self, x: Node, channels: Channels, count: int, name: str) -> Node:
        """Channels of x, which has ``count``: x itself, a slice, or a copy in another order."""
        start = run_of(channels)
        if start is not None:
            arguments = (x, self.dim, start, len(channels))
            return x if len(channels) == count else self.graph.call_method("narrow", arguments)
        self.root.register_buffer(name, torch.tensor(channels, device=self.device))
        return self.graph.call_function(torch.index_select, (x, self.dim, self.graph.get_attr(name)))
