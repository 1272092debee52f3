"""Random small networks with silenced channels, and models pruned as people prune them."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from convmerge.inputs import as_inputs
from convmerge.passes import Prepared
from convmerge.passes.silenced import remove_silenced

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softplus, nn.SiLU, nn.Hardswish, nn.GELU, nn.Tanh, nn.ELU),
    *(nn.LeakyReLU, nn.Hardsigmoid, nn.Mish, nn.Softsign, nn.LogSigmoid, nn.Identity),
)
KINDS = (
    *("conv",) * 10,
    *("act",) * 6,
    *("add",) * 5,
    *("bn", "depthwise", "grouped", "sum", "cat", "inplace") * 2,
    *("multiplied", "transpose", "mul", "gate", "max", "avg", "up", "chunk", "slice", "shuffle", "pixel"),
    *("mean", "view", "prelu", "norm", "scale", "noise", "split", "pad"),
)


class Masked(nn.Module):
    """A parametrization that multiplies by a mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class Shuffled(nn.Module):
    """nn.ChannelShuffle as ShuffleNets write it, or with ``way`` as others do."""

    def __init__(self, groups: int, way: str = "view") -> None:
        super().__init__()
        self.groups, self.way = groups, way

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.size()
        g, each = self.groups, x.size(1) // self.groups
        if self.way == "view":
            return x.view(n, g, each, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        if self.way == "sizes":
            return x.view(n, g, each, h * w).permute(0, 2, 1, 3).reshape(n, c, h, w)
        if self.way == "flatten":
            return x.unflatten(1, (g, -1)).transpose(1, 2).flatten(1, 2)
        if self.way == "back":
            return x.reshape(n, -1, g, h, w).swapaxes(1, 2).reshape(x.shape)
        return x.view(n, each, g, h, w).clone().transpose(2, 1).reshape(n, -1, h, w)  # "fewer"


class RandomNet(nn.Module):
    """A list of steps on earlier values, drawn from a seed; every map is of one of a few sizes.

    ``head``: the last value is flattened into linear layers.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[str, str, tuple[int, ...]]] = []
        self.size = (12, 10)
        self.inputs = self.random.choice([2, 3, 5])
        self.head = self.random.random() < 0.4
        self.build(self.random.randint(6, 16))

    def build(self, length: int) -> None:
        values = [torch.zeros(1, self.inputs, *self.size)]
        self._add("conv", values)
        while len(self.steps) < length:
            kind = self.random.choice(KINDS)
            self._add(kind, values)
        if self.head:
            for kind in ("flatten", "linear", "act", "linear"):
                self._add(kind, values)
        else:
            self._add("conv", values)
        for module in self.layers.modules():
            self._randomise(module)
        for module in list(self.layers.modules()):
            self._silence(module)

    def _add(self, kind: str, values: list[Tensor]) -> None:
        recent = range(max(0, len(values) - 4), len(values))
        where = len(values) - 1 if self.random.random() < 0.7 else self.random.choice(recent)
        if kind in ("flatten", "linear") or values[where].dim() < 4:
            where = len(values) - 1
        operands = (where,)
        x = values[where]
        if kind in ("add", "sum", "mul", "inplace"):
            same = [i for i, v in enumerate(values) if v.shape == x.shape and i not in (where, 0)]
            operands = (where, self.random.choice(same)) if same else operands
        if kind == "cat":
            same = [i for i, v in enumerate(values) if v.shape[2:] == x.shape[2:] and i]
            more = self.random.choices(same, k=self.random.randint(1, 2)) if same else []
            operands = (where, *more)
        name = f"{len(self.steps)}_{kind}"
        layer = self._layer(kind, x)
        if layer is not None:
            self.layers[name] = layer
        self.steps.append((kind, name, operands))
        try:
            with torch.no_grad():
                result = self.run(self.steps[-1], values)
            if result.dim() == 4 and not (2 <= result.shape[2] <= 24 and 1 <= result.shape[1] <= 24):
                raise ValueError("too small or large")
            values.append(result)
        except (RuntimeError, ValueError, IndexError):
            self.steps.pop()
            if name in self.layers:
                del self.layers[name]

    def _layer(self, kind: str, x: Tensor) -> nn.Module | None:
        draw, channels = self.random.choice, x.shape[1]
        k, padding = draw([(1, 0), (3, 1), (3, 1), (3, 1), ((3, 5), (1, 2)), (3, 0), (1, 1), (3, 2)])
        bias, stride = self.random.random() < 0.5, draw([1, 1, 1, 1, 1, 2])
        mode = draw(["zeros", "zeros", "zeros", "circular", "replicate"])
        common = {"stride": stride, "padding": padding, "bias": bias}
        if kind == "conv":
            out = draw([5, 6, 6, 6, 7])
            return nn.Conv2d(channels, out, k, **common, dilation=draw([1, 1, 1, 1, 2]), padding_mode=mode)
        if kind == "depthwise":
            return nn.Conv2d(channels, channels, k, **common, groups=channels)
        if kind == "multiplied":
            return nn.Conv2d(channels, 2 * channels, k, **common, groups=channels)
        if kind == "grouped":
            groups = draw([g for g in range(1, channels + 1) if channels % g == 0])
            return nn.Conv2d(channels, groups * draw([1, 2, 3]), k, **common, groups=groups)
        if kind == "transpose":
            groups = draw([g for g in (1, 1, 2, channels) if channels % g == 0])
            return nn.ConvTranspose2d(channels, groups * draw([1, 3]), k, **common, groups=groups)
        if kind == "gate":
            mid = draw([2, 3])
            squeeze = nn.Conv2d(channels, mid, 1), draw(ACTIVATIONS)(), nn.Conv2d(mid, channels, 1)
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), *squeeze, nn.Sigmoid())
        if kind == "linear":
            return nn.Linear(x.shape[-1], draw([5, 7, 11]), bias=bias)
        if kind == "norm":
            return draw([nn.GroupNorm(1, channels), nn.InstanceNorm2d(channels, affine=bias)])
        if kind == "scale":
            return nn.ParameterList([nn.Parameter(torch.zeros(channels, 1, 1))])
        makers = {
            "bn": lambda: nn.BatchNorm2d(channels),
            "act": lambda: draw(ACTIVATIONS)(),
            "prelu": lambda: nn.PReLU(draw([1, channels])),
            "max": lambda: nn.MaxPool2d(draw([2, 3]), draw([1, 2]), 1),
            "avg": lambda: nn.AvgPool2d(3, draw([1, 2]), draw([0, 1]), count_include_pad=bias),
            "up": lambda: nn.Upsample(scale_factor=2, mode=draw(["nearest", "bilinear"])),
            "shuffle": lambda: draw([nn.ChannelShuffle, Shuffled])(draw([1, 2, 3])),
            "pixel": lambda: draw([nn.PixelShuffle(2), nn.PixelUnshuffle(2)]),
            "pad": lambda: draw([nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ConstantPad2d(1, 0.5)]),
        }
        return makers[kind]() if kind in makers else None

    def run(self, step: tuple[str, str, tuple[int, ...]], values: list[Tensor]) -> Tensor:
        kind, name, operands = step
        x, *others = (values[i] for i in operands)
        if kind in ("add", "sum", "inplace"):
            if kind == "inplace":
                x = x.clone()
                x += others[0] if others else x
                return F.relu_(x)
            return sum(others, x) if kind == "sum" else torch.add(x, others[0], alpha=0.5) if others else x
        if kind == "mul":
            return x * (others[0] if others else x)
        if kind == "cat":
            return torch.cat([x, *others], 1)
        if kind == "gate":
            return x * self.layers[name](x)
        if kind == "scale":
            return x * self.layers[name][0]
        if kind == "chunk":
            a, b = x.chunk(2, 1)
            return torch.cat([b, a * 2, b.sigmoid()], 1)
        if kind == "split":
            a, b = x.split([2, x.shape[1] - 2], 1)
            return torch.cat([b, a], 1)
        if kind == "slice":
            return x[:, 1:] + 0.5
        if kind == "mean":
            return x - x.mean((2, 3), keepdim=True)
        if kind == "view":
            n, c, h, w = x.shape
            return x.view(n, c, h * w).softmax(2).view(n, c, h, w)
        if kind == "noise":
            return x * 0.5 + torch.ones(x.shape[2:], dtype=x.dtype).cumsum(0) / 8
        if kind == "flatten":
            return x.flatten(1)
        return self.layers[name](x)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(self.run(step, values))
        return values[-1]

    def _randomise(self, module: nn.Module) -> None:
        with torch.no_grad():
            for p in module.parameters(recurse=False):
                p.copy_(torch.randn(p.shape, generator=self.torch) * (0.3 if p.dim() > 1 else 0.7))
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=self.torch))
                module.running_var.copy_(torch.rand(module.num_features, generator=self.torch) + 0.5)

    def _silence(self, module: nn.Module) -> None:
        """Zeros by one of the ways in which they come about."""
        if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d) and module.weight is not None:
            if self.random.random() < 0.3:
                module.weight.data *= self._chosen(module.num_features)
            return
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() < 2:
            return
        how = self.random.choice(
            ["rows", "rows", "zero rows", "columns", "both", "scattered", "mask", "none"]
        )
        mask = torch.ones_like(weight)
        if how in ("rows", "zero rows", "both", "mask"):
            mask *= self._chosen(len(weight)).reshape(-1, *(1,) * (weight.dim() - 1))
        if how in ("columns", "both"):
            mask *= self._chosen(weight.shape[1]).reshape(1, -1, *(1,) * (weight.dim() - 2))
        if how == "scattered":
            mask = (torch.rand(weight.shape, generator=self.torch) < 0.5).float()
        if how in ("zero rows", "both"):
            weight.data *= mask
        elif how == "mask":
            parametrize.register_parametrization(module, "weight", Masked(mask))
        elif how != "none":
            prune.custom_from_mask(module, "weight", mask)
        if how == "zero rows" and getattr(module, "bias", None) is not None and self.random.random() < 0.5:
            module.bias.data *= mask.reshape(len(weight), -1)[:, 0] if len(weight) == len(module.bias) else 1

    def _chosen(self, count: int) -> Tensor:
        share = self.random.choice([0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 1.0])
        return (torch.rand(count, generator=self.torch) >= share).float()


def randomise(model: nn.Module, seed: int = 5) -> nn.Module:
    """Batch norms with statistics of their own, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator) * 0.4

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.copy_(normal(module.num_features) + 1)
                module.running_mean.copy_(normal(module.num_features))
                module.running_var.copy_(normal(module.num_features).abs() + 0.5)
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                module.bias.copy_(normal(len(module.bias)))
    return model


