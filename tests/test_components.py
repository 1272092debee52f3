"""Block structure as integers: found whatever hides it, and exact as independent parts side by side.

With integer weights and inputs float64 is exact, so results are compared with ``torch.equal``.
"""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from convmerge.affine import Affine, Geometry
from convmerge.algebra import compose, selection
from convmerge.algebra.components import (
    components,
    diagonal_sum,
    edges_of_geometry,
    edges_of_weight,
    restrict,
)
from convmerge.emit import emissions
from convmerge.emit.parallel import Branch, Parallel, build_parallel
from convmerge.recognise import Filter, Scalar
from convmerge.regions.blocks import Blocks, Patterns, blocks_of
from convmerge.regions.elements import Block, Element, Leaf
from convmerge.regions.fold import Place, after, fold_geometry, fold_numbers

NODES = fx.Graph()


def integers(generator: torch.Generator, *shape: int) -> Tensor:
    """From -3 to 3 without 0."""
    values = torch.randint(1, 4, shape, generator=generator).double()
    return values * (2 * torch.randint(0, 2, shape, generator=generator) - 1)


def dense(weight: Tensor, bias: Tensor | None = None) -> Affine:
    """A form without padding from its weight (out, in, *kernel)."""
    one, zero = (1,) * (weight.dim() - 2), (0,) * (weight.dim() - 2)
    kernel = tuple(weight.shape[2:])
    out, into = weight.shape[:2]
    geometry = Geometry(into, out, 1, kernel, one, one, one, zero, zero, bias is not None)
    return Affine(geometry, weight, bias)


@pytest.mark.parametrize("seed", range(60))
def test_components_are_those_of_a_search(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 40)
    edges = [(draw.randrange(count), draw.randrange(count)) for _ in range(draw.randint(0, 45))]
    expected = list(range(count))
    for _ in range(count):
        for a, b in edges:
            expected[a] = expected[b] = min(expected[a], expected[b])
    found = components(count, torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).t())
    assert found.tolist() == expected, (count, edges)


def test_a_long_path_is_one_component() -> None:
    order = torch.randperm(10_007, generator=torch.Generator().manual_seed(1))
    assert not components(len(order), torch.stack([order[:-1], order[1:]])).any()


def labels(form: Affine) -> list[int]:
    edges = edges_of_weight(form) + torch.tensor([[0], [form.geometry.in_channels]])
    g = form.geometry
    return components(g.in_channels + g.out_channels, edges).tolist()


def test_blocks_behind_permutations_are_found_in_every_tap() -> None:
    weight = torch.zeros(7, 5, 3)
    weight[[0, 2, 5], 1, 0] = 1.0
    weight[[1, 3], :, 2] = torch.tensor([1.0, 0, 1, 0, 0])
    weight[[4, 6], 3, 1] = 1.0
    weight[6, 4, 2] = 1.0
    found = labels(dense(weight.double()))
    assert found == [0, 1, 0, 3, 3, 1, 0, 1, 0, 3, 1, 3]


def test_zero_rows_and_columns_go_with_their_neighbours() -> None:
    weight = torch.block_diag(torch.ones(3, 2), torch.ones(2, 3)).double()
    weight[1], weight[:, 4] = 0, 0
    assert labels(dense(weight)) == [0, 0, 2, 2, 2, 0, 0, 0, 2, 2]
    weight[0] = 0  # none before it: the first one after
    assert labels(dense(weight)) == [0, 0, 2, 2, 2, 0, 0, 0, 2, 2]


def test_what_a_slice_leaves_out_is_of_no_block() -> None:
    assert labels(selection(5, [3, 1], 0)) == [0, 1, 2, 3, 4, 3, 1]


