"""Planning: the cheapest exact segmentation of every chain, by the cost model; and why the rest stays."""

from __future__ import annotations

import itertools
import random as python_random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import models
import pytest
import torch
from captured import Function, context_of, randomised
from captured import random as normal
from models import conv_bn
from torch import Tensor, nn

import convmerge
from convmerge.borders.classes import Bordered
from convmerge.cost.model import ZERO, Cost, Objective, operator_cost
from convmerge.edit.frames import Frames
from convmerge.errors import Refusal
from convmerge.plan import WINDOW, Planner, Site, ends_of, site_numbers
from convmerge.regions.elements import Block, Chain
from convmerge.regions.reduction import find_regions
from convmerge.report import Report, SiteReport

MAP = (2, 6, 12, 14)
OBJECTIVES: tuple[Objective, ...] = ("latency", "macs", "params")


def planned(
    model: nn.Module, x: Tensor, objective: Objective = "latency", **options: Any
) -> tuple[Planner, Chain]:
    """A planner and the model's one chain."""
    context = context_of(model, x)
    (chain,) = find_regions(context).chains
    return Planner(Frames(context.evidence, context.constants), objective, **options), chain


def random_layers(draw: python_random.Random, n: int) -> list[nn.Module]:
    """Linear operators in a row that run on MAP, from a few kinds with random channels and kernels."""
    layers: list[nn.Module] = []
    channels, up = MAP[1], 0
    for _ in range(n):
        wide, bias = draw.choice([2, 3, 6, 11, 24]), draw.random() < 0.5
        kind = draw.choice(["1×1", "1×1", "k×k", "padded", "depthwise", "norm", "pool", "nearest", "stride"])
        if kind == "norm":
            layers.append(nn.BatchNorm2d(channels))
        elif kind == "pool":
            layers.append(nn.AvgPool2d(2, 1))
        elif kind == "nearest" and up < 2:
            up += 1
            layers.append(nn.Upsample(scale_factor=2))
        elif kind == "depthwise":
            layers.append(nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), groups=channels, bias=bias))
        else:
            k, p, s = {"k×k": (2, 0, 1), "padded": (3, 1, 1), "stride": (1, 0, 2)}.get(kind, (1, 0, 1))
            layers.append(
                nn.Conv2d(channels, wide, k, padding=p, stride=s if draw.random() < 0.3 else 1, bias=bias)
            )
            channels = wide
    return layers


def tilings(spans: dict[int, list[tuple[int, Cost]]], at: int, n: int) -> Iterator[Cost]:
    """The cost of every way to cover elements at..n-1 by spans, given as start → (end, cost)."""
    if at == n:
        yield ZERO
    for end, cost in spans.get(at, []):
        for rest in tilings(spans, end, n):
            yield cost + rest


def cheaper(a: Cost, b: Cost, objective: Objective) -> bool:
    """Whether ``a`` is less than ``b`` by more than the rounding of sums."""
    (x, t), (y, u) = a.key(objective), b.key(objective)
    return x < y * (1 - 1e-3) or (x <= y and t < u * (1 - 1e-3))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(25))
def test_the_plan_is_the_best_of_all_segmentations(seed: int, objective: Objective) -> None:
    draw = python_random.Random(seed)
    layers = random_layers(draw, draw.randint(2, 8))
    try:
        planner, chain = planned(nn.Sequential(*layers).eval(), torch.randn(MAP), objective)
    except convmerge.ConvmergeError:  # the drawn kernels did not fit
        planner, chain = planned(
            nn.Sequential(nn.Conv2d(6, 5, 1), nn.Conv2d(5, 3, 1)), torch.randn(MAP), objective
        )
    n = len(chain)
    spans: dict[int, list[tuple[int, Cost]]] = {i: [] for i in range(n)}
    for i, j in itertools.combinations(range(n + 1), 2):
        before = sum((planner._cost_as_is(element) for element in chain[i:j]), ZERO)
        if j == i + 1:
            spans[i].append((j, before))
        try:
            site = planner.site(chain[i:j], before) if j > i + 1 else None
        except Refusal:
            continue
        if site is not None and planner.gains(site.after, before):
            spans[i].append((j, site.after))
    least = min(cost.key(objective) for cost in tilings(spans, 0, n))
    plan = planner.plan(chain)
    merged = {id(e): site for site in plan.sites for e in site.elements}
    whole = {id(site): site.after for site in merged.values()}
    rest = [planner._cost_as_is(e) for e in chain if id(e) not in merged]
    total = sum([*whole.values(), *rest], ZERO).key(objective)
    bordered = any(isinstance(site.emission, Bordered) for site in plan.sites)
    reproduce = f"{layers} at {MAP}, {objective}: planned {total}, best {least}"
    assert total[0] <= least[0] * (1 + 1e-9), reproduce
    assert bordered or total[0] >= least[0] * (1 - 1e-9), reproduce


