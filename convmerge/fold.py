"""From elements in a row to one form: first its geometry, for planning, then its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from convmerge.affine import Affine, Geometry
from convmerge.algebra import add, add_geometry
from convmerge.borders import join, join_geometry
from convmerge.capture import Evidence
from convmerge.errors import Refusal
from convmerge.recognise import Filter, Passage, Same, Scalar
from convmerge.regions import Block, Element, Leaf, leaves


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
        product = 1
        for n in self.shape[: self.axis]:
            product *= n
        return product


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
        return add_geometry([fold_geometry(branch, place) for branch in element.branches])
    step = element.step
    if isinstance(step, Filter):
        if step.axis != place.axis:
            raise Refusal(f"{step.kind} works on axis {step.axis}, what comes before it on axis {place.axis}")
        return step.geometry
    channels = place.channels
    if isinstance(step, Passage):
        raise Refusal(f"a branch goes through {step.kind}")
    bias = isinstance(step, Scalar) and step.offset != 0
    return Geometry.channelwise(channels, channels, channels, len(place.size), bias=bias)


def fold_geometry(elements: Sequence[Element], place: Place) -> Geometry:
    """The geometry of elements in a row, without passages. Raises Refusal."""
    folded: Geometry | None = None
    for element in elements:
        if _is_same(element):
            continue
        step = geometry_of(element, place)
        folded = step if folded is None else join_geometry(step, folded)
        place = after(place, step)
    if folded is not None:
        return folded
    return Geometry.channelwise(place.channels, place.channels, place.channels, len(place.size))


def after(place: Place, geometry: Geometry) -> Place:
    """Where channels and space are in a form's output."""
    shape = (*place.shape[: place.axis], geometry.out_channels, *geometry.out_size(place.size))
    return Place(place.axis, shape)


def numbers_of(element: Element, place: Place) -> Affine:
    """The form of one element, in float64."""
    if isinstance(element, Block):
        return add([fold_numbers(branch, place) for branch in element.branches])
    step = element.step
    if isinstance(step, Filter):
        return step.numbers()
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
        folded = step if folded is None else join(step, folded)
        place = after(place, step.geometry)
    if folded is not None:
        return folded
    geometry = fold_geometry(elements, place)
    return Affine(geometry, torch.ones(geometry.out_channels, 1, *geometry.kernel, dtype=torch.float64))


def place_of(evidence: Evidence, elements: Sequence[Element]) -> Place | None:
    """Where the channels are at the source of the elements; None if no filter among them says."""
    axis = axis_of(elements)
    return None if axis is None else Place(axis, evidence.size(elements[0].source))


def _is_same(element: Element) -> bool:
    return isinstance(element, Leaf) and isinstance(element.step, Same)
