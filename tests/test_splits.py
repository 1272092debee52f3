"""A filter on a concatenation is split where parts merge with what comes before or run on smaller maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Pair, assert_close, random, randomised
from torch import Tensor, nn

import convmerge
from convmerge.api import Result

LOW, HIGH = (1, 22, 7, 9), (1, 10, 14, 18)


def fused(model: nn.Module, *inputs: Tensor, **options: Any) -> Result:
    """Fuse, and check that the result is the same function, for a larger batch too."""
    result = convmerge.fuse(model, inputs, **options)
    assert result.report.verification is None or result.report.verification.equal
    assert not any("differs" in site.reason for site in result.report.sites), result.report.sites
    with torch.no_grad():
        for given in (inputs, tuple(torch.cat([x, x.flip(-1), 2 * x]) for x in inputs)):
            assert_close(result.model(*given), model(*given))
    return result


def concatenations(result: Result) -> int:
    return result.report.after.operators.get("cat", 0) if result.report.after is not None else -1


class Neck(nn.Module):
    """As in detectors and U-Nets: a small map is upsampled and meets a larger one."""

    def __init__(
        self, kernel: int, skip: int = 10, mode: str = "nearest", axis: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode=mode)
        self.conv = nn.Conv2d(32, 12, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(12)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        y = torch.cat([self.up(low.relu()), high.relu()], 1)
        return self.norm(self.conv(y)).relu()


@pytest.mark.parametrize(("kernel", "mode"), [(1, "nearest"), (3, "nearest"), (1, "bilinear")])
def test_the_part_of_an_upsampled_map_runs_on_the_small_one(kernel: int, mode: str) -> None:
    result = fused(randomised(Neck(kernel, mode=mode)), random(*LOW), random(*HIGH), objective="macs")
    assert concatenations(result) == 0
    assert len(result.report.merged()) == 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())
    before, after = result.report.before, result.report.after
    assert before is not None and after is not None
    # 22 of the 32 channels at a quarter of the work, or at 4/9 where a 3×3 kernel has 2×2 taps in a phase.
    share = 1 / 4 if kernel == 1 else 4 / 9
    assert after.macs == pytest.approx(before.macs * (22 * share + 10) / 32)


@pytest.mark.parametrize("options", [{"mode": "bilinear"}, {"groups": 2}])
def test_where_nothing_is_saved_the_concatenation_stays(options: dict[str, Any]) -> None:
    result = fused(randomised(Neck(3, **options)), random(*LOW), random(*HIGH))
    assert concatenations(result) == 1


def resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear")


HEADS: list[tuple[Callable[..., Tensor], float]] = [
    (lambda m, x, y: m.a(resized(x, y)) + m.b(y), (22 * 63 + 10 * 252) * 12),
    (lambda m, x, y: m.n(m.a(resized(x.relu(), y)) + m.b(y.relu())), (22 * 63 + 10 * 252) * 12),
    (lambda m, x, y: m.c(torch.cat([resized(m.n22(x.relu()), y), y], 1)), (22 * 63 + 10 * 252) * 12),
    (lambda m, x, y: m.c(torch.cat([resized(m.i(x), y), m.j(y)], 1)), (22 * 63 + 10 * 252) * 12),
    (lambda m, x, y: m.d(resized(m.a(x), y) + m.b(y)), (22 * 63 + 10 * 252) * 5),
    (lambda m, x, y: m.d(resized(m.a(x), y) + m.b(y).relu()), (22 * 63 + 10 * 252) * 12 + 12 * 5 * 252),
]


@pytest.mark.parametrize("index", range(len(HEADS)))
def test_heads_mix_the_channels_of_small_maps_before_they_are_resized(index: int) -> None:
    """As in LR-ASPP, DeepLab, SegFormer and PSPNet."""
    forward, macs = HEADS[index]
    layers = {
        "a": nn.Conv2d(22, 12, 1), "b": nn.Conv2d(10, 12, 1), "c": nn.Conv2d(32, 12, 1),
        "d": nn.Conv2d(12, 5, 1), "i": nn.Conv2d(22, 22, 1), "j": nn.Conv2d(10, 10, 1),
        "n": nn.BatchNorm2d(12), "n22": nn.BatchNorm2d(22),
    }  # fmt: skip
    model = randomised(Pair(forward, **layers))
    result = fused(model, random(*LOW), random(*HIGH), objective="macs")
    assert result.report.after is not None
    assert result.report.after.macs == macs
    x, y = random(2, 22, 5, 6, seed=2), random(2, 10, 17, 9, seed=3)
    with torch.no_grad():
        assert_close(result.model(x, y), model(x, y))


class Ends(Neck):
    """What is upsampled and the sum's parts are read elsewhere or returned."""

    def forward(self, low: Tensor, high: Tensor) -> Tensor:  # type: ignore[override]
        up = self.up(low.relu())
        y = torch.cat([up, high.relu()], 1)
        return self.norm(self.conv(y)).relu() + up.mean()


