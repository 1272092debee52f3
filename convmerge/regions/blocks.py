"""Block structure: elements in a row as independent parts, each on channels of its own.

Two channels belong together if a non-zero weight leads from one to the other, anywhere between source and
target. The connected components are the finest blocks that hold for a composition, a sum or a concatenation,
whatever permutations of channels stand in between. A part is the same elements on the channels of one
component alone, and is folded as they are.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from convmerge.affine import Affine, Geometry
from convmerge.algebra.components import (
    Channels,
    components,
    diagonal_sum,
    edges_of_geometry,
    edges_of_weight,
    repeat_geometry,
    restrict,
    restrict_geometry,
)
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence
from convmerge.evidence.constants import Constants
from convmerge.recognise import BorderFill, Filter, Passage, Same
from convmerge.regions.elements import Element, Leaf, blocks, leaves
from convmerge.regions.fold import Place, after, fold_geometry, fold_numbers, geometry_of

MOST_PARTS = 512  # more are taken together, a few neighbours at a time


@dataclass(frozen=True, eq=False)
class Part:
    """Elements on some of their channels.

    Attributes:
        inputs, outputs: its channels of the source and of the target, in order.
        elements: as the whole, on the channels of this part alone.
    """

    inputs: Channels
    outputs: Channels
    elements: tuple[Element, ...]

    def place(self, whole: Place) -> Place:
        """Where its inputs are."""
        shape = list(whole.shape)
        shape[whole.axis] = len(self.inputs)
        return Place(whole.axis, tuple(shape))


@dataclass(frozen=True, eq=False)
class Group:
    """Parts of one geometry, side by side.

    Attributes:
        members: the parts, by number.
        geometry: of all of them as one grouped form.
        inputs, outputs: their channels, one part after the other.
    """

    members: tuple[int, ...]
    geometry: Geometry
    inputs: Channels
    outputs: Channels


@dataclass(frozen=True, eq=False)
class Blocks:
    """Elements as independent parts, in the order of their first inputs; together these give every output.

    Inputs that no output depends on are in no part.
    """

    place: Place
    parts: tuple[Part, ...]
    _whole: dict[Leaf, Affine] = field(default_factory=dict)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The parts, those of one geometry together. Raises Refusal where they are not one form."""
        members: dict[Geometry, list[int]] = defaultdict(list)
        geometries = [fold_geometry(part.elements, part.place(self.place)) for part in self.parts]
        bias = any(geometry.bias for geometry in geometries)
        for index, geometry in enumerate(geometries):
            members[replace(geometry, bias=bias)].append(index)
        return tuple(self._group(geometry, tuple(group)) for geometry, group in members.items())

    @property
    def words(self) -> str:
        """Number and sizes of the blocks, and whether a permutation hides them."""
        sizes = Counter(f"{len(part.inputs)}→{len(part.outputs)}" for part in self.parts)
        shown = [size if n == 1 else f"{n} of {size}" for size, n in sizes.most_common(3)]
        more = ", …" if len(sizes) > len(shown) else ""
        words = f"{len(self.parts)} blocks ({', '.join(shown)}{more})"
        if len(sizes) == 1:
            words = f"{len(self.parts)} block{'s' * (len(self.parts) > 1)} of {next(iter(sizes))}"
        hidden = any(not _is_run(c) for part in self.parts for c in (part.inputs, part.outputs))
        return f"{words}, behind a permutation" if hidden else words

    def forms(self) -> list[Affine]:
        """The form of every group in float64."""
        try:
            forms = [fold_numbers(part.elements, part.place(self.place)) for part in self.parts]
        finally:
            self._whole.clear()
        return [_side_by_side(forms, group) for group in self.groups]

    def _group(self, geometry: Geometry, members: tuple[int, ...]) -> Group:
        parts = [self.parts[member] for member in members]
        inputs = tuple(channel for part in parts for channel in part.inputs)
        outputs = tuple(channel for part in parts for channel in part.outputs)
        return Group(members, repeat_geometry(geometry, len(parts)), inputs, outputs)


def _side_by_side(forms: Sequence[Affine], group: Group) -> Affine:
    """The members of a group as one form, with the bias that its geometry says."""
    form = diagonal_sum([forms[member] for member in group.members])
    if group.geometry.bias and form.bias is None:
        return form.with_bias(form.weight.new_zeros(group.geometry.out_channels))
    return form


