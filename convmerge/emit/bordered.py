"""Chains in blocks as torch operators: slices, convolutions, concatenation, phases interleaved at the end."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Node

from convmerge.affine import Affine
from convmerge.algebra.axis import Axis
from convmerge.borders.classes import Bordered, Key, class_form, residues_of
from convmerge.emit.build import build, round_once
from convmerge.emit.interleave import Interleaving, interleave, plain_graph_module
from convmerge.emit.ways import emissions

_SIDES = (("front", "back"), ("top", "bottom"), ("left", "right"))


def build_bordered(
    b: Bordered,
    forms: Sequence[Affine],
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> fx.GraphModule:
    """A module that computes the chain ``forms``, every weight rounded once from float64.

    It is a torch.fx.GraphModule of class ``BorderedConv1d``, ``2d`` or ``3d``, or ``BlockedConv1d``, ... if
    there are no borders. It takes (N, C, *spatial) or (C, *spatial), and raises an AssertionError for inputs
    below ``b.minimum`` in a dimension with border classes.

    Raises:
        Refusal: a weight is too large for ``dtype``.
    """
    root = nn.Module()
    style = {"device": device, "requires_grad": requires_grad, "memory_format": memory_format}
    layers = _Layers(root, dtype, style)
    for key in b.keys:
        layers.add(b, forms, key)
    name = "BorderedConv" if len(b.keys) > 1 else "BlockedConv"
    return plain_graph_module(root, _Writer(b).write(), f"{name}{b.low.spatial}d")


def class_name(b: Bordered, key: Key) -> str:
    """``interior``, ``top``, ``top_left``, ..."""
    words = []
    for side, segment, (first, last) in zip(b.sides, key, _SIDES[-len(key) :], strict=True):
        inner = int(side.ends.first is not None)
        if segment != inner:
            words.append(first if segment < inner else last)
    return "_".join(words) or "interior"


def _own_padding(g_lo: int, g_hi: int) -> int:
    """How much of an inner axis's padding its convolution does itself."""
    return max(0, min(g_lo, g_hi))


class _Layers:
    """Puts the convolutions of the classes under their names."""

    def __init__(self, root: nn.Module, dtype: torch.dtype, style: dict[str, Any]) -> None:
        self.root = root
        self.dtype = dtype
        self.style = style  # device, requires_grad, memory_format

    def add(self, b: Bordered, forms: Sequence[Affine], key: Key) -> None:
        """One class: a convolution, or stacked weights where they depend on the residue of the input size."""
        found = [_padded_itself(class_form(b, forms, key, residue)) for residue in residues_of(b, key)]
        name = class_name(b, key)
        if len(found) == 1:
            layer = build(found[0], emissions(found[0].geometry)[0], self.dtype, **self.style)
            self.root.add_module(name, layer)
            return
        lead = [n for n in b.residues(key) if n > 1]
        holder = nn.Module()
        weight = torch.stack([form.weight for form in found])
        holder.register_parameter("weight", self._parameter(weight.reshape(*lead, *weight.shape[1:])))
        if b.low.bias:
            bias = torch.stack([form.bias for form in found if form.bias is not None])
            holder.register_parameter("bias", self._parameter(bias.reshape(*lead, -1)))
        self.root.add_module(name, holder)

    def _parameter(self, values: Tensor) -> nn.Parameter:
        rounded = round_once(values, self.dtype).to(self.style["device"])
        return nn.Parameter(rounded, self.style["requires_grad"])


def _padded_itself(form: Affine) -> Affine:
    """The form with as much padding as its convolution does itself; the rest is done on the slice."""
    g = form.geometry
    own = tuple(map(_own_padding, g.lo, g.hi))
    return Affine(replace(g, lo=own, hi=own), form.weight, form.bias)


