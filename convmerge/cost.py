"""What a layer costs to run: a roofline per kind of operator, calibrated on one machine.

With compute = MACs / peak and traffic = bytes / bandwidth, bytes counting activations in and out and
weights::

    latency = overhead + max(compute, traffic) + min(compute, traffic) / 2

that is, half of the shorter one hides behind the longer one. (The roofline of S. Williams, A. Waterman and
D. Patterson, CACM 52(4), 2009, hides all of it; measured layers lie between.) The figures say which of two
ways is cheaper, not how long a model takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from convmerge.affine import Geometry
from convmerge.borderclasses import Bordered
from convmerge.emit import Emission, Kind, Layer, emissions

Objective = Literal["latency", "macs", "params"]


@dataclass(frozen=True)
class Cost:
    """Predicted latency in seconds; multiply-accumulates of convolutions and linear layers; parameters."""

    latency: float
    macs: int
    weights: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.latency + other.latency, self.macs + other.macs, self.weights + other.weights)

    def key(self, objective: Objective = "latency") -> tuple[float, float]:
        """What to compare costs by; ties go to latency."""
        primary = {"latency": self.latency, "macs": self.macs, "params": self.weights}[objective]
        return float(primary), self.latency


ZERO = Cost(0.0, 0, 0)


@dataclass(frozen=True)
class Rate:
    """A kind of operator's ceilings: MACs per second, bytes per second; and seconds per call."""

    peak: float
    bandwidth: float
    overhead: float


# Best of many runs in eager mode, float32, torch 2.14 with 2 threads on an AMD EPYC (Zen 5, AVX-512), at
# 16..512 channels and maps of 2×2..112×112; tests/benchmarks/calibrate.py prints measured beside predicted.
RATES = {
    "dense": Rate(240e9, 17e9, 8e-6),
    "pointwise": Rate(215e9, 17e9, 6e-6),
    "grouped": Rate(230e9, 17e9, 45e-6),
    "depthwise": Rate(100e9, 45e9, 45e-6),
    "transposed": Rate(180e9, 7.5e9, 9e-6),
    "transposed depthwise": Rate(4.5e9, 10e9, 20e-6),
    "strip": Rate(45e9, 17e9, 10e-6),
    "blocked strip": Rate(90e9, 17e9, 38e-6),
    "linear": Rate(100e9, 70e9, 4e-6),
    "elementwise": Rate(math.inf, 150e9, 2e-6),
    "batch norm": Rate(math.inf, 110e9, 8e-6),
    "pad": Rate(math.inf, 110e9, 4e-6),
    "pool": Rate(3.2e9, 8e9, 3e-6),
    "mean": Rate(math.inf, 110e9, 5e-6),
    "upsample": Rate(math.inf, 24e9, 6e-6),
    "shuffle": Rate(math.inf, 14e9, 3e-6),
    "interleave": Rate(math.inf, 15e9, 25e-6),
    "copy": Rate(math.inf, 14e9, 3e-6),
}
# Dense kernels run on blocks of channels: a convolution of 20 channels takes the time of 32. Below about this
# many channels they also reach a smaller part of their peak.
BLOCK = 16
HALF_PEAK_CHANNELS = 14

_LAYERS: dict[str, Kind] = {"conv": "conv", "conv_transpose": "conv_transpose", "linear": "linear"}
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
    "pixel_shuffle": "shuffle",
    "pixel_unshuffle": "shuffle",
    "channel_shuffle": "copy",
    "cat": "copy",
}


def layer_cost(layer: Layer, size: Sequence[int], *, batch: int = 1, dtype_size: int = 4) -> Cost:
    """Cost of one layer on ``batch`` maps of spatial size ``size``, ``dtype_size`` bytes a number."""
    g = layer.geometry
    if layer.kind in ("linear", "conv", "conv_transpose"):
        name, work = _convolution(layer)
        macs = batch * g.macs(size)
        moved = _activations(g, size) * batch + g.weights
        return Cost(_latency(RATES[name], macs * work, moved * dtype_size), macs, g.weights)
    kinds = {"shuffle": "shuffle", "interleave": "interleave", "avg_pool": "pool", "nearest": "upsample"}
    kind = kinds.get(layer.kind, "pad")
    taps = batch * g.macs(size) if kind == "pool" else 0
    return Cost(_latency(RATES[kind], taps, _activations(g, size) * batch * dtype_size), 0, 0)


def emission_cost(emission: Emission, size: Sequence[int], *, batch: int = 1, dtype_size: int = 4) -> Cost:
    """Cost of all layers of an emission, one after the other."""
    total = ZERO
    for layer in emission.layers:
        total = total + layer_cost(layer, size, batch=batch, dtype_size=dtype_size)
        size = layer.geometry.out_size(size)
    return total


