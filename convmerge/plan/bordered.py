"""Border classes in planning: which stretches of a chain they could pay for, and the numbers of one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from convmerge.affine import Affine, Geometry
from convmerge.algebra.axis import words
from convmerge.borders.classes import Bordered, blocked_geometry, bordered
from convmerge.cost.model import Cost, CostModel
from convmerge.errors import Refusal
from convmerge.recognise import Same
from convmerge.regions.elements import Element, Leaf
from convmerge.regions.fold import Place, after, geometry_of, numbers_of

MARGIN = 1.25  # predicted time as it is over that of border classes, whose many small calls vary more
ROOM = 2  # the example must have this many times the smallest size, so that somewhat smaller ones run too
HOPELESS = 16  # a composition with this many times the MACs does not come back by what follows
LARGEST = 4_000_000  # weights in all: more take too long to compute, and are too much to store for speed


def border_stages(elements: Sequence[Element], place: Place) -> tuple[Geometry, ...]:
    """The geometry of every element. Raises Refusal."""
    stages = []
    for element in elements:
        if not (isinstance(element, Leaf) and isinstance(element.step, Same)):
            stages.append(geometry_of(element, place))
            place = after(place, stages[-1])
    return tuple(stages)


def border_numbers(elements: Sequence[Element], place: Place) -> list[Affine]:
    """The forms of :func:`border_stages` in float64."""
    forms = []
    for element in elements:
        if not (isinstance(element, Leaf) and isinstance(element.step, Same)):
            forms.append(numbers_of(element, place))
            place = after(place, forms[-1].geometry)
    return forms


def border_option(
    elements: Sequence[Element], place: Place, before: Cost, dtype: torch.dtype, model: CostModel
) -> tuple[Bordered, Cost] | None:
    """Border classes for elements in a row, and their cost; None where more MACs rule them out.

    dtype: of the maps.

    Raises:
        Refusal: they are not exact, not for maps as small as these, or hopeless for what follows too.
    """
    stages = border_stages(elements, place)
    macs = place.batch * blocked_geometry(stages).macs(place.size)
    if macs > HOPELESS * max(before.macs, 1):
        raise Refusal(f"{macs / max(before.macs, 1):.0f}× the MACs as one operator")
    if macs > before.macs or place.axis > 1:
        return None
    b = bordered(stages)
    if any(n < ROOM * least for n, least in zip(place.size, b.minimum, strict=True)):
        raise Refusal(f"a map of {words(place.size)} is mostly borders")
    if b.weights > LARGEST:
        raise Refusal(f"the kernels of the borders would have {b.weights / 1e6:.1f} M weights")
    return b, model.bordered(b, place.size, batch=place.batch, dtype=dtype, before=before)


def border_pays(before: Cost, after: Cost) -> bool:
    """Whether border classes are clearly faster, with no more MACs."""
    return after.macs <= before.macs and MARGIN * after.latency <= before.latency


def border_words(
    elements: Sequence[Element], place: Place, before: Cost, dtype: torch.dtype, model: CostModel
) -> str:
    """What to add to the reason why elements are not one operator, where blocks or borders would do."""
    try:
        option = border_option(elements, place, before, dtype, model)
        borders = len(bordered(border_stages(elements, place)).keys) > 1
    except Refusal:
        return ""
    if option is not None and border_pays(before, option[1]):
        return ""  # it is part of a larger merge, or was ruled out for another reason
    what = (
        "kernels of their own for the borders" if borders else "one convolution for all phases of the output"
    )
    return f"; {what} would cost more"


def border_canvases(b: Bordered, multiple: int = 1) -> list[tuple[int, ...]]:
    """Input sizes to check border classes at: the smallest, the next seven, and all pairs of residues.

    multiple: the original takes multiples of this only.
    """
    residues, period = (
        max(sizes) for sizes in zip(*((s.ends.residues, s.period) for s in b.sides), strict=True)
    )
    span = residues * -(-max(8, period) // residues)
    strides = [n for n in range(1, 3 * span) if math.gcd(n, span) == 1]
    least = [-(-n // multiple) for n in b.minimum]
    sizes = [
        tuple(multiple * (n + (strides[dim] * i + dim * k) % span) for dim, n in enumerate(least))
        for k in range(residues)
        for i in range(span)
    ]
    return list(dict.fromkeys(sizes))
