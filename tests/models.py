"""Small models of the published over-parameterised blocks, from scratch, for tests.

Channel counts are small, unequal and mostly prime, so that a transposed weight or a wrong group shows.
``build(name)`` gives (model in eval mode with calibrated random statistics, example input).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def conv_bn(i: int, o: int, k: int | tuple[int, int], **options: object) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, bias=False, **options), nn.BatchNorm2d(o))


class Sum(nn.Module):
    """The sum of what the branches make of one input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        out = self.branches[0](x)
        for branch in self.branches[1:]:
            out = out + branch(x)
        return out


class Cat(nn.Module):
    """The branches' outputs side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Sesr(nn.Module):
    """SESR: a wide k×k conv padded first, squeezed by a 1×1, linear in between; residuals; pixel shuffle."""

    def __init__(self, channels: int = 7, wide: int = 29, blocks: int = 2, scale: int = 2) -> None:
        super().__init__()

        def collapsible(i: int, o: int, k: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(i, wide, k, padding=k // 2, bias=False), nn.Conv2d(wide, o, 1, bias=True)
            )

        self.first = nn.Sequential(collapsible(1, channels, 5), nn.PReLU(channels))
        self.body = nn.ModuleList(collapsible(channels, channels, 3) for _ in range(blocks))
        self.relus = nn.ModuleList(nn.PReLU(channels) for _ in range(blocks))
        self.last = collapsible(channels, scale**2, 5)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        start = y = self.first(x)
        for conv, relu in zip(self.body, self.relus, strict=True):
            y = relu(conv(y) + y)
        return self.shuffle(self.last(y + start) + x)


class SpanConv(nn.Module):
    """SPAN's Conv3XC: zero pad, then 1×1, 3×3 and 1×1 without padding, beside a 1×1."""

    def __init__(self, i: int, o: int, gain: int = 2) -> None:
        super().__init__()
        self.skip = nn.Conv2d(i, o, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(i, i * gain, 1), nn.Conv2d(i * gain, o * gain, 3), nn.Conv2d(o * gain, o, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (1, 1, 1, 1))) + self.skip(x)


class SpanBlock(nn.Module):
    """Three such convs and SPAN's parameter-free attention."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = SpanConv(c, c), SpanConv(c, c), SpanConv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c3(F.silu(self.c2(F.silu(self.c1(x)))))
        return (y + x) * (torch.sigmoid(y) - 0.5)


def repvgg(i: int, o: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """3×3 and 1×1, each with its batch norm, and a batch norm alone where the shapes allow."""
    branches: list[nn.Module] = [
        conv_bn(i, o, 3, stride=stride, padding=1, groups=groups),
        conv_bn(i, o, 1, stride=stride, groups=groups),
    ]
    if i == o and stride == 1:
        branches.append(nn.BatchNorm2d(i))
    return nn.Sequential(Sum(*branches), nn.ReLU())


def mobileone(i: int, o: int, stride: int = 1, copies: int = 3) -> nn.Module:
    """A depthwise and a pointwise stage, each several convs with batch norm, a 1×1 scale and the identity."""

    def stage(i: int, o: int, k: int, stride: int, groups: int) -> nn.Module:
        convs = [conv_bn(i, o, k, stride=stride, padding=k // 2, groups=groups) for _ in range(copies)]
        scale = [conv_bn(i, o, 1, stride=stride, groups=groups)] if k > 1 else []
        identity = [nn.BatchNorm2d(i)] if i == o and stride == 1 else []
        return nn.Sequential(Sum(*convs, *scale, *identity), nn.ReLU())

    return nn.Sequential(stage(i, i, 3, stride, i), stage(i, o, 1, 1, 1))


class BnPad(nn.Module):
    """DBB's batch norm that pads with the value it gives to zero, so that the next conv needs no padding."""

    def __init__(self, channels: int, pad: int) -> None:
        super().__init__()
        self.bn, self.pad = nn.BatchNorm2d(channels), pad

    def forward(self, x: Tensor) -> Tensor:
        bn, p = self.bn, self.pad
        value = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        y, value = bn(x), value.view(1, -1, 1, 1)
        rows = value.expand(y.shape[0], -1, p, y.shape[3])
        y = torch.cat([rows, y, rows], 2)
        columns = value.expand(y.shape[0], -1, y.shape[2], p)
        return torch.cat([columns, y, columns], 3)