def _is_run(channels: Channels) -> bool:
    return channels == tuple(range(channels[0], channels[0] + len(channels)))


class Patterns:
    """Which channels a leaf connects; its weight is looked at once, and only where it holds enough zeros."""

    def __init__(self, evidence: Evidence, constants: Constants) -> None:
        self._evidence = evidence
        self._constants = constants
        self._found: dict[Leaf, Tensor | None] = {}

    def found(self, leaf: Leaf) -> bool:
        """Whether the weight has more blocks than the geometry says."""
        return self._look(leaf) is not None

    def links(self, leaf: Leaf, geometry: Geometry) -> Tensor:
        """int64, shape (2, ·): pairs of channels that belong together, outputs numbered after the inputs."""
        found = self._look(leaf)
        return _numbered(edges_of_geometry(geometry), geometry) if found is None else found

    def _look(self, leaf: Leaf) -> Tensor | None:
        if leaf not in self._found:
            self._found[leaf] = self._labels(leaf)
        return self._found[leaf]

    def _labels(self, leaf: Leaf) -> Tensor | None:
        step = leaf.step
        if not isinstance(step, Filter) or step.geometry.diagonal or not self._has_zeros(leaf, step.geometry):
            return None
        try:
            form = step.numbers()
        except Refusal:
            return None
        finally:
            self._constants.release()
        g = form.geometry
        channels = torch.arange(g.in_channels + g.out_channels)
        label = components(len(channels), _numbered(edges_of_weight(form), g))
        return torch.stack([channels, label]) if int((label == channels).sum()) > g.groups else None

    def _has_zeros(self, leaf: Leaf, g: Geometry) -> bool:
        """Whether the weight, if it is stored as it is, has the zeros that two blocks in a group take."""
        read = {n for call in leaf.calls for n in call.all_input_nodes if n in self._evidence.tensors}
        stored = [tensor for n in read if (tensor := self._evidence.tensors[n][1]).dim() > 1]
        if len(stored) != 1 or stored[0].numel() != g.out_channels * g.in_channels // g.groups * _taps(g):
            return True
        least = (g.in_channels + g.out_channels) // g.groups - 2
        return stored[0].numel() - int(stored[0].count_nonzero()) >= max(least * _taps(g), 1)


def _taps(g: Geometry) -> int:
    return math.prod(g.kernel)


def _numbered(edges: Tensor, g: Geometry) -> Tensor:
    """Edges from inputs to outputs, with the outputs numbered after the inputs."""
    return edges + torch.tensor([[0], [g.in_channels]])


def moves_channels(element: Element) -> bool:
    """Whether an operator only picks channels or puts them in another order."""
    step = element.step if isinstance(element, Leaf) else None
    return isinstance(step, Filter) and step.kind.split()[0] in ("channels", "permuted", "channel_shuffle")


def has_structure(elements: Sequence[Element], patterns: Patterns) -> bool:
    """Whether the elements may have blocks that their geometry does not show.

    That is, some weight has blocks, or slices are joined again, or channels in another order go on.
    """
    joined = any(block.joined == "cat" for block in blocks(elements))
    found = [leaf for leaf in leaves(elements) if joined or not is_slice(leaf)]
    return any(patterns.found(leaf) for leaf in found)


def is_slice(element: Element) -> bool:
    """Whether an operator picks channels in a row: a view."""
    step = element.step if isinstance(element, Leaf) else None
    return isinstance(step, Filter) and step.kind.startswith("channels ")


