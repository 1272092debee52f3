"""Block-diagonal layers: time and memory of the forms people write, and of what convmerge makes of them.

    python tests/benchmarks/block_diagonal.py [WIDTH ...] [--rows 1 32 512] [--blocks 2 8 64] [--threads 2]
                                              [--fit] [--quick]

All forms of a case run in turn, in short bursts, and the best time of each counts. ``fused`` is what the
einsum form becomes; the others become the same. ``ratio`` is its time over the fastest written form's; the
last lines have the worst and the mean. Memory is parameters, then the peak of the tensors alive at one time
in the forward pass, of the dense form, the loop and the fused one. ``--fit`` prints rates for roofline.py
that fit what batched products and selections of channels took.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fitting import fitted, rate_line
from table import parsed, parser
from torch import Tensor, nn

import convmerge
from convmerge.affine import Geometry
from convmerge.benchmark import peak_bytes
from convmerge.cost.roofline import RATES, Load, latency, layer_load
from convmerge.cost.timing import Stopwatch
from convmerge.emit import Layer
from convmerge.emit.batched import batched_linear
from convmerge.inputs import as_inputs

FORMS = ("dense", "mask", "loop", "conv", "two convs", "einsum", "bmm")
COLUMNS = "{:>5} {:>6} {:>5} " + " {:>9}" * (len(FORMS) + 1) + " {:>6}  {:30} {:>18} {:>22}"


class Dense(nn.Module):
    """One linear layer with exact zeros off the blocks."""

    def __init__(self, blocks: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.block_diag(*blocks))
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Mask(Dense):
    """The same with a mask that is applied anew in every call."""

    def __init__(self, blocks: Tensor, bias: Tensor) -> None:
        super().__init__(blocks, bias)
        self.register_buffer("mask", (self.weight != 0).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Loop(nn.Module):
    """A linear layer for every chunk."""

    def __init__(self, blocks: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(blocks.shape[2], blocks.shape[1]) for _ in blocks)
        for layer, weight, part in zip(self.layers, blocks, bias.chunk(len(blocks)), strict=True):
            layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(part.clone())

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.layers), -1)
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], -1)


class Blocks(nn.Module):
    """A stack of weights (blocks, in, out), multiplied by ``einsum`` or ``bmm``."""

    def __init__(self, blocks: Tensor, bias: Tensor, product: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(blocks.transpose(1, 2).contiguous())
        self.bias = nn.Parameter(bias)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        n, into, _ = self.weight.shape
        x = x.view(-1, n, into)
        if self.product == "einsum":
            return torch.einsum("nbi,bio->nbo", x, self.weight).flatten(1) + self.bias
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1).flatten(1) + self.bias


def written(blocks: Tensor, bias: Tensor) -> dict[str, nn.Module]:
    """The forms people write of blocks (blocks, out, in), by name."""
    n, out, into = blocks.shape

    def conv(weight: Tensor, bias: Tensor | None) -> nn.Conv1d:
        layer = nn.Conv1d(n * weight.shape[1], len(weight), 1, groups=n, bias=bias is not None)
        layer.weight = nn.Parameter(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias)
        return layer

    around = nn.Unflatten(1, (n * into, 1)), nn.Flatten()
    narrow = max(1, into // 2)
    halves = torch.randn(n * narrow, into, 1), torch.randn(n * out, narrow, 1)
    return {
        "dense": Dense(blocks, bias),
        "mask": Mask(blocks, bias),
        "loop": Loop(blocks, bias),
        "conv": nn.Sequential(around[0], conv(blocks.flatten(0, 1).unsqueeze(-1), bias), around[1]),
        "two convs": nn.Sequential(around[0], conv(halves[0], None), conv(halves[1], bias), around[1]),
        "einsum": Blocks(blocks, bias, "einsum"),
        "bmm": Blocks(blocks, bias, "bmm"),
    }


@dataclass(frozen=True)
class Case:
    """A layer of equal blocks, and the rows it is run on."""

    width: int
    blocks: int
    rows: int

    def measure(self, timer: Stopwatch) -> float:
        """Print a row; the time of what convmerge emits over that of the fastest form."""
        size = self.width // self.blocks
        forms = written(torch.randn(self.blocks, size, size), torch.randn(self.width))
        x = torch.randn(self.rows, self.width)
        result = convmerge.fuse(forms["einsum"], x)
        fused = result.model
        seconds = timer([lambda m=m: m(x) for m in (*forms.values(), fused)])  # type: ignore[misc]
        ratio = seconds[-1] / min(seconds[:-1])
        became = [site.reason for site in result.report.sites if site.action == "merge"]
        models = forms["dense"], forms["loop"], fused
        parameters = (f"{sum(p.numel() for p in m.parameters()) / 1e3:.1f}" for m in (models[0], fused))
        peaks = (f"{peak_bytes(m, as_inputs(x)) / 2**20:.2f}" for m in models)
        print(
            COLUMNS.format(
                self.width,
                self.blocks,
                self.rows,
                *(f"{s * 1e6:.1f} µs" for s in seconds),
                f"{ratio:.2f}",
                became[0].split(":")[0].removeprefix("one ") if became else "as it is",
                " → ".join(parameters) + " k",
                ", ".join(peaks) + " MiB",
            ),
            flush=True,
        )
        return ratio


def cases(widths: Sequence[int], blocks: Sequence[int], rows: Sequence[int]) -> Iterator[Case]:
    return (Case(w, b, n) for w in widths for b in blocks for n in rows if w >= 2 * b)


def fit(timer: Stopwatch) -> None:
    """Print rates for batched products and selections that fit this machine."""
    products: list[tuple[Load, Callable[[], object]]] = []
    selections: list[tuple[Load, Callable[[], object]]] = []
    for case in cases((64, 256, 1024), (2, 8, 32), (1, 16, 256)):
        g = Geometry.channelwise(case.width, case.width, case.blocks, 0, bias=True)
        layer, x = batched_linear(g, torch.float32, "cpu"), torch.randn(case.rows, case.width)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        load = layer_load(Layer("batched_linear", g), (), batch=case.rows)
        products.append((load, lambda m=layer, x=x: m(x)))  # type: ignore[misc]
        order = torch.randperm(case.width)
        moved = Load("select", 0, 2 * 4 * x.numel())
        selections.append((moved, lambda x=x, i=order: torch.index_select(x, -1, i)))  # type: ignore[misc]
    for name, samples in (("batched", products), ("select", selections)):
        seconds = timer([run for _, run in samples])
        rate = fitted(RATES[name], [load for load, _ in samples], seconds)
        print(rate_line(name, rate))
        for old, new in ((RATES[name], "now"), (rate, "fitted")):
            off = [latency(old, load) / s for (load, _), s in zip(samples, seconds, strict=True)]
            print(f"    predicted over measured, {new}: {min(off):.2f} … {max(off):.2f}")


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--rows", type=int, nargs="+", default=[1, 32, 512])
    found.add_argument("--blocks", type=int, nargs="+", default=[2, 8, 64])
    found.add_argument("--fit", action="store_true")
    arguments = parsed(found)
    timer = Stopwatch(least=3, most=5) if arguments.quick else Stopwatch()
    if arguments.fit:
        fit(timer)
        return
    print(
        COLUMNS.format("width", "blocks", "rows", *FORMS, "fused", "ratio", "", "parameters", "peak memory")
    )
    widths = [int(name) for name in arguments.names] or [64, 256, 1024, 4096]
    ratios = [case.measure(timer) for case in cases(widths, arguments.blocks, arguments.rows)]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"fused over the fastest written form: at most {max(ratios):.2f}, {mean:.2f} in the geometric mean")


if __name__ == "__main__":
    main()
