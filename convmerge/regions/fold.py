"""From elements in a row to one form: first its geometry, for planning, then its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convmerge.affine import Affine, Geometry
from convmerge.algebra import (
    add,
    add_geometry,
    lift,
    lift_geometry,
    stack,
    stack_geometry,
    with_fill,
    without_fill,
)
from convmerge.borders.leaks import join, join_geometry
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence
from convmerge.recognise import BorderFill, Filter, Passage, Same, Scalar
from convmerge.regions.elements import Block, Element, Leaf, leaves


@dataclass(frozen=True)
class Place:
    """Where channels and space are in a tensor: the channel axis, and the sizes of all axes."""

    axis: int
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[self.axis]

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial size: the axes after the channels'."""
        return self.shape[self.axis + 1 :]

    @property
    def batch(self) -> int:
        """Number of independent positions before the channels' axis."""
        return math.prod(self.shape[: self.axis])


def axis_of(elements: Sequence[Element]) -> int | None:
    """The channel axis that the first filter among the elements works on, at the elements' source."""
    back: dict[int, int] | None = None  # axis after the passages so far → axis at the source
    for element in elements:
        for leaf in leaves([element]):
            step = leaf.step
            if isinstance(step, Filter):
                return step.axis if back is None else back.get(step.axis)
            if isinstance(step, Passage):
                forward = step.axis_map
                back = {
                    forward[a]: (a if back is None else back[a]) for a in forward if back is None or a in back
                }
    return None


def axes_along(elements: Sequence[Element]) -> list[int | None]:
    """The channel axis at the source of every element, followed through passages; None where it is lost."""
    axis = axis_of(elements)
    found: list[int | None] = []
    for element in elements:
        found.append(axis)
        if axis is not None and isinstance(element, Leaf) and isinstance(element.step, Passage):
            axis = element.step.axis_map.get(axis)
    return found


def geometry_of(element: Element, place: Place) -> Geometry:
    """The geometry of one element whose source has its channels at ``place``.

    Raises Refusal where the element works on another axis, or is a sum that is not one form.
    """
    if isinstance(element, Block):
        branches = [fold_geometry(branch, place) for branch in element.branches]
        if element.joined == "sum":
            return add_geometry(branches)
        if element.axis != place.axis:
            raise Refusal(f"concatenates along axis {element.axis}, the channels are on axis {place.axis}")
        return stack_geometry(branches)
    step = element.step
    if isinstance(step, Filter):
        if step.axis != place.axis:
            raise Refusal(f"{step.kind} works on axis {step.axis}, what comes before it on axis {place.axis}")
        return _seen_at(step.geometry, place)
    channels = place.channels
    if isinstance(step, Passage):
        raise Refusal(f"a branch goes through {step.kind}")
    bias = isinstance(step, Scalar) and step.offset != 0
    return Geometry.channelwise(channels, channels, channels, len(place.size), bias=bias)


def _seen_at(geometry: Geometry, place: Place) -> Geometry:
    """What works on channels alone, after a linear layer on a flattened map, sees a map of one position."""
    if geometry.spatial == len(place.size):
        return geometry
    if not geometry.pointwise or any(n != 1 for n in place.size):
        raise Refusal("the map is laid out anew in between")
    return lift_geometry(geometry, len(place.size))


def covers_map(elements: Sequence[Element]) -> bool:
    """Whether the elements hold at the example's input size only, where they end in one position."""
    steps = [leaf.step for leaf in leaves(elements)]
    return any(isinstance(s, Filter) and s.through and not s.geometry.pointwise for s in steps)


def cover_geometry(geometry: Geometry, size: Sequence[int]) -> Geometry:
    """A filter with one output position on a map of ``size``, as a kernel of just that size."""
    if any(n != 1 for n in geometry.out_size(size)) or math.prod(geometry.up) != 1:
        raise Refusal("the linear layer does not cover the map")
    one, zero = (1,) * len(size), (0,) * len(size)
    bias = geometry.bias or geometry.ones
    return Geometry(
        geometry.in_channels,
        geometry.out_channels,
        geometry.groups,
        tuple(size),
        one,
        one,
        one,
        zero,
        zero,
        bias,
    )


def cover(form: Affine, size: Sequence[int]) -> Affine:
    """The numbers of :func:`cover_geometry`: taps over padding are dropped, those over ones join the bias."""
    weight = _inside(form.weight, form.geometry, size)
    bias = form.bias
    if form.ones is not None:
        ones = _inside(form.ones.unsqueeze(1), form.geometry, size).flatten(1).sum(1)
        bias = ones if bias is None else bias + ones
    geometry = cover_geometry(form.geometry, size)
    return Affine(replace(geometry, bias=bias is not None), weight, bias)


