"""Published blocks and real models, fused in float64: the same function, with the expected operators left."""

from __future__ import annotations

import copy

import authored
import models
import pytest
import torch
import zoo
from torch import Tensor, nn

import convmerge
from convmerge.counts import count
from convmerge.inputs import as_inputs

BLOCKS: dict[str, dict[str, int]] = {
    "sesr": {"conv": 4, "add": 2},
    "span": {"conv": 3, "pad": 0},
    "repvgg": {"conv": 3, "batch_norm": 0, "add": 0},
    "mobileone": {"conv": 4, "batch_norm": 0, "add": 0},
    "acnet": {"conv": 2, "batch_norm": 0, "add": 0},
    "doconv": {"conv": 2, "batch_norm": 0},
    "lora": {"linear": 2, "add": 0},
    "inception": {"conv": 3, "batch_norm": 0},
    "bottleneck": {"conv": 6, "batch_norm": 0},
    "unet": {"conv": 4, "conv_transpose": 1, "batch_norm": 0, "interpolate": 0},
    "ecb": {"conv": 2, "add": 0},
    "dbb": {"conv": 2, "batch_norm": 0, "add": 0},
}

REAL: dict[str, dict[str, int]] = {
    "torchvision/resnet50": {"conv": 52, "linear": 1, "batch_norm": 0, "add": 16},
    "torchvision/mobilenet_v2": {"conv": 52, "linear": 1, "batch_norm": 0, "add": 10},
    "torchvision/densenet121": {"conv": 120, "linear": 1, "batch_norm": 62},
    "torchvision/googlenet": {"conv": 39, "linear": 1, "batch_norm": 0},
    "torchvision/deeplabv3_resnet50": {"conv": 63, "batch_norm": 0, "add": 20},
    "timm/resnetv2_50x1_bit": {"conv": 53, "batch_norm": 0, "add": 16},
    "timm/xception41": {"conv": 84, "linear": 1, "batch_norm": 0, "add": 12},
    "timm/mobilenetv2_100": {"conv": 52, "linear": 1, "batch_norm": 0, "add": 10},
    "timm/repvgg_a0": {"conv": 22, "linear": 1, "batch_norm": 0, "add": 0},
    "timm/mobileone_s1": {"conv": 43, "linear": 1, "batch_norm": 0, "add": 0},
    "timm/fastvit_t8": {"conv": 52, "linear": 1, "batch_norm": 0},
    "timm/repghostnet_100": {"conv": 95, "linear": 1, "batch_norm": 0, "add": 16},
    "torchsr/edsr_baseline": {"conv": 44, "batch_norm": 0, "add": 17},
    "sesr": {"conv": 7},
    "span": {"conv": 9, "pad": 0},
}


def distance(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """The largest difference over all outputs, relative to the largest value of that output."""
    with torch.no_grad():
        pairs = zip(zoo.outputs(a(x.clone())), zoo.outputs(b(x.clone())), strict=True)
        return max(float((p - q).abs().max() / p.abs().max()) for p, q in pairs)


def check(model: nn.Module, x: Tensor, expected: dict[str, int], tolerance: float) -> None:
    model, x = copy.deepcopy(model).double(), x.double()
    result = convmerge.fuse(model, x)
    verification = result.report.verification
    assert verification is None or verification.equal, verification
    assert not any("dropped" in warning for warning in result.report.warnings), result.report.warnings
    assert distance(model, result.model, x) < tolerance
    assert distance(model, result.model, torch.randn(3, *x.shape[1:], dtype=x.dtype)) < tolerance
    calls = models.operators(result.model, x)
    assert {kind: calls.get(kind, 0) for kind in expected} == expected, calls


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str) -> None:
    check(*models.build(name), BLOCKS[name], 1e-12)


@pytest.mark.long
@pytest.mark.parametrize("name", REAL)
def test_real_model(name: str) -> None:
    check(*zoo.build(name), REAL[name], 1e-9)


# MACs after fusing over those before, and how many chains are kept because they cost more as one.
MACS: dict[str, tuple[float, int]] = {
    "torchvision/densenet121": (0.92, 0),
    "timm/mobilevitv2_050": (0.88, 3),
    "timm/fastvit_t8": (1.0, 13),
    "timm/xception41": (1.0, 30),
    "timm/mobilenetv2_100": (1.0, 1),
    "torchvision/shufflenet_v2_x1_0": (1.0, 19),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MACS)
def test_chains_of_real_models_merge_where_that_pays_and_are_kept_where_not(name: str) -> None:
    ratio, kept = MACS[name]
    report = convmerge.inspect(*zoo.build(name))
    assert report.before is not None and report.saving is not None
    saved = sum(site.macs_before - site.macs_after for site in report.merged())
    assert 1 - saved / report.before.macs <= ratio
    assert report.saving.latency_after < report.saving.latency_before
    reasons = [site.reason for site in report.sites if site.action == "keep"]
    assert len(reasons) >= kept, reasons
    assert all("× the" in r or "where there was none" in r for r in reasons), reasons


@pytest.mark.long
@pytest.mark.parametrize("name", authored.AUTHORED)
def test_no_more_is_left_than_authors_leave(name: str) -> None:
    model, merged, x = authored.build(name)
    theirs = count(merged, as_inputs(x))
    model, x = model.double(), x.double() if x.is_floating_point() else x
    result = convmerge.fuse(model, x)
    ours = result.report.after
    assert ours is not None
    assert not any("dropped" in warning for warning in result.report.warnings), result.report.warnings
    left, theirs_left = (sum(c.operators.get(k, 0) for k in ("conv", "linear")) for c in (ours, theirs))
    # A filter on a concatenation can be two, one of them where the map is smaller: more layers, fewer MACs.
    assert left <= theirs_left or ours.macs < 0.98 * theirs.macs
    assert ours.operators.get("batch_norm", 0) == 0
    assert ours.macs <= theirs.macs
    assert authored.distance(model, result.model, x) < 1e-9
