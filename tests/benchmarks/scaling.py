"""Whether the tool's time per layer stays constant as models grow.

    python tests/benchmarks/scaling.py [LAYERS ...]

Fuses synthetic chains of conv, batch norm and ReLU, tiny in every layer so that the tool's own work is
timed. Prints the time per layer relative to that of the shortest chain, for the whole and for every stage.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models

import convmerge

LAYERS = (200, 400, 800, 1600, 3200, 6400)


def chain(layers: int) -> nn.Sequential:
    """``layers`` modules: conv, batch norm and ReLU in turn.

    The batch norms shift by 3, so that most values pass the ReLU: a random network of this depth would
    otherwise amplify rounding errors until nothing of the input is left.
    """
    torch.manual_seed(0)
    model = nn.Sequential()
    for i in range(layers):
        model.append((nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())[i % 3])
    for norm in model[1::3]:
        nn.init.constant_(norm.bias, 3.0)
    return model


def main() -> None:
    sizes = [int(n) for n in sys.argv[1:]] or LAYERS
    x = torch.randn(1, 3, 8, 8)
    convmerge.fuse(chain(30).eval(), x)  # what a first call loads is not what grows
    reference: dict[str, float] = {}
    for layers in sizes:
        model = models.calibrate(chain(layers), x)
        start = time.perf_counter()
        report = convmerge.fuse(model, x).report
        total = time.perf_counter() - start
        assert len(report.merged()) == (layers + 1) // 3
        per_layer = {stage: spent / layers for stage, spent in {"total": total, **report.seconds}.items()}
        reference = reference or per_layer
        ratios = (f"{stage} {spent / reference[stage]:.2f}×" for stage, spent in per_layer.items())
        print(f"{layers:6} layers, time per layer: {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
