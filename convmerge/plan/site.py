"""A site: elements that become one operator, where each part of it stands, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx.node import Node

from convmerge.affine import Affine, Geometry
from convmerge.algebra import lift
from convmerge.borders.classes import Bordered
from convmerge.borders.leaks import join
from convmerge.cost.model import Cost
from convmerge.edit.edits import Run
from convmerge.emit import Emission
from convmerge.emit.parallel import Parallel
from convmerge.emit.sized import Sized
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence
from convmerge.recognise import Passage, Same
from convmerge.regions.blocks import Blocks
from convmerge.regions.elements import Chain, Element, Fork, Gap, Join, Leaf, Share, Via
from convmerge.regions.fold import (
    Place,
    axes_along,
    cover,
    covers_map,
    fold_geometry,
    fold_numbers,
)


@dataclass(frozen=True, eq=False)
class Site:
    """Elements that become one operator.

    Attributes:
        elements: in execution order; with ``place`` at their source.
        home: the part that the new layer replaces; ``emptied``: the parts that vanish into it.
        geometry: the merged form at home; ``emission``: what it is built as.
        before, after: predicted cost of the elements as they are, and of the new layer.
        joint: the join of which this is a term, where an operator after it moved into all of its terms: a
            site of one of them is made if the sites of all are.
        blocks: the independent parts that the emission is built of; None where it is one form.
        spare: how many MACs it may add where it is predicted to be faster.
    """

    elements: tuple[Element, ...]
    place: Place
    home: Run
    emptied: tuple[Run, ...]
    home_place: Place
    geometry: Geometry
    emission: Emission | Bordered | Parallel | Sized
    before: Cost
    after: Cost
    joint: Join | None = None
    blocks: Blocks | None = None
    spare: int = 0

    @property
    def opens(self) -> Join | None:
        """The concatenation that becomes a sum, at the one of its terms that takes over the operators."""
        taken = any(isinstance(e, Share) and e.constant for e in self.elements)
        return self.joint if taken and self.joint is not None and self.joint.joined == "cat" else None

    @property
    def ends(self) -> tuple[Node, Node]:
        """Source and target: what names the site."""
        return ends_of(self.elements)


@dataclass(frozen=True, eq=False)
class Denial:
    """Two neighbouring parts that stay apart: not exact (``cost`` is None), or exact but dearer."""

    elements: tuple[Element, ...]
    place: Place
    reason: str
    before: Cost | None = None
    after: Cost | None = None


@dataclass(frozen=True)
class ChainPlan:
    """What becomes of one chain."""

    sites: tuple[Site, ...] = ()
    denials: tuple[Denial, ...] = ()


@dataclass(frozen=True, eq=False)
class Part:
    """A segment of the best plan: elements first..last, merged if ``site`` is given."""

    first: int
    last: int
    cost: Cost
    site: Site | None


def run_geometries(evidence: Evidence, elements: Chain, runs: Sequence[Run]) -> list[tuple[Place, Geometry]]:
    """Where each run stands, and its geometry there. Raises Refusal."""
    axes = dict(zip(map(id, elements), axes_along(elements), strict=True))
    found = []
    for run in runs:
        axis = axes[id(run.elements[0])]
        if axis is None:
            raise Refusal("the channels are split or joined in between")
        place = Place(axis, evidence.size(run.source))
        found.append((place, fold_geometry(run.elements, place)))
    return found


def ends_of(elements: Sequence[Element]) -> tuple[Node, Node]:
    """Source and target of elements, identities at either end not counted; of siblings the last and first."""
    if elements and isinstance(fork := elements[0], Fork):
        return fork.branches[-1][-1].target, fork.target
    if elements and isinstance(elements[0], Via):
        return elements[0].source, elements[-1].target
    solid = [e for e in elements if not is_same(e)] or list(elements)
    return solid[0].source, solid[-1].target


def site_numbers(site: Site, evidence: Evidence) -> Affine:
    """The merged form of a site in float64."""
    if site.blocks is not None:
        return site.blocks.forms()[0]
    runs = runs_of(site.elements)
    folded: Affine | None = None
    for run, (place, _) in zip(runs, run_geometries(evidence, site.elements, runs), strict=True):
        form = fold_numbers(run.elements, place)
        if not covers_map(site.elements) and form.geometry.spatial != site.geometry.spatial:
            form = lift(form, site.geometry.spatial)
        folded = form if folded is None else join(form, folded)
    assert folded is not None
    return cover(folded, site.home_place.size) if covers_map(site.elements) else folded


def runs_of(elements: Chain) -> list[Run]:
    """The stretches between passages that have something besides identities."""
    runs: list[Run] = []
    current: list[Element] = []
    for element in (*elements, None):
        if element is None or is_passage(element):
            if not all(is_same(e) for e in current):
                runs.append(Run(tuple(current)))
            current = []
        else:
            current.append(element)
    return runs


def before_join(run: Run) -> Run | None:
    """The part of a run that a new layer can replace: what stands before its value joins others."""
    end = next((i for i, e in enumerate(run.elements) if isinstance(e, Via)), len(run.elements))
    elements = run.elements[:end]
    if not all(is_same(e) for e in elements):
        return Run(elements)
    via = run.elements[end] if end < len(run.elements) else None
    return Run((via,)) if isinstance(via, Via) and via.edge is not None else None


def check_place(geometry: Geometry, place: Place) -> None:
    """The layers of torch.nn take channels on axis 1 (0 without a batch), or on the last axis."""
    rank = len(place.shape)
    if geometry.spatial and (
        place.axis > 1 or geometry.spatial > 3 or rank - place.axis - 1 != geometry.spatial
    ):
        raise Refusal("no layer of torch.nn takes channels on this axis")
    if geometry.spatial == 0 and place.axis != rank - 1:
        raise Refusal("no layer of torch.nn takes channels on this axis")


def is_filler(element: Element) -> bool:
    return isinstance(element, Leaf) and isinstance(element.step, Same | Passage)


def is_same(element: Element) -> bool:
    """Whether an element hands its value on, and no layer can stand there."""
    return isinstance(element, Leaf) and isinstance(element.step, Same) and not isinstance(element, Gap)


def is_passage(element: Element) -> bool:
    return isinstance(element, Leaf) and isinstance(element.step, Passage)
