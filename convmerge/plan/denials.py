"""Why neighbouring parts of a chain stay apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from convmerge.borderplan import border_words
from convmerge.errors import Refusal
from convmerge.fold import Place, place_of
from convmerge.plan.site import Denial, Part, ends_of, is_filler
from convmerge.regions import Block, Chain

if TYPE_CHECKING:
    from convmerge.plan.planner import Planner


def denials(planner: Planner, chain: Chain, parts: Sequence[Part]) -> list[Denial]:
    """Why neighbouring parts, and the branches of blocks that stay, are not one operator."""
    found: list[Denial] = []
    for part in parts:
        element = chain[part.first]
        if part.site is None and isinstance(element, Block):
            found.append(denial(planner, (element,)))
            for branch in element.branches:
                found.extend(planner.plan(branch).denials)
    solid = [p for p in parts if not is_filler(chain[p.first]) or p.site is not None]
    for left, right in itertools.pairwise(solid):
        found.append(denial(planner, chain[left.first : right.last + 1]))
    return found


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
        return Denial(elements, place, "left out by --only or --skip")
    if planner.pays(site):
        return Denial(elements, place, "another grouping is cheaper", before, site.after)
    return Denial(elements, place, "costs more as one operator", before, site.after)