def pruned_model(name: str, amount: float, *, last: bool = True, head: int | None = None) -> nn.Module:
    """A torchvision model with random statistics, ``amount`` of the channels of every convolution masked.

    Args:
        last: whether the last convolution is masked too.
        head: another width for the linear layers of vgg16_bn, which have most of its weights.
    """
    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    if head is not None:
        model.classifier = nn.Sequential(nn.Linear(25088, head), nn.ReLU(), nn.Dropout(), nn.Linear(head, 10))
    layers = [m for m in randomise(model).modules() if isinstance(m, nn.Conv2d)]
    for layer in layers if last else layers[:-1]:
        prune.ln_structured(layer, "weight", amount, 2, 0)
    return model.eval()


TOLERANCE = 1e-9


def apart(a: nn.Module, b: nn.Module, *inputs: Tensor) -> float:
    """max |a(x) - b(x)| over max |a(x)|."""
    with torch.no_grad():
        wanted, found = a(*inputs), b(*inputs)
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3))


def removed(model: nn.Module, *inputs: Tensor, **options: tuple[str, ...]) -> Prepared:
    """Run the pass in float64, with the result compared and the model found unchanged."""
    model = model.double().eval()
    inputs = tuple(x.double() for x in inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = remove_silenced(model, as_inputs(inputs), **options)
    assert apart(model, result.model, *inputs) < TOLERANCE
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return result
