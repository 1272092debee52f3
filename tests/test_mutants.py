"""Deliberate mistakes in the algebra, each of which an exact law must notice.

A mutant replaces one function wherever it is used. The laws run on random draws until one gives another
result than the original; a mutant that survives them all is a hole in the tests.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import laws
import pytest
import torch
from generate import Draw
from torch import Tensor, fx, nn

from convmerge.affine import Affine, Geometry
from convmerge.algebra import axis, bias, blocked, branches, edges, ends, multiples, polyphase
from convmerge.algebra.axis import Axis, Composition, Placement
from convmerge.algebra.blocked import Count, Rates
from convmerge.borders import classes
from convmerge.borders import leaks as borders
from convmerge.borders.leaks import Leaks

# Packages export functions of the names of these modules.
compose = importlib.import_module("convmerge.algebra.compose")
commute = importlib.import_module("convmerge.algebra.commute")
build = importlib.import_module("convmerge.emit.build")
interleave = importlib.import_module("convmerge.emit.interleave")

LAWS = (
    laws.composes, laws.folds, laws.joins, laws.fades, laws.adds, laws.stacks, laws.splits, laws.commutes,
    laws.builds, laws.fills, laws.blocks,
)  # fmt: skip
DRAWS = {2: 60, 1: 150, 0: 20}
Function = Callable[..., Any]
MUTANTS: list[tuple[str, Function, Function]] = []


def mutant(original: Function) -> Callable[[Function], Function]:
    """Register a mistaken version of ``original``; it gets the original as its first argument."""

    def register(mistaken: Function) -> Function:
        MUTANTS.append((mistaken.__name__, original, mistaken))
        return mistaken

    return register


def spatial(weight: Tensor) -> tuple[int, ...]:
    return tuple(range(2, weight.dim()))


@mutant(compose._compose_blocks)
def kernel_not_flipped(right: Function, outer: Tensor, *rest: Any) -> Tensor:
    return right(outer.flip(spatial(outer)), *rest)


@mutant(compose._compose_blocks)
def axes_swapped(right: Function, *args: Any) -> Tensor:
    taps = right(*args)
    return taps.transpose(-1, -2) if taps.dim() == 4 and taps.shape[-1] == taps.shape[-2] else taps


@mutant(compose._compose_taps)
def channels_transposed(right: Function, outer: Tensor, *rest: Any) -> Tensor:
    square = outer.shape[0] == outer.shape[1]
    return right(outer.transpose(0, 1) if square else outer, *rest)


@mutant(compose._compose_blocks)
def blocks_of_a_group_in_another_order(right: Function, outer: Tensor, groups: int, *rest: Any) -> Tensor:
    taps = right(outer, groups, *rest)
    return taps.reshape(len(taps), -1, rest[0].shape[1], *taps.shape[2:]).flip(1).reshape(taps.shape)


@mutant(compose._compose_taps)
def diagonal_scales_the_wrong_side(
    right: Function, outer: Tensor, groups: int, inner: Tensor, *rest: Any
) -> Tensor:
    diagonal = rest[0] == len(inner) == len(outer) and inner[0].numel() == 1
    return (
        outer * inner.reshape(-1, *(1,) * (outer.dim() - 1))
        if diagonal
        else right(outer, groups, inner, *rest)
    )


@mutant(compose.expand_groups)
def groups_off_the_diagonal(right: Function, weight: Tensor, groups: int, coarser: int) -> Tensor:
    dense = right(weight, groups, coarser)
    return dense.reshape(len(dense), groups // coarser, *weight.shape[1:]).flip(1).reshape(dense.shape)


@mutant(compose._keep)
def taps_between_the_rates_kept(right: Function, taps: Tensor, dims: Sequence[Composition]) -> Tensor:
    return right(taps, [d._replace(start=0) if d.step > 1 else d for d in dims])


@mutant(bias.response)
def inner_bias_dropped(right: Function, outer: Affine, inner_bias: Tensor) -> Tensor:
    return torch.zeros_like(right(outer, inner_bias))


@mutant(bias.sum_biases)
def outer_bias_dropped(right: Function, biases: Sequence[Tensor | None]) -> Tensor | None:
    return right(biases[-1:])


@mutant(bias.response)
def inner_bias_not_weighted(right: Function, outer: Affine, inner_bias: Tensor) -> Tensor:
    one_tap = outer.weight.flatten(2).select(2, 0) if outer.geometry.spatial else outer.weight
    blocks = one_tap.reshape(outer.geometry.groups, -1, one_tap.shape[1])
    if inner_bias.dim() > 1:
        return right(outer, inner_bias)
    return (blocks @ inner_bias.reshape(outer.geometry.groups, -1, 1)).flatten()


@mutant(bias.response)
def bias_phase_ignored(right: Function, outer: Affine, inner_bias: Tensor) -> Tensor:
    result = right(outer, inner_bias)
    return result.flatten(1)[:, 0] if result.dim() > 1 else result


@mutant(axis.compose_axis)
def down_forgotten_in_lo(right: Function, outer: Axis, inner: Axis) -> Composition:
    found = right(outer, inner)
    off = (inner.down - 1) * outer.lo
    return found._replace(axis=found.axis._replace(lo=found.axis.lo - off, hi=found.axis.hi + off))


@mutant(axis.compose_axis)
def up_forgotten_in_lo(right: Function, outer: Axis, inner: Axis) -> Composition:
    found = right(outer, inner)
    off = (outer.up - 1) * inner.lo
    return found._replace(axis=found.axis._replace(lo=found.axis.lo - off, hi=found.axis.hi + off))


@mutant(axis.compose_axis)
def down_forgotten_in_the_taps(right: Function, outer: Axis, inner: Axis) -> Composition:
    found, apart = right(outer, inner), right(outer, inner._replace(down=1))
    rates = found.axis._replace(kernel=apart.axis.kernel, dilation=apart.axis.dilation)
    return apart._replace(axis=rates._replace(hi=rates.hi + found.axis.slack - rates.slack))


@mutant(axis.compose_axis)
def steps_swapped(right: Function, outer: Axis, inner: Axis) -> Composition:
    found = right(outer, inner)
    return found._replace(outer_step=found.inner_step, inner_step=found.outer_step)


@mutant(axis.compose_axis)
def dilation_forgotten(right: Function, outer: Axis, inner: Axis) -> Composition:
    return right(outer._replace(dilation=1), inner._replace(dilation=1))


@mutant(axis.compose_axis)
def hi_forgotten(right: Function, outer: Axis, inner: Axis) -> Composition:
    found = right(outer, inner)
    return found._replace(axis=found.axis._replace(hi=outer.hi))


@mutant(axis.align_axes)
def branches_not_aligned(right: Function, parts: tuple[Axis, ...]) -> tuple[Axis, tuple[Placement, ...]]:
    common, where = right(parts)
    return common, tuple(p._replace(start=0) for p in where)


@mutant(axis.align_axes)
def dilation_of_a_branch_forgotten(
    right: Function, parts: tuple[Axis, ...]
) -> tuple[Axis, tuple[Placement, ...]]:
    common, where = right(parts)
    return common, tuple(p._replace(step=1) for p in where)


@mutant(bias.concatenate_biases)
def biases_stacked_in_another_order(right: Function, biases: Sequence[Tensor]) -> Tensor:
    return right(biases[::-1])


@mutant(branches.split)
def bias_given_to_every_part(right: Function, form: Affine, sizes: Sequence[int]) -> list[Affine]:
    return [part.with_bias(form.bias) for part in right(form, sizes)]


@mutant(commute._gain)
def gain_forgotten(right: Function, taps: Tensor, g: Geometry) -> float | None:
    return None if right(taps, g) is None else 1.0


@mutant(commute._reads_padding)
def padding_ignored_in_a_swap(right: Function, g: Geometry) -> bool:
    return False


@mutant(borders.leaks)
def border_ignored(right: Function, outer: Geometry, inner: Geometry) -> Leaks:
    return Leaks((False,) * outer.spatial, (False,) * outer.spatial)


@mutant(borders.leaks)
def bias_leak_ignored(right: Function, outer: Geometry, inner: Geometry) -> Leaks:
    return dataclasses.replace(right(outer, inner), bias=(False,) * outer.spatial)


@mutant(borders.leaks)
def only_the_first_dimension_judged(right: Function, outer: Geometry, inner: Geometry) -> Leaks:
    found = right(outer, inner)
    rest = (False,) * (outer.spatial - 1)
    return Leaks(found.tap[:1] + rest, found.bias[:1] + rest)


@mutant(edges._remainders)
def unread_remainders_forgotten(right: Function, outer: Axis, inner: Axis) -> set[tuple[int, int]]:
    return {(0, 0)}


@mutant(edges._left_end)
def left_end_forgotten(right: Function, outer: Axis, inner: Axis) -> edges.Edge:
    return right(outer._replace(lo=min(outer.lo, outer.hi)), inner)


@mutant(edges.inside_taps)
def ones_at_the_tap_of_another_phase(right: Function, inner: Axis) -> tuple[int, ...] | None:
    found = right(inner)
    return None if found is None else (*found[1:], *found[:1])


@mutant(borders._annihilates)
def every_bias_taken_for_annihilated(right: Function, outer: Affine, inner_bias: Tensor) -> bool:
    return True


@mutant(borders._without_zero_bias)
def bias_taken_for_zero_by_its_first_entry(right: Function, form: Affine, magnitude: Tensor | None) -> Affine:
    zero = form.bias is not None and not form.bias.flatten()[0]
    return form.with_bias(None) if zero else right(form, magnitude)


@mutant(multiples.without_fill)
def padding_made_symmetric_at_any_cost(right: Function, g: Geometry, multiple: int) -> Geometry:
    return dataclasses.replace(g, hi=g.lo)


@mutant(multiples.with_fill)
def filled_in_front(right: Function, g: Geometry, multiple: int) -> Geometry:
    return dataclasses.replace(g, lo=tuple(lo + multiple - 1 for lo in g.lo))


@mutant(polyphase.polyphase_axis)
def phases_in_reverse(right: Function, dim: Axis, shift: int) -> polyphase.Phases:
    found = right(dim, shift)
    return found._replace(of=tuple(dim.up - 1 - p for p in found.of))


@mutant(polyphase.polyphase_axis)
def crop_at_the_wrong_end(right: Function, dim: Axis, shift: int) -> polyphase.Phases:
    found = right(dim, shift)
    return found._replace(axis=found.axis._replace(lo=found.axis.lo + 1, hi=found.axis.hi - 1))


@mutant(polyphase._phase_biases)
def phase_shift_forgotten_in_the_bias(
    right: Function, values: Tensor, up: Sequence[int], shift: Sequence[int]
) -> Tensor:
    return right(values, up, [0 for _ in shift])


@mutant(blocked.rates_of)
def rates_multiplied_without_a_common_block(right: Function, chain: Sequence[Axis]) -> Rates:
    found = right(chain)
    shared = math.gcd(*found)
    return Rates(found.outputs // shared, found.inputs // shared)


@mutant(blocked.blocked)
def excess_taken_for_the_same_at_all_sizes(right: Function, chain: tuple[Axis, ...]) -> blocked.Blocked:
    found = right(chain)
    return found._replace(excess=found.excess[:1] * len(found.excess))


@mutant(blocked._counts)
def output_counted_without_the_last_floor(right: Function, chain: Sequence[Axis]) -> tuple[Count, ...]:
    *rest, last = right(chain)
    return (*rest, last._replace(plus=last.plus + last.over - 1))


@mutant(ends._ends)
def one_border_block_forgotten(right: Function, first: ends.Border, *rest: Any) -> ends.Ends:
    return right(first._replace(blocks=max(first.blocks - 1, 0)), *rest)


@mutant(ends._least)
def smallest_size_of_one_residue(right: Function, trees: Any, large: int, *rest: int) -> int:
    return max(1, right(trees, large, *rest) - 1)


@mutant(classes._by_phase)
def blocks_before_phases(
    right: Function, outputs: Tensor, rates: Sequence[int], together: Sequence[int]
) -> Tensor:
    n = len(rates)
    found = right(outputs, rates, together)
    swapped = found.movedim(tuple(range(1, n + 1)), tuple(range(n + 1, 2 * n + 1)))
    return swapped.reshape(found.shape)


@mutant(build._transposed_weight)
def transposed_weight_not_flipped(right: Function, weight: Tensor, groups: int) -> Tensor:
    found = right(weight, groups)
    return found.flip(spatial(found))


@mutant(build._transposed_weight)
def transposed_weight_not_by_groups(right: Function, weight: Tensor, groups: int) -> Tensor:
    return weight.transpose(0, 1).reshape(right(weight, groups).shape).flip(spatial(weight))


@mutant(interleave._phase)
def phases_all_from_the_same_position(right: Function, *args: Any) -> fx.Node:
    *rest, kept = args
    return right(*rest, slice(None, ((kept.stop or 0) - (kept.start or 0)) or None))


@mutant(interleave._phase)
def phases_of_the_wrong_dimension(
    right: Function, graph: fx.Graph, y: fx.Node, n: int, at: int, phase: int, kept: slice
) -> fx.Node:
    return right(graph, y, n, -n - 1 - at, phase, kept)


@mutant(build._append_ones)
def ones_before_the_channels(right: Function, g: Geometry) -> nn.Module:
    layer = right(g)
    for module in layer.modules():
        if hasattr(module, "padding"):
            module.padding = (*module.padding[:-2], 1, 0)
    return layer


@pytest.fixture(autouse=True)
def empty_caches() -> Iterator[None]:
    """Laws on geometry remember their results. And one thread, as the maps are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    clear_caches()
    yield
    clear_caches()
    torch.set_num_threads(threads)


def clear_caches() -> None:
    for module in convmerge_modules():
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def convmerge_modules() -> list[Any]:
    return [m for name, m in sys.modules.items() if name.split(".")[0] == "convmerge" or name == "laws"]


def killer() -> str | None:
    """The first law and draw that gives another result; crashes and other failed assertions do not count."""
    for dims, draws in DRAWS.items():
        for law in LAWS:
            for seed in range(draws):
                try:
                    law(Draw(seed, dims))
                except laws.WrongResultError:
                    return f"{law.__name__}(Draw({seed}, {dims}))"
                except Exception:
                    continue
    return None


@pytest.mark.parametrize(("name", "original", "mistaken"), MUTANTS, ids=[name for name, _, _ in MUTANTS])
def test_mutant_is_killed(
    name: str, original: Function, mistaken: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mutated(*args: Any, **kwargs: Any) -> Any:
        return mistaken(original, *args, **kwargs)

    for module in convmerge_modules():
        for attribute, value in list(vars(module).items()):
            if value is original:
                monkeypatch.setattr(module, attribute, mutated)
    found = killer()
    print(f"{name}: {found}")
    assert found is not None, f"no law notices {name}"


def test_without_a_mutant_every_law_holds() -> None:
    assert killer() is None