def blocks_of(elements: Sequence[Element], place: Place, patterns: Patterns) -> Blocks | None:
    """The elements as independent parts; None where all channels belong together, or where an element is of
    a kind that has no parts.

    Raises:
        Refusal: the elements are not one form.
    """
    if any(type(e) is not Leaf or isinstance(e.step, BorderFill | Passage) for e in leaves(elements)):
        return None
    numbering = _Numbering(patterns)
    stages, target = numbering.along(elements, place, numbering.new(place.channels))
    label = components(numbering.count, torch.cat(numbering.links, 1))
    source, outputs = label[: place.channels], label[target.first : target.first + target.count]
    reached = torch.isin(source, outputs)
    names = list(dict.fromkeys(source[reached].tolist()))
    if len(names) == 1 and bool(reached.all()):
        return None
    together = -(-len(names) // MOST_PARTS)
    part = torch.full((numbering.count,), -1, dtype=torch.int64)
    part[torch.tensor(names)] = torch.arange(len(names)) // together
    whole: dict[Leaf, Affine] = {}
    cut = _Cut(part[label], place, target, stages, whole)
    return Blocks(place, tuple(cut.part(p) for p in range(-(-len(names) // together))), whole)


@dataclass(frozen=True)
class _Row:
    """The channels of one value, numbered in a row."""

    first: int
    count: int


@dataclass(frozen=True, eq=False)
class _Stage:
    """An element with the channels of its source and of its target."""

    element: Element
    source: _Row
    target: _Row
    branches: tuple[tuple[_Stage, ...], ...] = ()


class _Numbering:
    """Numbers the channels of all values on the way, and links those that belong together."""

    def __init__(self, patterns: Patterns) -> None:
        self.patterns = patterns
        self.count = 0
        self.links: list[Tensor] = []

    def new(self, channels: int) -> _Row:
        self.count += channels
        return _Row(self.count - channels, channels)

    def along(
        self, elements: Sequence[Element], place: Place, source: _Row
    ) -> tuple[tuple[_Stage, ...], _Row]:
        """The stages of elements in a row, and the channels they end in."""
        stages = []
        for element in elements:
            if isinstance(element, Leaf) and isinstance(element.step, Same):
                continue
            stages.append(self._stage(element, place, source))
            place, source = after(place, geometry_of(element, place)), stages[-1].target
        return tuple(stages), source

    def _stage(self, element: Element, place: Place, source: _Row) -> _Stage:
        target = self.new(geometry_of(element, place).out_channels)
        if isinstance(element, Leaf):
            self._link(element, geometry_of(element, place), source, target)
            return _Stage(element, source, target)
        branches, start = [], target.first
        for branch in element.branches:
            stages, end = self.along(branch, place, source)
            branches.append(stages)
            first = torch.tensor([[end.first], [start]])
            self.links.append(torch.arange(end.count).repeat(2, 1) + first)
            start += end.count if element.joined == "cat" else 0
        return _Stage(element, source, target, tuple(branches))

    def _link(self, leaf: Leaf, g: Geometry, source: _Row, target: _Row) -> None:
        links = self.patterns.links(leaf, g)
        moved = torch.where(links < source.count, source.first, target.first - source.count)
        self.links.append(links + moved)


class _Cut:
    """Cuts stages along the parts that their channels belong to; shared by all parts."""

    def __init__(
        self,
        part: Tensor,
        place: Place,
        target: _Row,
        stages: Sequence[_Stage],
        whole: dict[Leaf, Affine],
    ) -> None:
        self._part = part.tolist()
        self._source = _Row(0, place.channels)
        self._target = target
        self._stages = stages
        self._rows: dict[_Row, dict[int, Channels]] = {}
        self._whole = whole

    def part(self, index: int) -> Part:
        inputs, outputs = self._channels(self._source, index), self._channels(self._target, index)
        return Part(inputs, outputs, self._elements(self._stages, index))

    def _channels(self, row: _Row, index: int) -> Channels:
        if row not in self._rows:
            members: dict[int, list[int]] = defaultdict(list)
            for channel in range(row.count):
                members[self._part[row.first + channel]].append(channel)
            self._rows[row] = {name: tuple(channels) for name, channels in members.items()}
        return self._rows[row].get(index, ())

    def _elements(self, stages: Sequence[_Stage], index: int) -> tuple[Element, ...]:
        return tuple(self._element(stage, index) for stage in stages)

    def _element(self, stage: _Stage, index: int) -> Element:
        element = stage.element
        if isinstance(element, Leaf):
            return self._leaf(element, stage, index)
        branches = [
            self._elements(stages, index)
            for stages in stage.branches
            if element.joined == "sum" or self._channels(stages[-1].target if stages else stage.source, index)
        ]
        return replace(element, branches=tuple(branches))

    def _leaf(self, leaf: Leaf, stage: _Stage, index: int) -> Leaf:
        step = leaf.step
        if not isinstance(step, Filter):
            return leaf
        inputs, outputs = self._channels(stage.source, index), self._channels(stage.target, index)
        geometry = restrict_geometry(step.geometry, inputs, outputs)

        def numbers() -> Affine:
            if leaf not in self._whole:
                self._whole[leaf] = step.numbers()
            return restrict(self._whole[leaf], inputs, outputs)

        return replace(leaf, step=replace(step, geometry=geometry, numbers=numbers))
