"""Hypernetworks: parameters, MACs, peak memory and latency before and after, with a fixed vector and without.

    python tests/benchmarks/hypernetwork.py [NAME ...] [--pairs 15] [--threads 2] [--quick]

NAME is any part of a row's name. A generator of two linear layers computes the kernel of a convolution from a
vector; a constant 1×1 convolution follows. ``unbound``: that moves into the generator. ``composed``: the
generator ends in something that is not linear, so kernels are composed in every call. ``bound``: the vector
is fixed, and the original runs with it filled in. ``film``: scales and shifts of every channel are computed
from the vector. Peak memory is that of the tensors alive at one time, weights not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from table import attempted, chosen, parsed, parser
from torch import Tensor, nn

import convmerge
from convmerge.benchmark import benchmark
from convmerge.inputs import Filled

COLUMNS = "{:32} {:>19} {:>19} {:>19} {:>17} {:>8} {:>15}"
HEAD = ("", "parameters", "MACs", "peak memory", "latency", "faster", "middle half")
LENGTH = 64  # of the vector


class HyperConv(nn.Module):
    """A convolution with a computed kernel and a constant pointwise one after it."""

    def __init__(self, inp: int, mid: int, out: int, kernel: int, last: nn.Module) -> None:
        super().__init__()
        self.shape, self.padding = (mid, inp, kernel, kernel), kernel // 2
        numbers = mid * inp * kernel**2
        self.generator = nn.Sequential(
            nn.Linear(LENGTH, 2 * mid), nn.ReLU(), nn.Linear(2 * mid, numbers), last
        )
        self.conv = nn.Conv2d(mid, out, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        kernel = self.generator(cond).reshape(self.shape)
        return F.relu(self.conv(F.conv2d(x, kernel, padding=self.padding)))


class Film(nn.Module):
    """Four blocks of a convolution, batch norm, and a scale and shift computed from the vector."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(4))
        self.films = nn.ModuleList(nn.Linear(LENGTH, 2 * channels) for _ in range(4))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        for conv, norm, film in zip(self.convs, self.norms, self.films, strict=True):
            scale, shift = film(cond)[:, :, None, None].chunk(2, 1)
            x = F.relu(norm(conv(x)) * (1 + scale) + shift)
        return x


def main() -> None:
    arguments = parsed(parser(__doc__))
    makers: dict[str, Callable[[], tuple[nn.Module, int]]] = {}
    for inp, mid, out, kernel in ((3, 64, 16, 1), (32, 128, 32, 1), (64, 256, 64, 1), (16, 64, 16, 3)):
        title = f"{inp}→{mid}→{out} {kernel}×{kernel}"
        makers[f"unbound {title}"] = partial(hyper, inp, mid, out, kernel, nn.Identity())
        makers[f"composed {title}"] = partial(hyper, inp, mid, out, kernel, nn.Tanh())
        makers[f"bound {title}"] = partial(hyper, inp, mid, out, kernel, nn.Identity())
    for channels in (32, 64):
        makers[f"bound film {channels}"] = partial(film, channels)
    print(COLUMNS.format(*HEAD))
    for name in chosen(makers, arguments.names):
        for size in (16,) if arguments.quick else (16, 56, 112):
            attempted(name, partial(row, name, makers[name], size, arguments.pairs))


def hyper(*sizes: int | nn.Module) -> tuple[nn.Module, int]:
    return HyperConv(*sizes), int(sizes[0])  # type: ignore[arg-type, call-overload]


def film(channels: int) -> tuple[nn.Module, int]:
    return Film(channels), channels


def row(name: str, make: Callable[[], tuple[nn.Module, int]], size: int, pairs: int) -> str:
    """Fuse, measure and format one row."""
    model, channels = make()
    model.eval()
    x, cond = torch.randn(1, channels, size, size), torch.randn(1, LENGTH)
    bind = {"cond": cond} if name.startswith("bound") else {}
    result = convmerge.fuse(model, (x, cond), bind=bind)
    original = Filled(model, bind) if bind else model
    found = benchmark(original, result.model, result.inputs, pairs=pairs)
    (before, after), (low, high) = found.counts, found.speedup.middle_half
    peaks, times = [p / 2**20 for p in found.peak_bytes], [s * 1e3 for s in found.speedup.seconds]
    return COLUMNS.format(
        f"{name}, {size}²",
        f"{before.parameters / 1e3:.1f} → {after.parameters / 1e3:.1f} k",
        f"{before.macs / 1e6:.2f} → {after.macs / 1e6:.2f} M",
        f"{peaks[0]:.2f} → {peaks[1]:.2f} MiB",
        f"{times[0]:.2f} → {times[1]:.2f} ms",
        f"{found.speedup.median:.2f}×",
        f"{low:.2f} – {high:.2f}×",
    )


if __name__ == "__main__":
    main()
