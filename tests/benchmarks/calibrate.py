"""Measure the kinds of layers that convmerge/cost/roofline.py tells apart, beside what it predicts.

    python tests/benchmarks/calibrate.py [KIND ...] [--rounds 20] [--threads 2] [--verbose] [--quick]

KIND is any part of a kind's name. All cases run in turn, in short bursts, round after round, and the best
time of each counts: other work on the machine costs time but does not change the figures. For every kind it
prints how far the constants are off (the mean over its cases), the constants that fit this machine best, and
how far these are off; with --verbose every case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from fitting import fitted, off, rate_line
from table import parsed, parser

from convmerge.affine import Geometry
from convmerge.algebra.axis import Axis, from_axes
from convmerge.cost.measure import Operator, Subject, runnable
from convmerge.cost.roofline import RATES, Load, activations, latency, layer_load, map_load
from convmerge.cost.timing import Run, Stopwatch
from convmerge.emit import Kind, Layer


@dataclass(frozen=True)
class Case:
    """A call, and what it asks of the machine."""

    name: str
    load: Load
    run: Run


def square(layer: Kind, channels: tuple[int, int], axis: Axis, size: int, groups: int = 1) -> Case:
    """A layer on a square map."""
    return layer_case(layer, from_axes(*channels, groups, [axis] * 2, layer.startswith("conv")), (size, size))


def layer_case(kind: Kind, g: Geometry, size: tuple[int, ...], batch: int = 1) -> Case:
    layer = Layer(kind, g)
    run = runnable(Subject((layer,), size, batch, torch.float32))
    at = "×".join(map(str, (batch, *size) if batch > 1 else size))
    return Case(f"{layer} at {at}", layer_load(layer, size, batch=batch), run)


def same(kernel: int, stride: int = 1) -> Axis:
    return Axis(kernel, 1, stride, 1, kernel // 2, kernel // 2)


def dense() -> Iterator[Case]:
    """Convolutions with all channels connected: kernels, strides, strips, few and odd channels."""
    for channels in (8, 16, 32, 64, 128, 256):
        for kernel in (1, 3, 5):
            for size in (3, 7, 14, 28, 56):
                if (channels * kernel * size) ** 2 < 2e9:
                    yield square("conv", (channels, channels), same(kernel), size)
    for channels in (20, 33, 48):
        for size in (14, 28, 56):
            yield square("conv", (channels, channels), same(3), size)
    for into, out, kernel, stride, size in (
        (3, 64, 3, 1, 56), (64, 3, 3, 1, 56), (3, 32, 3, 2, 112), (3, 64, 7, 2, 224), (64, 128, 3, 2, 56),
        (512, 512, 3, 1, 7), (24, 144, 1, 1, 56), (144, 24, 1, 1, 56), (64, 256, 1, 1, 56),
        (512, 2048, 1, 1, 7), (256, 512, 1, 2, 28),
    ):  # fmt: skip
        yield square("conv", (into, out), same(kernel, stride), size)
    for into, out in ((8, 8), (16, 16), (64, 12), (64, 48)):
        for length in (14, 56, 192):
            wide, narrow = Axis(5, 1, 1, 1, 0, 0), Axis(3, 1, 1, 1, 0, 0)
            yield layer_case("conv", from_axes(into, out, 1, [narrow, wide], True), (3, length))
            yield layer_case("conv", from_axes(into, out, 1, [wide, narrow], True), (length, 3))
    for length in (100, 500, 2000, 8000):
        yield layer_case("conv", from_axes(8, 64, 1, [same(5)], True), (length,))
    for size in (8, 16, 24):
        yield layer_case("conv", from_axes(4, 64, 1, [same(3)] * 3, True), (size,) * 3)
        yield layer_case("conv", from_axes(4, 4, 1, [same(5)] * 3, True), (size,) * 3)


def grouped() -> Iterator[Case]:
    """Convolutions in groups, of one channel and of several."""
    for channels, groups in ((16, 16), (64, 64), (144, 144), (256, 256), (256, 32), (64, 4), (64, 32)):
        for size in (7, 14, 28, 56):
            yield square("conv", (channels, channels), same(3), size, groups)


def others() -> Iterator[Case]:
    """Transposed convolutions, linear layers, pools, resampling, and what goes over a map once."""
    for channels, kernel, stride, size, groups in (
        (16, 2, 2, 2, 1), (64, 2, 2, 56, 1), (64, 4, 2, 14, 1), (64, 4, 2, 56, 1), (64, 4, 2, 128, 1),
        (64, 3, 1, 56, 1), (256, 4, 2, 28, 1), (64, 4, 2, 14, 64), (64, 4, 2, 56, 64),
    ):  # fmt: skip
        lo = kernel - 1 - (kernel - stride) // 2
        axis = Axis(kernel, stride, 1, 1, lo, lo)
        yield square("conv_transpose", (channels, channels), axis, size, groups)
    for batch, into, out in (
        (1, 512, 512), (1, 2048, 1000), (16, 512, 512), (197, 768, 768), (197, 64, 64), (1000, 24, 96),
    ):  # fmt: skip
        yield layer_case("linear", Geometry.channelwise(into, out, 1, 0, bias=True), (), batch)
    for size in (14, 56, 112):
        yield square("avg_pool", (64, 64), Axis(2, 1, 2, 1, 0, 0), size, 64)
        yield square("nearest", (64, 64), Axis(2, 2, 1, 1, 1, 1), size, 64)
        yield square("shuffle", (64, 16), Axis(2, 2, 1, 1, 1, 1), size, 16)
        yield square("pad", (64, 64), Axis(1, 1, 1, 1, 1, 1), size, 64)
        for name, kind in (("batch_norm", "batch norm"), ("scale", "elementwise")):
            yield over_map(name, kind, size)
    yield square("avg_pool", (64, 64), same(3), 56, 64)


def over_map(name: str, kind: str, size: int) -> Case:
    g = from_axes(64, 64, 64, [Axis(1, 1, 1, 1, 0, 0)] * 2)
    run = runnable(Subject(Operator(name, 64), (size, size), 1, torch.float32))
    return Case(
        f"{name} 64 at {size}×{size}", map_load(kind, *(4 * n for n in activations(g, (size, size)))), run
    )


def large() -> Iterator[Case]:
    """Maps that malloc takes from the system in every call."""
    for kernel in (1, 3):
        yield square("conv", (64, 64), same(kernel), 384)
    yield square("conv", (64, 64), same(3), 384, 64)
    yield square("shuffle", (64, 16), Axis(2, 2, 1, 1, 1, 1), 384)
    yield square("pad", (64, 64), Axis(1, 1, 1, 1, 1, 1), 384)
    yield over_map("batch_norm", "batch norm", 384)
    yield over_map("scale", "elementwise", 384)


SOURCES: tuple[Callable[[], Iterator[Case]], ...] = (dense, grouped, others, large)


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--rounds", type=int, default=20)
    found.add_argument("--verbose", action="store_true")
    arguments = parsed(found)
    rounds = 2 if arguments.quick else arguments.rounds
    wanted = arguments.names
    cases = [case for source in SOURCES for case in source() if not wanted or matches(case, wanted)]
    seconds = Stopwatch(least=rounds, most=rounds, burst=3e-3)([case.run for case in cases])
    for kind in dict.fromkeys(case.load.kind for case in cases):
        pairs = [(c, s) for c, s in zip(cases, seconds, strict=True) if c.load.kind == kind]
        loads, times = [case.load for case, _ in pairs], [s for _, s in pairs]
        rate = fitted(RATES[kind], loads, times)
        before, after = off(RATES[kind], loads, times), off(rate, loads, times)
        print(f"{rate_line(kind, rate):60} # off by {100 * after:.0f} %, now by {100 * before:.0f} %")
        if arguments.verbose:
            show(pairs)


def matches(case: Case, kinds: list[str]) -> bool:
    return any(kind in case.load.kind for kind in kinds)


def show(pairs: list[tuple[Case, float]]) -> None:
    """Every case of a kind: measured, and predicted over measured."""
    for case, s in pairs:
        ratio = latency(RATES[case.load.kind], case.load) / s
        print(f"        {case.name:60}{s * 1e6:10.1f} µs{ratio:8.2f}")


if __name__ == "__main__":
    main()
