"""Why neighbouring parts of a chain stay apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from convmerge.affine import Geometry
from convmerge.edit.lower import gap_of
from convmerge.emit import Emission, emissions
from convmerge.errors import Refusal
from convmerge.plan.bordered import border_words
from convmerge.plan.homes import not_filter
from convmerge.plan.site import Denial, Part, ends_of, is_filler, is_passage
from convmerge.regions.blocks import is_slice
from convmerge.regions.elements import Block, Chain, Element, Leaf
from convmerge.regions.fold import Place, place_of

if TYPE_CHECKING:
    from convmerge.plan.planner import Planner

NO_AXIS = "no operator says which axis the channels are on"


def denials(planner: Planner, chain: Chain, parts: Sequence[Part]) -> list[Denial]:
    """Why neighbouring parts, and the branches of blocks that stay, are not one operator."""
    found: list[Denial] = []
    for part in parts:
        element = chain[part.first]
        if part.site is None and isinstance(element, Block):
            found.append(denial(planner, (element,)))
            for branch in planner.inside(element).apart:
                found.extend(planner.plan(branch).denials)
        elif part.site is None and (kept := _in_blocks(planner, element)) is not None:
            found.append(kept)
    found += _beside_passages(planner, chain, parts)
    solid = [p for p in parts if not is_filler(chain[p.first]) or p.site is not None]
    for left, right in itertools.pairwise(solid):
        if left.site is None and is_slice(chain[left.first]):
            continue  # a view, which costs nothing where it is
        found.append(denial(planner, chain[left.first : right.last + 1]))
    return found


def _beside_passages(planner: Planner, chain: Chain, parts: Sequence[Part]) -> list[Denial]:
    """Why what acts on channels alone does not run on the smaller side of a resampling next to it."""
    found: list[Denial] = []
    for left, right in itertools.pairwise(parts):
        elements = chain[left.first : right.last + 1]
        ends = chain[left.first], chain[right.first]
        if left.site is None and (reason := not_filter(ends[0])) is not None and not is_filler(ends[1]):
            place = place_of(planner.evidence, elements) or Place(0, (1,))
            found.append(Denial(elements, place, reason))
        elif left.site is right.site is None and sum(map(is_passage, ends)) == 1:
            kept = denial(planner, elements)
            works = kept.before is not None and kept.before.macs > 0
            if works or ends_of(elements) in planner.forbidden:
                found.append(kept)
    return found


def _in_blocks(planner: Planner, element: Element) -> Denial | None:
    """Why an operator whose weight falls apart into blocks stays as it is; None for any other."""
    if not isinstance(element, Leaf) or not planner.maker.alone(element):
        return None
    place, before = place_of(planner.evidence, (element,)), planner.cost_as_is((element,))
    try:
        site = planner.site((element,), before)
        blocks = site and planner.maker.in_blocks(site, _smallest)
    except Refusal:
        return None
    if place is None or blocks is None or blocks.blocks is None:
        return None
    reason = f"{blocks.blocks.words} in its weight, which cost more by themselves"
    return Denial((element,), place, reason, before, blocks.after)


def _smallest(g: Geometry) -> tuple[Emission, ...]:
    """The way to build a block with the fewest weights."""
    return emissions(g)[:1] if g.spatial else emissions(g)[-1:]


def denial(planner: Planner, elements: Chain) -> Denial:
    """Why these elements are not one operator."""
    evidence = planner.evidence
    place = place_of(evidence, elements) or Place(0, (1,))
    ends = ends_of(elements)
    before = planner.cost_as_is(elements)
    if ends in planner.forbidden:
        return Denial(elements, place, planner.forbidden[ends])
    try:
        site = planner.site(elements, before)
    except Refusal as refusal:
        dtype = evidence.dtype(elements[0].source)
        words = border_words(elements, place, before, dtype, planner.cost_model)
        return Denial(elements, place, refusal.reason + words)
    if site is None:
        left_out = not planner.allowed(elements)
        return Denial(elements, place, "left out by --only or --skip" if left_out else NO_AXIS)
    if planner.pays(site):
        return Denial(elements, place, "another grouping is cheaper", before, site.after)
    if site.blocks is not None and site.after.latency >= before.latency:
        return Denial(elements, place, f"costs no less as {site.blocks.words}", before, site.after)
    where = "as one operator"
    if (gap := gap_of(site.home)) is not None:
        where = f"on the other side of the {gap.kind}"
    return Denial(elements, place, f"costs more {where}", before, site.after)
