"""The branches of a block that is not one operator: some of them may still merge with one another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convmerge.cost.model import ZERO, Cost
from convmerge.errors import Refusal
from convmerge.plan.site import Site, is_same
from convmerge.recognise import Scalar
from convmerge.regions.elements import Block, Chain, Leaf
from convmerge.regions.fold import place_of

if TYPE_CHECKING:
    from convmerge.plan.planner import Planner

BRANCHES = 24  # of more than so many, no subsets are looked at


@dataclass(frozen=True, eq=False)
class Inside:
    """The plan of a block's branches.

    Attributes:
        cost: of all branches, and of joining what is left of them.
        sites: those of branches that merge with one another.
        apart: the other branches.
    """

    cost: Cost
    sites: tuple[Site, ...]
    apart: tuple[Chain, ...]


@dataclass(frozen=True, eq=False)
class _Group:
    """Branches that become one operator, or a single one with its own plan."""

    members: tuple[int, ...]
    cost: Cost
    site: Site | None = None


def plan_inside(planner: Planner, block: Block) -> Inside:
    """Starting from every branch by itself, join the two groups that gain most by it, as long as any do."""
    groups = [_Group((i,), _cost(planner, branch)) for i, branch in enumerate(block.branches)]
    joining = joining_cost(planner, block)
    if block.joined == "sum" and 2 < len(groups) + block.partial <= BRANCHES:
        known: dict[tuple[int, ...], _Group | None] = {}
        while (found := _best_pair(planner, block, groups, joining, known)) is not None:
            groups = [g for g in groups if not set(g.members) & set(found.members)] + [found]
    rest = len(groups) - 1 if block.joined == "sum" else 1
    cost = sum([group.cost for group in groups] + [joining] * rest, ZERO)
    merged = tuple(group.site for group in groups if group.site is not None)
    apart = [block.branches[group.members[0]] for group in groups if group.site is None]
    return Inside(cost, merged, tuple(apart))


def _cost(planner: Planner, branch: Chain) -> Cost:
    return planner.table(branch).cost(len(branch)) if place_of(planner.evidence, branch) is not None else ZERO


def joining_cost(planner: Planner, block: Block) -> Cost:
    """Of one addition, or of the concatenation."""
    volume, dtype = math.prod(planner.evidence.size(block.target)), planner.evidence.dtype(block.target)
    return planner.cost_model.operator("add" if block.joined == "sum" else "cat", volume, dtype=dtype)


def _best_pair(
    planner: Planner,
    block: Block,
    groups: Sequence[_Group],
    joining: Cost,
    known: dict[tuple[int, ...], _Group | None],
) -> _Group | None:
    """The two groups whose union saves most, as one; None where no union saves anything."""
    best: tuple[tuple[float, float], _Group] | None = None
    for a, b in itertools.combinations(groups, 2):
        members = tuple(sorted(a.members + b.members))
        before = a.cost + b.cost + joining
        if members not in known:
            known[members] = _union(planner, block, members, before)
        union = known[members]
        if len(members) == len(block.branches) or union is None or not planner.gains(union.cost, before):
            continue
        (new, new_latency), (old, old_latency) = (c.key(planner.objective) for c in (union.cost, before))
        saved = (old - new, old_latency - new_latency)
        if best is None or saved > best[0]:
            best = saved, union
    return best[1] if best is not None else None


def _union(planner: Planner, block: Block, members: tuple[int, ...], before: Cost) -> _Group | None:
    part = part_of(block, members)
    if part is None:
        return None
    try:
        site = planner.site((part,), before)
    except Refusal:
        return None
    return None if site is None else _Group(members, site.after, site)


def part_of(block: Block, members: Sequence[int]) -> Block | None:
    """Some branches of a sum as a part of it; None where none of them has an operator to stand in for."""
    factored = [_without_factor(block.branches[i]) for i in members]
    solid = [i for i, (branch, _) in enumerate(factored) if not all(is_same(e) for e in branch)]
    if not solid:
        return None
    kept = next((i for i in solid if factored[i][1] == 1.0), solid[0])
    unit = factored[kept][1]
    scaled = zip(members, factored, strict=True)
    branches = tuple(_with_factor(block, i, factor / unit) for i, (_, factor) in scaled)
    target = factored[kept][0][-1].target
    edges = tuple(block.edges[i] for i in members)
    return Block(block.source, target, branches, block.sums, True, edges, kept)


def _without_factor(branch: Chain) -> tuple[Chain, float]:
    """A branch, and the factor that the sum puts on it."""
    last = branch[-1] if branch else None
    if isinstance(last, Leaf) and last.implied and isinstance(last.step, Scalar):
        inner, factor = _without_factor(branch[:-1])
        return inner, factor * last.step.factor
    return branch, 1.0


def _with_factor(block: Block, index: int, factor: float) -> Chain:
    branch, own = _without_factor(block.branches[index])
    if own == factor:
        return block.branches[index]
    if factor == 1.0:
        return branch
    value = branch[-1].target if branch else block.source
    scalar = Leaf(value, block.edges[index].call, Scalar(value, factor, 0.0, "alpha"), implied=True)
    return (*branch, scalar)