def bordered_cost(
    b: Bordered, size: Sequence[int], *, batch: int = 1, dtype_size: int = 4, native: bool = True
) -> Cost:
    """Cost of an interior kernel, of the kernels of all border classes, and of putting them together.

    native: whether torch runs small convolutions natively, as it does in single and double precision.
    """
    total = ZERO
    for key in b.keys:
        layer, at = Layer("conv", b.layer(key)), b.layer_size(key, size)
        cost = layer_cost(layer, at, batch=batch, dtype_size=dtype_size)
        if key != b.interior:
            moved = dtype_size * (_activations(layer.geometry, at) * batch + layer.geometry.weights)
            blocked = batch > 1 or not native or _is_blocked(layer.geometry)
            rate = RATES["blocked strip" if blocked else "strip"]
            cost = replace(cost, latency=_latency(rate, cost.macs, moved))
        weights = cost.weights * math.prod(b.residues(key))
        total = total + replace(cost, weights=weights)
    outputs = batch * b.low.out_channels * math.prod(b.low.out_size(size))
    joins = sum(side.ends.blocks > 0 for side in b.sides)
    for _ in range(joins):
        total = total + operator_cost("pad", outputs, dtype_size=dtype_size)
    if max(b.rates) > 1:
        total = total + operator_cost("pixel_shuffle", outputs, dtype_size=dtype_size)
    return total


def cheapest(
    g: Geometry,
    size: Sequence[int],
    *,
    objective: Objective = "latency",
    batch: int = 1,
    dtype_size: int = 4,
) -> tuple[Emission, Cost]:
    """The cheapest way to build a form of this geometry for inputs of this size.

    Raises:
        Refusal: no layer of torch.nn computes it.
    """
    costed = ((e, emission_cost(e, size, batch=batch, dtype_size=dtype_size)) for e in emissions(g))
    return min(costed, key=lambda pair: pair[1].key(objective))


def operator_cost(
    name: str,
    elements: int,
    *,
    geometry: Geometry | None = None,
    size: Sequence[int] = (),
    batch: int = 1,
    dtype_size: int = 4,
) -> Cost:
    """Cost of an operator as a model has it now.

    Args:
        name: ``conv``, ``conv_transpose``, ``linear``, ``batch_norm``, ``avg_pool``, ``add``, ...; one that
            is not known is taken to go once over its input, as ``add`` does.
        elements: numbers in its input, for operators without a geometry.
        geometry, size, batch: its form, and the maps it runs on.
    """
    if geometry is None:
        rate = RATES[_KINDS.get(name, "elementwise")]
        return Cost(_latency(rate, 0, 2 * elements * dtype_size), 0, 0)
    if name in _LAYERS:
        return layer_cost(Layer(_LAYERS[name], geometry), size, batch=batch, dtype_size=dtype_size)
    kind = _KINDS.get(name, "elementwise")
    moved = batch * _activations(geometry, size) * dtype_size
    taps = batch * geometry.macs(size) if kind == "pool" else 0
    weights = geometry.weights if kind in ("batch norm", "elementwise") else 0
    return Cost(_latency(RATES[kind], taps, moved), 0, weights)


def _is_blocked(g: Geometry) -> bool:
    """Whether torch runs a small convolution on blocks of channels, relaid for the call, and not natively."""
    return g.groups > 1 or max(g.down) > 1 or max(g.dilation) > 1 or (g.spatial > 1 and min(g.kernel) > 3)


def _latency(rate: Rate, macs: float, moved: float) -> float:
    compute, traffic = macs / rate.peak, moved / rate.bandwidth
    return rate.overhead + max(compute, traffic) + min(compute, traffic) / 2


def _activations(g: Geometry, size: Sequence[int]) -> int:
    """Numbers read and written for one sample."""
    return g.in_channels * math.prod(size) + g.out_channels * math.prod(g.out_size(size))


def _convolution(layer: Layer) -> tuple[str, float]:
    """The kind of rate, and how many times its MACs the layer takes the time of."""
    g = layer.geometry
    if layer.kind == "linear":
        return "linear", 1.0
    into, out = g.in_channels // g.groups, g.out_channels // g.groups
    if layer.kind == "conv_transpose":
        return ("transposed depthwise" if into == 1 and g.groups > 1 else "transposed"), 1.0
    if g.groups > 1:
        if into == out == 1:
            return "depthwise", 1.0
        return "grouped", _blocks(into, 4) * _blocks(out, BLOCK)
    if math.prod(g.kernel) == 1:
        return "pointwise", 1.0
    # A few input channels (an image) are not blocked as wide as many.
    narrow = BLOCK if into > 4 else BLOCK // 2
    wide = max(into * _blocks(into, narrow), out * _blocks(out, BLOCK))
    return "dense", _blocks(into, narrow) * _blocks(out, BLOCK) * (1 + HALF_PEAK_CHANNELS / wide)


def _blocks(channels: int, block: int) -> float:
    """Channels rounded up to whole blocks, over channels."""
    return -(-channels // block) * block / channels
