"""Random models end to end: whatever is merged is exact, whatever is not has a reason.

A model is a random program over values: every step applies a layer, a function or a sum to earlier values,
so that chains, branches, residuals, sums and concatenations of several origins, shared modules, in-place
writes and dead ends all occur.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convmerge

SIZE = 11
TOLERANCE = 1e-9  # float64, relative: far above rounding, far below what one wrong tap or bias amounts to


class RandomModel(nn.Module):
    """A random program; the seed reproduces it."""

    def __init__(self, seed: int, steps: int = 9) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.layers = nn.ModuleDict()
        self.scales = nn.ParameterDict()
        self.program: list[tuple[str, tuple[int, ...], str]] = []
        channels = [rng.choice([2, 4, 6])]
        maps = [True]  # whether the value still is a map of the input's size
        self.channels = channels[0]
        for step in range(steps):
            source = rng.choice([len(channels) - 1] * 3 + list(range(len(channels))))
            kind = rng.choice(KINDS)
            other = rng.choice(range(len(channels)))
            if kind in JOINS and not (
                maps[source] and maps[other] and (kind == "cat" or channels[other] == channels[source])
            ):
                kind = "conv"
            out = self._make(kind, f"s{step}", channels[source], rng)
            operands = (source, other) if kind in JOINS else (source,)
            out += channels[other] if kind == "cat" else 0
            self.program.append((kind, operands, f"s{step}"))
            channels.append(out)
            maps.append(maps[source] and kind not in ("stride", "pool", "nearest", "transpose", "valid"))
        if rng.random() < 0.3:  # one module at two sites
            places = [i for i, (kind, _, _) in enumerate(self.program) if kind == "depthwise"]
            for i in places[1:]:
                kind, operands, _ = self.program[i]
                first = self.program[places[0]]
                if channels[operands[0]] == channels[first[1][0]]:
                    self.program[i] = (kind, operands, first[2])
        self._randomise(seed)

    def _make(self, kind: str, name: str, c: int, rng: random.Random) -> int:
        out = rng.choice([2, 4, 6])
        bias = rng.random() < 0.7
        makers: dict[str, Callable[[], nn.Module]] = {
            "conv": lambda: nn.Conv2d(c, out, rng.choice([1, 1, 3]), padding="same", bias=bias),
            "valid": lambda: nn.Conv2d(c, out, (1, 3), padding=rng.choice([0, 1]), bias=bias),
            "stride": lambda: nn.Conv2d(c, out, rng.choice([1, 2, 3]), stride=2, padding=rng.choice([0, 1])),
            "grouped": lambda: nn.Conv2d(c, out, 3, padding=1, groups=2, bias=bias),
            "depthwise": lambda: nn.Conv2d(c, c, 3, padding=1, groups=c, bias=bias),
            "transpose": lambda: nn.ConvTranspose2d(c, out, rng.choice([2, 3]), stride=2, bias=bias),
            "bn": lambda: nn.BatchNorm2d(c, affine=rng.random() < 0.8),
            "pool": lambda: nn.AvgPool2d(2, ceil_mode=rng.random() < 0.2),
            "nearest": lambda: nn.Upsample(scale_factor=2),
            "dropout": lambda: nn.Dropout(0.5),
            "identity": lambda: nn.Identity(),
            "block": lambda: nn.Sequential(nn.Conv2d(c, out, 1), nn.BatchNorm2d(out)),
        }
        if kind in makers:
            self.layers[name] = makers[kind]()
            kept = kind in ("depthwise", "bn", "pool", "nearest", "dropout", "identity")
            return c if kept else out
        if kind in ("scale", "shift"):
            self.scales[name] = nn.Parameter(torch.ones(c, 1, 1))
        return c

    @torch.no_grad()
    def _randomise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.abs_().add_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, operands, name in self.program:
            value = values[operands[0]]
            if name in self.layers:
                value = self.layers[name](value)
            elif kind == "add":
                value = value + values[operands[1]]
            elif kind == "sub":
                value = value - values[operands[1]]
            elif kind == "alpha":
                value = torch.add(value, values[operands[1]], alpha=0.5)
            elif kind == "iadd":
                value = value.clone()
                value += values[operands[1]]
            elif kind == "cat":
                value = torch.cat([value, values[operands[1]]], 1)
            elif kind == "scale":
                value = value * self.scales[name]
            elif kind == "shift":
                value = value + self.scales[name].sigmoid()
            elif kind == "half":
                value = value / 2 - 1
            else:
                value = F.relu(value)
            values.append(value)
        return values[-1]


KINDS = [
    *("conv", "conv", "conv", "bn", "bn", "add", "add", "relu", "valid", "stride", "grouped", "depthwise"),
    *("transpose", "pool", "nearest", "dropout", "identity", "block", "sub", "alpha", "iadd", "scale"),
    *("shift", "half", "cat"),
]
JOINS = ("add", "sub", "alpha", "iadd", "cat")


def check(seed: int) -> Counter[str]:
    """Fuse one random model; returns how many sites there were by action."""
    model = RandomModel(seed).double().eval()
    x = torch.randn(1 + seed % 2, model.channels, SIZE, SIZE + 2, dtype=torch.float64)
    with torch.no_grad():
        try:
            model(x)
        except RuntimeError:  # strides and pools have left nothing of the map
            return Counter()
        result = convmerge.fuse(model, x)
        for inputs in (x, torch.randn(3, model.channels, SIZE + 1, SIZE, dtype=torch.float64)):
            try:
                wanted = model(inputs)
            except RuntimeError:  # too small for this model
                continue
            error = (result.model(inputs) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
            assert error < TOLERANCE, f"RandomModel({seed}): relative error {error:.1e}"
    assert all(site.reason for site in result.report.sites), f"RandomModel({seed}): a site without a reason"
    return Counter(site.action for site in result.report.sites)


def test_random_models() -> None:
    actions: Counter[str] = Counter()
    for seed in range(30):
        actions += check(seed)
    assert actions["merge"] > 10


@pytest.mark.long
def test_many_random_models() -> None:
    actions: Counter[str] = Counter()
    for seed in range(100, 500):
        actions += check(seed)
    print(dict(actions))
    assert actions["merge"] > actions["refuse"] / 4
