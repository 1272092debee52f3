"""A filter behind nearest upsampling to a given size, as one layer that is given the size too.

Where the size is a whole multiple of the input's, that is one form. Twice the input's less one, as where maps
of odd sizes were halved before, is the same with the last output of a dimension dropped, save for those
outputs that read beyond the last: a few rows and columns, computed anew as they were.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Node

from convmerge.affine import Affine, Dims, Geometry
from convmerge.emit.build import build
from convmerge.emit.interleave import plain_graph_module
from convmerge.emit.layer import Emission
from convmerge.emit.ways import emissions
from convmerge.errors import Refusal

SIZES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
# From here on, torch computes some neighbours of n in 2n - 1 wrongly, as it multiplies in single precision.
LIMIT = 2048


@dataclass(frozen=True)
class Sized:
    """A filter behind nearest upsampling to a given size.

    Attributes:
        main: how the form at the whole multiple is built.
        up: what multiple that is.
        edge: the filter alone, where the size can be one less; else None.
    """

    main: Emission
    up: Dims
    edge: Geometry | None

    @property
    def rows(self) -> Dims:
        """By dimension, how many outputs at the end are computed anew."""
        return self.edge.hi if self.edge is not None else (0,) * len(self.up)

    def __str__(self) -> str:
        return f"{self.main}, to the size given"


def check_edge(g: Geometry) -> None:
    """Raise Refusal unless a filter can have its last outputs computed anew."""
    if g.ones or any(n != 1 for n in (*g.up, *g.down)) or min((*g.lo, *g.hi)) < 0:
        raise Refusal("the filter behind an upsampling to odd sizes too has a stride, or crops")
    if any(hi > 0 and lo + 1 < _reach(g, dim) for dim, (lo, hi) in enumerate(zip(g.lo, g.hi, strict=True))):
        raise Refusal("the filter behind an upsampling to odd sizes too is larger than 3×3")


def edge_size(g: Geometry, dim: int, size: Sequence[int]) -> tuple[int, ...]:
    """The part of the upsampled map, of spatial size ``size``, that the last outputs of ``dim`` read."""
    return tuple(_reach(g, dim) if d == dim else n for d, n in enumerate(size))


def _reach(g: Geometry, dim: int) -> int:
    return g.dilation[dim] * (g.kernel[dim] - 1)


def build_sized(
    s: Sized,
    form: Affine,
    edge: Affine | None,
    dtype: torch.dtype = torch.float32,
    **style: Any,
) -> fx.GraphModule:
    """A module that takes (N, C, *spatial) and the spatial size to upsample to, one int per dimension.

    It raises an AssertionError for sizes that are not as ``s`` has it. ``style`` is as for
    :func:`convmerge.emit.build`. Raises Refusal as that does.
    """
    root = nn.Module()
    root.add_module("main", build(form, s.main, dtype, **style))
    n = len(s.up)
    if edge is not None:
        bare = edge.seen_as(replace(edge.geometry, lo=(0,) * n, hi=(0,) * n))
        root.add_module("edge", build(bare, emissions(bare.geometry)[0], dtype, **style))
    return plain_graph_module(root, _Writer(s, n).write(), f"ResizedConv{n}d")


class _Writer:
    def __init__(self, s: Sized, n: int) -> None:
        self.s, self.n = s, n
        self.graph = fx.Graph()

    def write(self) -> fx.Graph:
        self.x = self.graph.placeholder("x")
        self.sizes = [self.graph.placeholder(name) for name in SIZES[self.n]]
        self.missing = [self._missing(dim) for dim in range(self.n)]
        y = self.graph.call_module("main", (self.x,))
        edge = self.s.edge
        if edge is not None:
            y = self._part(y, [(None, self._valid(edge, dim)) for dim in range(self.n)])
            if any(edge.hi):  # a map of its own, whose layout is the same at even and odd sizes
                y = self._call(F.pad, y, [n for hi in reversed(edge.hi) for n in (0, hi)])
            for dim in range(self.n):
                if edge.hi[dim]:
                    self._renew(y, edge, dim)
        self.graph.output(y)
        return self.graph

    def _missing(self, dim: int) -> Node:
        """How much the size falls short of the multiple in one dimension; checked."""
        up = self.s.up[dim]
        size = self.graph.call_method("size", (self.x, dim - self.n))
        missing = self._call(operator.sub, self._call(operator.mul, size, up), self.sizes[dim])
        name = SIZES[self.n][dim]
        if self.s.edge is None:
            message = f"the merged upsampling makes the {name} {up} times as large, and was given another"
            self._call(torch._assert, self._call(operator.eq, missing, 0), message)
            return missing
        message = f"the merged upsampling makes the {name} twice as large, or one less, and was given another"
        self._call(torch._assert, self._call(operator.ge, missing, 0), message)
        self._call(torch._assert, self._call(operator.le, missing, 1), message)
        least = self._call(operator.lt, self._call(operator.mul, missing, size), LIMIT)
        self._call(torch._assert, least, f"the merged upsampling takes a {name} below {LIMIT}")
        return missing

    def _valid(self, g: Geometry, dim: int) -> Node:
        """How many outputs there are that read nothing beyond the size."""
        return self._call(operator.add, self.sizes[dim], g.slack[dim] - g.hi[dim])

    def _renew(self, y: Node, g: Geometry, dim: int) -> None:
        """Overwrite the last outputs of one dimension."""
        part = self._upsampled_end(g, dim)
        pads = [(0, g.hi[d]) if d == dim else (g.lo[d], g.hi[d]) for d in range(self.n)]
        part = self._call(F.pad, part, [p for pair in reversed(pads) for p in pair])
        part = self.graph.call_module("edge", (part,))
        end = self._part(y, [(-g.hi[d], None) if d == dim else (None, None) for d in range(self.n)])
        self._call(torch.ops.aten.copy_.default, end, part)

    def _upsampled_end(self, g: Geometry, dim: int) -> Node:
        """The last of the upsampled map along ``dim``, as much of it as the last outputs read."""
        reach = _reach(g, dim)
        few = -(-(reach + 1) // 2)
        whole: list[tuple[Any, Any]] = [(None, None)] * self.n
        last = [*whole[:dim], (-few, None), *whole[dim + 1 :]]
        # What is before the map is padding, which upsampling leaves as it is.
        end = self._part(self.x, last)
        end = self._call(F.pad, end, [0, 0] * (self.n - 1 - dim) + [few, 0])
        size = [2 * few if d == dim else self.sizes[d] for d in range(self.n)]
        end = self._call(F.interpolate, self._part(end, last), size)
        stop = self._call(operator.sub, 2 * few, self.missing[dim])
        start = self._call(operator.sub, stop, reach)
        return self._part(end, [*whole[:dim], (start, stop), *whole[dim + 1 :]])

    def _part(self, x: Node, bounds: Sequence[tuple[Any, Any]]) -> Node:
        return self._call(operator.getitem, x, (..., *(slice(*pair) for pair in bounds)))

    def _call(self, function: Any, *args: Any) -> Node:
        return self.graph.call_function(function, args)