def test_sites_do_not_overlap_and_are_in_order() -> None:
    layers = [
        *conv_bn(6, 9, 1),
        nn.BatchNorm2d(9),
        nn.Conv2d(9, 9, 3, padding=1),
        *conv_bn(9, 4, 1),
        nn.AvgPool2d(2),
    ]
    planner, chain = planned(nn.Sequential(*layers).eval(), torch.randn(MAP))
    sites = planner.plan(chain).sites
    positions = [chain.index(element) for site in sites for element in site.elements]
    assert positions == sorted(set(positions))
    assert all(site.after.latency < site.before.latency for site in sites)
    assert all(site.after.macs <= site.before.macs for site in sites)


def test_blocks_merge_whole_or_inside() -> None:
    """A sum of an affordable and a hopeless branch is still merged inside its branches."""
    wide = nn.Sequential(*conv_bn(6, 6, 1), *conv_bn(6, 6, (3, 1), padding=(1, 0), groups=6))
    planner, chain = planned(
        models.Sum(conv_bn(6, 6, 3, padding=1), conv_bn(6, 6, 1)).eval(), torch.randn(MAP)
    )
    (site,) = planner.plan(chain).sites
    assert isinstance(site.elements[0], Block)
    twice = nn.Sequential(*conv_bn(6, 6, 3, padding=1), *conv_bn(6, 6, 3, padding=1))
    planner, chain = planned(models.Sum(twice, wide).eval(), torch.randn(MAP), "macs")
    plan = planner.plan(chain)
    assert len(plan.sites) >= 4
    assert not any(isinstance(element, Block) for site in plan.sites for element in site.elements)
    assert any(isinstance(denial.elements[0], Block) for denial in plan.denials)


def test_the_numbers_of_a_site_are_those_of_its_geometry() -> None:
    model = randomised(
        nn.Sequential(nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    )
    planner, chain = planned(model, normal(*MAP))
    (site,) = planner.plan(chain).sites
    form = site_numbers(site, planner.evidence)
    assert form.geometry == site.geometry
    assert len(site.emptied) == 1
    assert site.home_place.size == () or set(site.home_place.size) == {1}


# --- What stays apart, and why ------------------------------------------------------------------------------


def report_of(model: nn.Module, x: Tensor, **options: Any) -> Report:
    return convmerge.inspect(model.eval(), x, **options)


def site_at(report: Report, action: str) -> SiteReport:
    (site,) = [site for site in report.sites if site.action == action]
    return site


def test_the_bottleneck_of_mobilenet_v2_is_kept_and_the_reason_has_numbers() -> None:
    """1×1 from 96 to 24, then 1×1 from 24 to 144: 5760 weights, 13,824 as one."""
    model = nn.Sequential(
        nn.Conv2d(96, 24, 1, bias=False), nn.BatchNorm2d(24), nn.Conv2d(24, 144, 1, bias=False)
    )
    report = report_of(model, torch.randn(1, 96, 28, 28))
    kept = site_at(report, "keep")
    assert kept.reason == "costs more as one operator: 2.40× the MACs"
    assert kept.macs_before == 28 * 28 * (96 * 24 + 24 * 144)
    assert kept.macs_after == 28 * 28 * 96 * 144
    assert site_at(report, "merge").operators == ("conv 1×1", "batch_norm")


def test_a_low_rank_pair_is_kept_and_a_full_rank_one_merged() -> None:
    x = torch.randn(5, 64)
    low = report_of(nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 64)), x)
    assert [site.action for site in low.sites] == ["keep"]
    full = report_of(nn.Sequential(nn.Linear(64, 48, bias=False), nn.Linear(48, 64)), x)
    assert [site.action for site in full.sites] == ["merge"]


def test_depthwise_and_pointwise_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32, bias=False), nn.Conv2d(32, 32, 1))
    kept = site_at(report_of(model, torch.randn(1, 32, 16, 16)), "keep")
    assert "× the MACs" in kept.reason
    assert kept.macs_after > 5 * kept.macs_before


def test_macs_decide_before_predicted_time() -> None:
    """Tiny maps: one call of a few more MACs is predicted to be faster, and is not chosen all the same."""
    model = nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(2, 5, 1))
    kept = site_at(report_of(model, torch.randn(1, 4, 5, 5)), "keep")
    assert kept.latency_after < kept.latency_before
    assert kept.macs_after > kept.macs_before
    planner, chain = planned(model, torch.randn(1, 4, 5, 5))
    assert not planner.plan(chain).sites
    planner.spare_macs = kept.macs_after - kept.macs_before
    (site,) = planner.plan(chain).sites
    assert isinstance(site, Site)


