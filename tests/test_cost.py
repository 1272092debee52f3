"""The cost model: what it counts, what it compares by, and decisions that must come out one way."""

from __future__ import annotations

import pytest
import torch

from convmerge.affine import Affine, Geometry
from convmerge.algebra import compose
from convmerge.algebra.axis import POINT, Axis, from_axes
from convmerge.borders.leaks import join_geometry
from convmerge.cost.model import ZERO, Cost, cheapest, emission_cost, layer_cost, operator_cost
from convmerge.cost.roofline import FAULTS, MAPPED, layer_load
from convmerge.emit import Layer, build, emissions, swapped

SAME = Axis(3, 1, 1, 1, 1, 1)
VALID = Axis(3, 1, 1, 1, 0, 0)


def mix(into: int, out: int, *, bias: bool = True) -> Geometry:
    return from_axes(into, out, 1, [POINT, POINT], bias)


def conv(into: int, out: int, axis: Axis = SAME, groups: int = 1) -> Geometry:
    return from_axes(into, out, groups, [axis, axis], True)


def depthwise(channels: int, _: int) -> Geometry:
    return conv(channels, channels, groups=channels)


def test_macs_and_weights_are_those_of_the_layers() -> None:
    g = Geometry(6, 4, 2, (3, 5), (1, 1), (2, 1), (1, 1), (1, 2), (1, 2), bias=True)
    cost = layer_cost(Layer("conv", g), (9, 7), batch=3)
    assert cost.macs == 3 * 4 * 3 * 15 * 5 * 7
    assert cost.weights == 4 * 3 * 15 + 4


def test_cost_of_an_emission_is_that_of_what_is_built() -> None:
    g = Geometry(3, 2, 1, (4, 4), (2, 2), (1, 1), (1, 1), (2, 2), (2, 2), bias=True, ones=True)
    for emission in emissions(g):
        layers = build(_zeros(g), emission)
        cost = emission_cost(emission, (8, 8))
        assert cost.weights == sum(p.numel() for p in layers.parameters())
        assert layers(torch.zeros(1, 3, 8, 8)).shape == (1, 2, 16, 16)
    macs = [emission_cost(e, (8, 8)).macs for e in emissions(g)]
    assert macs == [4 * 2 * 16 * 64, 4 * 8 * 9 * 64, 4 * 8 * 4 * 81, 4 * 8 * 4 * 81]


def _zeros(g: Geometry):  # type: ignore[no-untyped-def]
    weight = torch.zeros(g.out_channels, g.in_channels, *g.kernel, dtype=torch.float64)
    return Affine(g, weight, weight[:, 0, 0, 0], weight[:, 0])


def test_costs_add_up() -> None:
    assert Cost(1.0, 2, 3) + Cost(0.5, 1, 1) + ZERO == Cost(1.5, 3, 4)


def test_ties_go_to_latency() -> None:
    fast, small = Cost(1.0, 10, 5), Cost(2.0, 10, 4)
    assert min((fast, small), key=lambda c: c.key("latency")) is fast
    assert min((fast, small), key=lambda c: c.key("params")) is small
    assert min((fast, small), key=lambda c: c.key("macs")) is fast


@pytest.mark.parametrize("channels", [3, 64, 512])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (112, 112)])
def test_batch_norm_after_a_convolution_is_always_worth_folding(channels: int, size: tuple[int, int]) -> None:
    before, norm = conv(channels, channels), from_axes(channels, channels, channels, [POINT, POINT], True)
    apart = cheapest(before, size)[1] + operator_cost("batch_norm", 0, geometry=norm, size=size)
    together = cheapest(join_geometry(norm, before), size)[1]
    for objective in ("latency", "macs", "params"):
        assert together.key(objective) < apart.key(objective)


@pytest.mark.parametrize(
    ("inner", "outer", "size"),
    [
        (mix(96, 24), mix(24, 144), (28, 28)),  # MobileNetV2's bottleneck
        (conv(32, 32, SAME, groups=32), mix(32, 64), (56, 56)),  # depthwise, then pointwise
        (conv(64, 64, VALID), conv(64, 64, VALID), (56, 56)),
        (conv(256, 256, VALID), conv(256, 256, VALID), (14, 14)),
    ],
)
def test_merges_that_must_not_be_made(inner: Geometry, outer: Geometry, size: tuple[int, int]) -> None:
    assert _together(inner, outer, size) > _apart(inner, outer, size)


