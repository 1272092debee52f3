"""What operators and layers cost: predicted latency, MACs, weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from convmerge.affine import Geometry
from convmerge.borders.classes import Bordered
from convmerge.cost.roofline import JOINT, Load, activations, bytes_of, layer_load, map_load
from convmerge.emit import Emission, Kind, Layer, emissions

Objective = Literal["latency", "macs", "params"]


@dataclass(frozen=True)
class Cost:
    """Latency in seconds; multiply-accumulates of convolutions and linear layers; parameters.

    ``measured``: whether the latency was, and not predicted.
    """

    latency: float
    macs: int
    weights: int
    measured: bool = False

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.latency + other.latency,
            self.macs + other.macs,
            self.weights + other.weights,
            self.measured and other.measured,
        )

    def key(self, objective: Objective = "latency") -> tuple[float, float]:
        """What to compare costs by; ties go to latency."""
        primary = {"latency": self.latency, "macs": self.macs, "params": self.weights}[objective]
        return float(primary), self.latency


ZERO = Cost(0.0, 0, 0, measured=True)


class CostModel(Protocol):
    """What planning asks. Sizes are spatial; ``dtype`` is that of the maps."""

    def operator(
        self,
        name: str,
        elements: int,
        *,
        geometry: Geometry | None = None,
        size: Sequence[int] = (),
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Cost:
        """Cost of an operator as a model has it, see :func:`operator_cost`."""

    def ways(
        self, ways: Sequence[Emission], size: Sequence[int], *, batch: int, dtype: torch.dtype, before: Cost
    ) -> list[Cost]:
        """Cost of each of several ways to build a form; ``before``: of what they would replace."""

    def bordered(
        self, b: Bordered, size: Sequence[int], *, batch: int, dtype: torch.dtype, before: Cost
    ) -> Cost:
        """Cost of a form with border classes; ``before``: of what it would replace."""


class Roofline:
    """Costs as predicted by :mod:`convmerge.cost.roofline`."""

    def operator(
        self,
        name: str,
        elements: int,
        *,
        geometry: Geometry | None = None,
        size: Sequence[int] = (),
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Cost:
        return operator_cost(name, elements, geometry=geometry, size=size, batch=batch, dtype=dtype)

    def ways(
        self, ways: Sequence[Emission], size: Sequence[int], *, batch: int, dtype: torch.dtype, before: Cost
    ) -> list[Cost]:
        return [emission_cost(way, size, batch=batch, dtype=dtype) for way in ways]

    def bordered(
        self, b: Bordered, size: Sequence[int], *, batch: int, dtype: torch.dtype, before: Cost
    ) -> Cost:
        return bordered_cost(b, size, batch=batch, dtype=dtype)


_LAYERS: dict[str, Kind] = {
    "linear": "linear",
    "batched_linear": "batched_linear",
    "batched_rows": "batched_rows",
    "conv": "conv",
    "conv_transpose": "conv_transpose",
    "unfolded": "unfolded",
}
# Operators that are not convolutions or linear layers, by name → kind.
_KINDS = {
    "batch_norm": "batch norm",
    "avg_pool": "pool",
    "adaptive_avg_pool": "pool",
    "mean": "mean",
    "pad": "pad",
    "nearest": "upsample",
    "upsample": "upsample",
    "interpolate": "upsample",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "pixel_shuffle": "shuffle",
    "pixel_unshuffle": "shuffle",
    "channel_shuffle": "copy",
    "cat": "copy",
    "index_select": "select",
    "permuted": "select",
    "narrow": "view",
    "channels": "view",
}
# Products of blocks → how many views more there are in and around one than in a batched layer.
_PRODUCTS = {"einsum": 4, "matmul": 4, "bmm": 0, "baddbmm": 0}


def layer_cost(
    layer: Layer, size: Sequence[int], *, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Cost:
    """Cost of one layer on ``batch`` maps of spatial size ``size``."""
    seconds = layer_load(layer, size, batch=batch, dtype=dtype).latency
    if layer.kind not in _LAYERS:
        return Cost(seconds, 0, 0)
    return Cost(seconds, batch * layer.geometry.macs(size), layer.geometry.weights)


def emission_cost(
    emission: Emission, size: Sequence[int], *, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Cost:
    """Cost of all layers of an emission, one after the other."""
    total = ZERO
    for layer in emission.layers:
        total = total + layer_cost(layer, size, batch=batch, dtype=dtype)
        size = layer.out_size(size)
    return total


def bordered_cost(
    b: Bordered, size: Sequence[int], *, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Cost:
    """Cost of an interior kernel, of the kernels of all border classes, and of putting them together."""
    total = ZERO
    for key in b.keys:
        layer, at = Layer("conv", b.layer(key)), b.layer_size(key, size)
        cost = layer_cost(layer, at, batch=batch, dtype=dtype)
        weights = cost.weights * math.prod(b.residues(key))
        views = (b.low.spatial + 2) * Load("view", 0, 0).latency if max(b.together(key)) > 1 else 0.0
        total = total + replace(cost, latency=cost.latency + JOINT + views, weights=weights)
    outputs = batch * b.low.out_channels * math.prod(b.low.out_size(size))
    joins = sum(len(side.segments) > 1 for side in b.sides)
    for _ in range(joins):
        total = total + operator_cost("pad", outputs, dtype=dtype)
    if max(b.rates) > 1:
        total = total + operator_cost("pixel_shuffle", outputs, dtype=dtype)
    for side in b.sides:
        if side.excess != 0:  # what is too much at the end is dropped, by a copy
            total = total + operator_cost("index_select", outputs, dtype=dtype)
    return total


def cheapest(
    g: Geometry,
    size: Sequence[int],
    *,
    objective: Objective = "latency",
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Emission, Cost]:
    """The cheapest way to build a form of this geometry for inputs of this size.

    Raises:
        Refusal: no layer of torch.nn computes it.
    """
    costed = ((e, emission_cost(e, size, batch=batch, dtype=dtype)) for e in emissions(g))
    return min(costed, key=lambda pair: pair[1].key(objective))


def operator_cost(
    name: str,
    elements: int,
    *,
    geometry: Geometry | None = None,
    size: Sequence[int] = (),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Cost:
    """Cost of an operator as a model has it now.

    Args:
        name: ``conv``, ``conv_transpose``, ``linear``, ``batch_norm``, ``avg_pool``, ``add``, ...; one that
            is not known is taken to go once over its input, as ``add`` does.
        elements: numbers in its input, for operators without a geometry.
        geometry, size, batch: its form, and the maps it runs on.
    """
    kind = _KINDS.get(name, "elementwise")
    if geometry is None:
        moved = elements * bytes_of(dtype)
        return Cost(map_load(kind, moved, moved).latency, 0, 0)
    if name in _LAYERS:
        return layer_cost(Layer(_LAYERS[name], geometry), size, batch=batch, dtype=dtype)
    if name in _PRODUCTS and not geometry.spatial:
        kinds: tuple[Kind, ...] = ("batched_linear", "batched_rows")
        ways = [layer_cost(Layer(kind, geometry), size, batch=batch, dtype=dtype) for kind in kinds]
        product = min(ways, key=Cost.key)
        around = _PRODUCTS[name] * Load("view", 0, 0).latency
        return replace(product, latency=product.latency + around)
    taps = batch * geometry.macs(size) if kind == "pool" else 0
    weights = geometry.weights if kind in ("batch norm", "elementwise") else 0
    into, out = (batch * n * bytes_of(dtype) for n in activations(geometry, size))
    return Cost(map_load(kind, into, out, taps).latency, 0, weights)
