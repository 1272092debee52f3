"""Random affine regions as modules: chains of resampling and convolving operators in one to three dimensions.

All weights are small integers and all averages are over powers of two, so that every product and sum is exact
in float64 and results can be compared for equality. The seed and the number of dimensions reproduce a region.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
EXAMPLE = {1: (30, 41), 2: (18, 25), 3: (8, 11)}  # the range of example sizes, by number of dimensions
LARGEST = {1: 200, 2: 90, 3: 34}  # along a dimension, anywhere in the region
NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INTERPOLATION = ("linear", "bilinear", "trilinear")
CHANNELS = [1, 2, 3, 4, 6]


class Pad(nn.Module):
    """Zero padding by any amounts, negative ones cropping."""

    def __init__(self, amounts: list[int]) -> None:
        super().__init__()
        self.amounts = amounts

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.amounts)

    def extra_repr(self) -> str:
        return str(self.amounts)


class Crop(nn.Module):
    """Slices of the spatial dimensions."""

    def __init__(self, bounds: list[tuple[int, int]]) -> None:
        super().__init__()
        self.index = (slice(None), slice(None), *(slice(a or None, -b or None) for a, b in bounds))

    def forward(self, x: Tensor) -> Tensor:
        return x[self.index]

    def extra_repr(self) -> str:
        return str(self.index[2:])


class Pick(nn.Module):
    """Some channels, in any order."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.register_buffer("channels", torch.tensor(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.channels)


