"""The real models that convmerge is measured on, with random calibrated statistics.

``build(name)`` imports what it needs and raises ImportError where that is not installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import models
import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def torchvision(name: str, size: int, **options: Any) -> Built:
    get_model = importlib.import_module("torchvision.models").get_model
    return get_model(name, weights=None, **options), image(size)


def timm(name: str, size: int) -> Built:
    return importlib.import_module("timm").create_model(name, pretrained=False), image(size)


def edsr(size: int) -> Built:
    module = importlib.import_module("torchsr.models")
    return module.edsr_baseline(scale=4, pretrained=False), image(size).sigmoid()


def sesr(size: int) -> Built:
    """SESR-M5's proportions: 16 channels, 256 in between, scale 2."""
    return models.Sesr(channels=16, wide=256, blocks=5), image(size, 1).sigmoid()


def span(size: int) -> Built:
    """Three blocks of SPAN at its width."""
    return nn.Sequential(*(models.SpanBlock(48) for _ in range(3))), image(size, 48)


def image(size: int, channels: int = 3) -> Tensor:
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(1))


MODELS: dict[str, Callable[[], Built]] = {
    "torchvision/resnet50": lambda: torchvision("resnet50", 224),
    "torchvision/mobilenet_v2": lambda: torchvision("mobilenet_v2", 224),
    "torchvision/shufflenet_v2_x1_0": lambda: torchvision("shufflenet_v2_x1_0", 224),
    "torchvision/densenet121": lambda: torchvision("densenet121", 224),
    "torchvision/googlenet": lambda: torchvision("googlenet", 224, init_weights=False, aux_logits=False),
    "torchvision/deeplabv3_resnet50": lambda: torchvision("deeplabv3_resnet50", 128, weights_backbone=None),
    "timm/resnetv2_50x1_bit": lambda: timm("resnetv2_50x1_bit", 224),
    "timm/xception41": lambda: timm("xception41", 299),
    "timm/mobilenetv2_100": lambda: timm("mobilenetv2_100", 224),
    "timm/mobilevitv2_050": lambda: timm("mobilevitv2_050", 256),
    "timm/repvgg_a0": lambda: timm("repvgg_a0", 224),
    "timm/mobileone_s1": lambda: timm("mobileone_s1", 224),
    "timm/fastvit_t8": lambda: timm("fastvit_t8", 256),
    "timm/repghostnet_100": lambda: timm("repghostnet_100", 224),
    "torchsr/edsr_baseline": lambda: edsr(48),
    "sesr": lambda: sesr(96),
    "span": lambda: span(64),
}


def build(name: str, *, seed: int = 0) -> Built:
    """The model in eval mode and an input of batch 1. Raises ImportError where its package is missing."""
    torch.manual_seed(seed)
    model, x = MODELS[name]()
    return models.calibrate(model, x, seed=seed), x


def outputs(result: Any) -> list[Tensor]:
    """The tensors of an output that is a tensor, a dict of them, or an object with them as fields."""
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [x for x in values if isinstance(x, Tensor)]
