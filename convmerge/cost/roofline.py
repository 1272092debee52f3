"""How long a layer runs: a roofline per kind of operator, calibrated on one machine.

With compute = MACs / peak and traffic = bytes / bandwidth, bytes counting activations in and out and
weights::

    latency = overhead + max(compute, traffic) + min(compute, traffic) / 2

that is, half of the shorter one hides behind the longer one. (The roofline of S. Williams, A. Waterman and
D. Patterson, CACM 52(4), 2009, hides all of it; measured layers lie between.) Maps that do not fit into the
caches have the bandwidth of main memory, and every large buffer that a call allocates costs its page faults
on top. The figures say which of two ways is cheaper, not how long a model takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from convmerge.affine import Geometry
from convmerge.emit import Layer


@dataclass(frozen=True)
class Rate:
    """A kind of operator's ceilings: MACs per second, bytes per second; and seconds per call."""

    peak: float
    bandwidth: float
    overhead: float


@dataclass(frozen=True)
class Load:
    """What a layer asks of the machine, in terms of what the kernel does.

    Attributes:
        kind: of its rate.
        work: MACs, those of channels that fill up a block counted as well.
        moved: bytes, those of weights that are laid out anew for the call counted as well.
        ragged: bytes of maps that are laid out in blocks which their channels do not fill.
        fresh: bytes of large new buffers.
    """

    kind: str
    work: float
    moved: float
    ragged: float = 0
    fresh: float = 0

    @property
    def latency(self) -> float:
        """Predicted seconds."""
        return latency(RATES[self.kind], self)


def latency(rate: Rate, load: Load) -> float:
    """The roofline described above, in seconds."""
    bandwidth = rate.bandwidth if load.moved <= CACHED else min(rate.bandwidth, MEMORY)
    compute, traffic = load.work / rate.peak, load.moved / bandwidth + load.ragged / RAGGED
    return rate.overhead + max(compute, traffic) + min(compute, traffic) / 2 + load.fresh / FAULTS


# Fitted by tests/benchmarks/calibrate.py to the best of many short runs, of all cases in turn: eager mode,
# float32, torch 2.14 with 2 threads on an AMD EPYC (Zen 5, AVX-512), 3..512 channels, maps of 3×3..112×112.
# It prints measured beside predicted time, and the constants that fit another machine.
RATES = {
    "blocked": Rate(217e9, 29e9, 44e-6),
    "pointwise": Rate(215e9, 21e9, 43e-6),
    "grouped": Rate(264e9, 15e9, 46e-6),
    "depthwise": Rate(112e9, 45e9, 47e-6),
    "native": Rate(85e9, 28e9, 8e-6),
    "native pointwise": Rate(123e9, 24e9, 7e-6),
    "native volume": Rate(67e9, 7.8e9, 8e-6),
    "transposed": Rate(180e9, 4e9, 9e-6),
    "transposed depthwise": Rate(4.5e9, 10e9, 20e-6),
    "linear": Rate(100e9, 70e9, 4e-6),
    "unfolded": Rate(100e9, 70e9, 9e-6),
    "batched": Rate(130e9, 24e9, 8.5e-6),
    "select": Rate(math.inf, 24e9, 1.5e-6),
    "view": Rate(math.inf, math.inf, 1e-6),
    "elementwise": Rate(math.inf, 150e9, 2e-6),
    "batch norm": Rate(math.inf, 110e9, 8e-6),
    "pad": Rate(math.inf, 110e9, 4e-6),
    "pool": Rate(3.2e9, 8e9, 3e-6),
    "mean": Rate(math.inf, 110e9, 5e-6),
    "upsample": Rate(math.inf, 24e9, 6e-6),
    "bilinear": Rate(math.inf, 7e9, 6e-6),
    "bicubic": Rate(math.inf, 1.5e9, 6e-6),
    "shuffle": Rate(math.inf, 14e9, 3e-6),
    "interleave": Rate(math.inf, 15e9, 25e-6),
    "copy": Rate(math.inf, 14e9, 3e-6),
}
# The vectors of the kernels are 16 channels long: a convolution to 20 channels takes the time of one to 32.
# From a few channels, such as those of an image, there are kernels that take them as they are.
BLOCK = 16
FEW = 8
RAGGED = 15e9  # bytes per second that maps of 20 channels take more to lay out than those of 16 or 32
SHORT_ROW = 1.2  # how much of an output position more each row of them takes in a blocked kernel
# torch leaves convolutions of few numbers to its own kernel: taps copied side by side, one matrix product.
NATIVE_NUMBERS = 20480
ROW = 8  # numbers that might be copied in the time it takes to begin another row
# How many times weights are moved in a call: laid out in blocks; packed for a matrix product of few columns.
BLOCKED_WEIGHTS = 1.5
NATIVE_WEIGHTS = 3
# In batched products of blocks weights are read in place, faster than maps are laid out anew; with the rows
# first weights are faster still, and maps slower.
BATCHED_WEIGHTS, ROWS_WEIGHTS = 0.6, 0.3
ROWS_MAPS = 1.25
# Maps of more bytes than these, read and written, come from main memory; its bytes per second.
CACHED, MEMORY = 24e6, 45e9
# glibc's malloc takes blocks above DEFAULT_MMAP_THRESHOLD_MAX from the system in every call, and returns them
# after it: each page is zeroed at the first touch. Bytes, and bytes per second. Measured with relu and
# pixel_shuffle on 31 to 256 MiB; kernels that lay out maps and weights in blocks have a buffer more for each.
MAPPED, FAULTS = 2**25, 3.8e9
BLOCKED = frozenset({"blocked", "pointwise", "grouped", "depthwise", "transposed", "transposed depthwise"})
GATHERED = 25  # how many times the numbers under a kernel count as moved to be laid side by side
JOINT = 4e-6  # seconds for every border class: its slice, its call, its place in the concatenation


