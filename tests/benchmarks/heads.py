"""Heads and copies: parameters, MACs, peak memory and latency, before and after.

    python tests/benchmarks/heads.py [NAME ...] [--models alexnet resnet18] [--size 224] [--larger 320]
                                     [--pairs 15] [--threads 2] [--quick]

NAME is any part of a row's name. ``flatten``: a convolution that is flattened into a linear layer, fused into
one. ``head``: a torchvision classifier with ``--fully-conv``, at the size that it is made for. ``windows``:
the same on a larger image, against the original on every window of that image (at the borders of windows the
original sees padding, where the other sees the image). ``copies``: a network in which a share of the channels
of every layer are multiples of others. Peak memory is that of the tensors alive at one time, weights not
counted.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from table import attempted, chosen, parsed, parser
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zoo

import convmerge
from convmerge.benchmark import benchmark
from convmerge.inputs import Inputs, as_inputs
from convmerge.passes.windows import OnWindows, Windows

COLUMNS = "{:40} {:>17} {:>17} {:>19} {:>19} {:>8} {:>15}"
HEAD = ("", "parameters", "MACs", "peak memory", "latency", "faster", "middle half")
STEP = 32  # of the feature map's positions in the image, for all of these models


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--models", nargs="*", default=["alexnet", "vgg11_bn", "resnet18"])
    found.add_argument("--size", type=int, default=224)
    found.add_argument("--larger", type=int, default=320)
    arguments = parsed(found)
    print(COLUMNS.format(*HEAD))
    size, larger = arguments.size, arguments.larger
    makers: dict[str, Maker] = {f"flatten {n}²": partial(flatten, n) for n in (12, 28, 64)}
    makers |= {f"head {name}": partial(head, name, size) for name in arguments.models}
    makers |= {f"windows {name}": partial(windows, name, size, larger) for name in arguments.models}
    makers |= {f"copies {share:.0%}": partial(copies, share) for share in (0.1, 0.3, 0.5)}
    for name in chosen(makers, arguments.names):
        attempted(name, partial(row, makers[name], arguments.pairs))


Case = tuple[str, nn.Module, nn.Module, Inputs]
Maker = Callable[[], Case]


def flatten(size: int) -> Case:
    """A convolution, flattened into a linear layer."""
    model = nn.Sequential(nn.Conv2d(3, 16, 5), nn.Flatten(), nn.Linear(16 * (size - 4) ** 2, 10)).eval()
    x = as_inputs(torch.randn(1, 3, size, size))
    return f"flatten, 3→16 5×5 → 10, {size}²", model, convmerge.fuse(model, x).model, x


def head(name: str, size: int) -> Case:
    """A classifier and its fully convolutional form, at the size of one window."""
    model, converted, x = converted_model(name, size)
    return f"{name}, {size}²", OnWindows(model, {0: (1, 1)}, average=False), converted, x


def windows(name: str, size: int, larger: int) -> Case:
    """All windows of a larger image, one by one and at once."""
    model, converted, _ = converted_model(name, size)
    x = as_inputs(torch.randn(1, 3, larger, larger))
    count = ((larger - size) // STEP + 1) ** 2
    cut = Windows((size, size), (STEP, STEP))
    every = OnWindows(model, {0: (size, size)}, average=False, cut=cut)
    return f"{name}, {count} windows of {larger}²", every, converted, x


def converted_model(name: str, size: int) -> tuple[nn.Module, nn.Module, Inputs]:
    model, x = zoo.torchvision(name, size)
    inputs = as_inputs(x)
    return model.eval(), convmerge.fuse(model.eval(), inputs, fully_conv=True).model, inputs


def copies(share: float) -> Case:
    """Four convolutions in which every layer repeats a share of its channels."""
    widths = (3, 64, 128, 128, 64)
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        layers += [with_copies(nn.Conv2d(into, out, 3, padding=1), share), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(widths[-1], 8, 1)).eval()
    x = as_inputs(torch.randn(1, 3, 56, 56))
    return (
        f"copies, {share:.0%} of {' '.join(map(str, widths[1:]))}",
        model,
        convmerge.fuse(model, x).model,
        x,
    )


def with_copies(conv: nn.Conv2d, share: float) -> nn.Conv2d:
    """The last channels twice the first ones."""
    count = math.floor(share * conv.out_channels)
    with torch.no_grad():
        for tensor in (conv.weight, conv.bias):
            tensor[len(tensor) - count :] = 2 * tensor[:count]
    return conv


def row(make: Maker, pairs: int) -> str:
    title, a, b, inputs = make()
    found = benchmark(a, b, inputs, pairs=pairs)
    (before, after), (low, high) = found.counts, found.speedup.middle_half
    peaks, times = [p / 2**20 for p in found.peak_bytes], [s * 1e3 for s in found.speedup.seconds]
    return COLUMNS.format(
        title,
        f"{before.parameters / 1e6:.3f} → {after.parameters / 1e6:.3f} M",
        f"{before.macs / 1e6:.1f} → {after.macs / 1e6:.1f} M",
        f"{peaks[0]:.2f} → {peaks[1]:.2f} MiB",
        f"{times[0]:.2f} → {times[1]:.2f} ms",
        f"{found.speedup.median:.2f}×",
        f"{low:.2f} – {high:.2f}×",
    )


if __name__ == "__main__":
    main()