@pytest.mark.parametrize(
    ("inner", "outer", "size"),
    [
        (mix(64, 256), mix(256, 64), (28, 28)),
        (conv(16, 256, SAME), mix(256, 16), (64, 64)),  # SESR's over-parameterised pair
        (mix(3, 3), conv(3, 64, SAME), (96, 96)),  # a change of colours before the first convolution
        (conv(48, 96, VALID), mix(96, 48), (32, 32)),
    ],
)
def test_merges_that_must_be_made(inner: Geometry, outer: Geometry, size: tuple[int, int]) -> None:
    assert _together(inner, outer, size) < _apart(inner, outer, size)


def _apart(inner: Geometry, outer: Geometry, size: tuple[int, int]) -> float:
    return (cheapest(inner, size)[1] + cheapest(outer, inner.out_size(size))[1]).latency


def _together(inner: Geometry, outer: Geometry, size: tuple[int, int]) -> float:
    return cheapest(join_geometry(outer, inner), size)[1].latency


def test_an_unknown_operator_goes_once_over_its_input() -> None:
    assert operator_cost("mystery", 10**6) == operator_cost("add", 10**6)
    assert operator_cost("add", 2 * 10**6).latency > operator_cost("add", 10**6).latency


def test_zero_taps_are_chosen_over_padding_only_where_they_are_cheaper() -> None:
    small = from_axes(16, 16, 1, [Axis(5, 1, 2, 1, 1, 2)] * 2)
    assert str(cheapest(small, (8, 8))[0]).startswith("Conv2d(16, 16, 6×6")
    large = from_axes(256, 256, 1, [Axis(3, 1, 2, 1, 0, 1)] * 2)
    assert str(cheapest(large, (56, 56))[0]).startswith("ZeroPad2d")


@pytest.mark.parametrize(
    ("into", "out", "kernel", "size", "kind"),
    [
        (256, 4096, 6, 6, "unfolded"),  # the heads of AlexNet, VGG and LeNet
        (512, 4096, 7, 7, "unfolded"),
        (16, 120, 5, 5, "unfolded"),
        (512, 4096, 7, 10, "unfolded"),
        (512, 512, 3, 9, "conv"),
        (256, 256, 3, 16, "conv"),
        (64, 64, 5, 60, "conv"),
        (64, 64, 11, 58, "conv"),
    ],
)
def test_large_kernels_on_small_maps_are_one_product(
    into: int, out: int, kernel: int, size: int, kind: str
) -> None:
    way, _ = cheapest(conv(into, out, Axis(kernel, 1, 1, 1, 0, 0)), (size, size))
    assert [layer.kind for layer in way.layers] == [kind]


def pool(channels: int, kernel: int, stride: int) -> Geometry:
    return from_axes(channels, channels, channels, [Axis(kernel, 1, stride, 1, 0, 0)] * 2)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 1)])
def test_a_mix_after_the_pool_is_the_same_form(kernel: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(7)
    weight, bias, x = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((5, 3, 1, 1), (5,), (2, 3, 11, 13))
    )
    taps = torch.full((5, 1, kernel, kernel), 1 / kernel**2, dtype=torch.float64)
    inner = Affine(mix(3, 5), weight, bias)
    outer = Affine(pool(5, kernel, stride), taps)
    expected = outer(inner(x))
    way = swapped(outer.geometry, inner.geometry, "avg_pool")
    layers = build(compose(outer, inner), way, torch.float64)
    assert torch.allclose(layers(x), expected, rtol=1e-13, atol=1e-13)


def test_a_buffer_that_malloc_maps_costs_its_page_faults() -> None:
    numbers = MAPPED // 4
    below, above = (operator_cost("add", n).latency for n in (numbers, numbers + 1))
    assert above - below == pytest.approx(MAPPED / FAULTS, rel=1e-3)
    views = [operator_cost("narrow", n).latency for n in (numbers, numbers + 1)]
    assert views[0] == views[1]


def test_kernels_with_maps_in_blocks_have_buffers_of_their_own() -> None:
    g = conv(16, 16)
    assert layer_load(Layer("conv", g), (724, 724)).fresh == 0
    assert layer_load(Layer("conv", g), (725, 725)).fresh == 3 * 4 * 16 * 725**2


def test_channels_that_do_not_fill_blocks_cost_more_than_a_few_more_that_do() -> None:
    for layer in (mix, depthwise):
        ragged, full = (layer_cost(Layer("conv", layer(n, n)), (28, 28)) for n in (132, 144))
        assert ragged.latency > 1.1 * full.latency
        assert ragged.macs < full.macs
