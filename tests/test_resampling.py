"""Resampling between convolutions, through the whole tool: what merges, as what, equal at several sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captured import Function, randomised
from captured import random as normal
from torch import Tensor, nn

import convmerge

Make = Callable[[], nn.Module]


def conv(into: int, out: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def around(resample: Callable[[Tensor], Tensor]) -> nn.Module:
    """A channel mix with a bias on either side."""
    return Function(lambda m, x: m.after(resample(m.before(x))), before=conv(6, 9, 1), after=conv(9, 4, 1))


class BlurPool(nn.Module):
    """Reflection padding, then one binomial filter for all channels, at stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.channels = channels
        self.register_buffer("taps", (taps[:, None] * taps)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 2, 1, 2), mode="reflect")
        return F.conv2d(padded, self.taps.expand(self.channels, -1, -1, -1), stride=2, groups=self.channels)


MERGES: list[tuple[Make, tuple[int, ...], str]] = [
    (lambda: nn.Sequential(nn.PixelUnshuffle(2), conv(24, 32)), (6, 64, 64), "one Conv2d(6, 32, 6×6"),
    (
        lambda: nn.Sequential(nn.PixelUnshuffle(2), conv(24, 32, 1)),
        (6, 64, 64),
        "one Conv2d(6, 32, 2×2, stride 2)",
    ),
    (
        lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"), conv(16, 16)),
        (16, 64, 64),
        "Conv2d(16, 64, 2×2, padding 1) → phases interleaved 2×2",
    ),
    (
        lambda: nn.Sequential(conv(6, 64), nn.ConvTranspose2d(64, 3, 4, 2, 1)),
        (6, 64, 64),
        "9 border classes of Conv2d(6, 12, 5×5) → phases interleaved 2×2",
    ),
    (
        lambda: nn.Sequential(nn.ConvTranspose2d(6, 64, 2, 2), conv(64, 8, 1)),
        (6, 32, 32),
        "Conv2d(6, 32, 1×1) → PixelShuffle(2)",
    ),
    (lambda: nn.Sequential(BlurPool(6), conv(6, 9, 1), conv(9, 2, 1)), (6, 33, 40), "one Conv2d(6, 2"),
    (lambda: around(nn.AvgPool2d(2, ceil_mode=True)), (6, 33, 40), "one Conv2d(6, 4, 1×1)"),
    (lambda: around(nn.AvgPool2d(3, 2, 1, count_include_pad=False)), (6, 33, 40), "one Conv2d(6, 4, 1×1)"),
    (lambda: around(nn.AdaptiveAvgPool2d((16, 20))), (6, 32, 40), "one Conv2d(6, 4, 1×1)"),
    (lambda: around(nn.Upsample(scale_factor=2, mode="bilinear")), (6, 13, 16), "one Conv2d(6, 4, 1×1)"),
    (
        lambda: around(nn.Upsample(scale_factor=0.5, mode="bilinear", align_corners=True)),
        (6, 33, 40),
        "one Conv2d(6, 4, 1×1)",
    ),
    (
        lambda: around(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True)),
        (6, 13, 16),
        "one Conv2d(6, 4, 1×1)",
    ),
    (
        lambda: around(lambda x: F.interpolate(x, scale_factor=2, recompute_scale_factor=True)),
        (6, 13, 16),
        "one Conv2d(6, 4, 1×1)",
    ),
    (lambda: around(nn.ReflectionPad2d((1, 2, 3, 0))), (6, 13, 16), "one Conv2d(6, 4, 1×1)"),
    (lambda: around(nn.ReplicationPad2d(2)), (6, 13, 16), "one Conv2d(6, 4, 1×1)"),
    (
        lambda: nn.Sequential(conv(6, 32, 1), nn.ReflectionPad2d(1), nn.Conv2d(32, 4, 3)),
        (6, 33, 40),
        "one Conv2d(6, 4, 3×3)",
    ),
]


