"""Zero padding between two forms: refused or exact at every size, and refused only where it is wrong."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import laws
import pytest
import torch
from generate import Draw, run

from convmerge.affine import Affine, Geometry
from convmerge.algebra import diagonal
from convmerge.algebra.axis import POINT, Axis, from_axes
from convmerge.algebra.edges import axis_edges, inside_taps
from convmerge.borders.leaks import fade_bias, join, join_geometry, leaks
from convmerge.errors import Refusal

NEAREST = Axis(2, 2, 1, 1, 1, 1)


def same_padding(kernel: int, down: int = 1, dilation: int = 1) -> Axis:
    reach = dilation * (kernel - 1) // 2
    return Axis(kernel, 1, down, dilation, reach, reach)


def valid(kernel: int, down: int = 1) -> Axis:
    return Axis(kernel, 1, down, 1, 0, 0)


def pair(
    draw: Draw, inner: list[Axis], outer: list[Axis], *, bias: bool, groups: int = 1
) -> tuple[Affine, Affine]:
    """outer and inner forms of 4 → 6 → 2 channels."""
    return (
        draw.numbers(from_axes(6, 2, 1, outer, bias=True), zero=False),
        draw.numbers(from_axes(4, 6, groups, inner, bias=bias), zero=False),
    )


def refused_or_exact(draws: int, spatial: int, first: int = 0) -> Counter[str]:
    outcomes = laws.check(laws.joins, draws, spatial, first)
    assert outcomes["exact"] >= 0.15 * draws, outcomes
    assert outcomes["exact with ones"] >= 0.02 * draws, outcomes
    refused = {reason: n for reason, n in outcomes.items() if "pads its input" in reason}
    assert sum(refused.values()) >= 0.05 * draws, outcomes
    assert outcomes["upsampling by # after a stride of # is not one filter"] > 0, outcomes
    return outcomes


@pytest.mark.parametrize(("spatial", "draws"), [(1, 300), (2, 200), (3, 100)])
def test_chains_are_refused_or_exact(spatial: int, draws: int) -> None:
    refused_or_exact(draws, spatial)


@pytest.mark.long
@pytest.mark.parametrize(("spatial", "draws"), [(1, 4000), (2, 3000), (3, 2000)])
def test_chains_are_refused_or_exact_at_length(spatial: int, draws: int) -> None:
    outcomes = refused_or_exact(draws, spatial, first=10_000)
    print(spatial, dict(outcomes.most_common()))


@pytest.mark.parametrize(("spatial", "draws"), [(1, 100), (2, 60), (3, 30)])
def test_the_kernel_over_ones_composes_on(spatial: int, draws: int) -> None:
    outcomes = laws.check(laws.fades, draws, spatial)
    assert outcomes["exact with ones"] >= 0.4 * draws, outcomes


def brute_force(outer: Axis, inner: Axis, longest: int) -> tuple[bool, bool]:
    """Reads and touches by the definition, at every input length up to ``longest``."""
    reads = touches = False
    for length in range(1, longest):
        middle = inner.out_size(length)
        count = outer.out_size(middle)
        if middle < 1:
            continue
        for n in range(count):
            for t in range(outer.kernel):
                m, odd = divmod(outer.down * n + outer.dilation * t - outer.lo, outer.up)
                if odd or 0 <= m < middle:
                    continue
                reads = True
                for s in range(inner.kernel):
                    j, odd = divmod(inner.down * m + inner.dilation * s - inner.lo, inner.up)
                    touches |= not odd and 0 <= j < length
    return reads, touches


def test_edges_of_every_size_are_those_found_by_brute_force() -> None:
    outcomes: Counter[tuple[bool, bool]] = Counter()
    for seed in range(600):
        draw = Draw(seed, 1)
        outer, inner = draw.axis(), draw.axis()
        expected = brute_force(outer, inner, longest=45)
        assert axis_edges(outer, inner)[:2] == expected, (seed, outer, inner)
        outcomes[expected] += 1
    assert all(outcomes[case] >= 50 for case in [(False, False), (True, False), (True, True)]), outcomes


def test_what_is_refused_would_have_been_wrong() -> None:
    outcomes = laws.check(laws.leaks_matter, 400, 1)
    assert outcomes["differs"] >= 50, outcomes


def test_tap_leak_names_the_dimensions() -> None:
    draw = Draw(1, 2)
    outer, inner = pair(draw, [same_padding(3), same_padding(3)], [same_padding(3), valid(3)], bias=False)
    assert leaks(outer.geometry, inner.geometry).tap == (True, False)
    with pytest.raises(Refusal) as refusal:
        join(outer, inner)
    assert refusal.value.reason == (
        "the 3×3 conv pads its input with zeros where the output of the 3×3 conv before it "
        "would not be zero (height)"
    )


def test_tap_leak_at_odd_sizes_alone_says_so() -> None:
    """2×2 patches leave the last row of an odd map unread, and padding after them would see it."""
    patches, padded = valid(2, down=2), same_padding(3)
    assert axis_edges(padded, patches).ragged
    assert not axis_edges(padded, same_padding(3)).ragged
    outer, inner = from_axes(3, 3, 1, [padded] * 2), from_axes(3, 3, 1, [patches] * 2)
    with pytest.raises(Refusal, match=r"height, width; where the stride leaves a rest unread"):
        join_geometry(outer, inner)


def test_separable_depthwise_pair_without_bias_has_no_leak() -> None:
    draw = Draw(2, 2)
    rows = draw.numbers(from_axes(5, 5, 5, [POINT, same_padding(5)]))
    columns = draw.numbers(from_axes(5, 5, 5, [same_padding(5), POINT], bias=True))
    merged = join(columns, rows)
    assert (merged.geometry.kernel, merged.geometry.groups, merged.ones) == ((5, 5), 5, None)
    x = draw.input(5, (7, 6))
    assert torch.equal(merged(x), run([rows, columns], x))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ([POINT, POINT], [same_padding(3), same_padding(5)]),
        ([POINT, NEAREST], [same_padding(3), same_padding(3)]),
        ([valid(1, down=2), POINT], [same_padding(3), same_padding(3, dilation=2)]),
        ([POINT, same_padding(3)], [same_padding(3), valid(1)]),
        ([POINT, POINT], [Axis(4, 2, 1, 1, 2, 2), Axis(3, 2, 1, 1, 2, 3)]),
    ],
    ids=["1×1 then 3×5", "nearest then 3×3", "strided 1×1 then 3×3", "1×3 then 3×1", "1×1 then transposed"],
)
def test_bias_leak_moves_onto_ones(inner: list[Axis], outer: list[Axis], groups: int) -> None:
    draw = Draw(3, 2)
    second, first = pair(draw, inner, outer, bias=True, groups=groups)
    found = leaks(second.geometry, first.geometry)
    assert not any(found.tap) and any(found.bias)
    merged = join(second, first)
    planned = join_geometry(second.geometry, first.geometry)
    assert merged.geometry == replace(planned, phased=merged.geometry.phased)
    assert merged.ones is not None
    for size in ((5, 4), (6, 7), (3, 3), (1, 2)):
        x = draw.input(4, size)
        assert torch.equal(merged(x), run([first, second], x))


def test_what_comes_after_ones_composes_and_is_checked_again() -> None:
    """1×1 with bias, padded 3×3, batch norm: one form. Then a padded 3×3: its taps leak."""
    draw = Draw(4, 2)
    padded = [same_padding(3), same_padding(3)]
    chain = [
        draw.numbers(from_axes(3, 5, 1, [POINT, POINT], bias=True)),
        draw.numbers(from_axes(5, 4, 1, padded, bias=True)),
        diagonal(draw.integers(4), draw.integers(4), spatial=2),
    ]
    merged = functools.reduce(lambda inner, outer: join(outer, inner), chain)
    x = draw.input(3, (5, 4))
    assert torch.equal(merged(x), run(chain, x))
    with pytest.raises(Refusal, match=r"height, width"):
        join(draw.numbers(from_axes(4, 2, 1, padded)), merged)


def test_a_form_with_ones_after_another_form() -> None:
    draw = Draw(5, 1)
    first = draw.numbers(from_axes(3, 4, 1, [NEAREST], bias=True))
    middle = draw.numbers(from_axes(4, 5, 1, [POINT], bias=True))
    last = draw.numbers(from_axes(5, 2, 1, [same_padding(3)], bias=True))
    outer = join(last, middle)
    assert outer.ones is not None
    merged = join(outer, first)
    for length in range(1, 8):
        x = draw.input(3, (length,))
        assert torch.equal(merged(x), run([first, middle, last], x))


@pytest.mark.parametrize(
    ("axis", "taps"),
    [
        (POINT, (0,)),
        (same_padding(5), (2,)),
        (valid(3), (0,)),
        (NEAREST, (1, 0)),
        (Axis(4, 2, 1, 1, 2, 2), (2, 1)),
        (Axis(1, 1, 1, 1, 1, 1), None),
        (Axis(3, 1, 1, 1, 2, 2), None),
    ],
)
def test_taps_that_are_always_inside(axis: Axis, taps: tuple[int, ...] | None) -> None:
    assert inside_taps(axis) == taps


def test_a_bias_without_a_tap_to_mark_its_end_is_refused() -> None:
    draw = Draw(6, 1)
    outer, inner = pair(draw, [Axis(1, 1, 1, 1, 1, 1)], [same_padding(3)], bias=True)
    assert leaks(outer.geometry, inner.geometry).tap == (False,)
    for joining in (lambda: join(outer, inner), lambda: join_geometry(outer.geometry, inner.geometry)):
        with pytest.raises(Refusal, match="no tap marks where"):
            joining()
    with pytest.raises(Refusal, match="no tap marks where"):
        fade_bias(inner)


def test_a_bias_of_zero_is_no_bias() -> None:
    draw = Draw(7, 1)
    outer, inner = pair(draw, [POINT], [same_padding(3)], bias=True)
    merged = join(outer, inner.with_bias(torch.zeros(6, dtype=torch.float64)))
    assert merged.ones is None


def test_a_bias_of_rounding_size_is_no_bias_where_its_magnitude_is_known() -> None:
    draw = Draw(8, 1)
    outer, inner = pair(draw, [POINT], [same_padding(3)], bias=True)
    noise = inner.with_bias(torch.full((6,), 3 * 2.0**-53, dtype=torch.float64))
    assert join(outer, noise).ones is not None
    assert join(outer, noise, bias_magnitude=torch.ones(6, dtype=torch.float64)).ones is None
    # One channel of a real bias keeps the ones; the others are zero on them.
    mixed = noise.with_bias(torch.cat([torch.ones(1), torch.full((5,), 2.0**-52)]).double())
    merged = join(outer, mixed, bias_magnitude=torch.ones(6, dtype=torch.float64))
    assert merged.ones is not None and torch.equal(merged.ones, outer.weight[:, 0])


def test_a_bias_that_every_tap_annihilates_is_no_bias() -> None:
    draw = Draw(9, 1)
    outer, inner = pair(draw, [POINT], [same_padding(3)], bias=True)
    difference = Affine(
        outer.geometry,
        outer.weight[:, :1] * torch.tensor([1, -1, 0, 0, 2, -2.0]).reshape(1, 6, 1),
        outer.bias,
    )
    flat = inner.with_bias(torch.tensor([3, 3, 5, 7, 2, 2], dtype=torch.float64))
    merged = join(difference, flat)
    assert merged.ones is None
    x = draw.input(4, (5,))
    assert torch.equal(merged(x), run([flat, difference], x))


def test_linear_layers_have_no_borders() -> None:
    g = Geometry.channelwise(3, 3, 1, 0, bias=True)
    assert not leaks(g, g)
    assert join_geometry(g, g) == g


@pytest.mark.parametrize(("spatial", "draws"), [(1, 100), (2, 60)])
def test_windows_side_by_side_leave_no_rest(spatial: int, draws: int) -> None:
    outcomes = laws.check(laws.fills, draws, spatial)
    assert outcomes["exact"] > 0.8 * draws, outcomes
