"""The models of the benchmarks, by name: those of tests/zoo.py and more, built from packages on demand.

``build(name, size)`` raises ImportError where a package is missing. VAE decoders are made by diffusers where
that can be imported, and otherwise written here in the same shape.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import zoo

Built = tuple[nn.Module, Tensor]
Builder = Callable[[int], Built]


def _torchsr(name: str) -> Builder:
    def make(size: int) -> Built:
        module = importlib.import_module("torchsr.models")
        return getattr(module, name)(scale=4, pretrained=False), zoo.image(size).sigmoid()

    return make


def _spandrel(module: str, name: str, **options: object) -> Builder:
    def make(size: int) -> Built:
        kind = getattr(importlib.import_module(f"spandrel.architectures.{module}"), name)
        return kind(**options), zoo.image(size).sigmoid()

    return make


def _timm(name: str) -> Builder:
    return lambda size: zoo.timm(name, size)


def _unet(encoder: str) -> Builder:
    def make(size: int) -> Built:
        kind = importlib.import_module("segmentation_models_pytorch").Unet
        return kind(encoder, encoder_weights=None), zoo.image(size)

    return make


def vae_decoder(size: int) -> Built:
    """The decoder of a diffusion model's autoencoder: groups norms, SiLU, nearest upsampling, 3×3 convs."""
    latents = zoo.image(size, 4)
    try:
        kind = importlib.import_module("diffusers").AutoencoderKL
    except ImportError:
        return VaeDecoder((256, 128, 64)), latents
    blocks = 3
    vae = kind(
        block_out_channels=(64, 128, 256),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        layers_per_block=1,
    )
    return vae.decoder, latents


class VaeBlock(nn.Module):
    """Two normalised convolutions with a shortcut."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(32, into), nn.SiLU(), nn.Conv2d(into, out, 3, padding=1))
        self.second = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(self.first(x))


class VaeDecoder(nn.Sequential):
    """Latents with 4 channels → an image, twice as large after every stage but the last."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        layers: list[nn.Module] = [nn.Conv2d(4, channels[0], 3, padding=1)]
        into = channels[0]
        for stage, out in enumerate(channels):
            layers += [VaeBlock(into, out), VaeBlock(out, out)]
            if stage + 1 < len(channels):
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(out, out, 3, padding=1)]
            into = out
        layers += [nn.GroupNorm(32, into), nn.SiLU(), nn.Conv2d(into, 3, 3, padding=1)]
        super().__init__(*layers)


_RGT = {"embed_dim": 60, "depth": [2, 2], "num_heads": [6, 6], "upscale": 4, "split_size": [8, 32]}

# name → (builder, usual size)
MORE: dict[str, tuple[Builder, int]] = {
    **{
        f"torchsr/{name}": (_torchsr(name), 96)
        for name in ("edsr_baseline", "carn", "rdn", "ninasr_b0", "rcan")
    },
    "spandrel/RCAN": (_spandrel("RCAN.__arch.rcan_arch", "RCAN", n_resgroups=3), 96),
    "spandrel/RGT": (_spandrel("RGT.__arch.rgt", "RGT", **_RGT), 64),
    "smp/Unet-resnet18": (_unet("resnet18"), 224),
    "smp/Unet-mobilenet_v2": (_unet("mobilenet_v2"), 224),
    "vae decoder": (vae_decoder, 32),
    **{
        f"timm/{name}": (_timm(name), size)
        for name, size in (
            ("convnext_atto_ols", 224),
            ("convnext_femto_ols", 224),
        )
    },
}
NAMES = [*(name for name in zoo.MODELS if name not in MORE), *MORE]


def build(name: str, size: int | None = None, *, seed: int = 0) -> Built:
    """A model in eval mode with calibrated statistics, and an input of batch 1; ``size`` only for super
    resolution and decoders. Raises ImportError.
    """
    if name not in MORE:
        return zoo.build(name, seed=seed)
    torch.manual_seed(seed)
    make, usual = MORE[name]
    model, x = make(size or usual)
    return models.calibrate(model, x, seed=seed), x