def test_a_map_that_is_read_elsewhere_stays() -> None:
    assert concatenations(fused(randomised(Ends(1)), random(*LOW), random(*HIGH))) == 1


class Narrow(nn.Module):
    """Filters of different values, concatenated and mixed down."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 31, 1), nn.Conv2d(5, 29, 3, padding=1, bias=False)
        self.c, self.n = nn.Conv2d(60, 3, 1), nn.BatchNorm2d(60)
        self.function = forward

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.function(self, x, z)  # type: ignore[no-any-return]


MIXED: list[tuple[Callable[..., Any], int]] = [
    (lambda m, x, z: m.c(torch.cat([m.a(x), m.b(z)], 1)).relu(), 0),
    (lambda m, x, z: m.c(torch.cat((m.b(z), m.a(x)), dim=-3)).relu() * 2, 0),
    (lambda m, x, z: m.c(torch.cat([m.a(x), m.b(z)], 1) * 3 + 1).relu(), 1),
    (lambda m, x, z: m.c(torch.cat([m.a(x).relu(), m.b(z).relu()], 1)), 1),
    (lambda m, x, z: (lambda y: m.c(y) + y.mean())(torch.cat([m.a(x), m.b(z)], 1)), 1),
    (lambda m, x, z: m.c(m.n(torch.cat([m.a(x), m.b(z)], 1))).relu(), 1),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(MIXED)))
def test_the_parts_merge_with_the_filters_before(index: int) -> None:
    forward, left = MIXED[index]
    result = fused(randomised(Narrow(forward)), random(2, 4, 8, 11), random(2, 5, 8, 11, seed=1))
    assert concatenations(result) == left, result.report.sites
    if not left:
        assert sum(isinstance(m, nn.Conv2d) for m in result.model.modules()) == 2


def test_concatenations_along_other_axes_stay() -> None:
    forward = lambda m, x, z: m.c(torch.cat([m.a(x), m.b(z)], 2)).relu()  # noqa: E731
    layers = {"a": nn.Conv2d(4, 31, 1), "b": nn.Conv2d(5, 31, 1), "c": nn.Conv2d(31, 3, 1)}
    result = fused(randomised(Pair(forward, **layers)), random(2, 4, 8, 11), random(2, 5, 8, 11))
    assert concatenations(result) == 1


class Routed(nn.Module):
    """With code that no trace follows: then the concatenation is left, and what follows merges by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = Neck(1)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        parts = [self.neck.up(low.relu()), high.relu()]
        y = torch.cat([p for p in parts if p.shape[1] > 0], 1)
        return self.neck.norm(self.neck.conv(y)).relu()


def test_code_that_cannot_be_traced_keeps_its_concatenation() -> None:
    result = fused(randomised(Routed()), random(*LOW), random(*HIGH))
    assert concatenations(result) == 1
    assert any(site.operators == ("conv 1×1", "batch_norm") for site in result.report.merged())
