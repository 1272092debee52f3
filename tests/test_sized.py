"""Nearest upsampling to the size of another map, as in U-Nets, merges with the filter behind it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from captured import assert_close, random, randomised
from torch import Tensor, nn

import convmerge
from convmerge.affine import Affine, Geometry
from convmerge.borders.leaks import join
from convmerge.emit import emissions
from convmerge.emit.sized import Sized, build_sized, check_edge
from convmerge.errors import Refusal

ONE = (1, 1)


def upsampled(channels: int) -> Affine:
    geometry = Geometry(channels, channels, channels, (2, 2), (2, 2), ONE, ONE, ONE, ONE)
    return Affine(geometry, torch.ones(channels, 1, 2, 2, dtype=torch.float64))


def filter_of(kernel: tuple[int, int], lo: tuple[int, int], hi: tuple[int, int], dilation: int) -> Affine:
    geometry = Geometry(3, 5, 1, kernel, ONE, ONE, (dilation, dilation), lo, hi, True)
    return Affine(geometry, random(5, 3, *kernel), random(5, seed=1))


FILTERS = [
    ((3, 3), (1, 1), (1, 1), 1),
    ((3, 3), (0, 0), (0, 0), 1),
    ((2, 3), (0, 1), (1, 1), 1),
    ((3, 1), (2, 0), (1, 0), 1),
    ((2, 2), (1, 1), (1, 1), 2),
]


@pytest.mark.parametrize(("kernel", "lo", "hi", "dilation"), FILTERS)
def test_a_filter_behind_twice_the_size_or_one_less(
    kernel: tuple[int, int], lo: tuple[int, int], hi: tuple[int, int], dilation: int
) -> None:
    form = filter_of(kernel, lo, hi, dilation)
    check_edge(form.geometry)
    whole = join(form, upsampled(3))
    for way in emissions(whole.geometry):
        layer = build_sized(Sized(way, (2, 2), form.geometry), whole, form, torch.float64)
        for height, width, odd, odder in itertools.product((1, 2, 3, 6), (1, 2, 5), (0, 1), (0, 1)):
            size = (2 * height - odd, 2 * width - odder)
            if min(form.geometry.out_size(size)) < 1:
                continue
            x = random(2, 3, height, width)
            assert_close(layer(x, *size), form(F.interpolate(x, size)))


def test_other_sizes_are_an_error() -> None:
    form = filter_of((3, 3), ONE, ONE, 1)
    whole = join(form, upsampled(3))
    way = emissions(whole.geometry)[0]
    short = build_sized(Sized(way, (2, 2), form.geometry), whole, form, torch.float64)
    for size in ((11, 8), (10, 9), (8, 8), (10, 6)):
        with pytest.raises(AssertionError, match="twice as large, or one less"):
            short(random(1, 3, 5, 4), *size)
    exact = build_sized(Sized(way, (2, 2), None), whole, None, torch.float64)
    with pytest.raises(AssertionError, match="makes the width 2 times as large"):
        exact(random(1, 3, 5, 4), 10, 7)
    with pytest.raises(AssertionError, match="takes a height below 2048"):
        short(torch.zeros(1, 3, 2048, 1, dtype=torch.float64), 4095, 2)


@pytest.mark.parametrize("filter_", [((5, 5), (2, 2), (2, 2), 1), ((3, 3), (0, 0), (1, 1), 1)])
def test_filters_that_reach_too_far(
    filter_: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int],
) -> None:
    with pytest.raises(Refusal, match="larger than 3×3"):
        check_edge(filter_of(*filter_).geometry)


class Decoder(nn.Module):
    """Upsamples to a size that it is told, as smp's U-Net does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, 32, 3, padding=1, bias=False)
        self.conv = nn.Sequential(conv, nn.BatchNorm2d(32), nn.ReLU())

    def forward(self, x: Tensor, height: int, width: int, skip: Tensor | None = None) -> Tensor:
        x = F.interpolate(x, size=(height, width), mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], 1)
        return self.conv(x)  # type: ignore[no-any-return]


