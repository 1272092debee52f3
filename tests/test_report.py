"""Sums over the places of a report."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convmerge
from convmerge.report import SiteReport, saving_of


def merge(modules: str, before: float, after: float, step: int, *, measured: bool = False) -> SiteReport:
    paths = tuple(modules.split())
    return SiteReport(
        " … ".join(paths),
        (),
        "",
        "merge",
        "",
        latency_before=before,
        latency_after=after,
        measured=measured,
        modules=paths,
        step=step,
    )


@pytest.mark.parametrize(
    ("sites", "before", "after"),
    [
        pytest.param([merge("a", 10, 7, 0), merge("b", 5, 3, 0)], 15, 10, id="side by side"),
        pytest.param([merge("a", 10, 7, 0), merge("a", 10, 7, 0)], 20, 14, id="two calls of one module"),
        pytest.param([merge("a", 10, 7, 0), merge("a bn", 9, 6, 1)], 12, 6, id="shrunk, then merged"),
        pytest.param([merge("a bn", 9, 6, 1), merge("a", 10, 7, 0)], 12, 6, id="listed the other way round"),
        pytest.param(
            [merge("a", 11, 9, 0), merge("a", 9, 7, 1), merge("a b", 10, 6, 2)], 14, 6, id="shrunk twice"
        ),
        pytest.param(
            [merge("a", 10, 7, 0), merge("b", 8, 5, 0), merge("a x b y", 17, 4, 1)], 23, 4, id="both in one"
        ),
        pytest.param(
            [merge("a", 10, 7, 0), merge("a", 10, 7, 0), merge("a bn", 9, 6, 1), merge("a bn", 9, 6, 1)],
            24,
            12,
            id="both calls merged",
        ),
        pytest.param([merge("g conv", 20, 11, 0), merge("g h", 3, 1, 1)], 20, 9, id="a part of it merged"),
        pytest.param([merge("a", 10, 7, 0), merge("ab", 5, 3, 1)], 15, 10, id="another module"),
    ],
)
def test_what_one_step_leaves_to_the_next_counts_once(
    sites: list[SiteReport], before: float, after: float
) -> None:
    saving = saving_of(sites)
    assert saving is not None
    assert (saving.latency_before, saving.latency_after) == pytest.approx((before, after))


def test_a_saving_is_measured_if_all_of_it_is() -> None:
    assert saving_of([]) is None
    for second in (True, False):
        saving = saving_of([merge("a", 2, 1, 0, measured=True), merge("b", 2, 1, 0, measured=second)])
        assert saving is not None and saving.measured is second


def test_saving_of_a_pruned_convolution_before_a_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 23, 3), nn.BatchNorm2d(23), nn.ReLU(), nn.Conv2d(23, 5, 1)).eval()
    with torch.no_grad():
        for channel in range(11):
            model[0].weight[channel], model[0].bias[channel] = 0, 0
            model[1].bias[channel], model[1].running_mean[channel] = 0, 0
    report = convmerge.inspect(model, torch.randn(1, 3, 53, 59))
    shrunk, reader, merged = report.merged()
    assert (shrunk.place, reader.place, merged.place) == ("0", "3", "0 … 1")
    assert merged.modules == ("0", "1") and shrunk.step == reader.step < merged.step
    assert report.saving is not None
    norm = merged.latency_before - shrunk.latency_after
    assert report.saving.latency_before == pytest.approx(shrunk.latency_before + norm + reader.latency_before)
    assert report.saving.latency_after == pytest.approx(merged.latency_after + reader.latency_after)


def test_rounds_of_removing_copies_are_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 17, 3), nn.ReLU(), nn.Conv2d(17, 19, 3), nn.ReLU(), nn.Conv2d(19, 5, 1)
    ).eval()
    with torch.no_grad():  # the copies of the second layer are copies only once the first has none
        model[0].weight[8:16], model[0].bias[8:16] = model[0].weight[:8], model[0].bias[:8]
        model[2].weight[10:], model[2].bias[10:] = model[2].weight[:9], model[2].bias[:9]
        model[2].weight[10:, 8:16], model[2].weight[10:, :8] = (
            model[2].weight[:9, :8],
            model[2].weight[:9, 8:16],
        )
    report = convmerge.inspect(model, torch.randn(1, 3, 31, 37), objective="macs")
    second = [site for site in report.merged() if site.place == "2"]
    assert len(second) == 2 and second[0].step < second[1].step
    assert second[0].macs_after == second[1].macs_before
    assert report.saving is not None
    assert report.saving.latency_before - report.saving.latency_after == pytest.approx(
        sum(site.latency_before - site.latency_after for site in report.merged())
    )
    assert report.saving.latency_before < sum(site.latency_before for site in report.merged())
