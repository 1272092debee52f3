"""What removing pruned channels gives: parameters, MACs, peak memory and latency, before and after.

    python tests/benchmarks/pruned.py [NAME ...] [--size 224] [--pairs 15] [--threads 2] [--quick]

Every convolution of a torchvision model is pruned by torch.nn.utils.prune.ln_structured, 30 % and 50 % of its
channels. Three rows each: the masked model fused, against the masked model; against the same model with the
masks made permanent (torch.nn.utils.prune.remove), which leaves zeros in weights of full size; and against
that model fused without removing any channel, so that the rest is what the removal alone gives. Peak memory
is that of the tensors alive at one time, weights not counted.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from table import attempted, chosen, parsed, parser
from torch import nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from silenced import pruned_model

import convmerge
from convmerge.benchmark import benchmark
from convmerge.evidence.capture import copy_model
from convmerge.inputs import Inputs, as_inputs

NAMES = ("resnet18", "vgg16_bn", "mobilenet_v2")
COLUMNS = "{:24} {:28} {:>17} {:>17} {:>19} {:>17} {:>8} {:>15}"
HEAD = ("model", "fused, against", "parameters", "MACs", "peak memory", "latency", "faster", "middle half")


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--size", type=int, default=224)
    arguments = parsed(found)
    print(COLUMNS.format(*HEAD))
    for name in chosen(NAMES, arguments.names):
        for amount in (0.3, 0.5):
            attempted(name, partial(rows, name, amount, arguments.size, arguments.pairs))


def rows(name: str, amount: float, size: int, pairs: int) -> str:
    """The masked model as it is, with permanent zeros, and fused as it is, each against the smaller one."""
    masked = pruned_model(name, amount)
    inputs = as_inputs(torch.randn(1, 3, size, size))
    smaller = convmerge.fuse(masked, inputs).model
    zeros = permanent(masked)
    wide = convmerge.fuse(nonzero(zeros), inputs).model
    title = f"{name}, {amount:.0%}"
    others = {"the masked model": masked, "zeros in the weights": zeros, "fused at full width": wide}
    return "\n".join(row(title, words, other, smaller, inputs, pairs) for words, other in others.items())


def permanent(model: nn.Module) -> nn.Module:
    """A copy with the masks made part of the weights."""
    model = copy_model(model)
    for module in model.modules():
        if prune.is_pruned(module) and isinstance(module, nn.Conv2d):
            prune.remove(module, "weight")
    return model


def nonzero(model: nn.Module) -> nn.Module:
    """A copy without zeros, so that no channel can be removed: its speed does not depend on the values."""
    model = copy_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter == 0] = 1e-3
    return model


def row(title: str, words: str, a: nn.Module, b: nn.Module, inputs: Inputs, pairs: int) -> str:
    found = benchmark(a, b, inputs, pairs=pairs)
    (before, after), (low, high) = found.counts, found.speedup.middle_half
    peaks, times = [p / 2**20 for p in found.peak_bytes], [s * 1e3 for s in found.speedup.seconds]
    return COLUMNS.format(
        title,
        words,
        f"{before.parameters / 1e6:.2f} → {after.parameters / 1e6:.2f} M",
        f"{before.macs / 1e6:.0f} → {after.macs / 1e6:.0f} M",
        f"{peaks[0]:.1f} → {peaks[1]:.1f} MiB",
        f"{times[0]:.1f} → {times[1]:.1f} ms",
        f"{found.speedup.median:.2f}×",
        f"{low:.2f} – {high:.2f}×",
    )


if __name__ == "__main__":
    main()