class Scale(nn.Module):
    """A factor and a shift for each channel."""

    def __init__(self, channels: int, spatial: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, *(1,) * spatial))
        self.bias = nn.Parameter(torch.empty(channels, *(1,) * spatial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Negated(nn.Module):
    """-x."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


class Continued(nn.Module):
    """Padding that repeats what is at the border."""

    def __init__(self, amounts: list[int], mode: str) -> None:
        super().__init__()
        self.amounts = amounts
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.amounts, self.mode)

    def extra_repr(self) -> str:
        return f"{self.amounts}, {self.mode}"


class Blur(nn.Module):
    """A fixed kernel on every channel alone, with a stride."""

    def __init__(self, channels: int, spatial: int, stride: int) -> None:
        super().__init__()
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
        self.stride, self.groups = stride, channels
        kernel = torch.ones(1, dtype=torch.float64)
        for _ in range(spatial):
            kernel = kernel.unsqueeze(-1) * torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
        self.register_buffer("kernel", kernel.expand(channels, 1, *(3 for _ in range(spatial))).clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.kernel, None, self.stride, 1, 1, self.groups)

    def extra_repr(self) -> str:
        return f"{self.groups}, stride={self.stride}"


class Joined(nn.Module):
    """What branches make of one value, concatenated."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Branches(nn.Module):
    """The sum of what branches make of one value."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


class Drawing:
    """A seeded source of operators for maps of ``spatial`` dimensions."""

    def __init__(self, seed: int, spatial: int) -> None:
        self.random = random.Random(f"{seed} {spatial}")
        self.n = spatial
        self.choose = self.random.choice

    def dims(self, options: list[int]) -> tuple[int, ...]:
        """One of the options for every dimension, the same for all of them as often as not."""
        same = self.choose(options)
        return tuple(same if self.alike else self.choose(options) for _ in range(self.n))

    def operator(self, channels: int) -> tuple[str, nn.Module]:
        """A name and an operator on so many channels."""
        self.alike = self.random.random() < 0.6
        kinds: dict[str, Callable[[int], nn.Module]] = {
            "conv": self.conv,
            "pointwise": self.pointwise,
            "transposed": self.transposed,
            "nearest": self.nearest,
            "pool": self.pool,
            "pad": lambda c: Pad([self.choose([-1, 0, 0, 1, 2]) for _ in range(2 * self.n)]),
            "crop": lambda c: Crop([(self.choose([0, 1]), self.choose([0, 1, 2])) for _ in range(self.n)]),
            "pick": lambda c: Pick([self.random.randrange(c) for _ in range(self.choose([1, 2, 4]))]),
            "scale": lambda c: Scale(c, self.n),
            "branches": self.branches,
            "joined": self.joined,
            "norm": self.norm,
            "blur": lambda c: Blur(c, self.n, self.choose([1, 2])),
            "same": lambda c: self.choose([nn.Dropout(), nn.Identity(), Negated()]),
            "continued": self.continued,
            "interpolated": lambda c: nn.Upsample(scale_factor=2.0, mode=INTERPOLATION[self.n - 1]),
        }
        if channels % 2 == 0:
            kinds["channel shuffle"] = lambda c: nn.ChannelShuffle(2)
        if self.n == 2:
            kinds["unshuffle"] = lambda c: nn.PixelUnshuffle(self.choose([2, 2, 3]))
            for rate in (2, 3):
                if channels % rate**2 == 0:
                    kinds["shuffle"] = lambda c, rate=rate: nn.PixelShuffle(rate)
        kind = self.choose([*kinds, *["conv"] * 5, *["transposed"] * 2])
        return kind, kinds[kind](channels)

    def groups(self, channels: int, out: int) -> int:
        return self.choose([g for g in (1, 1, 2, 3, channels) if channels % g == 0 and out % g == 0])

    def conv(self, channels: int) -> nn.Module:
        kernel, dilation = self.dims([1, 2, 3, 3, 4] if self.n < 3 else [1, 2, 3]), self.dims([1, 1, 2])
        out, bias = self.choose(CHANNELS), self.random.random() < 0.5
        options = {"groups": self.groups(channels, out), "bias": bias}
        if self.random.random() < 0.15:
            return CONV[self.n - 1](channels, out, kernel, dilation=dilation, padding="same", **options)
        padding = tuple(
            self.choose([0, d * (k - 1) // 2, k - 1]) for k, d in zip(kernel, dilation, strict=True)
        )
        stride = self.dims([1, 1, 1, 2, 3])
        return CONV[self.n - 1](channels, out, kernel, stride, padding, dilation, **options)

    def pointwise(self, channels: int) -> nn.Module:
        return CONV[self.n - 1](channels, self.choose(CHANNELS), 1, bias=self.random.random() < 0.5)

    def transposed(self, channels: int) -> nn.Module:
        kernel, stride = self.dims([1, 2, 3, 4]), self.dims([1, 2, 2, 3])
        dilation = self.dims([1, 1, 1, 2])
        padding = tuple(self.choose([0, (k - 1) // 2]) for k in kernel)
        extra = tuple(self.choose([0, 0, max(s, d) - 1]) for s, d in zip(stride, dilation, strict=True))
        out, bias = self.choose(CHANNELS), self.random.random() < 0.5
        groups = self.groups(channels, out)
        kind = TRANSPOSED[self.n - 1]
        return kind(channels, out, kernel, stride, padding, extra, groups, bias, dilation)

    def nearest(self, channels: int) -> nn.Module:
        factors = self.dims([2, 2, 3] if self.alike else [1, 2, 3])
        return nn.Upsample(
            scale_factor=tuple(map(float, factors)), mode=self.choose(["nearest", "nearest-exact"])
        )

    def pool(self, channels: int) -> nn.Module:
        kernel = self.dims([2, 2, 4])
        if self.n > 1 and self.random.random() < 0.3:  # a sum over an eighth of the window, which is exact
            return POOL[self.n - 1](3, self.dims([1, 2, 3]), self.choose([0, 1]), divisor_override=8)
        return POOL[self.n - 1](kernel, self.dims([1, 2]), tuple(self.choose([0, k // 2]) for k in kernel))

    def norm(self, channels: int) -> nn.Module:
        """A batch norm, whose deviations are powers of two."""
        norm = NORM[self.n - 1](channels, eps=0.0)
        for c in range(channels):
            norm.running_mean[c] = self.choose([-2.0, -1.0, 0.0, 1.0, 3.0])
            norm.running_var[c] = self.choose([0.25, 1.0, 4.0])
        return norm

    def continued(self, channels: int) -> nn.Module:
        mode = self.choose(["reflect", "replicate", "circular"])
        return Continued([self.choose([0, 1, 2]) for _ in range(2 * self.n)], mode)

    def joined(self, channels: int) -> nn.Module:
        """Convolutions with outputs of one size, one beside the other."""
        stride, out = self.dims([1, 1, 2]), self.choose([1, 2, 3])
        kernels = [self.dims([1, 3, 5] if self.n < 3 else [1, 3]) for _ in range(self.choose([2, 2, 3]))]
        return Joined(
            [
                CONV[self.n - 1](channels, out, kernel, stride, tuple(k // 2 for k in kernel))
                for kernel in kernels
            ]
        )

    def branches(self, channels: int) -> nn.Module:
        """Convolutions with the same output size beside one another, often with what comes before itself."""
        stride, out = self.dims([1, 1, 1, 2]), self.choose(CHANNELS)
        found: list[nn.Module] = []
        for _ in range(self.choose([2, 2, 3])):
            kernel = self.dims([1, 3, 5] if self.n < 3 else [1, 3])
            padding = tuple(k // 2 for k in kernel)
            branch: nn.Module = CONV[self.n - 1](channels, out, kernel, stride, padding)
            if self.random.random() < 0.3:
                branch = nn.Sequential(self.pointwise(channels), branch)
                branch[1] = CONV[self.n - 1](branch[0].out_channels, out, kernel, stride, padding)
            found.append(branch)
        if out == channels and set(stride) == {1}:
            found.append(nn.Identity())
        return Branches(found)


class RandomRegion(nn.Module):
    """Two to five operators in a row, and an example input that runs through them."""

    def __init__(self, seed: int, spatial: int) -> None:
        super().__init__()
        drawing = Drawing(seed, spatial)
        self.spatial = spatial
        self.channels = drawing.choose(CHANNELS)
        self.size = tuple(drawing.random.randint(*EXAMPLE[spatial]) for _ in range(spatial))
        generator = torch.Generator().manual_seed(1000 * seed + spatial)
        self.steps = nn.ModuleList()
        self.kinds: list[str] = []
        length, value = drawing.choose([2, 3, 3, 4, 5]), torch.zeros(1, self.channels, *self.size).double()
        while len(self.kinds) < length:
            kind, step = drawing.operator(value.shape[1])
            step = integers(step, generator).eval()
            try:
                after = step(value)
            except RuntimeError:
                continue
            if min(after.shape[2:]) > 3 and max(after.shape[2:]) <= LARGEST[spatial] and after.shape[1] <= 24:
                self.steps.append(step)
                self.kinds.append(kind)
                value = after
        if self.steps and "unshuffle" in self.kinds[:1]:
            self.size = tuple(n + n % 2 for n in self.size)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


@torch.no_grad()
def integers(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """The module in float64 with random parameters from -3..3."""
    module = module.double()
    for p in module.parameters():
        p.copy_(torch.randint(-3, 4, p.shape, generator=generator))
    return module


def integer_input(channels: int, size: tuple[int, ...], seed: int) -> Tensor:
    """(2, channels, *size), entries from -3..3."""
    generator = torch.Generator().manual_seed(seed + math.prod(size))
    return torch.randint(-3, 4, (2, channels, *size), generator=generator).double()
