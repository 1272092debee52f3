"""Where the layer that elements merge into can stand: in place of some of them, or in a gap beside what all
pointwise forms move past.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from convmerge.affine import Geometry
from convmerge.algebra import lift_geometry
from convmerge.borders.leaks import join_geometry
from convmerge.cost.model import ZERO, Cost, CostModel
from convmerge.edit.edits import Run
from convmerge.edit.lower import gap_of
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence
from convmerge.plan.costs import passage_cost
from convmerge.plan.site import is_passage, is_same
from convmerge.recognise import Passage, Same
from convmerge.regions.elements import Chain, Element, Gap, Leaf
from convmerge.regions.fold import Place, axes_along

Geometries = Sequence[tuple[Place, Geometry]]


def with_gaps(elements: Chain) -> Chain:
    """The elements with gaps beside their passages wherever no other element stands there.

    Raises Refusal where they begin with a pool that enlarges the example's map, and will not larger ones.
    """
    found: list[Element] = []
    solid = False  # whether an operator stands between here and the passage before
    last: Leaf | None = None
    for element in elements:
        if is_passage(element):
            assert isinstance(element, Leaf)
            adaptive = element.step.kind == "adaptive_avg_pool"  # type: ignore[union-attr]
            if adaptive and last is None and not solid:
                raise Refusal("the pool in front gives the same size for larger maps too")
            if not solid and not adaptive:
                found.append(_gap(element, behind=False))
            last, solid = element, False
        elif not is_same(element):
            solid = True
        found.append(element)
    if last is not None and not solid:
        found.insert(found.index(last) + 1, _gap(last, behind=True))
    return tuple(found)


def _gap(passage: Leaf, *, behind: bool) -> Gap:
    value = passage.node if behind else passage.source
    return Gap(value, value, Same(value), True, beside=passage, behind=behind)


def as_filter(element: Element) -> Leaf | None:
    """An upsampling to a given size as a filter; None for any other element."""
    if not isinstance(element, Leaf) or not isinstance(element.step, Passage) or element.step.filter is None:
        return None
    return Leaf(element.source, element.node, element.step.filter)


def not_filter(element: Element) -> str | None:
    """Why a resampling is no filter that could merge with the one behind it, where there is a reason."""
    return element.step.refusal if isinstance(element, Leaf) and isinstance(element.step, Passage) else None


def homes(geometries: Geometries, runs: Sequence[Run], possible: Sequence[bool]) -> list[int]:
    """Which runs can keep the merged operator, among those where that is ``possible``, the best guess first.

    Everything pointwise can move past a passage; what is not pointwise stays where it is. A gap is for fewer
    positions only, and gaps at the ends are the only homes of elements that end in passages. Raises Refusal.
    """
    fixed = [index for index, (_, geometry) in enumerate(geometries) if not geometry.pointwise]
    if len(fixed) > 1:
        raise Refusal("a relayout or a resampling stands between two filters with spatial extent")
    gaps = [index for index, run in enumerate(runs) if gap_of(run) is not None]
    ends = [index for index in (0, len(runs) - 1) if index in gaps]
    positions = [place.batch * math.prod(place.size) for place, _ in geometries]
    solid = [index for index in range(len(runs)) if possible[index] and index not in gaps]
    least = min((positions[index] for index in range(len(runs)) if index not in gaps), default=math.inf)
    if not fixed:
        # The fewest positions; of equals the last, so that nothing large is computed early. Views must meet
        # as many channels as before where they can: code may have read that number off the map before them.
        wanted = [i for i in ends or gaps if positions[i] < least] + ([] if ends else solid)
        changed = {index: _changed(geometries, index) for index in wanted}
        if _relaid(geometries):
            wanted = [index for index in wanted if changed[index] == min(changed.values())]
        found = sorted(wanted, key=lambda index: (positions[index], changed[index], -index))
    else:
        found = [] if ends else [index for index in fixed if possible[index]]
    if not found and ends:
        raise Refusal("nothing on the other side of the resampling would be less work")
    if not found:
        raise Refusal("a term of the sum ends in no filter that it could merge with")
    return found


def _relaid(geometries: Geometries) -> bool:
    """Whether views stand between the runs, which change the axes of the map."""
    places = [place for place, _ in geometries]
    return any((a.axis, len(a.shape)) != (b.axis, len(b.shape)) for a, b in itertools.pairwise(places))


def _changed(geometries: Geometries, home: int) -> int:
    """Between how many runs the number of channels changes when all but ``home`` vanish."""
    first, last = geometries[0][1].in_channels, geometries[-1][1].out_channels
    between = enumerate(g.out_channels for _, g in geometries[:-1])
    return sum(channels != (first if index < home else last) for index, channels in between)


def at_home(geometries: Geometries, home: int) -> Geometry:
    """The geometry of everything at the run ``home``. Raises Refusal."""
    spatial = geometries[home][1].spatial
    folded: Geometry | None = None
    for index, (_, geometry) in enumerate(geometries):
        moved = geometry if index == home else lift_geometry(geometry, spatial)
        folded = moved if folded is None else join_geometry(moved, folded)
    assert folded is not None
    return folded


def passages_cost(
    model: CostModel, evidence: Evidence, elements: Chain, home: Run, geometry: Geometry
) -> Cost:
    """What the passages among the elements cost with as many channels as they have then."""
    total, behind = ZERO, False
    for element, axis in zip(elements, axes_along(elements), strict=True):
        behind = behind or any(element is e for e in home.elements)
        if is_passage(element):
            assert isinstance(element, Leaf)
            channels = geometry.out_channels if behind else geometry.in_channels
            total = total + passage_cost(model, evidence, element, axis, channels)
    return total