def test_a_weight_of_zeros_is_one_block() -> None:
    assert set(labels(dense(torch.zeros(3, 2).double()))) == {0}


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_geometry_alone_connects_every_group(groups: int) -> None:
    g = Geometry.channelwise(6, 12, groups, 0)
    edges = edges_of_geometry(g) + torch.tensor([[0], [6]])
    found = components(18, edges)
    assert found.tolist() == [
        *(i // (6 // groups) * (6 // groups) for i in range(6)),
        *(i // (12 // groups) * (6 // groups) for i in range(12)),
    ]


def test_unequal_forms_are_no_grouped_one() -> None:
    with pytest.raises(ValueError, match="one geometry"):
        diagonal_sum([dense(torch.ones(2, 3).double()), dense(torch.ones(3, 2).double())])


def test_restricting_a_grouped_form_keeps_its_numbers() -> None:
    generator = torch.Generator().manual_seed(2)
    g = Geometry.channelwise(6, 9, 3, 1, bias=True)
    form = Affine(g, integers(generator, 9, 2, 1), integers(generator, 9))
    x = integers(generator, 2, 6, 5)
    part = restrict(form, [5, 4, 0, 1], [8, 1, 7])
    assert torch.equal(part(x[:, [5, 4, 0, 1]]), form(x)[:, [8, 1, 7]])


class Region:
    """Random elements in a row that are block-diagonal, each with permutations of its own."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.spatial = self.random.choice([0, 0, 1, 2])
        self.blocks = self.random.choice([1, 2, 3, 4])
        self.equal = self.random.random() < 0.5
        self.holes = self.random.random() < 0.3
        self.x = NODES.placeholder(f"x{seed}")
        channels = self.sizes()
        self.channels, self.elements = sum(channels), []
        owner = self.owners(channels)
        for _ in range(self.random.randint(1, 3)):
            element, owner = self.element(owner)
            self.elements.append(element)

    def sizes(self) -> list[int]:
        size = self.random.randint(1, 4)
        return [size if self.equal else self.random.randint(1, 5) for _ in range(self.blocks)]

    def owners(self, sizes: list[int]) -> list[int]:
        """The block of every channel, shuffled as often as not."""
        owner = [block for block, size in enumerate(sizes) for _ in range(size)]
        if self.random.random() < 0.5:
            self.random.shuffle(owner)
        return owner

    def leaf(self, form: Affine, kind: str = "linear") -> Leaf:
        step = Filter(self.x, 1, form.geometry, lambda: form, kind)
        return Leaf(self.x, NODES.call_function(torch.relu, (self.x,)), step)

    def element(self, owner: list[int]) -> tuple[Element, list[int]]:
        kind = self.random.choice(["filter", "filter", "filter", "scale", "scalar", "shuffle", "sum", "cat"])
        if kind == "scale":
            factors = integers(self.generator, len(owner), 1, *(1,) * self.spatial)
            g = Geometry.channelwise(len(owner), len(owner), len(owner), self.spatial, bias=True)
            return self.leaf(Affine(g, factors, integers(self.generator, len(owner)))), owner
        if kind == "scalar":
            return Leaf(self.x, self.x, Scalar(self.x, 3.0, -2.0, "mul")), owner
        if kind == "shuffle":
            order = self.random.sample(range(len(owner)), len(owner))
            return self.leaf(selection(len(owner), order, self.spatial), "shuffle"), [owner[i] for i in order]
        new = self.owners(self.sizes())
        if kind == "sum":
            branches = tuple((self.filter(owner, new, self.taps()),) for _ in range(2))
            return Block(self.x, self.x, branches, ()), new
        if kind == "cat":
            chosen = [[i for i, o in enumerate(owner) if o == block] for block in range(self.blocks)]
            branches = tuple((self.slice(owner, rows), *self.inside(rows)) for rows in chosen)
            widths = [b[-1].step.geometry.out_channels for b in branches]
            owner = [block for block, width in enumerate(widths) for _ in range(width)]
            return Block(self.x, self.x, branches, (), joined="cat", axis=1), owner
        return self.filter(owner, new, self.random.choice([1, 1, 2])), new

    def taps(self) -> int:
        return 1

    def slice(self, owner: list[int], rows: list[int]) -> Leaf:
        return self.leaf(selection(len(owner), rows, self.spatial), "channels")

    def inside(self, rows: list[int]) -> tuple[Leaf, ...]:
        out = self.random.randint(1, 4)
        weight = integers(self.generator, out, len(rows), *(1,) * self.spatial)
        return (self.leaf(dense(weight, integers(self.generator, out))),)

    def filter(self, owner: list[int], new: list[int], taps: int) -> Leaf:
        weight = integers(self.generator, len(new), len(owner), *(taps,) * self.spatial)
        mask = torch.tensor([[a == b for a in owner] for b in new]).double()
        if self.holes:
            mask[self.random.randrange(len(new))] = 0
            mask[:, self.random.randrange(len(owner))] = 0
        bias = integers(self.generator, len(new)) if self.random.random() < 0.7 else None
        return self.leaf(dense(weight * mask.reshape(*mask.shape, *(1,) * self.spatial), bias))

    def place(self) -> Place:
        return Place(1, (2, self.channels, *(7, 6)[: self.spatial]))

    def found(self) -> Blocks | None:
        nothing: Any = SimpleNamespace(tensors={}, release=lambda: None)
        return blocks_of(self.elements, self.place(), Patterns(nothing, nothing))

    def __repr__(self) -> str:
        return f"Region({self.seed})"


def side_by_side(region: Region, blocks: Blocks) -> torch.nn.Module:
    """Every group in the last of the ways to build it, which has the finest blocks."""
    branches = [Branch(g.inputs, g.outputs, emissions(g.geometry)[-1]) for g in blocks.groups]
    whole = fold_geometry(region.elements, region.place())
    return build_parallel(Parallel(whole, tuple(branches)), blocks.forms(), torch.float64)


def outcome(seed: int) -> str:
    """``whole`` where all hangs together, else ``exact``; what the parts are is compared with the whole."""
    region = Region(seed)
    blocks = region.found()
    place = region.place()
    form = fold_numbers(region.elements, place)
    if not region.holes:
        count = 1 if blocks is None else len(blocks.parts)
        assert count >= region.blocks, f"{region}: {count} blocks of {region.blocks}"
    if blocks is None:
        return "whole"
    given = sorted(channel for part in blocks.parts for channel in part.outputs)
    taken = [channel for part in blocks.parts for channel in part.inputs]
    assert given == list(range(form.geometry.out_channels)) and len(set(taken)) == len(taken), region
    x = integers(region.generator, *place.shape)
    assert torch.equal(side_by_side(region, blocks)(x), form(x)), region
    assert after(place, form.geometry).shape[1:] == form(x).shape[1:]
    return "exact"


def test_parts_are_the_whole() -> None:
    outcomes = Counter(map(outcome, range(400)))
    assert outcomes["exact"] > 200, outcomes


@pytest.mark.long
def test_parts_are_the_whole_at_length() -> None:
    outcomes = Counter(map(outcome, range(1000, 6000)))
    print(dict(outcomes))
    assert outcomes["exact"] > 2500, outcomes


def test_grouped_forms_around_a_shuffle_keep_the_finest_groups() -> None:
    """Groups of 12 and of 4 channels; a shuffle that only reorders channels inside the larger ones."""
    generator = torch.Generator().manual_seed(3)
    first = Affine(Geometry.channelwise(24, 24, 6, 0), integers(generator, 24, 4))
    order = [i // 8 * 8 + (3 * i) % 8 for i in range(24)]
    second = Affine(Geometry.channelwise(24, 12, 3, 0), integers(generator, 12, 8))
    region = Region(0)
    region.spatial, region.channels = 0, 24
    region.elements = [region.leaf(first), region.leaf(selection(24, order, 0)), region.leaf(second)]
    assert fold_geometry(region.elements, region.place()).groups == 1
    blocks = region.found()
    assert blocks is not None and [g.geometry.groups for g in blocks.groups] == [3]
    x = integers(generator, 2, 24)
    expected = compose(second, compose(selection(24, order, 0), first))
    assert torch.equal(blocks.forms()[0](x), expected(x))
