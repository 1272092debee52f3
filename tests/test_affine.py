"""The form against torch: every operator of the table in its docstring, in every dimension it has."""

from __future__ import annotations

import pytest
import torch
from generate import Draw
from torch import Tensor, nn

from convmerge.affine import Affine, Geometry

DIMS = (1, 2, 3)


def layers(kind: str) -> dict[int, type[nn.Module]]:
    return {n: getattr(nn, f"{kind}{n}d") for n in DIMS}


def randomise(layer: nn.Module, draw: Draw) -> nn.Module:
    """Integer weights, in float64."""
    layer = layer.double().requires_grad_(False)
    for tensor in layer.parameters():
        tensor.copy_(draw.integers(*tensor.shape))
    return layer


def agrees(form: Affine, operator: nn.Module, x: Tensor) -> None:
    expected = operator(x)
    assert torch.equal(form(x), expected)
    assert form.geometry.out_size(x.shape[2:]) == tuple(expected.shape[2:])


@pytest.mark.parametrize("spatial", DIMS)
def test_convolution(spatial: int) -> None:
    for seed in range(60 if spatial < 3 else 20):
        draw = Draw(seed, spatial)
        into, out = draw.channels(), draw.channels()
        groups = draw.groups(into, out)
        pick = draw.random.choice
        kernel, stride, dilation, padding = (
            tuple(pick(options) for _ in range(spatial))
            for options in ([1, 2, 3, 5], [1, 2, 3], [1, 2], [0, 1, 2])
        )
        bias = pick([True, False])
        conv = randomise(
            layers("Conv")[spatial](into, out, kernel, stride, padding, dilation, groups, bias), draw
        )
        one = (1,) * spatial
        g = Geometry(into, out, groups, kernel, one, stride, dilation, padding, padding, bias)
        size = tuple(pick([11, 12, 13]) for _ in range(spatial))
        agrees(Affine(g, conv.weight, conv.bias), conv, draw.input(into, size))


