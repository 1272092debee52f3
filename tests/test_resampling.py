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


def test_pooling_at_a_ratio_of_one_size_alone_stays() -> None:
    """At other sizes the windows of adaptive pooling differ, so that it is no filter that could be merged."""
    model = randomised(nn.Sequential(conv(6, 8), nn.AdaptiveAvgPool2d(16), conv(8, 4)))
    report = convmerge.inspect(model, normal(1, 6, 32, 32))
    assert not report.merged()
    assert any("stands between two filters" in site.reason for site in report.sites)
