"""A layer of torch.nn as plain data, and a form built from a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from convmerge.affine import Dims, Geometry
from convmerge.algebra.axis import axes, words

Kind = Literal[
    "linear",
    "batched_linear",
    "batched_rows",
    "conv",
    "conv_transpose",
    "unfolded",
    "pad",
    "ones",
    "shuffle",
    "interleave",
    "avg_pool",
    "nearest",
    "flatten",
]


@dataclass(frozen=True)
class Layer:
    """One layer: its kind, and what it computes. ``pad`` also crops; ``ones`` appends channels of ones;
    ``shuffle`` is PixelShuffle, ``interleave`` the same at any rates and with a crop; ``flatten`` puts the
    positions of every channel among the channels; ``unfolded`` is a convolution as one matrix product.
    """

    kind: Kind
    geometry: Geometry

    def out_size(self, size: Sequence[int]) -> Dims:
        """Spatial size after it; none after ``flatten``."""
        return () if self.kind == "flatten" else self.geometry.out_size(size)

    def __str__(self) -> str:
        return _describe(self)


@dataclass(frozen=True)
class Emission:
    """One way to build a form.

    Attributes:
        layers: what runs, in order.
        shift: the phases' shift where the form is built in polyphase form, see ``polyphase``; else None.
        front, back: zero taps added to the kernel before and after, so that the padding fits the layer.
    """

    layers: tuple[Layer, ...]
    front: Dims
    back: Dims
    shift: Dims | None = None

    def __str__(self) -> str:
        return " → ".join(map(str, self.layers))


def transposed_padding(g: Geometry) -> tuple[Dims, Dims]:
    """``padding`` and ``output_padding`` of a transposed convolution."""
    padding = tuple(a.dilation * (a.kernel - 1) - a.lo for a in axes(g))
    return padding, tuple(a.hi - a.lo for a in axes(g))


def _describe(layer: Layer) -> str:
    g = layer.geometry
    n = g.spatial
    if layer.kind == "ones":
        return f"ConstantPad{min(n + 1, 3)}d(a channel of ones)"
    if layer.kind == "flatten":
        return "Flatten()"
    if layer.kind == "shuffle":
        return f"PixelShuffle({g.up[0]})"
    if layer.kind == "interleave":
        return f"phases interleaved {words(g.up)}"
    if layer.kind == "pad":
        sides = ", ".join(f"{lo}…{hi}" for lo, hi in zip(g.lo, g.hi, strict=True))
        return f"ZeroPad{n}d({sides})"
    if layer.kind == "avg_pool":
        return f"AvgPool{n}d({words(g.kernel)})"
    if layer.kind == "nearest":
        return f"Upsample(nearest, {words(g.up)})"
    if layer.kind in ("batched_linear", "batched_rows"):
        return f"BatchedLinear({g.groups} × {g.in_channels // g.groups}→{g.out_channels // g.groups})"
    if layer.kind == "linear":
        return f"Linear({g.in_channels}, {g.out_channels})"
    options = {"stride": g.down, "padding": g.lo, "dilation": g.dilation}
    if layer.kind == "conv_transpose":
        padding, extra = transposed_padding(g)
        options = {"stride": g.up, "padding": padding, "output padding": extra, "dilation": g.dilation}
    usual = {"stride": 1, "dilation": 1}
    said = [f"{name} {_short(v)}" for name, v in options.items() if set(v) != {usual.get(name, 0)}]
    said += [f"groups {g.groups}"] if g.groups > 1 else []
    name = {"conv_transpose": "ConvTranspose", "unfolded": "UnfoldedConv"}.get(layer.kind, "Conv")
    return f"{name}{n}d({', '.join([str(g.in_channels), str(g.out_channels), words(g.kernel), *said])})"


def _short(sizes: Dims) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else words(sizes)