def layer_load(
    layer: Layer, size: Sequence[int], *, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Load:
    """What one layer asks of the machine on ``batch`` maps of spatial size ``size``."""
    load = _kernel_load(layer, size, batch, dtype)
    if load.kind == "view":
        return load
    g = layer.geometry
    into, out = (batch * n * bytes_of(dtype) for n in activations(g, size))
    if load.kind not in BLOCKED:
        return replace(load, fresh=fresh(out))
    copied = ((g.in_channels, into if g.in_channels > FEW else 0), (g.out_channels, out))
    ragged = sum(size for channels, size in copied if channels % BLOCK)
    buffers = (out, *(size for _, size in copied), g.weights * bytes_of(dtype))
    return replace(load, ragged=ragged, fresh=fresh(*buffers))


def map_load(kind: str, into: float, out: float, work: float = 0) -> Load:
    """What an operator asks that reads ``into`` bytes and makes a map of ``out`` bytes, or a view of them."""
    return Load(kind, 0, 0) if kind == "view" else Load(kind, work, into + out, fresh=fresh(out))


def fresh(*buffers: float) -> float:
    """The bytes of those buffers of a call that malloc takes from the system."""
    return sum(size for size in buffers if size > MAPPED)


def _kernel_load(layer: Layer, size: Sequence[int], batch: int, dtype: torch.dtype) -> Load:
    g = layer.geometry
    maps = batch * sum(activations(g, size)) * bytes_of(dtype)
    weights = g.weights * bytes_of(dtype)
    work = float(batch * g.macs(size))
    if layer.kind == "conv":
        return _convolution(g, size, batch, dtype)
    if layer.kind == "batched_linear":
        return _batched(g, batch, dtype, 1.0, BATCHED_WEIGHTS)
    if layer.kind == "batched_rows":
        return _batched(g, batch, dtype, ROWS_MAPS, ROWS_WEIGHTS)
    if layer.kind == "linear":
        return Load("linear", work, maps + weights)
    if layer.kind == "unfolded":
        return _unfolded(g, size, batch, dtype)
    if layer.kind == "conv_transpose":
        depthwise = g.groups > 1 and g.groups == g.in_channels
        return Load("transposed depthwise" if depthwise else "transposed", work, maps + weights)
    if layer.kind == "flatten":
        return Load("view", 0, 0)
    kinds = {"shuffle": "shuffle", "interleave": "interleave", "avg_pool": "pool", "nearest": "upsample"}
    kind = kinds.get(layer.kind, "pad")
    return Load(kind, work if kind == "pool" else 0, maps)


def is_native(g: Geometry, size: Sequence[int], batch: int, dtype: torch.dtype) -> bool:
    """Whether torch runs a convolution with its own kernels and not with the blocked ones of oneDNN.

    The rule is that of ``use_mkldnn`` in aten/src/ATen/native/Convolution.cpp, for more than one thread.
    """
    if dtype.itemsize < 4:
        return False
    if g.groups > 1 or batch > 1 or (g.spatial > 1 and min(g.kernel[-2:]) > 3):
        return False
    # The rule does not look at the last dimension of a volume.
    return g.in_channels * math.prod(size[:2]) <= NATIVE_NUMBERS


def bytes_of(dtype: torch.dtype) -> int:
    """Of one number; double precision is planned as single, so that a model merges alike in both."""
    return min(4, dtype.itemsize)


def activations(g: Geometry, size: Sequence[int]) -> tuple[int, int]:
    """Numbers read, and numbers written, for one sample."""
    return g.in_channels * math.prod(size), g.out_channels * math.prod(g.out_size(size))


def _convolution(g: Geometry, size: Sequence[int], batch: int, dtype: torch.dtype) -> Load:
    maps = batch * sum(activations(g, size))
    work = float(batch * g.macs(size))
    taps = math.prod(g.kernel)
    if is_native(g, size, batch, dtype):
        return _native(g, size, batch, dtype)
    into, out = g.in_channels // g.groups, g.out_channels // g.groups
    kind, weights = "blocked", BLOCKED_WEIGHTS * g.weights
    if into == out == 1:
        kind = "depthwise"
    elif g.groups > 1:
        kind, work = "grouped", work * _blocks(into, 4) * _blocks(out, BLOCK)
    elif taps == 1:
        kind = "pointwise"
    else:
        rows = 1 + SHORT_ROW / max(1, g.out_size(size)[-1])
        work *= rows * _blocks(out, BLOCK) * (_blocks(into, BLOCK) if into > FEW else 1)
    return Load(kind, work, (maps + weights) * bytes_of(dtype))


def _batched(g: Geometry, batch: int, dtype: torch.dtype, maps: float, weights: float) -> Load:
    """A product for every block; ``maps`` and ``weights``: how many times they count as moved."""
    into, out = g.in_channels // g.groups, g.out_channels // g.groups
    work = batch * g.macs(()) * _blocks(into, 4) * (_blocks(out, BLOCK) if batch > 1 else 1)
    moved = maps * batch * sum(activations(g, ())) + weights * g.weights
    return Load("batched", work, moved * bytes_of(dtype))


def _unfolded(g: Geometry, size: Sequence[int], batch: int, dtype: torch.dtype) -> Load:
    positions = batch * math.prod(g.out_size(size))
    # A kernel that covers the map reads it where it is.
    rows = GATHERED * positions if any(n > 1 for n in g.out_size(size)) else 0
    weights = (NATIVE_WEIGHTS if positions > 1 else 1) * g.weights
    moved = batch * sum(activations(g, size)) + rows * g.in_channels * math.prod(g.kernel) + weights
    return Load("unfolded", batch * g.macs(size), moved * bytes_of(dtype))


def _native(g: Geometry, size: Sequence[int], batch: int, dtype: torch.dtype) -> Load:
    work, taps = float(batch * g.macs(size)), math.prod(g.kernel)
    out = [max(1, n) for n in g.out_size(size)]
    positions = batch * math.prod(out)
    if g.spatial == 3:
        return Load("native volume", work, g.in_channels * taps * positions * bytes_of(dtype))
    # A product with a single column, a matrix by a vector, takes the weights as they are.
    weights = (NATIVE_WEIGHTS if positions > 1 else 1) * g.weights
    if taps == 1:
        return Load("native pointwise", work, (batch * sum(activations(g, size)) + weights) * bytes_of(dtype))
    columns = g.in_channels * taps * (positions + ROW * positions // out[-1])
    return Load("native", work, (columns + g.out_channels * positions + weights) * bytes_of(dtype))


def _blocks(channels: int, block: int) -> float:
    """Channels rounded up to whole blocks, over channels."""
    return -(-channels // block) * block / channels
