"""The laws of the algebra on random forms, and the cases with a name."""

from __future__ import annotations

import laws
import pytest
import torch
from generate import Draw, run

from convmerge.affine import Affine, Geometry
from convmerge.algebra import (
    add,
    add_geometry,
    commute,
    compose,
    compose_geometry,
    diagonal,
    identity,
    lift,
    selection,
    split,
    stack,
    unflatten,
)
from convmerge.algebra.axis import POINT, Axis, from_axes
from convmerge.errors import Refusal

DRAWS = {0: 60, 1: 200, 2: 150, 3: 60}
# law → smallest share of draws that must come out exact, in 0, 1, 2 and 3 dimensions
EXACT = {
    laws.composes: (1.0, 0.8, 0.6, 0.3),
    laws.folds: (1.0, 0.9, 0.8, 0.6),
    laws.associates: (1.0, 0.6, 0.4, None),
    laws.adds: (1.0, 0.8, 0.7, 0.5),
    laws.stacks: (1.0, 0.8, 0.7, 0.5),
    laws.splits: (1.0, 0.8, 0.7, 0.5),
    laws.scales: (1.0, 0.9, 0.9, 0.7),
    laws.unflattens: (1.0, 0.7, 0.7, 0.5),
    laws.commutes: (None, 0.8, 0.7, 0.5),
}
CASES = [
    (law, n, share) for law, shares in EXACT.items() for n, share in enumerate(shares) if share is not None
]