def test_the_objective_decides_between_time_and_weights() -> None:
    """Two 3×3 convs of few channels: fewer MACs apart, fewer weights apart, or one call."""
    model = nn.Sequential(nn.Conv2d(24, 2, 5, bias=False), nn.Conv2d(2, 24, 1, bias=False))
    x = torch.randn(1, 24, 9, 9)
    assert [site.action for site in report_of(model, x, objective="params").sites] == ["keep"]
    assert [site.action for site in report_of(model, x, objective="macs").sites] == ["keep"]
    pool = nn.Sequential(nn.Conv2d(6, 5, 2, bias=False), nn.AvgPool2d(2))
    report = report_of(pool, torch.randn(1, 6, 17, 17), objective="params")
    assert all(site.weights_after <= site.weights_before for site in report.merged())
    with pytest.raises(ValueError, match="objective"):
        report_of(model, x, objective="beauty")


def test_a_tap_leak_is_refused_with_the_dimension() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 16, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(16, 5, 3, padding=(1, 0))
    )
    refused = site_at(report_of(model, torch.randn(MAP)), "refuse")
    assert "pads its input with zeros" in refused.reason
    assert "(height)" in refused.reason


def two_blocks() -> nn.Module:
    return Function(
        lambda m, x: m.head(m.body(m.stem(x).relu()).relu()),
        stem=conv_bn(6, 5, 3), body=conv_bn(5, 7, 3), head=conv_bn(7, 4, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, ["stem", "body", "head"]),
        ({"only": ["body"]}, ["body"]),
        ({"only": ["body.*"]}, ["body"]),
        ({"only": ["stem.0", "head.1"]}, ["stem", "head"]),
        ({"skip": ["s*"]}, ["body", "head"]),
        ({"only": ["*"], "skip": ["body.1", "head.0"]}, ["stem"]),
        ({"only": ["nothing"]}, []),
    ],
)
def test_only_and_skip_choose_sites_by_path(options: dict[str, Any], places: list[str]) -> None:
    report = report_of(two_blocks(), torch.randn(MAP), **options)
    assert [site.place.split(".")[0] for site in report.merged()] == places
    left = [site for site in report.sites if site.action != "merge"]
    assert {site.reason for site in left} <= {"left out by --only or --skip"}


def test_what_may_not_be_merged_is_planned_around() -> None:
    model = nn.Sequential(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1)).eval()
    planner, chain = planned(model, torch.randn(MAP))
    (site,) = planner.plan(chain).sites
    assert len(site.elements) == 3
    planner.forbidden = {ends_of(chain): "it is not to be"}
    plan = planner.plan(chain)
    (site,) = plan.sites
    assert len(site.elements) == 2
    assert [denial.reason for denial in plan.denials] == ["it is not to be"]


def test_planning_time_is_linear_in_the_length_of_a_chain() -> None:
    """The number of intervals looked at, not the time, which is not asserted."""
    looked: list[int] = []

    def allowed(elements: Sequence[object]) -> bool:
        looked.append(len(elements))
        return True

    def intervals(n: int) -> int:
        layers = [nn.Conv2d(6, 6, 1, groups=6) for _ in range(n)]
        planner, chain = planned(nn.Sequential(*layers), torch.randn(1, 6, 3, 3), allowed=allowed)
        looked.clear()
        planner.plan(chain)
        return len(looked)

    few, many = intervals(100), intervals(200)
    assert many < 3 * few
    assert max(looked) <= 2 * WINDOW  # two segments that stay apart are asked about together


def test_costs_of_operators_without_a_form_are_their_traffic() -> None:
    assert operator_cost("mul", 1000).macs == 0
    assert operator_cost("add", 10**6).latency > operator_cost("add", 10**3).latency


Maker = Callable[[], nn.Module]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(
            nn.Conv2d(6, 5, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.BatchNorm2d(5)
        ),
        lambda: nn.Sequential(nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        lambda: nn.Sequential(nn.Conv2d(6, 5, 3), nn.AdaptiveAvgPool2d((3, 3)), nn.Conv2d(5, 4, 1)),
    ],
)
def test_pointwise_forms_move_past_passages(make: Maker) -> None:
    model = randomised(make())
    planner, chain = planned(model, normal(*MAP))
    plan = planner.plan(chain)
    assert [len(site.emptied) for site in plan.sites] == [1], plan.denials


@pytest.mark.parametrize(("channels", "size"), [(256, 56), (512, 28), (1024, 14)])
def test_transitions_of_densenet_pool_before_they_mix_channels(channels: int, size: int) -> None:
    """A strided convolution is predicted to be faster by little, at four times the MACs."""
    model = nn.Sequential(nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2))
    site = site_at(report_of(model, torch.randn(1, channels, size, size)), "merge")
    assert site.reason == f"AvgPool2d(2×2) → Conv2d({channels}, {channels // 2}, 1×1)"
    assert site.macs_before == 4 * site.macs_after
    assert site.latency_after < site.latency_before
