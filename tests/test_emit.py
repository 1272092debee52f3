"""Layers built from forms: the same function, rounded once, described in words, nothing left to chance."""

from __future__ import annotations

import laws
import pytest
import torch
from generate import Draw
from torch import nn

from convmerge.affine import Affine, Geometry
from convmerge.algebra import compose
from convmerge.algebra.axis import POINT, Axis, from_axes
from convmerge.borders.leaks import join
from convmerge.emit import build, emissions, round_once
from convmerge.errors import Refusal

NEAREST = Axis(2, 2, 1, 1, 1, 1)
SAME = Axis(3, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("spatial", "draws", "kinds"),
    [
        (0, 30, {"linear"}),
        (1, 250, {"conv", "pad+conv", "ones+conv", "conv_transpose", "conv+interleave"}),
        (
            2,
            250,
            {"conv", "pad+conv", "conv_transpose", "conv+shuffle", "conv+shuffle+pad", "conv+interleave"},
        ),
        (3, 80, {"conv", "conv_transpose", "conv+interleave"}),
    ],
)
def test_every_way_to_build_is_exact(spatial: int, draws: int, kinds: set[str]) -> None:
    outcomes = laws.check(laws.builds, draws, spatial)
    assert kinds <= set(outcomes), outcomes


@pytest.mark.long
@pytest.mark.parametrize(("spatial", "draws"), [(1, 2000), (2, 2000), (3, 600)])
def test_every_way_to_build_is_exact_at_length(spatial: int, draws: int) -> None:
    outcomes = laws.check(laws.builds, draws, spatial, first=10_000)
    print(spatial, dict(outcomes.most_common()))
    assert outcomes["conv"] + outcomes["conv_transpose"] > 0.2 * draws, outcomes


def conv(into: int, out: int, *dims: Axis, groups: int = 1, bias: bool = False) -> Geometry:
    return from_axes(into, out, groups, dims, bias=bias)


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (Geometry.channelwise(5, 3, 1, 0), ["Linear(5, 3)"]),
        (conv(64, 48, SAME, SAME), ["Conv2d(64, 48, 3×3, padding 1)"]),
        (conv(6, 6, POINT, POINT, groups=6), ["Conv2d(6, 6, 1×1, groups 6)"]),
        (
            conv(4, 6, Axis(3, 1, 2, 1, 1, 1), Axis(2, 1, 1, 3, 0, 0), groups=2),
            ["Conv2d(4, 6, 3×2, stride 2×1, padding 1×0, dilation 1×3, groups 2)"],
        ),
        (
            conv(4, 6, Axis(3, 1, 2, 1, 0, 1)),  # as TensorFlow pads: by one tap in front, or outside
            ["ZeroPad1d(0…1) → Conv1d(4, 6, 3, stride 2)", "Conv1d(4, 6, 4, stride 2, padding 1)"],
        ),
        (conv(4, 6, Axis(3, 1, 1, 1, -1, -2)), ["ZeroPad1d(-1…-2) → Conv1d(4, 6, 3)"]),
        (
            conv(4, 6, Axis(8, 1, 2, 1, 0, 0), Axis(2, 1, 2, 1, 0, 0)),
            ["Conv2d(4, 6, 8×2, stride 2)", "UnfoldedConv2d(4, 6, 8×2, stride 2)"],
        ),
        (
            conv(4, 6, Axis(4, 3, 1, 1, 2, 3)),
            [
                "ConvTranspose1d(4, 6, 4, stride 3, padding 1, output padding 1)",
                "ZeroPad1d(0…1) → Conv1d(4, 18, 2) → phases interleaved 3",
                "Conv1d(4, 18, 3, padding 1) → phases interleaved 3",
            ],
        ),
        (
            conv(4, 3, Axis(4, 2, 1, 1, 2, 2), Axis(4, 2, 1, 1, 2, 2)),
            [
                "ConvTranspose2d(4, 3, 4×4, stride 2, padding 1)",
                "Conv2d(4, 12, 3×3, padding 1) → PixelShuffle(2)",
                "Conv2d(4, 12, 2×2, padding 1) → PixelShuffle(2) → ZeroPad2d(-1…-1, -1…-1)",
                "Conv2d(4, 12, 2×2, padding 1) → phases interleaved 2×2",
            ],
        ),
        (
            Geometry(3, 2, 1, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), ones=True),
            ["ConstantPad3d(a channel of ones) → Conv2d(4, 2, 3×3, padding 1)"],
        ),
    ],
)
def test_ways_to_build_in_words(geometry: Geometry, words: list[str]) -> None:
    assert [str(e) for e in emissions(geometry)] == words


def test_upsampling_and_striding_at_once_has_no_layer() -> None:
    with pytest.raises(Refusal, match="upsamples and strides"):
        emissions(conv(2, 2, Axis(3, 2, 3, 1, 1, 1)))
    with pytest.raises(Refusal, match="4 dimensions"):
        emissions(conv(2, 2, SAME, SAME, SAME, SAME))


