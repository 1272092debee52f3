"""Random regions: every stretch of operators is merged exactly or refused with a reason.

Whether merging pays does not matter here. What can be merged is built in every way there is, and compared for
equality with the operators themselves on maps of every size from the smallest that runs to seven more.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from captured import regions_of
from randomregions import RandomRegion, integer_input
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import convmerge
from convmerge.borders import classes
from convmerge.borders.classes import bordered
from convmerge.cost.model import ZERO
from convmerge.edit.edits import Run
from convmerge.edit.frames import Frames
from convmerge.emit import build, emissions
from convmerge.emit.bordered import build_bordered
from convmerge.errors import Refusal
from convmerge.plan import Planner, Site, site_numbers
from convmerge.plan.bordered import border_numbers, border_stages
from convmerge.plan.site import is_passage, is_same
from convmerge.recognise import Context
from convmerge.regions.elements import Chain
from convmerge.regions.fold import place_of
from convmerge.verification.replay import Replay

AHEAD = 8  # sizes from the smallest on
ROUNDING = 1e-12
LARGEST = 400_000  # numbers in a merged kernel: larger ones take too long to try


def check(seed: int, spatial: int) -> Counter[str]:
    """Merge every stretch of a random region in every way; counts what happened by kind or reason."""
    model = RandomRegion(seed, spatial)
    x = integer_input(model.channels, model.size, seed)
    context, regions = regions_of(model, x)
    outcomes: Counter[str] = Counter()
    for chain in regions.chains:
        for elements in stretches(chain):
            try:
                outcomes[merged(context, elements, seed)] += 1
            except Refusal as refusal:
                reason = re.sub(r"\d+(×\d+)*", "#", refusal.reason).split(" (")[0]
                outcomes[f"around a passage: {reason}" if any(map(is_passage, elements)) else reason] += 1
            except AssertionError as error:
                steps = [str(getattr(getattr(e, "step", e), "kind", "branches")) for e in elements]
                raise AssertionError(
                    f"{error}\nin {steps} of RandomRegion({seed}, {spatial}):\n{model}"
                ) from error
    for reason in regions.refused.values():
        outcomes[f"one operator: {re.sub(r'[0-9]+', '#', reason)}"] += 1
    return outcomes


def stretches(chain: Chain) -> Iterator[Chain]:
    """Every two or more elements in a row."""
    solid = [i for i, element in enumerate(chain) if not is_same(element)]
    for first, last in itertools.combinations(solid, 2):
        yield chain[first : last + 1]


def merged(context: Context, elements: Chain, seed: int) -> str:
    """Merge a stretch, compare, and say how. Raises Refusal."""
    evidence = context.evidence
    place = place_of(evidence, elements)
    if place is None:
        raise Refusal("numbers alone, with no filter to go into")
    try:
        site = Planner(Frames(evidence, context.constants)).maker.site(elements, place, ZERO)
        form = site_numbers(dataclasses.replace(site, blocks=None), evidence)
        layers = [build(form, way, torch.float64) for way in emissions(form.geometry)]
        how, smallest = "one form", (1,) * form.geometry.spatial
    except Refusal:
        if any(map(is_passage, elements)):
            raise
        b = bordered(border_stages(elements, place))
        if b.weights > LARGEST:
            return "too large to try"
        site = Site(elements, place, Run(elements), (), place, b.low, b, ZERO, ZERO)
        layers = [build_bordered(b, border_numbers(elements, place), torch.float64)]
        how, smallest = "border classes" if len(b.keys) > 1 else "blocks", b.minimum
    replay = Replay(site, evidence, context.constants)
    generator = random.Random(seed)
    compared = 0
    for size in sizes(replay, place.channels, smallest, site.place.size, generator):
        x = integer_input(place.channels, size, seed)
        expected = runs(replay, x)
        if expected is None:
            continue
        for layer in layers:
            found = replay.merged(layer)(x)
            assert found.shape == expected.shape, f"{found.shape} for {expected.shape} at {size}: {layer}"
            assert torch.equal(found, expected), f"another result at {size}: {layer}"
        compared += 1
    assert compared > 0, "no size runs"
    return how


def sizes(
    replay: Replay, channels: int, least: Sequence[int], example: Sequence[int], draw: random.Random
) -> Iterator[tuple[int, ...]]:
    """Every size of each dimension from the first that runs on, beside drawn ones of the others."""
    smallest = list(least)
    for dim, n in enumerate(example):
        while smallest[dim] < n:
            size = [smallest[d] if d == dim else m for d, m in enumerate(example)]
            if runs(replay, torch.zeros(1, channels, *size, dtype=torch.float64)) is not None:
                break
            smallest[dim] += 1
    for dim in range(len(example)):
        for extra in range(AHEAD):
            more = [draw.randrange(AHEAD) for _ in example]
            more[dim] = extra
            yield tuple(n + e for n, e in zip(smallest, more, strict=True))


def runs(replay: Replay, x: Tensor) -> Tensor | None:
    """The original on x; None where it is too small, or no multiple of a PixelUnshuffle's factor.

    A pad takes a map that a crop left nothing of, and makes zeros of it; that is too small as well.
    """
    maps: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            maps.extend(y for y in (result,) if isinstance(y, Tensor) and y.dim() == x.dim())
            return result

    try:
        with Watch():
            y = replay.original(x)
    except (RuntimeError, ValueError):
        return None
    return y if all(map.numel() for map in maps) else None


def fused(seed: int, spatial: int) -> Counter[str]:
    """A region through the whole tool, at eight sizes from the example's on.

    Equal up to rounding: a channel that is a third of another is computed from it.
    """
    model = RandomRegion(seed, spatial)
    x = integer_input(model.channels, model.size, seed)
    objective = ("latency", "macs", "params")[seed % 3]
    with torch.no_grad():
        result = convmerge.fuse(model, x, objective=objective)
        for extra in range(AHEAD):
            size = tuple(n + extra + dim for dim, n in enumerate(model.size))
            inputs = integer_input(model.channels, size, seed)
            try:
                expected = model(inputs)
            except RuntimeError:
                continue
            where = f"at {size}: convmerge.fuse(RandomRegion({seed}, {spatial}), ..., {objective!r})"
            error = (result.model(inputs) - expected).abs().max()
            assert error <= ROUNDING * expected.abs().max(), f"off by {error:.1e} {where}"
    assert all(site.reason for site in result.report.sites)
    return Counter(site.action for site in result.report.sites)


@pytest.mark.parametrize(("spatial", "regions"), [(1, 20), (2, 20), (3, 5)])
def test_stretches_of_random_regions(spatial: int, regions: int) -> None:
    outcomes = sum((check(seed, spatial) for seed in range(regions)), Counter[str]())
    made = outcomes["one form"] + outcomes["border classes"]
    assert made > 0.3 * outcomes.total(), outcomes


MISTAKES: dict[str, tuple[str, Callable[..., Any]]] = {
    "taps into padding kept": ("_adjoint", lambda right, *args: right(*args[:3], [None for _ in args[3]])),
    "bias of another block": ("_bias", lambda right, *args: right(*args[:4], [1 for _ in args[4]])),
    "kernel read from another input": ("_read", lambda right, *args: [p + 1 for p in right(*args)]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_at_the_borders_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, mistaken = MISTAKES[name]
    right = getattr(classes, function)
    monkeypatch.setattr(classes, function, lambda *args: mistaken(right, *args))
    with pytest.raises(AssertionError, match="another result"):
        for seed in range(10):
            check(seed, 1)


@pytest.mark.parametrize(("spatial", "regions"), [(1, 3), (2, 5)])
def test_random_regions_through_the_whole_tool(spatial: int, regions: int) -> None:
    actions = sum((fused(seed, spatial) for seed in range(regions)), Counter[str]())
    assert actions["merge"] > 0, actions


@pytest.mark.long
@pytest.mark.parametrize("part", range(20), ids=lambda part: f"part{part}-")
def test_many_random_regions(part: int) -> None:
    """2,000 regions: 800 in one, 800 in two and 400 in three dimensions; ``-rP`` prints what happened."""
    outcomes: Counter[str] = Counter()
    for spatial, regions in ((1, 40), (2, 40), (3, 20)):
        for seed in range(1000 + part * regions, 1000 + (part + 1) * regions):
            outcomes += check(seed, spatial)
            if seed % 4 == 0:
                outcomes += Counter({f"fuse: {k}": n for k, n in fused(seed, spatial).items()})
    for outcome, count in outcomes.most_common():
        print(f"{count:6} {outcome}")
    assert outcomes["border classes"] > 0
