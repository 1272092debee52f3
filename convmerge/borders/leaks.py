"""Zero padding between two forms: where composing them would not be exact, and what makes it exact.

The outer form's padding is zero where the composed form sees the inner form's *extension*: its taps over
input that is still there (a tap leak), and its bias (a bias leak). Remedies, cheapest first:

1. no leak: :func:`convmerge.algebra.compose` is exact as it is;
2. a bias leak alone: the bias moves onto a kernel over a channel of ones, which fades at the borders as the
   input does, and composes from there on like any other channel;
3. a tap leak: refused as one form; :mod:`convmerge.borders.classes` has kernels of their own for the borders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from convmerge.affine import Affine, Geometry
from convmerge.algebra import compose, compose_geometry
from convmerge.algebra.axis import axes, from_axes, words
from convmerge.algebra.bias import repeat_phases
from convmerge.algebra.edges import axis_edges, inside_taps
from convmerge.errors import Refusal

AXIS_NAMES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@dataclass(frozen=True)
class Leaks:
    """Per spatial dimension, whether composing loses exactness there at any valid input size.

    tap: the outer form pads where the inner one's taps would still see input.
    bias: the outer form pads where the inner one's bias would stand.
    """

    tap: tuple[bool, ...]
    bias: tuple[bool, ...]

    def __bool__(self) -> bool:
        return any(self.tap) or any(self.bias)


@lru_cache(maxsize=65536)
def leaks(outer: Geometry, inner: Geometry) -> Leaks:
    """The leaks of outer ∘ inner, decided for every input size (see :mod:`convmerge.algebra.edges`)."""
    edges = [axis_edges(o, i) for o, i in zip(axes(outer), axes(inner), strict=True)]
    return Leaks(tuple(e.touches for e in edges), tuple(e.reads and inner.bias for e in edges))


@lru_cache(maxsize=65536)
def join_geometry(outer: Geometry, inner: Geometry) -> Geometry:
    """The geometry of :func:`join` if no bias turns out to be zero.

    Raises:
        Refusal: as :func:`join`.
        ValueError: the two do not fit together.
    """
    faded = replace(outer, ones=False)
    both = compose_geometry(faded, inner)
    found = leaks(outer, inner)
    if any(found.tap):
        raise Refusal(_tap_leak(outer, inner))
    if not any(found.bias) and not outer.ones:
        return both
    _inside_taps(inner)  # or a refusal
    return replace(both, bias=outer.bias or (inner.bias and not any(found.bias)), ones=True)


def join(outer: Affine, inner: Affine, *, bias_magnitude: Tensor | None = None) -> Affine:
    """outer ∘ inner, exact at every input size, zero padding included.

    Args:
        bias_magnitude: for each entry of ``inner.bias`` the sum of the magnitudes it was computed from. An
            entry within 8 * 2**-53 of that is rounding, and taken to be zero.

    Raises:
        Refusal: the rates do not compose; a tap leak; or a bias leak without a tap that is always inside.
        ValueError: the two do not fit together.
    """
    inner = _without_zero_bias(inner, bias_magnitude)
    found = leaks(outer.geometry, inner.geometry)
    if inner.bias is not None and any(found.bias) and _annihilates(outer, inner.bias):
        inner, found = inner.with_bias(None), replace(found, bias=(False,) * len(found.bias))
    geometry = join_geometry(outer.geometry, inner.geometry)
    if any(found.bias):
        inner = fade_bias(inner)
    if outer.ones is None:
        return compose(outer, inner)
    plain = Affine(replace(outer.geometry, ones=False), outer.weight, outer.bias)
    both = compose(plain, inner)
    over_ones = Affine(from_axes(1, geometry.out_channels, 1, axes(outer.geometry)), outer.ones.unsqueeze(1))
    ones = compose(over_ones, _indicator(inner)).weight.squeeze(1)
    ones = ones if both.ones is None else ones + both.ones
    return Affine(replace(both.geometry, ones=True), both.weight, both.bias, ones)


def fade_bias(form: Affine) -> Affine:
    """The same form with its bias on the kernel over ones.

    Equal at all of its output positions, and zero instead of the bias beyond them where no tap touches input.

    Raises:
        Refusal: no tap is inside the input at every output position; or the bias has an unusual period.
    """
    assert form.bias is not None
    period = [len(taps) for taps in _inside_taps(form.geometry)]
    if form.bias.dim() > 1 and any(p % q for p, q in zip(period, form.bias.shape[1:], strict=True)):
        raise Refusal("the bias has another period than the upsampling")
    ones = form.weight.new_zeros(form.geometry.out_channels, *form.geometry.kernel)
    ones[_mesh(form.geometry)] = repeat_phases(form.bias, period)
    ones = ones if form.ones is None else ones + form.ones
    return Affine(replace(form.geometry, bias=False, ones=True), form.weight, None, ones)


def _indicator(form: Affine) -> Affine:
    """A one-channel form on the grid of ``form``: from ones inside its input to ones inside its output."""
    g = form.geometry
    weight = form.weight.new_zeros(1, 1, *g.kernel)
    weight[(slice(None), *_mesh(g))] = 1
    return Affine(from_axes(1, 1, 1, axes(g)), weight)


def _mesh(g: Geometry) -> tuple[slice | Tensor, ...]:
    """Index into (channels, *kernel) of the always-inside tap of every phase: (channels, *period)."""
    index: list[slice | Tensor] = [slice(None)]
    for dim, taps in enumerate(_inside_taps(g)):
        index.append(torch.tensor(taps).reshape([-1 if d == dim else 1 for d in range(g.spatial)]))
    return tuple(index)


def _inside_taps(g: Geometry) -> list[tuple[int, ...]]:
    """Per dimension a tap for every phase that is always inside the input."""
    found = [taps for axis in axes(g) if (taps := inside_taps(axis)) is not None]
    if len(found) < g.spatial:
        raise Refusal(f"the bias of the {_noun(g)} ends at the padding after it, and no tap marks where")
    return found


def _without_zero_bias(form: Affine, magnitude: Tensor | None) -> Affine:
    """Entries of pure rounding size set to zero, and the bias dropped where nothing of it is left."""
    if form.bias is None:
        return form
    bias = form.bias
    if magnitude is not None:
        bias = bias.where(bias.abs() > 8 * 2.0**-53 * magnitude, 0.0)
    return form.with_bias(bias if bias.any() else None)


def _annihilates(outer: Affine, bias: Tensor) -> bool:
    """Whether every single tap of ``outer`` makes exactly zero of the bias."""
    g = outer.geometry
    taps = outer.weight.reshape(g.groups, g.out_channels // g.groups, g.in_channels // g.groups, -1)
    phases = bias.reshape(g.groups, g.in_channels // g.groups, -1)
    return not torch.einsum("goct,gcp->gotp", taps, phases).any()


def _tap_leak(outer: Geometry, inner: Geometry) -> str:
    names = AXIS_NAMES[outer.spatial]
    edges = [axis_edges(o, i) for o, i in zip(axes(outer), axes(inner), strict=True)]
    where = ", ".join(name for name, e in zip(names, edges, strict=True) if e.touches)
    when = "" if any(e.touches and not e.ragged for e in edges) else "; where the stride leaves a rest unread"
    return (
        f"the {_noun(outer)} pads its input with zeros where the output of the {_noun(inner)} before it "
        f"would not be zero ({where}{when})"
    )


def _noun(g: Geometry) -> str:
    """A geometry as a noun: ``3×3 conv``."""
    kind = "transposed conv" if any(u > 1 for u in g.up) else "conv"
    return f"{words(g.kernel)} {kind}"