class Unet(nn.Module):
    """One level: halved by ``down``, upsampled again; ``even``: takes even sizes only."""

    def __init__(self, *, skip: bool = True, even: bool = False, floor: bool = False) -> None:
        super().__init__()
        self.skip, self.even = skip, even
        self.start = nn.Conv2d(3, 16, 3, padding=1)
        down = [nn.MaxPool2d(2), nn.Conv2d(16, 64, 1)] if floor else [nn.Conv2d(16, 64, 3, 2, 1)]
        self.down = nn.Sequential(*down, nn.ReLU())
        self.decoder = Decoder(80 if skip else 64)

    def forward(self, x: Tensor) -> Tensor:
        if self.even and (x.shape[2] % 2 or x.shape[3] % 2):
            raise RuntimeError("sizes must be even")
        a = self.start(x).relu()
        height, width = a.shape[2:]
        return self.decoder(self.down(a), height, width, skip=a if self.skip else None)  # type: ignore[no-any-return]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("even", [False, True])
def test_a_decoder_runs_on_the_small_map(skip: bool, even: bool) -> None:
    model = randomised(Unet(skip=skip, even=even))
    result = convmerge.fuse(model, random(1, 3, 64, 96), objective="macs")
    assert result.report.verification is not None
    assert result.report.verification.equal
    merged = [site for site in result.report.merged() if "nearest ×2×2" in site.operators]
    assert [site.reason.split(", to")[1] for site in merged] == [" the size given"]
    assert merged[0].macs_after < 0.6 * merged[0].macs_before
    edges = [name for name, _ in result.model.named_modules() if name.endswith("edge")]
    assert len(edges) == (not even)
    for height, width in ((64, 96), (8, 10)) if even else ((7, 9), (8, 5), (1, 1), (2, 3), (33, 34)):
        x = random(2, 3, height, width)
        with torch.no_grad():
            assert_close(result.model(x), model(x))
    assert not convmerge.inspect(result.model, random(1, 3, 64, 96), objective="macs").merged()


def test_the_result_can_be_exported_with_open_sizes() -> None:
    model = randomised(Unet())
    fused = convmerge.fuse(model, random(1, 3, 64, 96), objective="macs").model
    assert any(name.endswith("edge") for name, _ in fused.named_modules())
    open_ = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(fused, (random(1, 3, 64, 96),), dynamic_shapes=(open_,)).module()
    for height, width in ((64, 96), (33, 50), (41, 27)):
        x = random(1, 3, height, width)
        with torch.no_grad():
            assert_close(program(x), model(x))


class Routed(nn.Module):
    """The filter stands in another module than the upsampling, and nothing traces the code between them."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 64, 3, 2, 1)
        self.up, self.conv = Resize(), nn.Conv2d(64, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.start(x).relu()
        parts = [p for p in (self.down(a).relu(),) if float(p.shape[1]) > 0]
        return self.conv(self.up(parts[0], a)) if len(set(parts)) else a  # type: ignore[no-any-return]


class Resize(nn.Module):
    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[2:])


def test_code_that_cannot_be_traced_keeps_its_upsampling() -> None:
    model = randomised(Routed())
    result = convmerge.fuse(model, random(1, 3, 64, 96), objective="macs")
    assert not any("nearest" in name for site in result.report.merged() for name in site.operators)
    x = random(1, 3, 33, 34)
    with torch.no_grad():
        assert_close(result.model(x), model(x))


@pytest.mark.parametrize("skip", [False, True])
def test_maps_that_are_halved_downwards_are_not_doubled_again(skip: bool) -> None:
    """From 3 to 7, the nearest neighbours are not those of twice the size."""
    report = convmerge.inspect(
        randomised(Unet(skip=skip, floor=True)), random(1, 3, 64, 96), objective="macs"
    )
    reasons = [site.reason for site in report.sites if site.action == "refuse"]
    expected = "upsamples to a given size, not always 2 times as large: 32×48 to 65×97 on 1×3×65×97"
    assert expected in reasons
    assert not any("nearest" in name for site in report.merged() for name in site.operators)
