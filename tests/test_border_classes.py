"""Border classes: chains with zero padding inside, refused or exact at every size from the minimum on."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import laws
import pytest
import torch
from generate import Draw, run
from torch import nn

import convmerge
from convmerge.affine import Affine
from convmerge.algebra import compose
from convmerge.algebra.axis import POINT, Axis, from_axes
from convmerge.borders.classes import Bordered, bordered
from convmerge.borders.leaks import join
from convmerge.emit.bordered import build_bordered
from convmerge.errors import Refusal
from convmerge.report import Report, SiteReport

SAME = Axis(3, 1, 1, 1, 1, 1)
STRIDED = Axis(3, 1, 2, 1, 1, 1)
NEAREST = Axis(2, 2, 1, 1, 1, 1)
THRICE = Axis(3, 3, 1, 1, 2, 2)
RAGGED = Axis(3, 2, 1, 1, 1, 1)  # a transposed convolution with 2n - 1 outputs
POOL = Axis(2, 1, 2, 1, 0, 0)
PADDED_POOL = Axis(3, 1, 2, 1, 1, 1)
WIDE, DILATED = Axis(5, 1, 1, 1, 2, 2), Axis(3, 1, 1, 2, 2, 2)
AXES = [SAME, SAME, STRIDED, NEAREST, POOL, PADDED_POOL, POINT, WIDE, DILATED]
AHEAD = 8  # sizes from the minimum on


def regular_chain(draw: Draw) -> list[Affine]:
    """Forms as real models have them, the same axis in all dimensions."""
    length = draw.random.choice([2, 2, 3, 4] if draw.spatial < 3 else [2, 2, 3])
    channels = [draw.random.choice([1, 2, 3, 4]) for _ in range(length + 1)]
    chain = []
    for i, o in itertools.pairwise(channels):
        axis = draw.random.choice(AXES)
        other = draw.random.choice(AXES) if draw.random.random() < 0.2 else axis
        chain.append(draw.form(i, o, [axis] * (draw.spatial - 1) + [other]))
    return chain


def sizes(draw: Draw, b: Bordered) -> Iterator[tuple[int, ...]]:
    """Every size in one dimension; in more, every size of each beside drawn ones of the others."""
    for dim in range(draw.spatial):
        for extra in range(AHEAD):
            more = [draw.random.randrange(AHEAD if draw.spatial < 3 else 3) for _ in range(draw.spatial)]
            more[dim] = extra
            yield tuple(n + e for n, e in zip(b.minimum, more, strict=True))


def borders(draw: Draw) -> str:
    """Border classes of a chain: equal at every size from the minimum on, an error below."""
    chain = regular_chain(draw) if draw.random.random() < 0.7 else draw.chain(draw.random.choice([2, 3]))
    try:
        b = bordered(tuple(form.geometry for form in chain))
        merged = build_bordered(b, chain, torch.float64)
    except Refusal as refusal:
        return re.sub(r"\d+", "#", refusal.reason)
    cost = math.prod(m + AHEAD for m in b.minimum) * math.prod(b.rates) * b.low.kernel[0] ** draw.spatial
    if cost > 1e6:
        return "too large to try"
    for size in sizes(draw, b):
        x = draw.input(chain[0].geometry.in_channels, size)
        expected = run(chain, x)
        assert expected is not None, f"the chain does not run at {size}"
        found = merged(x)
        assert found.shape == expected.shape, f"{found.shape} for {expected.shape} at {size}"
        assert torch.equal(found, expected), f"another result at {size}"
    for dim, side in enumerate(b.sides):
        if len(side.segments) > 1 and b.minimum[dim] > 1:
            small = [n - (d == dim) for d, n in enumerate(b.minimum)]
            with pytest.raises(AssertionError, match="needs an input of at least"):
                merged(draw.input(chain[0].geometry.in_channels, small))
    count = len(b.keys)
    residues = max(side.ends.residues for side in b.sides)
    return "exact, no borders" if count == 1 else "exact by residues" if residues > 1 else "exact"


def refused_or_exact(draws: int, spatial: int, first: int = 0) -> Counter[str]:
    outcomes = laws.check(borders, draws, spatial, first)
    assert outcomes["exact"] >= 0.08 * draws, outcomes
    assert outcomes["exact by residues"] >= 0.02 * draws, outcomes
    return outcomes


@pytest.mark.parametrize(("spatial", "draws"), [(1, 150), (2, 100), (3, 22)])
def test_refused_or_exact(spatial: int, draws: int) -> None:
    refused_or_exact(draws, spatial)


@pytest.mark.long
@pytest.mark.parametrize(("spatial", "draws"), [(1, 1200), (2, 800), (3, 300)])
def test_refused_or_exact_at_length(spatial: int, draws: int) -> None:
    outcomes = refused_or_exact(draws, spatial, first=10_000)
    print(spatial, dict(outcomes.most_common()))


def pixel_shuffle(channels: int, rate: int) -> Affine:
    axis = Axis(rate, rate, 1, 1, rate - 1, rate - 1)
    one_hot = torch.eye(rate**2, dtype=torch.float64).reshape(1, rate**2, rate, rate).flip(2, 3)
    weight = one_hot.repeat(channels, 1, 1, 1)
    return Affine(from_axes(channels * rate**2, channels, channels, [axis, axis]), weight)


def upscaler(draw: Draw, channels: int, rates: Sequence[int]) -> list[Affine]:
    """The tail of EDSR: conv, shuffle, ..., conv."""
    chain = []
    for rate in rates:
        chain.append(draw.form(channels, channels * rate**2, [SAME, SAME]))
        chain.append(pixel_shuffle(channels, rate))
    return [*chain, draw.form(channels, 3, [SAME, SAME])]


@pytest.mark.parametrize("rates", [(2,), (3,), (2, 2)])
def test_the_tail_of_an_upscaler_is_nine_kernels_and_a_shuffle(rates: tuple[int, ...]) -> None:
    draw = Draw(1, 2)
    chain = upscaler(draw, 5, rates)
    b = bordered(tuple(form.geometry for form in chain))
    merged = build_bordered(b, chain, torch.float64)
    assert (len(b.keys), b.low.kernel, b.rates, b.minimum) == (9, (5, 5), (math.prod(rates),) * 2, (3, 3))
    corners = {"top_left", "top_right", "bottom_left", "bottom_right"}
    sides = {"top", "bottom", "left", "right"}
    assert {name for name, _ in merged.named_children()} == {"interior"} | corners | sides
    for size in ((3, 3), (3, 4), (7, 5), (6, 11)):
        x = draw.input(5, size)
        assert torch.equal(merged(x), run(chain, x))
        assert torch.equal(merged(x[0]), run(chain, x)[0])


@pytest.mark.parametrize(
    "kernels",
    [
        [[SAME], [NEAREST], [SAME]],
        [[SAME] * 3, [NEAREST] * 3, [SAME] * 3],
        [[SAME, SAME], [NEAREST, POINT], [SAME, SAME]],
        [[SAME, SAME], [NEAREST, THRICE], [SAME, SAME]],
        [[SAME, SAME], [NEAREST, STRIDED], [SAME, SAME]],
        [[SAME, STRIDED], [THRICE, NEAREST], [STRIDED, SAME]],
        [[POOL, STRIDED], [NEAREST, THRICE], [POINT, POINT]],
        [[WIDE, DILATED], [NEAREST, NEAREST], [WIDE, WIDE]],
        [[SAME], [RAGGED], [SAME]],
        [[SAME, SAME], [RAGGED, NEAREST], [SAME, SAME]],
    ],
    ids=[
        "1-d",
        "3-d",
        "one of two",
        "2×3",
        "up beside down",
        "up and down",
        "blocks",
        "long borders",
        "ragged",
        "ragged beside even",
    ],
)
def test_rates_go_up_in_any_dimension(kernels: list[list[Axis]]) -> None:
    draw = Draw(8, len(kernels[0]))
    channels = (3, 4, 5, 2)
    chain = [
        draw.form(i, o, dims) for (i, o), dims in zip(itertools.pairwise(channels), kernels, strict=True)
    ]
    b = bordered(tuple(form.geometry for form in chain))
    merged = build_bordered(b, chain, torch.float64)
    for size in sizes(draw, b):
        x = draw.input(3, size)
        y = merged(x)
        assert torch.equal(y, run(chain, x)), size
        assert y.is_contiguous()
        assert torch.equal(merged(x[0]), y[0])


@pytest.mark.parametrize("spatial", [1, 2])
def test_biases_that_depend_on_the_position(spatial: int) -> None:
    """A bias that fades in padding, and one for every phase of an upsampling."""
    draw = Draw(9, spatial)
    fading = join(draw.form(4, 3, [SAME] * spatial), biased(draw, 2, 4, POINT))
    phased = compose(draw.form(4, 2, [RAGGED] * spatial), biased(draw, 3, 4, POINT))
    assert fading.ones is not None and phased.bias is not None and phased.bias.dim() == 1 + spatial
    for chain in (
        [fading, draw.form(3, 5, [SAME] * spatial)],
        [biased(draw, 4, 2, SAME), fading, draw.form(3, 2, [STRIDED] * spatial)],
        [phased, draw.form(2, 3, [SAME] * spatial)],
        [biased(draw, 2, 3, SAME), phased, draw.form(2, 1, [STRIDED] * spatial)],
    ):
        b = bordered(tuple(form.geometry for form in chain))
        merged = build_bordered(b, chain, torch.float64)
        for size in sizes(draw, b):
            x = draw.input(chain[0].geometry.in_channels, size)
            assert torch.equal(merged(x), run(chain, x)), size


def biased(draw: Draw, into: int, out: int, axis: Axis) -> Affine:
    return draw.form(into, out, [axis] * draw.spatial).with_bias(draw.integers(out, zero=False))


def test_each_dimension_by_itself() -> None:
    """A leak in the width alone needs classes in the width alone."""
    draw = Draw(2, 2)
    chain = [draw.form(3, 4, [POINT, SAME]), draw.form(4, 2, [Axis(3, 1, 1, 1, 0, 0), SAME])]
    b = bordered(tuple(form.geometry for form in chain))
    assert [len(side.segments) for side in b.sides] == [1, 3]
    merged = build_bordered(b, chain, torch.float64)
    assert {name for name, _ in merged.named_children()} == {"interior", "left", "right"}
    x = draw.input(3, (4, 6))
    assert torch.equal(merged(x), run(chain, x))


def test_a_strided_stem_has_last_kernels_for_every_residue() -> None:
    draw = Draw(3, 2)
    chain = [draw.form(3, 5, [STRIDED, STRIDED]), draw.form(5, 4, [STRIDED, STRIDED])]
    b = bordered(tuple(form.geometry for form in chain))
    assert (b.low.kernel, b.low.down, b.sides[0].ends.residues) == ((7, 7), (4, 4), 4)
    merged = build_bordered(b, chain, torch.float64)
    assert merged.bottom_right.weight.shape[:2] == (4, 4)
    for size in itertools.product(range(9, 13), range(9, 13)):
        x = draw.input(3, size)
        assert torch.equal(merged(x), run(chain, x)), size


def test_grouped_chains_stay_grouped() -> None:
    draw = Draw(4, 2)
    chain = [
        draw.numbers(from_axes(12, 12, 12, [SAME, SAME], bias=True)),
        draw.numbers(from_axes(12, 6, 6, [SAME, SAME], bias=True)),
    ]
    b = bordered(tuple(form.geometry for form in chain))
    assert b.low.groups == 6
    x = draw.input(12, (5, 4))
    assert torch.equal(build_bordered(b, chain, torch.float64)(x), run(chain, x))


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        (
            [[Axis(51, 1, 1, 1, 25, 25)]] * 2,
            "50 outputs in a row would need kernels of their own at the borders",
        ),
        ([[STRIDED]] * 4, "modulo 16"),
    ],
)
def test_refusals_say_why(dims: list[list[Axis]], reason: str) -> None:
    draw = Draw(5, 1)
    chain = [draw.geometry(2, 2, axes) for axes in dims]
    with pytest.raises(Refusal, match=reason):
        bordered(tuple(chain))


def tail(channels: int, *rates: int) -> nn.Sequential:
    """The tail of EDSR as a module."""
    torch.manual_seed(channels)
    layers: list[nn.Module] = []
    for rate in rates:
        layers += [nn.Conv2d(channels, channels * rate**2, 3, padding=1), nn.PixelShuffle(rate)]
    return nn.Sequential(*layers, nn.Conv2d(channels, 3, 3, padding=1)).eval()


def the_merge(report: Report) -> SiteReport:
    [site] = report.merged()
    return site


@pytest.mark.parametrize("rates", [(2,), (3,), (2, 2)])
def test_fuse_merges_the_tail_of_an_upscaler(rates: tuple[int, ...]) -> None:
    model = tail(16, *rates)
    result = convmerge.fuse(model, torch.randn(1, 16, 48, 48))
    site = the_merge(result.report)
    assert site.reason.startswith("9 border classes of Conv2d(16, ")
    assert "from 3×3 up" in site.reason
    assert site.error is not None and site.bound is not None and site.error <= site.bound
    assert site.macs_after < site.macs_before
    assert result.report.verification is not None and result.report.verification.equal
    for size in ((48, 48), (3, 3), (5, 17), (8, 4)):
        x = torch.randn(2, 16, *size)
        torch.testing.assert_close(result.model(x), model(x))
    with pytest.raises(AssertionError, match="at least 3×3"):
        result.model(torch.randn(1, 16, 2, 9))


@pytest.mark.parametrize(
    ("model", "shape", "text"),
    [
        (
            nn.Sequential(nn.Conv1d(8, 64, 5, padding=2), nn.Conv1d(64, 8, 5, padding=2)),
            (1, 8, 2000),
            "3 border classes of Conv1d(8, 8, 9)",
        ),
        (
            nn.Sequential(
                nn.Conv1d(8, 64, 5, padding=2),
                nn.Upsample(scale_factor=2),
                nn.Conv1d(64, 8, 5, padding=2),
            ),
            (1, 8, 2000),
            "3 border classes of Conv1d(8, 16, 7) → phases interleaved 2",
        ),
        (
            nn.Sequential(nn.Conv3d(4, 64, 3, padding=1), nn.BatchNorm3d(64), nn.Conv3d(64, 4, 3, padding=1)),
            (1, 4, 24, 24, 24),
            "27 border classes of Conv3d(4, 4, 5×5×5)",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ConvTranspose2d(32, 3, 2, stride=2)),
            (1, 3, 128, 96),
            "Conv2d(3, 12, 3×3, stride 2×2) → phases interleaved 2×2",
        ),
        (
            nn.Sequential(
                nn.Upsample(scale_factor=3.0),
                nn.Conv2d(8, 64, 3, padding=1),
                nn.Conv2d(64, 4, 3, stride=2, padding=1),
            ),
            (1, 8, 48, 53),
            "9 border classes of Conv2d(8, 36, 4×4, stride 2×2) → phases interleaved 3×3",
        ),
    ],
    ids=["one dimension", "one dimension, upsampled", "three dimensions", "down and up", "up and down"],
)
def test_fuse_merges_bottlenecks_in(model: nn.Module, shape: tuple[int, ...], text: str) -> None:
    x = torch.randn(shape)
    result = convmerge.fuse(model.eval(), x)
    assert the_merge(result.report).reason.startswith(text)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)),
        nn.Sequential(nn.Conv2d(64, 16, 3, padding=1), nn.Conv2d(16, 64, 3, padding=1)),
        nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1, groups=64) for _ in range(2))),
        nn.Sequential(nn.Conv2d(64, 512, 7, padding=3), nn.Conv2d(512, 64, 5, padding=2)),
    ],
    ids=["a 5×5 of equal width", "narrow in the middle", "depthwise", "many weights at the borders"],
)
def test_what_border_classes_would_slow_down_is_left_alone(model: nn.Module) -> None:
    assert convmerge.inspect(model.eval(), torch.randn(1, 64, 56, 56)).merged() == ()


def test_maps_that_are_mostly_borders_are_left_alone() -> None:
    assert convmerge.inspect(tail(16, 2, 2), torch.randn(1, 16, 5, 5)).merged() == ()


def test_the_merged_module_loads_with_torch_alone(tmp_path: Path) -> None:
    result = convmerge.fuse(tail(16, 2), torch.randn(1, 16, 48, 48))
    torch.save(result.model, tmp_path / "fused.pt")
    assert type(result.model[0]).__name__ == "BorderedConv2d"
    code = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); "
        "assert m(torch.zeros(1, 16, 5, 4)).shape == (1, 3, 10, 8); "
        "assert not any(name.startswith('convmerge') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "fused.pt")], check=True)