def test_grouped_linear_becomes_dense() -> None:
    draw = Draw(1, 0)
    form = draw.numbers(from_axes(6, 4, 2, []))
    layer = build(form, emissions(form.geometry)[0], torch.float64)
    x = draw.input(6, ())
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer(x), form(x))


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_ones_in_every_dimension(spatial: int, groups: int) -> None:
    draw = Draw(2, spatial)
    inner = draw.numbers(from_axes(4, 6, groups, [POINT] * spatial, bias=True))
    outer = draw.numbers(from_axes(6, 2, groups, [Axis(3, 1, 1, 1, 1, 2)] * spatial))
    form = join(outer, inner)
    ways = emissions(form.geometry)
    assert len(ways) == 2
    for emission in ways:
        layers = build(form, emission, torch.float64)
        x = draw.input(4, (3, 4, 2)[:spatial])
        assert torch.equal(layers(x), outer(inner(x))), str(emission)
        assert torch.equal(layers(x[0]), layers(x)[0])
        assert {type(m).__module__.partition(".nn.")[0] for m in layers.modules()} == {"torch"}


def phases(spatial: int) -> tuple[Affine, Draw]:
    """A form whose bias depends on the output position: 1×1 with bias, then a transposed convolution."""
    draw = Draw(3, spatial)
    mix = draw.numbers(from_axes(3, 4, 1, [POINT] * spatial, bias=True))
    spread = draw.numbers(from_axes(4, 2, 1, [Axis(2, 2, 1, 1, 1, 1)] * spatial))
    form = compose(spread, mix)
    assert form.bias is not None and form.bias.dim() == 1 + spatial
    return form, draw


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_a_bias_that_depends_on_the_position(spatial: int) -> None:
    form, draw = phases(spatial)
    x = draw.input(3, (3, 4, 2)[:spatial])
    for emission in emissions(form.geometry):
        assert torch.equal(build(form, emission, torch.float64)(x), form(x)), str(emission)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_unfolded_takes_what_a_convolution_takes(spatial: int) -> None:
    dims = [Axis(17, 1, 1, 1, 0, 0), Axis(2, 1, 2, 3, 0, 0), Axis(4, 1, 1, 1, 0, 0)][:spatial]
    form = laws.Draw(4, spatial).form(5, 7, dims)
    usual, unfolded = (build(form, way, torch.float64) for way in emissions(form.geometry))
    assert [type(m).__name__ for m in (usual, unfolded)] == [f"Conv{spatial}d", f"UnfoldedConv{spatial}d"]
    assert torch.equal(unfolded.weight, usual.weight.flatten(1))
    draw = laws.Draw(5, spatial)
    for sizes in ((17, 4, 4), (21, 5, 8)):
        x = draw.input(5, sizes[:spatial])
        assert torch.equal(usual(x), unfolded(x))
        assert torch.equal(usual(x[0]), unfolded(x[0]))
        assert torch.equal(usual(x), unfolded(x.transpose(0, 1).contiguous().transpose(0, 1)))
    with pytest.raises(RuntimeError):
        unfolded(draw.input(5, (16, 4, 4)[:spatial]))


def test_nothing_random_is_run() -> None:
    form, _ = phases(2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for emission in emissions(form.geometry):
        build(form, emission)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_parameters_are_fresh_and_as_asked(dtype: torch.dtype, requires_grad: bool) -> None:
    draw = Draw(4, 2)
    form = draw.numbers(conv(3, 5, SAME, SAME, bias=True))
    (emission,) = emissions(form.geometry)
    layer = build(form, emission, dtype, requires_grad=requires_grad, memory_format=torch.channels_last)
    assert {(p.dtype, p.requires_grad, p.device.type) for p in layer.parameters()} == {
        (dtype, requires_grad, "cpu")
    }
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.weight.double(), form.weight)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert form.weight.any() and form.bias is not None and form.bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_happens_once(dtype: torch.dtype) -> None:
    """Beside a tie between two neighbours of ``dtype``, by less than float32 can see, and anywhere else."""
    generator = torch.Generator().manual_seed(6)
    near = torch.randn(400, 1, generator=generator, dtype=torch.float64).to(dtype).double()
    ulp = near.sign() * 2.0 ** near.abs().log2().floor() * torch.finfo(dtype).eps
    nudge = torch.tensor([-(2.0**-3), -(2.0**-25), 0.0, 2.0**-25, 2.0**-3], dtype=torch.float64)
    values = near + ulp * (0.5 + nudge)
    rounded = round_once(values, dtype)
    assert rounded.dtype == dtype
    # near and near + ulp are neighbours, and all differences are exact.
    distance = torch.minimum((values - near).abs(), (values - near - ulp).abs())
    assert torch.equal((rounded.double() - values).abs(), distance)
    assert not torch.equal(values[:, 1], values[:, 2])


def test_a_weight_too_large_for_half_precision_is_refused() -> None:
    with pytest.raises(Refusal, match="too large for float16"):
        round_once(torch.tensor([1.0, 7e4], dtype=torch.float64), torch.float16)
    assert round_once(torch.tensor([7e4], dtype=torch.float64), torch.bfloat16).isfinite().all()
