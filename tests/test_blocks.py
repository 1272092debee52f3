"""Published over-parameterised blocks, written from scratch as their authors do: each becomes what it should.

Everything is built and fused in float64; the counts are those of one forward pass after fusing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
import torch.nn.functional as F
from captured import assert_close
from models import Residual, Sum, conv_bn
from torch import Tensor, nn

import convmerge
from convmerge.api import Result

KINDS = ("conv", "conv_transpose", "linear", "batch_norm", "add", "avg_pool", "cat", "pad")


class BNAndPad(nn.Module):
    """DBB's batch norm and padding, as published: zeros, then the border overwritten strip by strip."""

    def __init__(self, pixels: int, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.bn, self.pixels = nn.BatchNorm2d(channels, affine=affine), pixels

    def forward(self, x: Tensor) -> Tensor:
        y, bn, p = self.bn(x), self.bn, self.pixels
        if p > 0:
            if bn.affine:
                values = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(
                    bn.running_var + bn.eps
                )
            else:
                values = -bn.running_mean / torch.sqrt(bn.running_var + bn.eps)
            y = F.pad(y, [p] * 4)
            values = values.view(1, -1, 1, 1)
            y[:, :, 0:p, :] = values
            y[:, :, -p:, :] = values
            y[:, :, :, 0:p] = values
            y[:, :, :, -p:] = values
        return y


class IdentityBasedConv1x1(nn.Conv2d):
    """DBB's 1×1 conv whose weight is kept as the difference from the identity."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        eye = torch.eye(channels).reshape(groups, channels // groups, groups, -1)
        blocks = torch.cat([eye[g, :, g] for g in range(groups)])
        self.register_buffer("id_tensor", blocks[:, :, None, None].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.id_tensor, None, groups=self.groups)


def dbb(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1, affine: bool = True) -> nn.Module:
    p = k // 2
    inner = IdentityBasedConv1x1(i, groups)
    return Sum(
        conv_bn(i, o, k, stride=stride, padding=p, groups=groups),
        conv_bn(i, o, 1, stride=stride, groups=groups),
        nn.Sequential(
            nn.Conv2d(i, o, 1, groups=groups, bias=False), BNAndPad(p, o, affine),
            nn.AvgPool2d(k, stride), nn.BatchNorm2d(o),
        ),
        nn.Sequential(inner, BNAndPad(p, i, affine), *conv_bn(i, o, k, stride=stride, groups=groups)),
    )  # fmt: skip


class SeqConv3x3(nn.Module):
    """ECB's pair of convs with the bias of the first one as its padding."""

    def __init__(self, i: int, o: int, multiplier: int = 2) -> None:
        super().__init__()
        mid = o * multiplier
        self.k0 = nn.Parameter(torch.randn(mid, i, 1, 1) / i)
        self.b0 = nn.Parameter(torch.randn(mid))
        self.k1 = nn.Parameter(torch.randn(o, mid, 3, 3) / mid)
        self.b1 = nn.Parameter(torch.randn(o))

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(F.conv2d(x, self.k0, self.b0), (1, 1, 1, 1), "constant", 0)
        pad = self.b0.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = pad
        y[:, :, -1:, :] = pad
        y[:, :, :, 0:1] = pad
        y[:, :, :, -1:] = pad
        return F.conv2d(y, self.k1, self.b1)


class MaskedConv(nn.Module):
    """ECB's 1×1 conv and one fixed stencil for every channel, scaled per channel."""

    def __init__(self, i: int, o: int, taps: list[list[float]]) -> None:
        super().__init__()
        self.k0, self.b0 = nn.Parameter(torch.randn(o, i, 1, 1) / i), nn.Parameter(torch.randn(o))
        self.scale, self.bias = nn.Parameter(torch.randn(o, 1, 1, 1)), nn.Parameter(torch.randn(o))
        self.mask = nn.Parameter(torch.tensor(taps).expand(o, 1, 3, 3).clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(F.conv2d(x, self.k0, self.b0), (1, 1, 1, 1), "constant", 0)
        pad = self.b0.view(1, -1, 1, 1)
        for strip in (y[:, :, 0:1, :], y[:, :, -1:, :], y[:, :, :, 0:1], y[:, :, :, -1:]):
            strip.copy_(pad)
        return F.conv2d(y, self.scale * self.mask, self.bias, groups=len(self.mask))


class Ecb(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        sobel = [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]
        self.conv3x3 = nn.Conv2d(i, o, 3, padding=1)
        self.pair = SeqConv3x3(i, o)
        self.sbx = MaskedConv(i, o, sobel)
        self.sby = MaskedConv(i, o, [list(row) for row in zip(*sobel, strict=True)])
        self.lpl = MaskedConv(i, o, [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
        self.act, self.with_idt = nn.PReLU(o), i == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3x3(x) + self.pair(x) + self.sbx(x) + self.sby(x) + self.lpl(x)
        if self.with_idt:
            y += x
        return self.act(y)


class RepVgg(nn.Module):
    """As published: branches that may be None, and an activation in the same forward."""

    def __init__(self, i: int, o: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(i) if i == o and stride == 1 else None
        self.rbr_dense = conv_bn(i, o, 3, stride=stride, padding=1, groups=groups)
        self.rbr_1x1 = conv_bn(i, o, 1, stride=stride, groups=groups)
        self.se, self.nonlinearity = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.nonlinearity(self.se(self.rbr_dense(x) + self.rbr_1x1(x) + identity))


class MobileOne(nn.Module):
    """As published: a loop over the branches that adds in place."""

    def __init__(self, i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1, copies: int = 4) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(i) if i == o and stride == 1 else None
        self.rbr_conv = nn.ModuleList(
            conv_bn(i, o, k, stride=stride, padding=k // 2, groups=groups) for _ in range(copies)
        )
        self.rbr_scale = conv_bn(i, o, 1, stride=stride, groups=groups) if k > 1 else None
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        scale_out = 0
        if self.rbr_scale is not None:
            scale_out = self.rbr_scale(x)
        identity_out = 0
        if self.rbr_skip is not None:
            identity_out = self.rbr_skip(x)
        out = scale_out + identity_out
        for ix in range(len(self.rbr_conv)):
            out += self.rbr_conv[ix](x)
        return self.activation(out)


class QaRepVgg(nn.Module):
    """Quantisation-aware RepVGG: branches without norms, and one norm after the sum."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.dense, self.point = conv_bn(c, c, 3, padding=1), nn.Conv2d(c, c, 1, bias=False)
        self.bn, self.act = nn.BatchNorm2d(c), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.dense(x) + self.point(x) + x))


class RepConv(nn.Module):
    """YOLO's RepConv: conv layers with an activation that may be an identity."""

    class Conv(nn.Module):
        def __init__(self, i: int, o: int, k: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(i, o, k, padding=k // 2, bias=False)
            self.bn, self.act = nn.BatchNorm2d(o), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x)))

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = self.Conv(c, c, 3), self.Conv(c, c, 1)
        self.bn, self.act = nn.BatchNorm2d(c), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        id_out = 0 if self.bn is None else self.bn(x)
        return self.act(self.conv1(x) + self.conv2(x) + id_out)


class RepMlp(nn.Module):
    """RepMLP's local branches: convs of several sizes with norms on the partitioned map."""

    def __init__(self, c: int) -> None:
        super().__init__()
        for k in (1, 3, 5):
            self.add_module(f"repconv{k}", conv_bn(c, c, k, padding=k // 2, groups=c))
        self.sizes = (1, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = 0
        for k in self.sizes:
            out += self.__getattr__(f"repconv{k}")(x)
        return out


class Implicit(nn.Module):
    """YOLOR's ImplicitA (added before a conv) and ImplicitM (multiplied after it)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.a, self.m = nn.Parameter(torch.randn(1, i, 1, 1)), nn.Parameter(torch.randn(1, o, 1, 1))
        self.conv = nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.m * self.conv(self.a + x)


class LoraConv(nn.Module):
    """A conv with a low-rank update: k×k down to the rank, 1×1 up."""

    def __init__(self, base: nn.Conv2d, rank: int = 2, alpha: float = 3.0) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict(
            {
                "default": nn.Conv2d(
                    base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False
                )
            }
        )
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(rank, base.out_channels, 1, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.1)})
        self.scaling, self.active_adapters = {"default": alpha / rank}, ["default"]

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                x = x.to(self.lora_A[name].weight.dtype)
                delta = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
                result = result + delta * self.scaling[name]
        return result


class LoraMatrices(nn.Module):
    """The original loralib layer: matrices instead of layers."""

    def __init__(self, i: int, o: int, rank: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(i, o)
        self.A, self.B = nn.Parameter(torch.randn(rank, i)), nn.Parameter(torch.randn(o, rank))
        self.dropout, self.scaling = nn.Dropout(0.2), 1 / math.sqrt(rank)

    def forward(self, x: Tensor) -> Tensor:
        delta = self.dropout(x) @ self.A.transpose(0, 1) @ self.B.transpose(0, 1)
        return self.linear(x) + delta * self.scaling


class Weighted(nn.Module):
    """Branches mixed by a softmax of parameters, and a learned residual gain."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1), nn.Identity()])
        self.alpha, self.gamma = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.alpha.softmax(0)
        y = sum(w * branch(x) for w, branch in zip(weights, self.branches, strict=True))
        return x + self.gamma * y


class Heads(nn.Module):
    """The mean of two linear heads after a norm, as in distilled transformers."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm1d(i), nn.BatchNorm1d(i)
        self.l1, self.l2 = nn.Linear(i, o), nn.Linear(i, o)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return (self.l1(self.bn1(x)) + self.l2(self.bn2(x))) / 2


def acb(i: int, o: int, stride: int = 1) -> nn.Module:
    """Asymmetric convolution block, with stride."""
    return Sum(
        conv_bn(i, o, 3, stride=stride, padding=1),
        conv_bn(i, o, (1, 3), stride=stride, padding=(0, 1)),
        conv_bn(i, o, (3, 1), stride=stride, padding=(1, 0)),
    )


Block = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]
CONV, LINEAR = {"conv": 1}, {"linear": 1}

BLOCKS: dict[str, Block] = {
    "conv bn 1d": (lambda: nn.Sequential(nn.Conv1d(5, 7, 3), nn.BatchNorm1d(7)), (2, 5, 11), CONV),
    "conv bn 2d": (lambda: conv_bn(5, 7, (3, 2), padding=1), (2, 5, 9, 11), CONV),
    "conv bn 3d": (
        lambda: nn.Sequential(nn.Conv3d(4, 6, (1, 2, 3), groups=2), nn.BatchNorm3d(6)), (2, 4, 3, 5, 4), CONV
    ),
    "transposed conv bn 1d": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, 2, groups=2), nn.BatchNorm1d(6)), (2, 4, 7),
        {"conv_transpose": 1},
    ),
    "transposed conv bn 2d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(5, 7, 3, 2, 1, 1), nn.BatchNorm2d(7)), (2, 5, 7, 6),
        {"conv_transpose": 1},
    ),
    "linear bn": (lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)), (4, 5), LINEAR),
    "bn conv": (lambda: nn.Sequential(nn.BatchNorm2d(5), nn.Conv2d(5, 7, 3)), (2, 5, 9, 7), CONV),
    "repvgg": (lambda: RepVgg(7, 7), (2, 7, 9, 11), CONV),
    "repvgg, stride and groups": (lambda: RepVgg(6, 9, 2, 3), (2, 6, 9, 11), CONV),
    "repvgg stage": (lambda: nn.Sequential(RepVgg(3, 5, 2), RepVgg(5, 5)), (2, 3, 9, 11), {"conv": 2}),
    "mobileone depthwise": (lambda: MobileOne(7, 7, groups=7), (2, 7, 9, 11), CONV),
    "mobileone pointwise": (lambda: MobileOne(7, 11, k=1), (2, 7, 9, 11), CONV),
    "mobileone stride": (lambda: MobileOne(7, 7, stride=2, groups=7), (2, 7, 9, 11), CONV),
    "dbb": (lambda: dbb(5, 7), (2, 5, 9, 11), CONV),
    "dbb 5×5, stride": (lambda: dbb(5, 7, 5, 2), (2, 5, 9, 11), CONV),
    "dbb, groups": (lambda: dbb(4, 6, groups=2), (2, 4, 9, 11), CONV),
    "dbb, no affine": (lambda: dbb(5, 7, affine=False), (2, 5, 9, 11), CONV),
    "dbb and more": (lambda: nn.Sequential(dbb(5, 7), nn.ReLU(), dbb(7, 3)), (2, 5, 9, 11), {"conv": 2}),
    "acnet": (lambda: acb(5, 7), (2, 5, 9, 11), CONV),
    "acnet, stride": (lambda: acb(5, 7, 2), (2, 5, 9, 11), CONV),
    "ecb": (lambda: Ecb(5, 7), (2, 5, 9, 11), CONV),
    "ecb with identity": (lambda: Ecb(7, 7), (2, 7, 9, 11), CONV),
    "do-conv": (lambda: nn.Sequential(models.DoConv(6, 9), nn.BatchNorm2d(9)), (2, 6, 9, 11), CONV),
    "do-gconv": (lambda: models.DoConv(6, 9, groups=3, stride=2), (2, 6, 9, 11), CONV),
    "do-dconv": (lambda: models.DoConv(6, 6, groups=6, padding=1), (2, 6, 9, 11), CONV),
    "repmlp": (lambda: RepMlp(5), (2, 5, 7, 7), CONV),
    "qa-repvgg": (lambda: QaRepVgg(7), (2, 7, 9, 11), CONV),
    "repconv": (lambda: RepConv(7), (2, 7, 9, 11), CONV),
    "implicit": (lambda: Implicit(5, 7), (2, 5, 9, 11), CONV),
    "lora linear": (lambda: models.Lora(13, 19), (2, 3, 13), LINEAR),
    "lora matrices": (lambda: LoraMatrices(13, 19), (2, 3, 13), LINEAR),
    "lora conv": (lambda: LoraConv(nn.Conv2d(5, 7, 3, 2, 1)), (2, 5, 9, 11), CONV),
    "weighted branches": (lambda: Weighted(7), (2, 7, 9, 11), CONV),
    "heads": (lambda: Heads(7, 5), (2, 7, 3, 4), LINEAR),
    "span": (lambda: models.SpanConv(5, 7), (2, 5, 9, 11), CONV),
    "sesr": (
        lambda: Residual(nn.Sequential(nn.Conv2d(7, 29, 3, padding=1, bias=False), nn.Conv2d(29, 7, 1))),
        (2, 7, 9, 11), CONV,
    ),
    "residual of residuals": (
        lambda: Residual(nn.Sequential(nn.Conv2d(7, 7, 3, padding=1), Residual(nn.Conv2d(7, 7, 1)))),
        (2, 7, 9, 11), CONV,
    ),
}  # fmt: skip


def built(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    make, shape, _ = BLOCKS[name]
    torch.manual_seed(seed)
    x = torch.randn(shape)
    return models.calibrate(make(), x, seed=seed).double(), x.double()


def fused(model: nn.Module, x: Tensor) -> Result:
    before = copy.deepcopy(model).state_dict()
    result = convmerge.fuse(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert result.report.verification is not None, result.report.sites
    assert result.report.verification.equal, result.report.verification
    assert not any("dropped" in warning for warning in result.report.warnings), result.report.warnings
    return result


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_becomes_what_it_should(name: str) -> None:
    model, x = built(name)
    result = fused(model, x)
    calls = models.operators(result.model, x)
    expected = BLOCKS[name][2]
    assert {k: n for k, n in calls.items() if k in KINDS} == expected, (result.report.sites, result.model)
    sizes = [x.shape, (3, *x.shape[1:])] + [(1, x.shape[1], *(n + 2 for n in x.shape[2:]))] * (x.dim() > 3)
    for seed, shape in enumerate(sizes):
        other = torch.randn(shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            assert_close(result.model(other), model(other.clone()), 1e-9)


@pytest.mark.parametrize("name", ["repvgg", "dbb", "lora conv", "ecb", "weighted branches"])
def test_a_fused_block_can_be_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x = built(name)
    result = fused(model, x)
    convmerge.save(result.model, tmp_path / "fused.pt")
    again = convmerge.load(tmp_path / "fused.pt", trust=True)
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))


def test_a_border_of_another_value_is_no_padding_by_bias() -> None:
    """Merged as if the border held what the norm gives to zeros, it would be wrong by a thousandth."""

    class Stale(BNAndPad):
        def forward(self, x: Tensor) -> Tensor:
            y, v = F.pad(self.bn(x), [1] * 4), (self.bn.bias + 1e-3).view(-1, 1, 1)
            y[:, :, :1], y[:, :, -1:], y[..., :1], y[..., -1:] = v, v, v, v
            return y

    model = nn.Sequential(nn.Conv2d(5, 4, 1, bias=False), Stale(1, 4), nn.Conv2d(4, 7, 3))
    x = torch.randn(2, 5, 9, 11).double()
    model = models.calibrate(model.double(), x)
    result = convmerge.fuse(model, x)
    with torch.no_grad():
        assert_close(result.model(x), model(x))
    assert models.operators(result.model, x)["conv"] == 2


def test_single_precision_blocks_are_merged_in_double_and_rounded_once() -> None:
    model, x = built("dbb")
    single = convmerge.fuse(copy.deepcopy(model).float(), x.float())
    exact = convmerge.fuse(copy.deepcopy(model).float().double(), x).model
    assert type(single.model) is nn.Conv2d
    assert torch.equal(single.model.weight, exact.weight.float())


def test_blocks_in_a_model_that_branches_on_values() -> None:
    """torch.export cannot follow it; the calls of a real run, border writes included, are as good."""

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = dbb(6, 6), Ecb(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.head(y.relu() if float(y.abs().sum()) > 0 else y)

    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 11)
    model, x = models.calibrate(Choosing(), x).double(), x.double()
    result = fused(model, x)
    assert models.operators(result.model, x) == {"conv": 2, "relu": 1}