def dbb(i: int, o: int, k: int = 3, stride: int = 1) -> nn.Module:
    """Diverse branch block: k×k, 1×1, 1×1 then k×k, 1×1 then average pooling, each with batch norms."""
    p = k // 2
    return nn.Sequential(
        Sum(
            conv_bn(i, o, k, stride=stride, padding=p),
            conv_bn(i, o, 1, stride=stride),
            nn.Sequential(nn.Conv2d(i, i, 1, bias=False), BnPad(i, p), *conv_bn(i, o, k, stride=stride)),
            nn.Sequential(
                nn.Conv2d(i, o, 1, bias=False), BnPad(o, p), nn.AvgPool2d(k, stride), nn.BatchNorm2d(o)
            ),
        ),
        nn.ReLU(),
    )


def acnet(i: int, o: int) -> nn.Module:
    """Asymmetric convolutions: 3×3, 1×3 and 3×1."""
    return nn.Sequential(
        Sum(
            conv_bn(i, o, 3, padding=1),
            conv_bn(i, o, (1, 3), padding=(0, 1)),
            conv_bn(i, o, (3, 1), padding=(1, 0)),
        ),
        nn.ReLU(),
    )


class Stencil(nn.Module):
    """A 1×1 conv followed by one fixed 3×3 filter for every channel, scaled and shifted per channel."""

    def __init__(self, i: int, o: int, taps: list[list[float]]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, 1, bias=False)
        self.scale, self.shift = nn.Parameter(torch.ones(o, 1, 1, 1)), nn.Parameter(torch.zeros(o))
        self.register_buffer("taps", torch.tensor(taps).expand(o, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.scale * self.taps, self.shift, padding=1, groups=len(self.taps))


def ecb(i: int, o: int) -> nn.Module:
    """Edge-oriented block: 3×3, 1×1 then 3×3, 1×1 then each of Sobel twice and Laplace, and the identity."""
    sobel = [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]
    laplace = [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]
    return nn.Sequential(
        Sum(
            nn.Conv2d(i, o, 3, padding=1),
            nn.Sequential(nn.Conv2d(i, 2 * o, 1, bias=False), nn.Conv2d(2 * o, o, 3, padding=1)),
            Stencil(i, o, sobel),
            Stencil(i, o, [list(row) for row in zip(*sobel, strict=True)]),
            Stencil(i, o, laplace),
            *([nn.Identity()] if i == o else []),
        ),
        nn.PReLU(o),
    )


class DoConv(nn.Module):
    """DO-Conv: a conv whose kernel is a product of W (o, i/groups, d_mul) and D (i, k², d_mul)."""

    def __init__(self, i: int, o: int, k: int = 3, groups: int = 1, **options: object) -> None:
        super().__init__()
        self.shape, self.options = (o, i // groups, k, k), {"groups": groups, **options}
        self.W = nn.Parameter(torch.randn(o, i // groups, k * k) / (i * k / groups))
        self.D = nn.Parameter(torch.randn(i, k * k, k * k) / k**2)
        self.register_buffer("D_diag", torch.eye(k * k).expand(i, -1, -1).clone())
        self.bias = nn.Parameter(torch.zeros(o))

    def forward(self, x: Tensor) -> Tensor:
        o, _, k, _ = self.shape
        w = self.W.view(o // self.options["groups"], -1, k * k)
        kernel = torch.einsum("ims,ois->oim", self.D + self.D_diag, w).reshape(self.shape)
        return F.conv2d(x, kernel, self.bias, **self.options)


def doconv() -> nn.Module:
    """DO-Conv with a batch norm, then DO-GConv (three groups, stride 2)."""
    return nn.Sequential(
        DoConv(6, 9, padding=1), nn.BatchNorm2d(9), nn.ReLU(), DoConv(9, 12, groups=3, stride=2)
    )


class Lora(nn.Module):
    """A linear layer with a low-rank update beside it."""

    def __init__(self, i: int, o: int, rank: int = 3, alpha: float = 5.0) -> None:
        super().__init__()
        self.base = nn.Linear(i, o)
        self.down, self.up = nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)
        self.dropout, self.scaling = nn.Dropout(0.1), alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x))) * self.scaling


def inception(i: int) -> nn.Module:
    """Parallel 1×1, 1×1 then 3×3, and pooled branches side by side, as in GoogLeNet."""
    return Cat(
        nn.Sequential(*conv_bn(i, 5, 1), nn.ReLU()),
        nn.Sequential(*conv_bn(i, 7, 1), nn.ReLU(), *conv_bn(7, 11, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv_bn(i, 3, 1), nn.ReLU()),
    )


def bottleneck(i: int, expand: int = 6) -> nn.Module:
    """MobileNetV2's inverted residual: the 1×1 that ends it is linear."""
    wide = i * expand
    return Residual(
        nn.Sequential(
            *conv_bn(i, wide, 1), nn.ReLU6(), *conv_bn(wide, wide, 3, padding=1, groups=wide), nn.ReLU6(),
            *conv_bn(wide, i, 1),
        )
    )  # fmt: skip


class UNet(nn.Module):
    """One level down and up, with a strided conv, nearest upsampling and a concatenation."""

    def __init__(self, i: int = 3, wide: int = 11) -> None:
        super().__init__()
        self.enter = nn.Sequential(*conv_bn(i, wide, 3, padding=1), nn.ReLU())
        self.down = nn.Sequential(*conv_bn(wide, 2 * wide, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.Upsample(scale_factor=2)
        self.leave = nn.Sequential(*conv_bn(3 * wide, wide, 3, padding=1), nn.ReLU(), nn.Conv2d(wide, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(torch.cat([self.up(self.down(x)), x], 1))


Builder = tuple[Callable[[], nn.Module], tuple[int, ...]]

BLOCKS: dict[str, Builder] = {
    "sesr": (Sesr, (1, 1, 14, 18)),
    "span": (lambda: SpanBlock(7), (1, 7, 12, 10)),
    "repvgg": (lambda: nn.Sequential(repvgg(3, 8, 2), repvgg(8, 8), repvgg(8, 12, 2, 4)), (1, 3, 18, 22)),
    "mobileone": (lambda: nn.Sequential(mobileone(7, 11, 2), mobileone(11, 11)), (1, 7, 18, 14)),
    "dbb": (lambda: nn.Sequential(dbb(5, 7), dbb(7, 11, 5, 2)), (1, 5, 14, 18)),
    "acnet": (lambda: nn.Sequential(acnet(5, 7), acnet(7, 3)), (1, 5, 14, 10)),
    "ecb": (lambda: nn.Sequential(ecb(5, 7), ecb(7, 7)), (1, 5, 10, 14)),
    "doconv": (doconv, (1, 6, 14, 18)),
    "lora": (lambda: nn.Sequential(Lora(13, 19), nn.ReLU(), Lora(19, 7)), (1, 5, 13)),
    "inception": (lambda: inception(11), (1, 11, 14, 10)),
    "bottleneck": (lambda: nn.Sequential(bottleneck(7), bottleneck(7)), (1, 7, 14, 10)),
    "unet": (UNet, (1, 3, 14, 18)),
}  # fmt: skip


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The block in eval mode with random calibrated statistics, and an example input."""
    make, shape = BLOCKS[name]
    torch.manual_seed(seed)
    x = torch.randn(shape)
    return calibrate(make(), x, seed=seed), x


@torch.no_grad()
def calibrate(model: nn.Module, *inputs: Tensor, seed: int = 0) -> nn.Module:
    """Make every constant count: random norms and biases, with running statistics that fit the activations.

    Batch norms get a random scale and shift, statistics measured layer by layer on the inputs and then moved,
    so that no batch norm is the identity and no activation explodes. Biases and other constant parameters
    (layer scales, zero-initialised residual weights) become random. Returns the model in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(x: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(x.shape, generator=generator)).to(x)

    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
        if p.numel() and bool((p == p.reshape(-1)[0]).all()):
            p.copy_(p * uniform(p, 0.6, 1.4) + uniform(p, -0.2, 0.2))
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    hooks = [m.register_forward_pre_hook(_measure) for m in norms]
    model(*(x.clone() for x in inputs))
    for hook in hooks:
        hook.remove()
    for m in norms:
        m.running_mean += uniform(m.running_mean, -0.3, 0.3) * m.running_var.sqrt()
        m.running_var *= uniform(m.running_var, 0.6, 1.5)
    return model


def _measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Set a batch norm's statistics to those of what it is about to normalise."""
    dims = [d for d in range(inputs[0].dim()) if d != 1]
    variance, mean = torch.var_mean(inputs[0].float(), dims, correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance.clamp(1e-3, 1e6))


def operators(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Calls by kind in one forward pass: conv, conv_transpose, linear, batch_norm, add, avg_pool, ..."""
    counter = _Calls()
    with torch.no_grad(), counter:
        model(*(x.clone() for x in inputs))
    return counter.calls


class _Calls(torch.overrides.TorchFunctionMode):
    NAMES = (
        {f"{kind}{n}d": kind for kind in ("conv", "conv_transpose", "avg_pool") for n in (1, 2, 3)}
        | {
            name: name
            for name in ("linear", "batch_norm", "pixel_shuffle", "interpolate", "pad", "relu", "cat")
        }
        | {name: "add" for name in ("add", "add_", "__add__", "__radd__", "__iadd__")}
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kind = self.NAMES.get(getattr(func, "__name__", ""))
        if kind:
            self.calls[kind] = self.calls.get(kind, 0) + 1
        return func(*args, **(kwargs or {}))