def _inside(weight: Tensor, g: Geometry, size: Sequence[int]) -> Tensor:
    for dim, (n, kernel, dilation, lo) in enumerate(
        zip(size, g.kernel, g.dilation, g.lo, strict=True), start=2
    ):
        position = torch.arange(kernel) * dilation - lo
        kept = (position >= 0) & (position < n)
        taps = weight.index_select(dim, kept.nonzero().flatten())
        shape = (*weight.shape[:dim], n, *weight.shape[dim + 1 :])
        weight = weight.new_zeros(shape).index_copy(dim, position[kept], taps)
    return weight


def fold_geometry(elements: Sequence[Element], place: Place) -> Geometry:
    """The geometry of elements in a row, without passages. Raises Refusal."""
    folded: Geometry | None = None
    for element in elements:
        if _is_same(element):
            continue
        step = geometry_of(element, place)
        if folded is not None and _continues_border(element, elements):
            bare = join_geometry(replace(step, bias=False, ones=False), replace(folded, bias=False))
            folded = replace(bare, bias=folded.bias)
        elif folded is None:
            folded = with_fill(step, size_multiple(elements))
        else:
            folded = join_geometry(step, folded)
        place = after(place, step)
    if folded is not None:
        return without_fill(folded, size_multiple(elements))
    return Geometry.channelwise(place.channels, place.channels, place.channels, len(place.size))


def _continues_border(element: Element, elements: Sequence[Element]) -> bool:
    """Whether an element pads with just what the elements before it make of zeros: no border then."""
    fill = element.step if isinstance(element, Leaf) else None
    first = next(e for e in elements if not _is_same(e))
    return isinstance(fill, BorderFill) and first.source in fill.beginnings


def after(place: Place, geometry: Geometry) -> Place:
    """Where channels and space are in a form's output."""
    shape = (*place.shape[: place.axis], geometry.out_channels, *geometry.out_size(place.size))
    return Place(place.axis, shape)


def numbers_of(element: Element, place: Place) -> Affine:
    """The form of one element, in float64."""
    if isinstance(element, Block):
        law = add if element.joined == "sum" else stack
        return law([fold_numbers(branch, place) for branch in element.branches])
    step = element.step
    if isinstance(step, Filter):
        form = step.numbers()
        return form if form.geometry.spatial == len(place.size) else lift(form, len(place.size))
    geometry = geometry_of(element, place)
    factor, offset = (step.factor, step.offset) if isinstance(step, Scalar) else (1.0, 0.0)
    shape = (geometry.out_channels, 1, *geometry.kernel)
    bias = torch.full((geometry.out_channels,), offset, dtype=torch.float64) if geometry.bias else None
    return Affine(geometry, torch.full(shape, factor, dtype=torch.float64), bias)


def fold_numbers(elements: Sequence[Element], place: Place) -> Affine:
    """The form of elements in a row, in float64. Raises Refusal as :func:`fold_geometry`."""
    folded: Affine | None = None
    for element in elements:
        if _is_same(element):
            continue
        step = numbers_of(element, place)
        if folded is not None and _continues_border(element, elements):
            bare = Affine(replace(step.geometry, bias=False, ones=False), step.weight)
            folded = join(bare, folded.with_bias(None)).with_bias(folded.bias)
        elif folded is None:
            folded = step.seen_as(with_fill(step.geometry, size_multiple(elements)))
        else:
            folded = join(step, folded)
        place = after(place, step.geometry)
    if folded is not None:
        return folded.seen_as(without_fill(folded.geometry, size_multiple(elements)))
    geometry = fold_geometry(elements, place)
    return Affine(geometry, torch.ones(geometry.out_channels, 1, *geometry.kernel, dtype=torch.float64))


def size_multiple(elements: Sequence[Element]) -> int:
    """What the spatial sizes of the elements' source are multiples of."""
    first = next((e for e in elements if not _is_same(e)), None)
    return first.step.multiple if isinstance(first, Leaf) and isinstance(first.step, Filter) else 1


def place_of(evidence: Evidence, elements: Sequence[Element]) -> Place | None:
    """Where the channels are at the source of the elements; None if no filter among them says."""
    axis = axis_of(elements)
    return None if axis is None else Place(axis, evidence.size(elements[0].source))


def _is_same(element: Element) -> bool:
    return isinstance(element, Leaf) and isinstance(element.step, Same)
