"""Every operator that is an affine form, as a module and as a function: the form is the operator.

A row is a model of one operator and an input; the form recognised in it, applied to random numbers, must give
what the model gives. Refusals are rows with the reason that users see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Function, Pair, applied, assert_close, random, randomised, regions_of
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from convmerge.recognise import RECOGNISERS, Passage
from convmerge.recognise.filters import _copies_exactly
from convmerge.regions.elements import leaves

W1, W2, W3 = random(7, 3, 5, seed=1), random(7, 3, 3, 5, seed=2), random(7, 3, 3, 2, 1, seed=3)
T2 = random(6, 5, 3, 4, seed=4)  # transposed: (in, out / groups, kernel)
M, B = random(7, 5, seed=5), random(7, seed=6)
C6, S6 = random(6, 1, 1, seed=7), random(6, seed=8)
MATRICES, ROWS, LINES, WHOLE = random(3, 5, 7), random(3, 7), random(6, 9, 1), random(2, 6, 9, 11)
LINE, MAP, VOLUME, ROW = (2, 6, 11), (2, 6, 9, 11), (2, 6, 5, 7, 4), (3, 2, 5)


# --- Filters: (operator, input shape) -----------------------------------------------------------------------

OPERATORS: list[tuple[nn.Module | Callable[[Tensor], Tensor], tuple[int, ...]]] = [
    (nn.Conv1d(6, 4, 5, stride=2, padding=3, dilation=2, groups=2), LINE),
    (nn.Conv1d(6, 7, 4, padding="same", bias=False), LINE),
    (nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 3), groups=2), MAP),
    (nn.Conv2d(6, 7, (4, 3), padding="same", dilation=(1, 2)), MAP),
    (nn.Conv2d(6, 7, (4, 3), padding="valid"), MAP),
    (nn.Conv2d(6, 12, 3, groups=6), MAP),
    (nn.Conv3d(6, 4, (3, 2, 1), stride=(1, 2, 3), padding=(1, 0, 2), groups=2), VOLUME),
    (lambda x: F.conv1d(x, W1, B, padding=2, groups=1), (2, 3, 11)),
    (lambda x: F.conv2d(x, W2, stride=2, groups=1), (2, 3, 9, 11)),
    (lambda x: F.conv2d(x, W2.flip(0), padding="same"), (2, 3, 9, 11)),
    (lambda x: F.conv3d(x, W3, B, padding=(1, 1, 0)), (2, 3, 4, 5, 3)),
    (lambda x: torch.conv2d(x, W2, None, 1, (1, 2)), (2, 3, 9, 11)),
    (nn.ConvTranspose1d(6, 4, 5, stride=3, padding=2, output_padding=1, groups=2), LINE),
    (nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1), groups=2), MAP),
    (nn.ConvTranspose2d(6, 7, 4, stride=2, output_padding=(1, 0), bias=False), MAP),
    (nn.ConvTranspose3d(6, 4, (3, 2, 1), stride=(1, 2, 3), padding=(1, 0, 0), groups=2), VOLUME),
    (lambda x: F.conv_transpose2d(x, T2, stride=2, padding=1), MAP),
    (nn.Linear(5, 7), ROW),
    (nn.Linear(5, 7, bias=False), (3, 5)),
    (lambda x: F.linear(x, M, B), ROW),
    (lambda x: x @ M.t(), ROW),
    (lambda x: torch.matmul(x, M.t()) + B, ROW),
    (lambda x: x.mm(M.t()), (3, 5)),
    (lambda x: torch.addmm(B, x, M.t()), (3, 5)),
    (nn.BatchNorm1d(6), LINE),
    (nn.BatchNorm1d(6), (3, 6)),
    (nn.BatchNorm2d(6, eps=0.1), MAP),
    (nn.BatchNorm2d(6, affine=False), MAP),
    (nn.BatchNorm3d(6), VOLUME),
    (FrozenBatchNorm2d(6, eps=0.1), MAP),
    (lambda x: F.batch_norm(x, S6, S6.abs() + 0.5, S6.flip(0)), MAP),
    (lambda x: x * C6, MAP),
    (lambda x: C6 * x, MAP),
    (lambda x: torch.mul(x, S6.view(1, 6, 1, 1)), MAP),
    (lambda x: x / C6, MAP),
    (lambda x: x + C6, MAP),
    (lambda x: C6 + x, MAP),
    (lambda x: x - C6, MAP),
    (lambda x: C6 - x, MAP),
    (lambda x: torch.rsub(x, C6, alpha=3), MAP),
    (lambda x: torch.add(x, C6, alpha=-0.5), MAP),
    (lambda x: torch.sub(C6, x, alpha=0.25), MAP),
    (lambda x: x.clone().mul_(C6).add_(C6, alpha=2).sub_(C6).div_(C6 + 9), MAP),
    (lambda x: x * S6 + S6.flip(0), (3, 2, 6)),
    (nn.AvgPool1d(3, 2), LINE),
    (nn.AvgPool2d((3, 2), stride=(2, 1), padding=(1, 0)), MAP),
    (nn.AvgPool2d(3, 1, ceil_mode=True), MAP),
    (nn.AvgPool2d(2, divisor_override=7), MAP),
    (nn.AvgPool3d((2, 3, 2), stride=1), VOLUME),
    (lambda x: F.avg_pool2d(x, 3), MAP),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False, divisor_override=5), MAP),
    (nn.Upsample(scale_factor=3), LINE),
    (nn.Upsample(scale_factor=(2, 3)), MAP),
    (nn.UpsamplingNearest2d(scale_factor=2), MAP),
    (nn.Upsample(scale_factor=2), VOLUME),
    (lambda x: F.interpolate(x, scale_factor=(2, 3), mode="nearest-exact"), MAP),
    (lambda x: F.interpolate(x, scale_factor=3, mode="nearest-exact"), LINE),
    (lambda x: F.interpolate(x, scale_factor=41, mode="nearest-exact"), LINE),
    (lambda x: F.interpolate(x, scale_factor=2.0), MAP),
    (nn.PixelShuffle(2), (2, 12, 5, 7)),
    (nn.PixelUnshuffle(3), (2, 2, 9, 6)),
    (lambda x: F.pixel_shuffle(x, 3), (2, 18, 5, 2)),
    (lambda x: F.pixel_unshuffle(x, 2), (2, 3, 4, 6)),
    (nn.ChannelShuffle(3), MAP),
    (nn.ZeroPad2d((1, 2, 3, 0)), MAP),
    (nn.ConstantPad1d((2, 1), 0.0), LINE),
    (nn.ZeroPad2d((-1, 2, -3, 0)), MAP),
    (lambda x: F.pad(x, (1, 2)), MAP),
    (lambda x: F.pad(x, (1, 2), value=2.5), MAP),
    (nn.ConstantPad2d((0, 2, 1, 0), -0.5), MAP),
    (nn.ConstantPad3d((0, 2, 1, 0, 1, 1), 3.0), VOLUME),
    (nn.ConstantPad1d((-2, 1), 1.5), LINE),
    (nn.ConstantPad1d((-2, -1), 1.5), LINE),
    (lambda x: F.pad(x, (1, 0, 0, 2), "constant", 0), MAP),
    (lambda x: x[:, :, 1:-2, 3:], MAP),
    (lambda x: x[..., 2:], LINE),
]


def circular(x: Tensor) -> Tensor:
    """Circular convolutions of blocks, by FFT."""
    spectrum = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(x.reshape(3, 2, 2, 6)), torch.fft.fft(CIRCLES))
    return torch.fft.fft(spectrum).real.reshape(3, 2, -1)


def rotated(x: Tensor) -> Tensor:
    """Halves of groups exchanged, one of them negated."""
    halves = x.reshape(-1, 2, 3)
    return torch.stack((-halves[:, 1, :], halves[:, 0, :]), dim=1).reshape(x.shape)


def twice(x: Tensor) -> Tensor:
    """Blocks, a shuffle of what they give, and blocks again."""
    inner = torch.einsum("abni,nir->abnr", x.view(3, 2, 3, 5), BLOCKS)
    inner = inner.view(3, 2, 3, 2, 2).permute(0, 1, 3, 2, 4).reshape(3, 2, 2, 6)
    return torch.einsum("abjr,jro->abjo", inner, AFTER).reshape(3, 2, -1)


def with_offsets(x: Tensor) -> Tensor:
    groups = x.view(3, 2, 4, 3).double()
    return (groups - groups.mean(-1, keepdim=True) + OFFSETS).flip(-2).reshape(3, 2, 12).cumsum(-1)


CIRCLES, BLOCKS = random(3, 2, 6, seed=11), random(3, 5, 4, seed=12)
AFTER, OFFSETS = random(2, 6, 7, seed=13), random(4, 3, seed=14)
LINEAR_MAPS: list[tuple[Callable[[Tensor], Tensor], int]] = [
    (lambda x: x.reshape(3, 2, 3, 4).sum(-2), 12),
    (lambda x: F.pad(x, (0, 2)).reshape(3, 2, 4, 3).sum(dim=-2), 10),
    (lambda x: x.unsqueeze(-1).repeat_interleave(3, -1).flatten(2).cumsum(-1), 5),
    (lambda x: torch.stack([x[..., ::2] + x[..., 1::2], x[..., ::2] - x[..., 1::2]], -1).flatten(2), 8),
    (circular, 12),
    (rotated, 12),
    (twice, 15),
    (with_offsets, 12),
    (lambda x: torch.cat([x @ M.t(), torch.zeros_like(x)], -1), 5),
]


@pytest.mark.parametrize("index", range(len(LINEAR_MAPS)))
def test_linear_maps_of_rows_are_one_form(index: int) -> None:
    operator, channels = LINEAR_MAPS[index]
    model = Function(lambda _, x: operator(x)).eval()
    x = random(3, 2, channels, seed=9)
    assert_close(applied(model, x), model(x))


NO_ROWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.cumsum(1),
    lambda x: x.reshape(3, 3, 2, 4).sum(1),
    lambda x: x.reshape(2, 3, 12).transpose(0, 1).neg().reshape(3, 2, 12),
    lambda x: (x.reshape(3, 2, 3, 4) * random(3, 2, 3, 1)).reshape(3, 2, 12),
    lambda x: (x.reshape(3, 2, 3, 4) * x.reshape(3, 2, 3, 4)).reshape(3, 2, 12),
    lambda x: x.reshape(3, 2, 3, 4).neg().square().reshape(3, 2, 12),
    lambda x: torch.einsum("abcd,abcd->abcd", *[x.view(3, 2, 3, 4)] * 2).reshape(3, 2, 12),
]


@pytest.mark.parametrize("index", range(len(NO_ROWS)))
def test_what_mixes_rows_or_treats_them_differently_is_no_form(index: int) -> None:
    model = Function(lambda _, x: NO_ROWS[index](x)).eval()
    _, regions = regions_of(model, random(3, 2, 12))
    found = [
        leaf.step.kind for chain in regions.chains for leaf in leaves(chain) if hasattr(leaf.step, "kind")
    ]
    assert not any(kind.startswith("rows") for kind in found), found


def model_of(operator: nn.Module | Callable[[Tensor], Tensor]) -> nn.Module:
    if isinstance(operator, nn.Module):
        return randomised(operator)
    return Function(lambda _, x: operator(x)).eval()


def row_id(value: object) -> str | None:
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}"
    return "function" if callable(value) else "×".join(map(str, value)) if isinstance(value, tuple) else None


@pytest.mark.parametrize(("operator", "shape"), OPERATORS, ids=row_id)
def test_the_form_is_the_operator(
    operator: nn.Module | Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    model, x = model_of(operator), random(*shape)
    with torch.no_grad():
        assert_close(applied(model, x), model(x.clone()), 1e-13)


SCALARS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x * 3,
    lambda x: 0.5 * x,
    lambda x: x / 7,
    lambda x: x + 2.5,
    lambda x: 2 - x,
    lambda x: x - 0.3,
    lambda x: -x,
    lambda x: x.neg() * torch.tensor(1.7, dtype=torch.float64),
    lambda x: torch.add(x, 3, alpha=0.5),
    lambda x: torch.rsub(x, 5, alpha=2),
    lambda x: x.clone().mul_(2).add_(1),
    lambda x: x * torch.full((1, 1, 1), 1.3, dtype=torch.float64),
]


@pytest.mark.parametrize("index", range(len(SCALARS)))
def test_a_scalar_is_the_same_on_every_axis(index: int) -> None:
    model, x = Function(lambda _, x: SCALARS[index](x)), random(2, 3, 5, 4)
    for axis in (1, 3):
        assert_close(applied(model, x, axis=axis), model(x))


SAME: list[nn.Module | Callable[[Tensor], Tensor]] = [
    nn.Dropout(0.3),
    nn.Dropout2d(0.3),
    nn.AlphaDropout(0.3),
    nn.Sequential(nn.Identity(), nn.Dropout2d(0.2), nn.Flatten(0, 0)),
    lambda x: F.dropout(x, 0.5, training=False),
    lambda x: x.contiguous().detach().clone(),
    lambda x: x.to(torch.float64).double().to("cpu"),
    lambda x: x.view(x.shape).reshape(2, 6, 9, 11),
    lambda x: x.permute(0, 1, 2, 3)[:, :, 0:],
    lambda x: F.dropout(x, 0.0, training=True),
]


@pytest.mark.parametrize("index", range(len(SAME)))
def test_an_identity_around_a_conv_is_nothing(index: int) -> None:
    operator, conv = SAME[index], nn.Conv2d(6, 5, (3, 2))
    first = operator if isinstance(operator, nn.Module) else Function(lambda _, x: operator(x))
    model, x = randomised(nn.Sequential(first, conv)), random(*MAP)
    with torch.no_grad():
        assert_close(applied(model, x), conv(x))


# --- Passages: a pointwise form before one equals the same form after it ------------------------------------

PASSAGES: list[tuple[nn.Module | Callable[[Tensor], Tensor], tuple[int, ...], int]] = [
    (nn.AdaptiveAvgPool2d((4, 3)), MAP, 1),
    (nn.AdaptiveAvgPool2d(1), MAP, 1),
    (nn.AdaptiveAvgPool1d(3), LINE, 1),
    (lambda x: x.mean((2, 3)), MAP, 1),
    (lambda x: x.mean((-2, -1), keepdim=True), MAP, 1),
    (lambda x: x.mean(1), (3, 5, 7), 2),
    (nn.Upsample(scale_factor=2, mode="bilinear"), MAP, 1),
    (nn.Upsample(scale_factor=1.7, mode="bicubic", align_corners=True), MAP, 1),
    (nn.Upsample(size=17, mode="linear"), LINE, 1),
    (nn.Upsample(size=(4, 5, 6), mode="trilinear"), VOLUME, 1),
    (nn.Upsample(size=(12, 20)), MAP, 1),
    (lambda x: F.interpolate(x, scale_factor=2.0, recompute_scale_factor=True), MAP, 1),
    (lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"), MAP, 1),
    (lambda x: F.interpolate(x, size=(5, 20), mode="area"), MAP, 1),
    (lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), MAP, 1),
    (lambda x: F.interpolate(x, size=(17, 6), mode="bicubic", antialias=True), MAP, 1),
    (nn.AvgPool2d(2, ceil_mode=True), MAP, 1),
    (nn.AvgPool2d(3, 2, (1, 0), count_include_pad=False), MAP, 1),
    (nn.AvgPool2d((4, 3), 3, 1, ceil_mode=True, count_include_pad=False), MAP, 1),
    (nn.AvgPool1d(4, 3, 2, count_include_pad=False), LINE, 1),
    (nn.AvgPool3d(2, ceil_mode=True), VOLUME, 1),
    (nn.ReflectionPad2d((1, 2, 0, 3)), MAP, 1),
    (nn.ReplicationPad2d(2), MAP, 1),
    (nn.CircularPad2d((1, 0, 2, 0)), MAP, 1),
    (lambda x: x.flatten(2), MAP, 1),
    (lambda x: x.flatten(2).transpose(1, 2), MAP, 1),
    (lambda x: x.permute(0, 2, 3, 1), MAP, 1),
    (lambda x: x.permute(0, 3, 1, 2), (2, 9, 11, 6), 3),
    (lambda x: x.reshape(2, 6, 99), MAP, 1),
    (lambda x: x.unsqueeze(2), LINE, 1),
    (lambda x: x.squeeze(2), (2, 6, 1, 9), 1),
    (lambda x: x.movedim(1, -1), MAP, 1),
    (lambda x: x.movedim((1, 3), (3, 0)), MAP, 1),
]


def test_nearest_factors_that_torch_does_not_repeat_evenly() -> None:
    """It computes in single precision which input to read, and for a few factors misses by one."""
    x = torch.arange(300.0)[None, None]
    for factor in range(2, 65):
        repeated = torch.equal(F.interpolate(x, scale_factor=factor), x.repeat_interleave(factor, -1))
        assert _copies_exactly(float(factor)) == repeated, factor
    assert not _copies_exactly(2.5)


def mixed(x: Tensor, axis: int) -> Tensor:
    """A pointwise form with a bias on the channels of an axis."""
    weight, bias = random(x.shape[axis], x.shape[axis], seed=3), random(x.shape[axis], seed=4)
    return F.linear(x.movedim(axis, -1), weight, bias).movedim(-1, axis)


@pytest.mark.parametrize(("operator", "shape", "axis"), PASSAGES, ids=row_id)
def test_a_passage_lets_pointwise_forms_through(
    operator: nn.Module | Callable[[Tensor], Tensor], shape: tuple[int, ...], axis: int
) -> None:
    model, x = model_of(operator), random(*shape)
    _, regions = regions_of(model, x)
    (chain,) = regions.chains
    moved: int | None = axis
    for element in chain:
        step = element.step  # type: ignore[union-attr]
        assert isinstance(step, Passage), step
        moved = step.axis_map.get(moved)  # type: ignore[arg-type]
    assert moved is not None
    assert_close(model(mixed(x, axis)), mixed(model(x), moved))


@pytest.mark.parametrize(
    ("operator", "shape", "axis"),
    [
        (lambda x: x.flatten(1), MAP, 1),
        (lambda x: x.mean(1), MAP, 1),
        (lambda x: x.reshape(2, 3, 2, 9, 11), MAP, 1),
        (lambda x: x.reshape(2, 18, 33), MAP, 1),
        (nn.ReflectionPad1d(1), (6, 11), 1),
    ],
    ids=row_id,
)
def test_a_passage_loses_channels_that_it_mixes(
    operator: nn.Module | Callable[[Tensor], Tensor], shape: tuple[int, ...], axis: int
) -> None:
    model, x = model_of(operator), random(*shape)
    _, regions = regions_of(model, x)
    maps = [e.step.axis_map for chain in regions.chains for e in chain]  # type: ignore[union-attr]
    assert not maps or axis not in maps[0]


# --- Sums ---------------------------------------------------------------------------------------------------

SUMS: list[Callable[[Any, Tensor], Tensor]] = [
    lambda m, x: m.a(x) + m.b(x),
    lambda m, x: torch.add(m.a(x), m.b(x), alpha=0.3),
    lambda m, x: m.a(x) - m.b(x),
    lambda m, x: torch.rsub(m.a(x), m.b(x), alpha=2),
    lambda m, x: sum([m.a(x), m.b(x), x]),
    lambda m, x: torch.stack([m.a(x), m.b(x), x]).sum(0),
    lambda m, x: torch.stack([m.a(x), m.b(x)], -1).sum(-1),
    lambda m, x: torch.stack((m.a(x), m.b(x), x), 1).mean(1),
    lambda m, x: torch.stack([m.a(x), m.a(x)]).sum(dim=0),
    lambda m, x: m.a(x).add_(m.b(x)).add_(x),
]


@pytest.mark.parametrize("index", range(len(SUMS)))
def test_the_form_is_the_sum(index: int) -> None:
    parts = {"a": nn.Conv2d(6, 6, 3, padding=1), "b": nn.Conv2d(6, 6, (1, 3), padding=(0, 1))}
    model, x = randomised(Function(SUMS[index], **parts)), random(*MAP)
    with torch.no_grad():
        assert_close(applied(model, x), model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.stack([m.a(x), x]).sum(1),
        lambda m, x: torch.stack([m.a(x), x]).sum(0, keepdim=True),
        lambda m, x: torch.stack([m.a(x), x]).sum(),
        lambda m, x: torch.stack([m.a(x), x]).sum(0, dtype=torch.float32),
        lambda m, x: (lambda s: s.sum(0) + s[0])(torch.stack([m.a(x), x])),
    ],
)
def test_other_sums_of_a_stack_are_no_sum_of_branches(forward: Callable[[Any, Tensor], Tensor]) -> None:
    _, regions = regions_of(randomised(Function(forward, a=nn.Conv2d(6, 6, 3, padding=1))), random(*MAP))
    assert "stack" in {call.op for call in regions.unknown}


# --- Padding by bias ----------------------------------------------------------------------------------------


def bordered(v: Tensor, x: Tensor, lo: int = 1, hi: int = 1) -> Tensor:
    y, v = F.pad(x, (lo, hi, lo, hi)), v.view(1, -1, 1, 1)
    y[:, :, :lo] = v
    y[:, :, -hi:] = v
    y[:, :, :, :lo] = v
    y[:, :, :, -hi:] = v
    return y


def surrounded(v: Tensor, x: Tensor) -> Tensor:
    v = v.view(1, -1, 1, 1)
    row = v.expand(x.shape[0], -1, 1, x.shape[3])
    return torch.cat([row, row, x, row], 2)


def filled(v: Tensor, x: Tensor) -> Tensor:
    y = F.pad(x, (1, 0, 0, 1))
    y[:, :, -1].fill_(0.25)
    y[..., 0] = 0.25
    return y


@pytest.mark.parametrize(
    "pad", [bordered, lambda v, x: bordered(v, x, 2, 3), surrounded, filled], ids=["1", "2", "cat", "fill"]
)
def test_the_form_is_the_padding_by_bias(pad: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x = Function(lambda m, x: pad(m.v, x), v=random(6, seed=5)), random(*MAP)
    assert_close(applied(model, x), model(x))


def late(v: Tensor, x: Tensor) -> Tensor:
    y = F.pad(x, (1, 1))
    y[..., :1] = v.view(-1, 1, 1)
    z = y * 2
    y[..., -1:] = v.view(-1, 1, 1)
    return y + z


def partly(v: Tensor, x: Tensor) -> Tensor:
    y = F.pad(x, (1, 1, 1, 1))
    y[..., :1] = v.view(-1, 1, 1)
    return y * 2


def inwards(v: Tensor, x: Tensor) -> Tensor:
    y = F.pad(x, (1, 1))
    y[..., :2] = v.view(-1, 1, 1)
    y[..., -1:] = v.view(-1, 1, 1)
    return y * 2


def two_values(v: Tensor, x: Tensor) -> Tensor:
    y = F.pad(x, (1, 1))
    y[..., :1] = v.view(-1, 1, 1)
    y[..., -1:] = v.view(-1, 1, 1) + 1
    return y * 2


def data(v: Tensor, x: Tensor) -> Tensor:
    y = F.pad(x, (1, 1))
    y[..., :1] = x[..., :1]
    y[..., -1:] = v.view(-1, 1, 1)
    return y * 2


def counted(v: Tensor, x: Tensor) -> Tensor:
    y = F.pad(x, (0, 1))
    y[..., 11:] = v.view(-1, 1, 1)
    return y * 2


@pytest.mark.parametrize("pad", [late, partly, inwards, two_values, data, counted])
def test_other_writes_into_a_padded_map_are_refused(pad: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x = Function(lambda m, x: pad(m.v, x), v=random(6, seed=5)), random(*MAP)
    _, regions = regions_of(model, x)
    assert "reads memory that was written to in between" in regions.refused.values()


# --- Refusals: (forward, input shape, reason) ---------------------------------------------------------------

HYPER = "depends on input x"
REFUSALS: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...], str]] = [
    (lambda x: F.conv2d(x, x[:1, :, :3, :3]), MAP, f"kernel {HYPER}"),
    (lambda x: F.conv2d(x, W2.repeat(1, 2, 1, 1), x[0, 0, 0, :7]), MAP, f"bias {HYPER}"),
    (lambda x: F.conv_transpose2d(x, x[:1, :, :3, :3].movedim(0, 1)), MAP, HYPER),
    (lambda x: F.linear(x, x[0]), ROW, f"kernel {HYPER}"),
    (lambda x: x @ MATRICES, ROW, "not one matrix for all positions"),
    (lambda x: torch.addmm(B, x, M.t(), beta=2), (3, 5), "addmm with beta, alpha"),
    (lambda x: torch.addmm(ROWS, x, M.t()), (3, 5), "a bias per row"),
    (lambda x: F.batch_norm(x, None, None, training=True), MAP, "statistics of the batch"),
    (lambda x: F.batch_norm(x, S6, S6.abs(), x[0, :, 0, 0]), MAP, "batch norm depend on an input"),
    (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), MAP, "ceil_mode reads zeros, or divides by"),
    (lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True, divisor_override=5), MAP, "ceil_mode reads zeros"),
    (lambda x: F.pad(x, (1, 1), value=-torch.inf), MAP, "pads with -inf, which is no number"),
    (lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)), MAP, "more than the spatial dimensions"),
    (lambda x: x * LINES, MAP, "from position to position"),
    (lambda x: x * WHOLE, MAP, "from position to position"),
    (lambda x: x[:, :1] * C6, MAP, "broadcasts the tensor to a larger shape"),
    (lambda x: x + x[:, :1] * x, MAP, ""),
    (lambda x: x + x.amax(2, keepdim=True), MAP, "different shapes"),
    (lambda x: F.dropout(x, 0.5), MAP, "active at inference too"),
    (lambda x: x.int() * 2, MAP, "casts to another dtype"),
    (lambda x: x[:, :, 1 : x.shape[2] - 1] * 2, MAP, "follow from the input's size"),
    (lambda x: x[:, :, -3:] * 2, MAP, "follow from the input's size"),
]


@pytest.mark.parametrize(("forward", "shape", "reason"), REFUSALS)
def test_what_is_no_affine_form_is_refused(
    forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], reason: str
) -> None:
    _, regions = regions_of(Function(lambda _, x: forward(x)).eval(), random(*shape))
    reasons = [*regions.refused.values(), *(call.op for call in regions.unknown)]
    assert any(reason in found for found in reasons), (reasons, regions.chains)


UNKNOWN: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.relu(),
    lambda x: x * x,
    lambda x: x.float().double() * x,
    lambda x: 1 / x,
    lambda x: torch.div(x, 2, rounding_mode="floor"),
    lambda x: F.max_pool2d(x, 2),
    lambda x: (x > 0) * 2.0,
    lambda x: x[:, 1:],
    lambda x: x[:, :, ::2],
    lambda x: x.flip(2),
    lambda x: x.transpose(1, 2).contiguous().sum(),
]


@pytest.mark.parametrize("index", range(len(UNKNOWN)))
def test_what_there_is_no_rule_for_is_counted(index: int) -> None:
    _, regions = regions_of(Function(lambda _, x: UNKNOWN[index](x)), random(*MAP))
    assert regions.unknown


def test_a_batch_norm_in_train_mode_is_treated_in_eval_mode() -> None:
    model, x = randomised(nn.BatchNorm2d(6)), random(*MAP)
    expected = model(x)
    assert_close(applied(model.train(), x), expected)


def test_integers_are_not_scaled() -> None:
    _, regions = regions_of(Function(lambda _, x: (x * 2 + 1).double()), torch.arange(12).reshape(3, 4))
    assert not regions.chains or all(
        e.target.meta["val"].is_floating_point() for c in regions.chains for e in c
    )


def test_a_product_of_two_inputs_is_no_form() -> None:
    _, regions = regions_of(Pair(lambda _, x, y: x * y), random(2, 3), random(2, 3))
    assert [call.op for call in regions.unknown] == ["mul"]


def test_every_recogniser_is_named_after_an_aten_operator() -> None:
    """A misspelt name would never be looked up."""
    names = set(RECOGNISERS) - {"getitem"}  # one of several results, no operator of ATen
    assert not [op for op in names if not hasattr(torch.ops.aten, op)]