@pytest.mark.parametrize(("law", "spatial", "share"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_law(law: laws.Law, spatial: int, share: float) -> None:
    outcomes = laws.check(law, DRAWS[spatial], spatial)
    assert outcomes["exact"] >= share * DRAWS[spatial], outcomes


@pytest.mark.long
@pytest.mark.parametrize(("law", "spatial", "share"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_law_at_length(law: laws.Law, spatial: int, share: float) -> None:
    draws = 2000 if spatial < 3 else 500
    outcomes = laws.check(law, draws, spatial, first=10_000)
    print(law.__name__, spatial, dict(outcomes.most_common()))
    assert outcomes["exact"] >= 0.9 * share * draws, outcomes


def form(draw: Draw, into: int, out: int, *dims: Axis, groups: int = 1, bias: bool = False) -> Affine:
    return draw.numbers(from_axes(into, out, groups, dims, bias=bias))


def same_padding(kernel: int, down: int = 1) -> Axis:
    return Axis(kernel, 1, down, 1, kernel // 2, kernel // 2)


def valid(kernel: int, down: int = 1, dilation: int = 1) -> Axis:
    return Axis(kernel, 1, down, dilation, 0, 0)


NEAREST = Axis(2, 2, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("outer", "inner", "kernel", "dilation"),
    [
        (valid(5), valid(3), 7, 1),
        (valid(1), valid(3, dilation=2), 3, 2),
        (valid(3, dilation=2), valid(2, dilation=4), 5, 2),  # taps at even places alone: no zero-stuffing
        (valid(3), valid(2, down=2), 6, 1),
        (valid(2), valid(1, down=2), 2, 2),
        (valid(3), NEAREST, 4, 1),
        (valid(2, down=2), NEAREST, 1, 1),  # a pool undoes the upsampling
        (valid(4, down=2), NEAREST, 2, 1),
    ],
)
def test_kernel_of_a_composition(outer: Axis, inner: Axis, kernel: int, dilation: int) -> None:
    draw = Draw(1, 1)
    merged = compose(form(draw, 3, 2, outer), form(draw, 5, 3, inner))
    assert (merged.geometry.kernel, merged.geometry.dilation) == ((kernel,), (dilation,))


def test_up_and_down_by_the_same_factor_is_a_plain_filter() -> None:
    g = compose_geometry(from_axes(3, 3, 3, [valid(2, down=2)] * 2), from_axes(3, 3, 3, [NEAREST] * 2))
    assert (g.up, g.down) == ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("outer", "inner", "result"),
    [(4, 2, 2), (2, 4, 2), (6, 4, 2), (3, 4, 1), (12, 1, 1), (1, 12, 1), (12, 12, 12)],
)
def test_groups_of_a_composition(outer: int, inner: int, result: int) -> None:
    draw = Draw(2, 1)
    chain = [form(draw, 24, 12, valid(2), groups=inner), form(draw, 12, 36, valid(3), groups=outer)]
    merged = compose(chain[1], chain[0])
    assert merged.geometry.groups == result
    x = draw.input(24, (9,))
    assert torch.equal(merged(x), run(chain, x))


@pytest.mark.parametrize("rate", [2, 3])
def test_a_stride_then_an_upsampling_is_refused(rate: int) -> None:
    """Also at coprime rates, where the two commute: the original ends earlier at some sizes."""
    spread = Axis(rate, rate, 1, 1, rate - 1, rate - 1)
    with pytest.raises(Refusal, match=f"upsampling by {rate} after a stride of 2"):
        compose_geometry(from_axes(3, 3, 1, [spread]), from_axes(3, 3, 1, [valid(2, down=2)]))


def test_forms_that_do_not_fit_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="does not take"):
        compose_geometry(from_axes(3, 3, 1, [POINT]), from_axes(3, 4, 1, [POINT]))
    with pytest.raises(ValueError, match="does not take"):
        compose_geometry(from_axes(3, 3, 1, [POINT]), from_axes(3, 3, 1, []))


def test_inner_bias_after_upsampling_depends_on_the_phase() -> None:
    draw = Draw(4, 1)
    mix = form(draw, 2, 3, POINT, bias=True)
    spread = form(draw, 3, 2, Axis(2, 2, 1, 1, 1, 1), bias=True)
    merged = compose(spread, mix)
    assert merged.bias is not None and merged.bias.shape == (2, 2)
    x = draw.input(2, (5,))
    assert torch.equal(merged(x), run([mix, spread], x))


def test_inner_bias_is_one_number_per_channel_where_all_phases_agree() -> None:
    draw = Draw(5, 2)
    mix = form(draw, 2, 3, POINT, POINT, bias=True)
    nearest = Affine(from_axes(3, 3, 3, [NEAREST, NEAREST]), torch.ones(3, 1, 2, 2, dtype=torch.float64))
    merged = compose(nearest, mix)
    assert merged.bias is not None and torch.equal(merged.bias, mix.bias)


def test_folding_into_many_channels_keeps_the_groups() -> None:
    draw = Draw(6, 2)
    depthwise = form(draw, 12, 12, valid(3), valid(2), groups=12)
    scale = diagonal(draw.integers(12), draw.integers(12), spatial=2)
    assert compose(scale, depthwise).geometry.groups == 12
    assert compose(depthwise, scale).geometry.groups == 12


def test_block_of_three_branches() -> None:
    """3×3, 1×1 and identity with strides, as in RepVGG."""
    draw = Draw(7, 2)
    branches = [
        form(draw, 4, 4, same_padding(3), same_padding(3), groups=2, bias=True),
        form(draw, 4, 4, POINT, POINT, bias=True),
        identity(4, 2),
    ]
    merged = add(branches)
    g = merged.geometry
    assert (g.kernel, g.lo, g.hi, g.groups) == ((3, 3), (1, 1), (1, 1), 1)
    x = draw.input(4, (5, 7))
    assert torch.equal(merged(x), torch.stack([b(x) for b in branches]).sum(0))


def test_branches_that_agree_at_even_sizes_only() -> None:
    """A 3×3 convolution beside a 2×2 pool, both at stride 2: the original runs at even sizes alone."""
    draw = Draw(8, 1)
    conv, pool = form(draw, 2, 2, same_padding(3, down=2)), form(draw, 2, 2, valid(2, down=2), groups=2)
    merged = add([conv, pool])
    assert (merged.geometry.kernel, merged.geometry.lo, merged.geometry.hi) == ((3,), (1,), (1,))
    for length in (2, 4, 6, 8):
        x = draw.input(2, (length,))
        assert torch.equal(merged(x), conv(x) + pool(x))


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ((3, 3, [valid(1)]), (3, 3, [valid(1, down=2)]), "differ in stride: 1, 2"),
        ((3, 3, [POINT]), (3, 3, [NEAREST]), "differ in upsampling: 1, 2"),
        ((3, 3, [valid(3)]), (3, 3, [valid(5)]), "differ in output size"),
        ((3, 3, [POINT]), (3, 4, [POINT]), "differ in channels"),
        ((3, 3, [POINT]), (3, 3, [POINT, POINT]), "number of dimensions"),
    ],
)
def test_refused_sums(a: tuple[int, int, list[Axis]], b: tuple[int, int, list[Axis]], reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        add_geometry([from_axes(i, o, 1, dims) for i, o, dims in (a, b)])


def test_stack_then_split_by_selection() -> None:
    """Q, K and V as one layer, and each of them back."""
    draw = Draw(9, 0)
    parts = [form(draw, 5, out, bias=bias) for out, bias in ((2, True), (3, False), (4, True))]
    merged = stack(parts)
    assert merged.geometry.out_channels == 9
    back = compose(selection(9, range(2, 5), 0), merged)
    assert torch.equal(back.weight, parts[1].weight)
    assert back.bias is not None and not back.bias.any()


def test_split_of_a_grouped_form() -> None:
    draw = Draw(10, 1)
    whole = form(draw, 12, 6, same_padding(3), groups=3, bias=True)
    x = draw.input(12, (5,))
    parts = split(whole, [5, 7])
    assert torch.equal(parts[0](x[:, :5]) + parts[1](x[:, 5:]), whole(x))
    assert parts[1].bias is None
    with pytest.raises(ValueError, match="do not add up"):
        split(whole, [5, 6])


def test_lift_and_unflatten_a_linear_layer() -> None:
    draw = Draw(11, 0)
    linear = form(draw, 30, 4, bias=True)
    x = draw.input(30, ())
    assert torch.equal(lift(linear, 2)(x[..., None, None]).flatten(1), linear(x))
    assert torch.equal(unflatten(linear, (2, 3))(x.reshape(2, 5, 2, 3)).flatten(1), linear(x))
    with pytest.raises(ValueError, match="flattened map"):
        unflatten(linear, (4, 3))
    with pytest.raises(ValueError, match="not pointwise"):
        lift(form(draw, 3, 3, valid(2)), 2)


def average(channels: int, kernel: int) -> Affine:
    pool = from_axes(channels, channels, channels, [valid(kernel, down=kernel)])
    return Affine(pool, torch.full((channels, 1, kernel), 1 / kernel, dtype=torch.float64))


def test_a_channel_mix_moves_to_the_lower_resolution() -> None:
    draw = Draw(12, 1)
    mix = form(draw, 6, 4, POINT, bias=True)
    outer, inner = commute(average(4, 2), mix)
    assert outer.geometry == mix.geometry and torch.equal(outer.bias, mix.bias)
    assert inner.geometry == average(6, 2).geometry
    nearest = Affine(from_axes(6, 6, 6, [NEAREST]), torch.ones(6, 1, 2, dtype=torch.float64))
    outer, inner = commute(mix, nearest)
    assert inner.geometry == mix.geometry and torch.equal(inner.bias, mix.bias)
    assert outer.geometry.in_channels == 4 and outer.bias is None


@pytest.mark.parametrize("which", ["padding", "weights", "neither"])
def test_refused_swaps(which: str) -> None:
    draw = Draw(13, 1)
    mix = form(draw, 3, 3, POINT, bias=True)
    padded = Affine(from_axes(3, 3, 3, [same_padding(3)]), torch.ones(3, 1, 3, dtype=torch.float64))
    different = Affine(from_axes(3, 3, 3, [valid(2)]), draw.integers(3, 1, 2))
    other = {"padding": padded, "weights": different, "neither": form(draw, 3, 3, valid(2))}[which]
    reason = {"padding": "pads with zeros", "weights": "weights differ", "neither": "only a channel mix"}[
        which
    ]
    with pytest.raises(Refusal, match=reason):
        commute(other, mix)


def test_geometry_of_a_linear_layer_has_no_dimensions() -> None:
    g = from_axes(3, 4, 1, [], bias=True)
    assert g == Geometry.channelwise(3, 4, 1, 0, bias=True)
