"""Whether any model gets slower: original / fused, and torch.fx's folding of batch norms / fused, in turn.

    python tests/benchmarks/whole.py [NAME ...] [--pairs 9] [--threads 2] [--quick]

NAME is any part of a model's name. Below 0.97× a figure is marked. torch.fx folds batch norms where it can
trace a model; elsewhere that column is empty.
"""

from __future__ import annotations

import statistics
import warnings

import catalogue
import models
import torch
import zoo
from table import chosen, parsed, parser, predicted
from torch import Tensor, nn
from torch.fx.experimental import optimization

import convmerge
from convmerge.benchmark import speedup
from convmerge.inputs import as_inputs

LEAST = 0.97
COLUMNS = "{:34} {:>10} {:>15} {:>9} {:>12} {:>7}"

TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 mnasnet1_0 mobilenet_v2 "
    "mobilenet_v3_small mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d "
    "shufflenet_v2_x1_0 squeezenet1_1 swin_t vgg11_bn vit_b_16 wide_resnet50_2"
)
TIMM = (
    "convmixer_768_32 convnext_atto cspresnet50 darknet53 deit_tiny_patch16_224 dla34 efficientformer_l1 "
    "efficientvit_b0 fastvit_t8 fbnetc_100 ghostnet_100 hardcorenas_a hrnet_w18_small lcnet_050 "
    "levit_conv_128s mixer_s32_224 mixnet_s mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small "
    "mobileone_s1 mobilevit_xxs mobilevitv2_050 nf_resnet50 pit_ti_224 poolformer_s12 regnetx_002 "
    "regnety_002 repghostnet_100 repvgg_a0 repvit_m1 res2net50_14w_8s resmlp_12_224 resnest14d resnet18d "
    "resnetv2_50 rexnet_100 selecsls42b seresnet50 skresnet18 spnasnet_100 tf_efficientnet_lite0 "
    "tiny_vit_5m_224 tinynet_e vovnet39a xception41 xcit_nano_12_p16_224"
)
NAMES = list(
    dict.fromkeys(
        [
            *(f"torchvision/{name}" for name in TORCHVISION.split()),
            *(f"timm/{n}" for n in TIMM.split()),
            *catalogue.NAMES,
        ]
    )
)


def main() -> None:
    arguments = parsed(parser(__doc__, pairs=9))
    print(COLUMNS.format("", "original", "middle half", "predicted", "folded", "MACs"))
    ratios: list[float] = []
    for name in chosen(NAMES, arguments.names):
        try:
            ratios.append(row(name, arguments.pairs))
        except Exception as error:  # a model that does not build or run here is not what is measured
            print(f"{name:34} skipped: {type(error).__name__}: {str(error).splitlines()[0][:60]}", flush=True)
    if ratios:
        slower = sum(ratio < LEAST for ratio in ratios)
        print(f"{len(ratios)} models, median {statistics.median(ratios):.2f}×, {slower} below {LEAST}×")


def build(name: str) -> tuple[nn.Module, Tensor]:
    package, _, short = name.partition("/")
    if name in catalogue.NAMES:
        return catalogue.build(name)
    torch.manual_seed(0)
    size = 299 if short in ("inception_v3", "xception41") else 224
    model, x = getattr(zoo, package)(short, size)
    return models.calibrate(model, x), x


def row(name: str, pairs: int) -> float:
    """Print a row; the ratio of original to fused."""
    model, x = build(name)
    result = convmerge.fuse(model, x)
    found = speedup(model, result.model, as_inputs(x), pairs=pairs)
    folded = folding(model, x)
    other = speedup(folded, result.model, as_inputs(x), pairs=pairs).median if folded is not None else None
    before, after = result.report.before, result.report.after
    assert before is not None and after is not None
    low, high = found.middle_half
    print(
        COLUMNS.format(
            name,
            marked(found.median),
            f"{low:.2f} – {high:.2f}×",
            predicted(result.report),
            "" if other is None else marked(other),
            f"{after.macs / max(before.macs, 1):.3f}×",
        ),
        flush=True,
    )
    return found.median


def folding(model: nn.Module, x: Tensor) -> nn.Module | None:
    """The model with batch norms folded by torch.fx; None where that fails."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folded = optimization.fuse(model)
            folded(x)
    except Exception:  # whatever the model's code does when it is traced
        return None
    return folded


def marked(ratio: float) -> str:
    return f"{ratio:.2f}×{' !' if ratio < LEAST else ''}"


if __name__ == "__main__":
    main()