@pytest.mark.parametrize("spatial", DIMS)
def test_transposed_convolution(spatial: int) -> None:
    for seed in range(60 if spatial < 3 else 20):
        draw = Draw(seed, spatial)
        into, out = draw.channels(), draw.channels()
        groups = draw.groups(into, out)
        pick = draw.random.choice
        kernel, stride, dilation = (
            tuple(pick(options) for _ in range(spatial)) for options in ([1, 2, 3, 5], [1, 2, 3], [1, 2])
        )
        padding = tuple(pick([0, 1]) for _ in range(spatial))
        extra = tuple(pick(range(max(s, d))) for s, d in zip(stride, dilation, strict=True))
        transposed = layers("ConvTranspose")[spatial]
        conv = randomise(transposed(into, out, kernel, stride, padding, extra, groups, True, dilation), draw)
        lo = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True))
        hi = tuple(a + b for a, b in zip(lo, extra, strict=True))
        one = (1,) * spatial
        g = Geometry(into, out, groups, kernel, stride, one, dilation, lo, hi, True)
        # torch: (in, out / groups, *kernel), true convolution
        weight = conv.weight.reshape(groups, into // groups, out // groups, *kernel).transpose(1, 2)
        weight = weight.reshape(out, into // groups, *kernel).flip(tuple(range(2, 2 + spatial)))
        size = tuple(pick([3, 4, 5]) for _ in range(spatial))
        agrees(Affine(g, weight, conv.bias), conv, draw.input(into, size))


def test_linear() -> None:
    draw = Draw(0, 0)
    linear = randomise(nn.Linear(7, 5), draw)
    agrees(
        Affine(Geometry.channelwise(7, 5, 1, 0, bias=True), linear.weight, linear.bias),
        linear,
        draw.input(7, ()),
    )


def test_linear_in_groups() -> None:
    draw = Draw(1, 0)
    form = draw.numbers(draw.geometry(6, 9, groups=3))
    x = draw.input(6, ())
    blocks = [x[:, 2 * i : 2 * i + 2] @ form.weight[3 * i : 3 * i + 3].T for i in range(3)]
    expected = torch.cat(blocks, 1) + (0 if form.bias is None else form.bias)
    assert torch.equal(form(x), expected)


@pytest.mark.parametrize("spatial", DIMS)
def test_average_pool(spatial: int) -> None:
    draw = Draw(2, spatial)
    kernel, stride, padding = (4, 2, 8)[:spatial], (3, 2, 1)[:spatial], (2, 0, 1)[:spatial]
    one = (1,) * spatial
    g = Geometry(3, 3, 3, kernel, one, stride, one, padding, padding)
    weight = torch.full((3, 1, *kernel), 1 / torch.tensor(kernel).prod().item(), dtype=torch.float64)
    agrees(
        Affine(g, weight),
        layers("AvgPool")[spatial](kernel, stride, padding),
        draw.input(3, (9, 7, 10)[:spatial]),
    )


@pytest.mark.parametrize("spatial", DIMS)
def test_nearest_upsampling(spatial: int) -> None:
    draw = Draw(3, spatial)
    rates = (2, 3, 2)[:spatial]
    one, lo = (1,) * spatial, tuple(u - 1 for u in rates)
    g = Geometry(5, 5, 5, rates, rates, one, one, lo, lo)
    weight = torch.ones(5, 1, *rates, dtype=torch.float64)
    agrees(Affine(g, weight), nn.Upsample(scale_factor=rates), draw.input(5, (4, 3, 2)[:spatial]))


@pytest.mark.parametrize("rate", (2, 3))
def test_pixel_shuffle_and_back(rate: int) -> None:
    draw = Draw(4, 2)
    one, zero, r = (1, 1), (0, 0), (rate, rate)
    last = (rate - 1, rate - 1)
    one_hot = torch.eye(rate**2, dtype=torch.float64).reshape(rate**2, 1, rate, rate).repeat(3, 1, 1, 1)
    unshuffle = Affine(Geometry(3, 3 * rate**2, 3, r, one, r, one, zero, zero), one_hot)
    agrees(unshuffle, nn.PixelUnshuffle(rate), draw.input(3, (2 * rate, 3 * rate)))
    # On the zero-stuffed input the tap that meets sample 0 of output i is rate - 1 - i: flipped.
    taps = one_hot.reshape(3, rate**2, rate, rate).flip(2, 3)
    shuffle = Affine(Geometry(3 * rate**2, 3, 3, r, r, one, one, last, last), taps)
    agrees(shuffle, nn.PixelShuffle(rate), draw.input(3 * rate**2, (4, 3)))


@pytest.mark.parametrize("spatial", DIMS)
def test_padding_and_cropping(spatial: int) -> None:
    draw = Draw(5, spatial)
    one, lo, hi = (1,) * spatial, (2, -1, -3)[:spatial], (-3, 4, 0)[:spatial]
    weight = torch.ones(2, 1, *one, dtype=torch.float64)
    sides = [s for pair in zip(reversed(lo), reversed(hi), strict=True) for s in pair]
    pad = layers("ZeroPad")[spatial](tuple(sides))
    agrees(
        Affine(Geometry(2, 2, 2, one, one, one, one, lo, hi), weight), pad, draw.input(2, (6, 5, 7)[:spatial])
    )


def test_a_crop_longer_than_the_input() -> None:
    g = Geometry(1, 1, 1, (1,), (1,), (1,), (1,), (-5,), (8,))
    form = Affine(g, torch.ones(1, 1, 1, dtype=torch.float64))
    assert torch.equal(form(torch.ones(1, 1, 3).double()), torch.zeros(1, 1, 6).double())


def test_batch_norm() -> None:
    norm = nn.BatchNorm2d(5).double().eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    factor = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias.detach() - norm.running_mean * factor
    form = Affine(Geometry.channelwise(5, 5, 5, 2, bias=True), factor.reshape(-1, 1, 1, 1), shift)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(form(x), norm(x), rtol=1e-13, atol=1e-13)


def test_a_bias_that_depends_on_the_output_position() -> None:
    g = Geometry(1, 2, 1, (1, 1), (3, 1), (1, 1), (1, 1), (0, 0), (2, 0), bias=True)
    bias = torch.arange(6.0, dtype=torch.float64).reshape(2, 3, 1)
    y = Affine(g, torch.zeros(2, 1, 1, 1, dtype=torch.float64), bias)(torch.zeros(1, 1, 2, 2).double())
    assert y[0, :, :, 1].tolist() == [[0, 1, 2, 0, 1, 2], [3, 4, 5, 3, 4, 5]]


def test_a_kernel_over_ones_is_one_more_input_channel() -> None:
    draw = Draw(6, 2)
    conv = randomise(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)), draw)
    g = Geometry(3, 6, 1, (3, 2), (1, 1), (2, 1), (1, 1), (1, 2), (1, 2), bias=True, ones=True)
    form = Affine(g, conv.weight[:, :3], conv.bias, conv.weight[:, 3])
    x = draw.input(3, (6, 5))
    assert torch.equal(form(x), conv(torch.cat([x, torch.ones_like(x[:, :1])], 1)))
    assert g.weights == sum(p.numel() for p in conv.parameters())
    assert g.macs((6, 5)) == conv.weight.numel() * 3 * 8


def test_too_small_an_input_is_an_error() -> None:
    form = Draw(7, 1).numbers(Geometry(1, 1, 1, (5,), (1,), (1,), (1,), (0,), (0,)))
    assert form.geometry.out_size((4,)) == (0,)
    with pytest.raises(ValueError, match="too small"):
        form(torch.zeros(1, 1, 4).double())


@pytest.mark.parametrize(
    ("shape", "bias"), [((3, 2, 3), None), ((2, 3, 3), torch.zeros(2)), ((2, 3, 2), None)], ids=str
)
def test_numbers_that_do_not_fit_the_geometry(shape: tuple[int, ...], bias: Tensor | None) -> None:
    g = Geometry(3, 2, 1, (3,), (1,), (1,), (1,), (0,), (0,))
    with pytest.raises(ValueError, match=r"shape|bias"):
        Affine(g, torch.zeros(shape), bias)
