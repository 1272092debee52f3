"""How much faster tails, stems and resampling become, at several sizes: original and fused run in turn.

    python tests/benchmarks/tails.py [NAME ...] [--pairs 9] [--threads 2] [--measure] [--quick]

NAME is any part of a case's name. A case that is left alone is shown with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from table import HEAD, attempted, compared, parsed, parser
from torch import Tensor, nn

import convmerge


def main() -> None:
    found = parser(__doc__, pairs=9)
    found.add_argument("--measure", action="store_true", help="plan by measured costs")
    arguments = parsed(found)
    print(HEAD, " becomes")
    for name, model, x in cases():
        if not arguments.names or any(part in name for part in arguments.names):
            attempted(name, partial(row, name, model.eval(), x, arguments.pairs, arguments.measure))


def cases() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, model and example input."""
    for rates in ((2,), (3,), (2, 2)):
        scale = "×".join(map(str, rates))
        for size in (24, 96, 192):
            yield f"EDSR tail ×{scale}, {size}²", edsr_tail(64, *rates), torch.randn(1, 64, size, size)
    yield "EDSR tail ×2×2, 48²", edsr_tail(64, 2, 2), torch.randn(1, 64, 48, 48)
    for channels, size in ((64, 128), (256, 64), (512, 32)):
        up = nn.Sequential(nn.Upsample(scale_factor=2), conv(channels, channels))
        yield f"nearest ×2, conv {channels}, {size}²", up, torch.randn(1, channels, size, size)
    for out in (64, 96):
        stem = nn.Sequential(conv(3, out // 2, stride=2), conv(out // 2, out, stride=2))
        yield f"stem 3→{out // 2}→{out}, 224²", stem, torch.randn(1, 3, 224, 224)
    for groups in (1, 4):
        padded = nn.Conv2d(24, 24, 5, padding=2, groups=groups)
        pair = nn.Sequential(nn.Conv2d(24, 24, 1, groups=groups), padded)
        yield f"1×1, padded 5×5 groups {groups}, 56²", pair, torch.randn(1, 24, 56, 56)
    for wide in (64, 128):
        yield (
            f"wide 16→{wide}→16, 56²",
            nn.Sequential(conv(16, wide), conv(wide, 16)),
            torch.randn(1, 16, 56, 56),
        )
    for channels, size in ((256, 56), (512, 28), (1024, 14)):
        pair = nn.Sequential(nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2))
        yield f"1×1 {channels}, average pool, {size}²", pair, torch.randn(1, channels, size, size)
    pooled = nn.Sequential(conv(64, 64), nn.AvgPool2d(3, 2, 1))
    yield "conv 64, padded average pool, 56²", pooled, torch.randn(1, 64, 56, 56)
    line = nn.Sequential(nn.Conv1d(8, 64, 5, padding=2), nn.Conv1d(64, 8, 5, padding=2))
    yield "1-d 8→64→8, 2000", line, torch.randn(1, 8, 2000)
    cube = nn.Sequential(nn.Conv3d(4, 64, 3, padding=1), nn.Conv3d(64, 4, 3, padding=1))
    yield "3-d 4→64→4, 24³", cube, torch.randn(1, 4, 24, 24, 24)


def conv(into: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, stride, padding=1)


def edsr_tail(channels: int, *rates: int) -> nn.Sequential:
    """conv → PixelShuffle for each rate, then a conv to three channels."""
    layers: list[nn.Module] = []
    for rate in rates:
        layers += [conv(channels, channels * rate**2), nn.PixelShuffle(rate)]
    return nn.Sequential(*layers, conv(channels, 3))


def row(name: str, model: nn.Module, x: Tensor, pairs: int, measure: bool) -> str:
    result = convmerge.fuse(model, x, measure=measure)
    merged = result.report.merged()
    if not merged:
        reasons = "; ".join(site.reason for site in result.report.sites)
        return f"{name:34} as it was: {reasons}"
    return f"{compared(name, model, result.model, result.report, x, pairs)}  {merged[0].reason}"


if __name__ == "__main__":
    main()
