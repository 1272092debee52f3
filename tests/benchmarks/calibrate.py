"""Measure the kinds of layers that convmerge/cost.py tells apart, beside what it predicts.

    python tests/benchmarks/calibrate.py [--seconds 60] [--threads 2]

Every layer is run in short bursts, all of them in turn, and the best time of each is kept: other work on the
machine then costs time but does not change the figures. The constants in cost.py are fitted to these by hand.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from convmerge.affine import Geometry
from convmerge.cost import Cost, layer_cost, operator_cost
from convmerge.emit import Layer

Case = tuple[str, Callable[[Tensor], Tensor], Tensor, Cost]

# in channels, out channels, groups, kernel, map size
CONVS = [
    (3, 64, 1, 3, 56), (64, 3, 1, 3, 56), (8, 8, 1, 3, 56), (16, 16, 1, 3, 56), (20, 20, 1, 3, 56),
    (32, 32, 1, 3, 56), (33, 33, 1, 3, 56), (64, 64, 1, 3, 56), (65, 64, 1, 3, 56), (64, 64, 1, 3, 14),
    (64, 64, 1, 5, 56), (256, 256, 1, 3, 14), (256, 256, 1, 3, 28), (512, 512, 1, 3, 7),
    (16, 16, 1, 1, 56), (24, 144, 1, 1, 56), (144, 24, 1, 1, 56), (64, 64, 1, 1, 56), (64, 256, 1, 1, 56),
    (256, 256, 1, 1, 28), (512, 512, 1, 1, 14), (512, 2048, 1, 1, 7), (64, 64, 1, 1, 14),
    (64, 64, 4, 3, 56), (256, 256, 32, 3, 56), (256, 256, 32, 3, 14), (64, 64, 32, 3, 56),
    (144, 144, 144, 3, 56), (144, 144, 144, 3, 14), (64, 64, 64, 5, 56), (64, 64, 64, 1, 56),
]  # fmt: skip
# channels, groups, kernel, stride, map size
TRANSPOSED = [
    (16, 1, 2, 2, 2), (64, 1, 2, 2, 56), (64, 1, 4, 2, 56), (64, 1, 4, 2, 14), (64, 1, 3, 1, 56),
    (256, 1, 4, 2, 28), (64, 64, 4, 2, 56), (64, 64, 4, 2, 14),
]  # fmt: skip
LINEARS = [(1, 512, 512), (1, 2048, 1000), (16, 512, 512), (197, 768, 768), (197, 64, 64), (1000, 24, 96)]


def convolutions() -> Iterator[Case]:
    for into, out, groups, k, size in CONVS:
        one, pad = (1, 1), (k // 2, k // 2)
        g = Geometry(into, out, groups, (k, k), one, one, one, pad, pad, bias=True)
        x = torch.randn(1, into, size, size)
        cost = layer_cost(Layer("conv", g), (size, size))
        name = f"conv {into}→{out} {k}×{k} groups {groups} at {size}²"
        yield name, nn.Conv2d(into, out, k, padding=k // 2, groups=groups), x, cost
    for channels, groups, k, stride, size in TRANSPOSED:
        padding = (k - stride) // 2
        lo = (k - 1 - padding,) * 2
        g = Geometry(channels, channels, groups, (k, k), (stride,) * 2, (1, 1), (1, 1), lo, lo, bias=True)
        layer = nn.ConvTranspose2d(channels, channels, k, stride, padding, groups=groups)
        cost = layer_cost(Layer("conv_transpose", g), (size, size))
        name = f"conv_transpose {channels} {k}×{k} stride {stride} groups {groups} at {size}²"
        yield name, layer, torch.randn(1, channels, size, size), cost
    for batch, into, out in LINEARS:
        g = Geometry.channelwise(into, out, 1, 0, bias=True)
        cost = layer_cost(Layer("linear", g), (), batch=batch)
        yield f"linear {batch}×{into}→{out}", nn.Linear(into, out), torch.randn(batch, into), cost


def others() -> Iterator[Case]:
    layers: list[tuple[str, Callable[[Tensor], Tensor], int, int]] = [  # the last: rate up, rate down
        ("batch_norm", nn.BatchNorm2d(64).eval(), 1, 1),
        ("add", lambda x: x + 1.5, 1, 1),
        ("pixel_shuffle", nn.PixelShuffle(2), 1, 1),
        ("pixel_unshuffle", nn.PixelUnshuffle(2), 1, 1),
        ("nearest", nn.Upsample(scale_factor=2), 2, 1),
        ("avg_pool", nn.AvgPool2d(2), 1, 2),
        ("pad", nn.ZeroPad2d(1), 1, 1),
    ]
    for name, layer, up, down in layers:
        for size in (14, 56, 112):
            x = torch.randn(1, 64, size, size)
            k = (up * down,) * 2
            ups, downs, los = (up, up), (down, down), (up - 1, up - 1)
            g = Geometry(64, 64, 64, k, ups, downs, (1, 1), los, los) if up * down > 1 else None
            cost = operator_cost(name, x.numel(), geometry=g, size=(size, size))
            yield f"{name} at {size}²", layer, x, cost
    pool = Geometry(64, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1))
    x = torch.randn(1, 64, 56, 56)
    cost = operator_cost("avg_pool", x.numel(), geometry=pool, size=(56, 56))
    yield "avg_pool 3×3 at 56²", nn.AvgPool2d(3, 1, 1), x, cost


def measure(cases: list[Case], seconds: float) -> list[float]:
    best = [math.inf] * len(cases)
    end = time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < end:
            for index, (_, run, x, _) in enumerate(cases):
                run(x)
                burst = time.perf_counter() + 0.003
                while (start := time.perf_counter()) < burst:
                    run(x)
                    best[index] = min(best[index], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [*convolutions(), *others()]
    print(f"{'layer':48}{'measured':>12}{'predicted':>12}{'ratio':>8}")
    for (name, _, _, cost), seconds in zip(cases, measure(cases, options.seconds), strict=True):
        ratio = cost.latency / seconds
        print(f"{name:48}{seconds * 1e6:9.1f} µs{cost.latency * 1e6:9.1f} µs{ratio:8.2f}")


if __name__ == "__main__":
    main()