class _Writer:
    """Writes the graph of a bordered form."""

    def __init__(self, b: Bordered) -> None:
        self.b = b
        self.n = b.low.spatial
        self.graph = fx.Graph()
        self.remainders: dict[int, Node] = {}  # by dimension: the residue of the input size
        self.lengths: dict[int, Node] = {}  # by dimension: the output size where no constant tells it

    def write(self) -> fx.Graph:
        x = self.graph.placeholder("x")
        for dim, side in enumerate(self.b.sides):
            if len(side.segments) > 1 or side.excess is None:
                self._measure(x, dim)
        y = self._assembled(x, ())
        if max(self.b.rates) > 1:
            dims = [Interleaving(side.blocked.rates.outputs, 0, side.excess or 0) for side in self.b.sides]
            y = interleave(self.graph, y, self.b.out_channels, dims)
            y = self._counted(y)
        self.graph.output(y)
        return self.graph

    def _measure(self, x: Node, dim: int) -> None:
        """Check one dimension of the input, and compute from its size what depends on it."""
        side, ends = self.b.sides[dim], self.b.sides[dim].ends
        size = self.graph.call_method("size", (x, dim - self.n))
        if len(side.segments) > 1:
            least = "×".join(map(str, self.b.minimum))
            message = f"the merged convolution needs an input of at least {least}"
            self._call(torch._assert, self._call(operator.ge, size, ends.minimum), message)
        if ends.residues > 1:
            self.remainders[dim] = self._call(operator.mod, size, ends.residues)
        if side.excess is None:
            for count in side.blocked.counts:
                size = self._call(operator.mul, size, count.times) if count.times > 1 else size
                size = self._call(operator.add, size, count.plus) if count.plus else size
                size = self._call(operator.floordiv, size, count.over) if count.over > 1 else size
            self.lengths[dim] = size

    def _counted(self, y: Node) -> Node:
        """As many outputs as there are, where the last block has more in a way that depends on the size."""
        for dim, length in self.lengths.items():
            # torch.export fixes by example whether a slice drops anything.
            device = self._call(getattr, y, "device")
            kept = self.graph.call_function(torch.arange, (length,), {"device": device})
            y = self._call(torch.index_select, y, dim - self.n, kept)
        return y

    def _assembled(self, x: Node, chosen: Key) -> Node:
        """All classes with the segments ``chosen`` in the leading dimensions, concatenated."""
        dim = len(chosen)
        if dim == self.n:
            return self._convolved(x, chosen)
        segments = self.b.sides[dim].segments
        parts = []
        for index, segment in enumerate(segments):
            if isinstance(segment, Axis):
                part = self._fitted(x, dim, segment)
            else:
                part = self._sliced(x, self._only(dim, (segment.start, segment.stop)))
            parts.append(self._assembled(part, (*chosen, index)))
        return parts[0] if len(parts) == 1 else self._call(torch.cat, parts, dim - self.n)

    def _fitted(self, x: Node, dim: int, axis: Axis) -> Node:
        """The input of the inner segment: what its convolution does not pad or crop itself."""
        own = _own_padding(axis.lo, axis.hi)
        lo, hi = axis.lo - own, axis.hi - own
        if lo < 0 or hi < 0:
            x = self._sliced(x, self._only(dim, (max(0, -lo), min(0, hi))))
        if lo > 0 or hi > 0:
            sides = [0, 0] * (self.n - 1 - dim) + [max(lo, 0), max(hi, 0)]
            x = self._call(F.pad, x, sides)
        return x

    def _only(self, dim: int, bounds: tuple[int, int]) -> list[tuple[int, int]]:
        return [bounds if d == dim else (0, 0) for d in range(self.n)]

    def _sliced(self, x: Node, bounds: Sequence[tuple[int, int]]) -> Node:
        """x[start:stop] in every spatial dimension; a stop of 0 is the end."""
        index = (..., *(slice(start or None, stop or None) for start, stop in bounds))
        return self._call(operator.getitem, x, index)

    def _convolved(self, x: Node, key: Key) -> Node:
        """One class, its blocks in a row."""
        y = self._convolution(x, key)
        together = self.b.together(key)
        if max(together) == 1:
            return y
        # (..., channels, a1, ..., an, s1, ..., sn), where a or s is 1 in every dimension.
        y = self.graph.call_method("unflatten", (y, -self.n - 1, (self.b.low.out_channels, *together)))
        places = tuple(range(-2 * self.n, 0))
        y = self.graph.call_method("movedim", (y, places[: self.n], places[::2]))
        for dim in range(self.n):
            y = self.graph.call_method("flatten", (y, -2 - dim, -1 - dim))
        return y

    def _convolution(self, x: Node, key: Key) -> Node:
        name = class_name(self.b, key)
        residues = self.b.residues(key)
        if max(residues) == 1:
            return self.graph.call_module(name, (x,))
        at = tuple(self.remainders[dim] for dim, n in enumerate(residues) if n > 1)
        g = self.b.layer(key)
        weight, bias = (
            self._call(operator.getitem, self.graph.get_attr(f"{name}.{what}"), at)
            if what == "weight" or g.bias
            else None
            for what in ("weight", "bias")
        )
        own = tuple(map(_own_padding, g.lo, g.hi))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.n - 1]
        return self._call(convolve, x, weight, bias, g.down, own, g.dilation, g.groups)

    def _call(self, function: Any, *args: Any) -> Node:
        return self.graph.call_function(function, args)
