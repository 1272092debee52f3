"""The laws of the algebra, each as a function of one random draw: merge and compare exactly, or be refused.

A law returns what happened: ``exact``, ``too small`` (the original never ran), or the reason of the refusal.
With integer weights and inputs float64 is exact, so results are compared with ``torch.equal``, and a wrong
identity survives t draws with probability at most (degree / 7) ** t (Schwartz, Zippel).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from generate import Draw, run
from torch import Tensor

from convmerge.affine import Affine
from convmerge.algebra import (
    add,
    add_geometry,
    commute,
    commutes_geometry,
    compose,
    compose_geometry,
    diagonal,
    scale,
    selection,
    split,
    stack,
    stack_geometry,
    unflatten,
    with_fill,
    without_fill,
)
from convmerge.algebra.axis import POINT, Axis
from convmerge.borders.classes import bordered
from convmerge.borders.leaks import join, join_geometry, leaks
from convmerge.emit import build, emissions
from convmerge.emit.bordered import build_bordered
from convmerge.errors import Refusal

Law = Callable[[Draw], str]
TRIES = 4  # input sizes a merge is compared at
BLOCKED = 100_000  # work that takes too long to try


def check(law: Law, draws: int, spatial: int, first: int = 0) -> Counter[str]:
    """Run a law on ``draws`` draws and count what happened. A failure names the draw and its forms."""
    outcomes: Counter[str] = Counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the maps are tiny
    try:
        for seed in range(first, first + draws):
            outcomes[_reproducible(law, seed, spatial)] += 1
    finally:
        torch.set_num_threads(threads)
    return outcomes


def _reproducible(law: Law, seed: int, spatial: int) -> str:
    draw = Draw(seed, spatial)
    try:
        return law(draw)
    except Exception as error:
        forms = "\n  ".join(draw.log)
        raise AssertionError(
            f"{type(error).__name__}: {error}\nforms:\n  {forms}\n"
            f"reproduce with laws.{law.__name__}(Draw({seed}, {spatial}))"
        ) from error


class WrongResultError(AssertionError):
    """What was merged is another function than the original."""


def require_equal(found: Tensor, expected: Tensor, size: Sequence[int]) -> None:
    """Not close: equal."""
    if found.shape != expected.shape:
        raise WrongResultError(f"shape {tuple(found.shape)}, not {tuple(expected.shape)}, at {tuple(size)}")
    if not torch.equal(found, expected):
        raise WrongResultError(f"another result at {tuple(size)}")


def refusable(law: Law) -> Law:
    """A refusal is an outcome, with the numbers taken out of its reason."""

    @functools.wraps(law)
    def outcome(draw: Draw) -> str:
        try:
            return law(draw)
        except Refusal as refusal:
            return re.sub(r"\d+(×\d+)*", "#", refusal.reason).split(" (")[0]

    return outcome


def same(
    draw: Draw,
    channels: int,
    original: Callable[[Tensor], Tensor | None],
    merged: Callable[[Tensor], Tensor],
    *,
    multiple: int = 1,
) -> str:
    """Compare on a few sizes; ``too small`` if the original ran on none."""
    ran = False
    for _ in range(TRIES):
        size = [multiple * n for n in draw.size()]
        x = draw.input(channels, size)
        expected = original(x)
        if expected is not None:
            require_equal(merged(x), expected, size)
            ran = True
    return "exact" if ran else "too small"


@refusable
def composes(draw: Draw) -> str:
    """compose(outer, inner) where the outer form reads no padding."""
    a, b, c = draw.channels(), draw.channels(), draw.channels()
    inner = draw.form(a, b)
    unpadded = [axis._replace(lo=min(axis.lo, 0), hi=min(axis.hi, 0)) for axis in draw_axes(draw)]
    outer = draw.form(b, c, unpadded)
    merged = compose(outer, inner)
    planned = compose_geometry(outer.geometry, inner.geometry)
    alike = planned.phased and not merged.geometry.phased  # biases that happen to be equal in all phases
    assert replace(merged.geometry, phased=alike or merged.geometry.phased) == planned
    assert merged.geometry.groups == math.gcd(outer.geometry.groups, inner.geometry.groups)
    return same(draw, a, lambda x: run([inner, outer], x), merged)


@refusable
def folds(draw: Draw) -> str:
    """Factors before a form, and factors and shifts after it, as batch norm has them."""
    a, b = draw.channels(), draw.random.choice([4, 6])
    form = draw.form(a, b) if draw.random.random() < 0.5 else draw.form(b, b)
    into = form.geometry.in_channels
    before = diagonal(draw.integers(into), spatial=draw.spatial)
    after = diagonal(draw.integers(b), draw.integers(b), spatial=draw.spatial)
    merged = compose(after, compose(form, before))
    assert merged.geometry.groups == form.geometry.groups
    return same(draw, into, lambda x: run([before, form, after], x), merged)


@refusable
def joins(draw: Draw) -> str:
    """join folded over a chain of two or three forms, padding and all."""
    chain = draw.chain(draw.random.choice([2, 2, 3]))
    merged = chain[0]
    for form in chain[1:]:
        planned = join_geometry(form.geometry, merged.geometry)
        merged = join(form, merged)
        assert merged.geometry.kernel == planned.kernel
        assert merged.geometry.weights <= planned.weights  # a bias may turn out to be zero
    outcome = same(draw, chain[0].geometry.in_channels, lambda x: run(chain, x), merged)
    return "exact with ones" if outcome == "exact" and merged.ones is not None else outcome


@refusable
def fades(draw: Draw) -> str:
    """Chains whose biases meet padding and whose taps do not: the kernel over ones, composed on."""
    filter_axes = [
        Axis(3, 1, 1, 1, 1, 1), Axis(3, 1, 2, 1, 1, 1), Axis(5, 1, 1, 2, 4, 4), Axis(2, 1, 1, 1, 1, 0),
        Axis(4, 2, 1, 1, 2, 2), Axis(3, 2, 1, 1, 2, 3), POINT,
    ]  # fmt: skip
    before_axes = [POINT, POINT, Axis(2, 2, 1, 1, 1, 1), Axis(3, 3, 1, 1, 2, 2), Axis(1, 1, 2, 1, 0, 0)]
    chain = []
    channels = [draw.channels() for _ in range(5)]
    for index, options in enumerate((before_axes, [POINT], filter_axes, before_axes[:4])):
        slow = [axis for axis in options if axis.up == 1]  # keep the maps small in three dimensions
        dims = [draw.random.choice(slow if dim > 1 else options) for dim in range(draw.spatial)]
        form = draw.form(channels[index], channels[index + 1], dims)
        chain.append(form if form.bias is not None else form.with_bias(draw.integers(channels[index + 1])))
    merged = functools.reduce(lambda inner, outer: join(outer, inner), chain)
    outcome = same(draw, channels[0], lambda x: run(chain, x), merged)
    return "exact with ones" if outcome == "exact" and merged.ones is not None else outcome


@refusable
def fills(draw: Draw) -> str:
    """Windows side by side that fill the input, then one or two forms: no rest, so no leak behind."""
    rate, dims = draw.random.choice([2, 3]), range(draw.spatial)
    after = [
        Axis(3, 1, 1, 1, 1, 1),
        Axis(5, 1, 2, 1, 2, 2),
        Axis(2, 1, 1, 2, 1, 1),
        POINT,
        Axis(4, 1, 3, 1, 2, 1),
    ]
    choices = [[draw.random.choice(after) for _ in dims] for _ in range(3)]
    choices[0] = [Axis(rate, 1, rate, 1, 0, 0) for _ in dims]
    channels = [draw.channels() for _ in range(4)]
    ends = zip(itertools.pairwise(channels), choices, strict=True)
    chain = [draw.form(i, o, axes).with_bias(None) for (i, o), axes in ends]
    merged = chain[0].seen_as(with_fill(chain[0].geometry, rate))
    if any(leaks(chain[2].geometry, chain[1].geometry).tap):
        chain.pop()
    for form in chain[1:]:
        merged = join(form, merged)
    merged = merged.seen_as(without_fill(merged.geometry, rate))
    return same(draw, channels[0], lambda x: run(chain, x), merged, multiple=rate)


@refusable
def blocks(draw: Draw) -> str:
    """A chain in blocks, with kernels for its borders, at sizes from the smallest on."""
    chain = draw.chain(draw.random.choice([1, 2, 2, 3]))
    b = bordered(tuple(form.geometry for form in chain))
    if math.prod(b.rates) * math.prod(b.minimum) * b.low.weights > BLOCKED:
        return "too large to try"
    merged = build_bordered(b, chain, torch.float64)
    for _ in range(TRIES):
        size = [n + draw.random.randrange(6) for n in b.minimum]
        x = draw.input(chain[0].geometry.in_channels, size)
        expected = run(chain, x)
        if expected is not None:
            require_equal(merged(x), expected, size)
    return "exact in blocks" if len(b.keys) == 1 else "exact with borders"


@refusable
def leaks_matter(draw: Draw) -> str:
    """Where a leak is predicted, the composed form differs at some size, if weights cannot cancel out."""
    a, b, c = draw.channels(), draw.channels(), draw.channels()
    inner = draw.numbers(draw.geometry(a, b), zero=False)
    outer = draw.numbers(draw.geometry(b, c), zero=False)
    if not leaks(outer.geometry, inner.geometry):
        return "no leak"
    merged = compose(outer, inner)
    for length in range(1, 40):
        x = draw.integers(1, a, length, zero=False)
        expected = run([inner, outer], x)
        if expected is not None and not torch.equal(merged(x), expected):
            return "differs"
    raise AssertionError("a leak was predicted, but no size shows it")


@refusable
def associates(draw: Draw) -> str:
    """(f3 ∘ f2) ∘ f1 and f3 ∘ (f2 ∘ f1) are the same function, though the one may have more zero taps."""
    f1, f2, f3 = draw.chain(3)
    left, right = compose(compose(f3, f2), f1), compose(f3, compose(f2, f1))
    assert left.geometry.groups == right.geometry.groups
    return same(draw, f1.geometry.in_channels, lambda x: run([left], x), right)


@refusable
def adds(draw: Draw) -> str:
    """The sum of two or three branches, at every size where they can be added."""
    a, b = draw.channels(), draw.channels()
    forms = [draw.form(a, b, dims) for dims in branch_axes(draw)]
    merged = add(forms)
    assert merged.geometry == add_geometry([f.geometry for f in forms])
    return same(draw, a, lambda x: _together(forms, x, lambda parts: torch.stack(parts).sum(0)), merged)


@refusable
def stacks(draw: Draw) -> str:
    """Branches with concatenated outputs."""
    a = draw.channels()
    forms = [draw.form(a, draw.channels(), dims) for dims in branch_axes(draw)]
    merged = stack(forms)
    assert merged.geometry == stack_geometry([f.geometry for f in forms])
    return same(draw, a, lambda x: _together(forms, x, lambda parts: torch.cat(parts, 1)), merged)


def _together(forms: Sequence[Affine], x: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    """All forms on one input; None where one does not run or their output sizes differ."""
    parts = [y for y in (run([f], x) for f in forms) if y is not None]
    alike = len(parts) == len(forms) and len({y.shape[2:] for y in parts}) == 1
    return combine(parts) if alike else None


@refusable
def splits(draw: Draw) -> str:
    """A form of concatenated inputs as a sum of forms of the parts."""
    sizes = [draw.channels() for _ in range(draw.random.choice([2, 3]))]
    form = draw.form(sum(sizes), draw.channels())
    parts = split(form, sizes)
    x = draw.input(sum(sizes), draw.size())
    expected = run([form], x)
    if expected is None:
        return "too small"
    found = [part(piece) for part, piece in zip(parts, x.split(sizes, 1), strict=True)]
    require_equal(torch.stack(found).sum(0), expected, x.shape[2:])
    return "exact"


@refusable
def scales(draw: Draw) -> str:
    """Factors per channel, and channels taken in another order."""
    form = draw.form(draw.channels(), draw.channels())
    g = form.geometry
    factor = draw.integers(g.out_channels)
    order = [draw.random.randrange(g.out_channels) for _ in range(draw.channels())]
    picked = compose(selection(g.out_channels, order, draw.spatial), scale(form, factor))

    def original(x: Tensor) -> Tensor | None:
        y = run([form], x)
        return None if y is None else (y * factor.reshape(-1, *(1,) * draw.spatial))[:, order]

    return same(draw, g.in_channels, original, picked)


@refusable
def unflattens(draw: Draw) -> str:
    """flatten, then a linear layer."""
    channels, size = draw.channels(), draw.size()
    features = channels * math.prod(size)
    flat = Draw(draw.random.getrandbits(30), 0)
    linear = flat.form(features, draw.channels())
    x = draw.input(channels, size)
    found = unflatten(linear, size)(x)
    require_equal(found.flatten(1), linear(x.flatten(1)), size)
    return "exact"


@refusable
def commutes(draw: Draw) -> str:
    """A channel mix and a filter with the same taps in every channel, swapped."""
    a, b = draw.channels(), draw.channels()
    filter_first = draw.random.random() < 0.5
    channels = a if filter_first else b
    dims = [axis if axis.kernel > 1 else Axis(2, 1, 2, 1, 0, 0) for axis in draw_axes(draw)]
    g = draw.geometry(channels, channels, dims, groups=channels)
    taps = draw.integers(1, 1, *g.kernel)
    taps = taps if draw.random.random() < 0.5 else torch.ones_like(taps)
    # The bias may be divided by the sum of the taps, or of those of one phase: keep that exact.
    unit = max(abs(int(taps.sum())), 1)
    bias = draw.integers(channels) * unit if g.bias else None
    spatial_filter = Affine(g, taps.expand(channels, *taps.shape[1:]).clone(), bias)
    mix = draw.form(a, b, [POINT] * draw.spatial)
    mix = mix if mix.bias is None else mix.with_bias(mix.bias * unit)
    inner, outer = (spatial_filter, mix) if filter_first else (mix, spatial_filter)
    new_outer, new_inner = commute(outer, inner)
    assert (new_inner if filter_first else new_outer).geometry.pointwise
    for found, planned in zip(
        (new_outer, new_inner), commutes_geometry(outer.geometry, inner.geometry), strict=True
    ):
        assert (found.geometry.kernel, found.geometry.groups) == (planned.kernel, planned.groups)
    ran = False
    for _ in range(TRIES):
        x = draw.input(a, draw.size())
        expected = run([inner, outer], x)
        if expected is not None:
            require_equal(new_outer(new_inner(x)), expected, x.shape[2:])
            ran = True
    return "exact" if ran else "too small"


@refusable
def builds(draw: Draw) -> str:
    """Every emission of a form, or of two joined ones, as torch layers; returns the kind of one of them."""
    chain = draw.chain(draw.random.choice([1, 1, 2]))
    if draw.spatial == 2 and draw.random.random() < 0.4:
        chain = _upsampling_chain(draw)
    form = functools.reduce(lambda inner, outer: join(outer, inner), chain)
    ways = emissions(form.geometry)
    kinds = set()
    for emission in ways:
        layers = build(form, emission, torch.float64)
        outcome = same(draw, form.geometry.in_channels, lambda x: run([form], x), layers)
        if outcome == "exact":
            kinds.add("+".join(layer.kind for layer in emission.layers))
    return draw.random.choice(sorted(kinds)) if kinds else "too small"


def _upsampling_chain(draw: Draw) -> list[Affine]:
    """A channel mix, then one rate in both dimensions, so that phases can be shuffled."""
    rate, channels = draw.random.choice([2, 3]), draw.channels()
    dims = [axis._replace(up=rate, down=1) for axis in draw_axes(draw)]
    mix = draw.form(draw.channels(), channels, [POINT] * draw.spatial)
    return [mix, draw.form(channels, draw.channels(), dims)]


def draw_axes(draw: Draw) -> list[Axis]:
    return [draw.axis() for _ in range(draw.spatial)]


def branch_axes(draw: Draw) -> list[list[Axis]]:
    """Axes of two or three branches, most often of equal rates and output sizes."""
    first = draw_axes(draw)
    branches = [first]
    for _ in range(draw.random.choice([1, 1, 2])):
        branches.append([_beside(draw, axis) for axis in first])
    return branches


def _beside(draw: Draw, axis: Axis) -> Axis:
    """An axis that can be added to ``axis``: another kernel, with the padding that gives the same output."""
    if draw.random.random() < 0.05:
        return draw.axis()
    kernel = draw.random.choice([1, 1, 2, 3, 5])
    dilation = draw.random.choice([1, 1, 2, 3]) if kernel > 1 else 1
    lo = draw.random.randint(0, 3)
    extra = draw.random.choice([0, 0, 0, 1]) if axis.down > 1 else 0
    return Axis(kernel, axis.up, axis.down, dilation, lo, axis.slack + extra - lo + dilation * (kernel - 1))
