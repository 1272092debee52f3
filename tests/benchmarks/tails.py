"""How much faster tails, stems and resampling become, at several sizes: paired, original / fused in one run.

    python tests/benchmarks/tails.py [NAME ...] [--pairs 9] [--threads N]

NAME is any part of a case's name. ``predicted`` is the cost model's ratio, beside the measured median and its
middle half. A case that is left alone is shown with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from latency import speedup
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import convmerge

COLUMNS = "{:34} {:>9} {:>8} {:>15} {:>7} {:>8}  {}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(COLUMNS.format("case", "predicted", "faster", "middle half", "MACs", "weights", "becomes"))
    for name, model, x in cases():
        if not arguments.names or any(part in name for part in arguments.names):
            measure(name, model.eval(), x, arguments.pairs)


def cases() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, model and example input."""
    for rates in ((2,), (3,), (2, 2)):
        scale = "×".join(map(str, rates))
        for size in (24, 96, 192):
            yield f"EDSR tail ×{scale}, {size}²", edsr_tail(64, *rates), torch.randn(1, 64, size, size)
    for channels, size in ((64, 128), (256, 64), (512, 32)):
        up = nn.Sequential(nn.Upsample(scale_factor=2), conv(channels, channels))
        yield f"nearest ×2, conv {channels}, {size}²", up, torch.randn(1, channels, size, size)
    for out in (64, 96):
        stem = nn.Sequential(conv(3, out // 2, stride=2), conv(out // 2, out, stride=2))
        yield f"stem 3→{out // 2}→{out}, 224²", stem, torch.randn(1, 3, 224, 224)
    for wide in (64, 128):
        yield (
            f"wide 16→{wide}→16, 56²",
            nn.Sequential(conv(16, wide), conv(wide, 16)),
            torch.randn(1, 16, 56, 56),
        )
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


def measure(name: str, model: nn.Module, x: Tensor, pairs: int) -> None:
    """Fuse, time and print one row."""
    result = convmerge.fuse(model, x)
    merged = result.report.merged()
    if not merged:
        reasons = "; ".join(site.reason for site in result.report.sites)
        print(COLUMNS.format(name, "", "", "", "", "", f"as it was: {reasons}"), flush=True)
        return
    before, after = result.report.before, result.report.after
    low, median, high = speedup(model, result.model, x, pairs)
    predicted = sum(s.latency_before for s in merged) / sum(s.latency_after for s in merged)
    print(
        COLUMNS.format(
            name,
            f"{predicted:.2f}×",
            f"{median:.2f}×",
            f"{low:.2f} – {high:.2f}×",
            f"{after.macs / before.macs:.3f}×",
            f"{after.parameters / before.parameters:.2f}×",
            merged[0].reason,
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