@pytest.mark.parametrize(("make", "shape", "words"), MERGES)
def test_what_merges(make: Make, shape: tuple[int, ...], words: str) -> None:
    model = randomised(make())
    result = convmerge.fuse(model, normal(1, *shape, seed=1))
    (site,) = result.report.merged()
    assert words in site.reason
    channels, height, width = shape
    for more in (0, 1, 2, 4):
        x = normal(2, channels, height + more, width + 3 * more, seed=more)
        try:
            expected = model(x)
        except RuntimeError:  # no multiple of PixelUnshuffle's factor
            continue
        torch.testing.assert_close(result.model(x), expected, rtol=1e-11, atol=1e-11)
    if "phases" in words:
        assert not convmerge.inspect(result.model, normal(1, *shape, seed=1)).merged()


Resample = Callable[[Tensor], Tensor]
SMALL_FIRST: list[tuple[str, Resample]] = [
    ("interpolate", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    ("interpolate", lambda x: F.interpolate(x, scale_factor=3.5, mode="bilinear", align_corners=True)),
    ("interpolate", lambda x: F.interpolate(x, size=(x.shape[2] * 3, 41), mode="bilinear")),
    ("interpolate", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
    ("interpolate", lambda x: F.interpolate(x, scale_factor=1.7, mode="nearest")),
    ("interpolate", lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact")),
    ("interpolate", lambda x: F.interpolate(F.interpolate(x, (20, 20)), (47, 31), mode="bilinear")),
    ("reflect pad", lambda x: F.pad(x, (6, 5, 7, 3), mode="reflect")),
    ("replicate pad", lambda x: F.pad(x, (6, 5, 7, 3), mode="replicate")),
    ("circular pad", lambda x: F.pad(x, (6, 5, 7, 3), mode="circular")),
]


def unchanged_at_other_sizes(result: convmerge.Result, model: nn.Module, channels: int) -> None:
    assert result.report.verification is not None
    assert result.report.verification.equal
    for size in ((13, 16), (14, 11), (29, 37)):
        x = normal(2, channels, *size, seed=size[0])
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("index", range(len(SMALL_FIRST)))
def test_pointwise_filters_behind_an_enlargement_run_in_front_of_it(index: int) -> None:
    name, resample = SMALL_FIRST[index]
    layers = {"c": conv(23, 7, 1), "n": nn.BatchNorm2d(7)}
    model = randomised(Function(lambda m, x: m.n(m.c(resample(x)) * 3).relu(), **layers))
    result = convmerge.fuse(model, normal(1, 23, 13, 16))
    (site,) = result.report.merged()
    assert site.reason == f"one Conv2d(23, 7, 1×1) in front of {name}"
    assert result.report.after is not None
    assert result.report.after.macs == 23 * 7 * 13 * 16
    unchanged_at_other_sizes(result, model, 23)


SMALL_LAST: list[tuple[str, Resample]] = [
    ("interpolate", lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear")),
    ("interpolate", lambda x: F.interpolate(x, scale_factor=0.4, mode="nearest")),
    ("interpolate", lambda x: F.interpolate(x, size=(5, 6), mode="bicubic", antialias=True)),
    ("adaptive_avg_pool", lambda x: F.adaptive_avg_pool2d(x, (5, 3))),
    ("adaptive_avg_pool", lambda x: F.interpolate(x, scale_factor=0.3, mode="area")),
    ("avg_pool", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    ("avg_pool", lambda x: F.avg_pool2d(x, 3, ceil_mode=True)),
    ("mean", lambda x: x.mean((2, 3))),
    ("mean", lambda x: x.mean(-1)),
]


@pytest.mark.parametrize("index", range(len(SMALL_LAST)))
def test_pointwise_filters_in_front_of_a_reduction_run_behind_it(index: int) -> None:
    name, resample = SMALL_LAST[index]
    layers = {"c": conv(7, 23, 1), "n": nn.BatchNorm2d(23)}
    model = randomised(Function(lambda m, x: resample(m.n(m.c(x)) * 3).relu(), **layers))
    result = convmerge.fuse(model, normal(1, 7, 13, 16))
    (site,) = result.report.merged()
    assert site.reason.endswith(f" behind {name}")
    assert site.macs_after < site.macs_before / 2
    unchanged_at_other_sizes(result, model, 7)


def test_a_pooled_map_is_mixed_before_it_is_resized_to_the_shape_of_the_whole() -> None:
    """As in the image pooling of DeepLab."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        pooled = m.c(F.interpolate(F.adaptive_avg_pool2d(x.relu(), 1).relu(), size=size))  # type: ignore[operator]
        return pooled.sigmoid() * x  # type: ignore[no-any-return]

    model = randomised(Function(forward, c=conv(23, 23, 1)))
    result = convmerge.fuse(model, normal(1, 23, 13, 16))
    assert [site.reason for site in result.report.merged()] == [
        "one Conv2d(23, 23, 1×1) in front of interpolate"
    ]
    unchanged_at_other_sizes(result, model, 23)


def test_modules_in_a_row_stay_such() -> None:
    """Without code of its own, the file of the result can be loaded without trusting it."""
    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    model = randomised(nn.Sequential(nn.ReLU(), up, conv(23, 7, 1), nn.ReLU()))
    result = convmerge.fuse(model, normal(1, 23, 13, 16))
    kinds = [type(m) for m in result.model.modules()]
    assert kinds.index(nn.Conv2d) < kinds.index(nn.Upsample)
    assert {kind.__module__.split(".")[0] for kind in kinds} == {"torch"}
    assert nn.Identity in kinds
    unchanged_at_other_sizes(result, model, 23)


def test_one_module_called_twice() -> None:
    """What is in front of the one call is not in front of the other."""
    up = nn.Upsample(scale_factor=2, mode="bilinear")
    model = Function(lambda m, x: (m.c(m.up(x)).relu(), m.up(x.relu())), up=up, c=conv(23, 7, 1))
    model = randomised(model)
    x = normal(1, 23, 13, 16)
    result = convmerge.fuse(model, x)
    assert len(result.report.merged()) == 1
    for found, expected in zip(result.model(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_map_that_changes_before_it_is_read_again() -> None:
    """Behind the pool, the filter would see what is written to its input in between."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = x.exp()
        y = m.c(x)  # type: ignore[operator]
        x.add_(1)
        return y.mean((2, 3)) + x.mean()  # type: ignore[no-any-return]

    model = randomised(Function(forward, c=conv(7, 23, 1)))
    report = convmerge.fuse(model, normal(1, 7, 13, 16)).report
    assert not report.merged()
    assert any("changed in place by add" in site.reason for site in report.sites)


def test_what_costs_more_on_the_other_side_stays_there_and_says_so() -> None:
    model = randomised(nn.Sequential(conv(64, 3, 1), nn.AdaptiveAvgPool2d(15)))
    report = convmerge.inspect(model, normal(1, 64, 16, 16))
    (site,) = report.sites
    assert site.action == "keep"
    assert site.reason.startswith("costs more on the other side of the adaptive_avg_pool: ")


def test_filters_stay_behind_pools_that_enlarge_small_examples_alone() -> None:
    model = randomised(nn.Sequential(nn.AdaptiveAvgPool2d(32), conv(23, 7, 1), nn.BatchNorm2d(7)))
    (site,) = convmerge.inspect(model, normal(1, 23, 13, 16)).merged()
    assert site.operators == ("conv 1×1", "batch_norm")


def test_pooling_at_a_ratio_of_one_size_alone_stays() -> None:
    """At other sizes the windows of adaptive pooling differ, so that it is no filter that could be merged."""
    model = randomised(nn.Sequential(conv(6, 8), nn.AdaptiveAvgPool2d(16), conv(8, 4)))
    report = convmerge.inspect(model, normal(1, 6, 32, 32))
    assert not report.merged()
    assert any("stands between two filters" in site.reason for site in report.sites)
