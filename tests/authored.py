"""Real models whose authors merge them by hand: the original, and what the authors' own code makes of it.

``build(name)`` imports what it needs and raises ImportError where that is not installed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import models
import torch
import zoo
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]
Merge = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Authored:
    """How a model is made, with an input, and how its authors merge it (in place, in single precision)."""

    make: Callable[[], Built]
    merge: Merge


class Logits(nn.Module):
    """A language model as a function of token ids alone.

    It is called past peft's wrapper, which merging by hand takes off: 0.05 ms of Python in every call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        inner = getattr(self.model, "get_base_model", lambda: self.model)()
        logits: Tensor = inner(input_ids=ids).logits
        return logits


def timm(name: str, size: int) -> Authored:
    return Authored(lambda: zoo.timm(name, size), _reparameterize)


def smp(encoder: str, size: int) -> Authored:
    def make() -> Built:
        kind = importlib.import_module("segmentation_models_pytorch").Unet
        return kind(encoder, encoder_weights=None), zoo.image(size)

    return Authored(make, _reparameterize)


def ultralytics(name: str, size: int, kind: str = "DetectionModel") -> Authored:
    def make() -> Built:
        tasks = importlib.import_module("ultralytics.nn.tasks")
        return getattr(tasks, kind)(f"{name}.yaml", verbose=False), zoo.image(size).sigmoid()

    return Authored(make, lambda model: model.fuse(verbose=False))  # type: ignore[operator]


def peft(config: str, **options: Any) -> Authored:
    """A small Llama with adapters on four of its linear layers."""

    def make() -> Built:
        library, transformers = importlib.import_module("peft"), importlib.import_module("transformers")
        shape = transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=131,
            use_cache=False,
            attn_implementation="eager",
        )
        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        settings = getattr(library, config)(target_modules=targets, **options)
        model = library.get_peft_model(transformers.LlamaForCausalLM(shape), settings)
        return Logits(_perturbed(model, *ADAPTERS)), IDS

    return Authored(make, _unload)


IDS = torch.arange(17)[None]
# Parts of the names of adapters' parameters.
ADAPTERS = (
    *("lora_", "hada_", "lokr_", "vera_", "oft_", "fourierft", "ia3_"),
    *("miss_", "road_", "waveft_"),
)


@torch.no_grad()
def _perturbed(model: nn.Module, *parts: str) -> nn.Module:
    """Adapters begin as no change at all: make them one."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts) and parameter.is_floating_point():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def _reparameterize(model: nn.Module) -> nn.Module:
    merged: nn.Module = importlib.import_module("timm.utils.model").reparameterize_model(model)
    return merged


def _unload(model: nn.Module) -> nn.Module:
    model.model = model.model.merge_and_unload()  # type: ignore[operator, union-attr]
    return model


AUTHORED: dict[str, Authored] = {
    "timm/repvgg_a0": timm("repvgg_a0", 224),
    "timm/mobileone_s0": timm("mobileone_s0", 224),
    "timm/mobileone_s1": timm("mobileone_s1", 224),
    "timm/fastvit_t8": timm("fastvit_t8", 256),
    "timm/fastvit_mci0": timm("fastvit_mci0", 256),
    "timm/repghostnet_100": timm("repghostnet_100", 224),
    "timm/ghostnetv3_100": timm("ghostnetv3_100", 224),
    "timm/repvit_m1": timm("repvit_m1", 224),
    "timm/levit_conv_128s": timm("levit_conv_128s", 224),
    "timm/tiny_vit_5m_224": timm("tiny_vit_5m_224", 224),
    "timm/efficientvit_m0": timm("efficientvit_m0", 224),
    "ultralytics/yolov5n": ultralytics("yolov5n", 320),
    "ultralytics/yolov6n": ultralytics("yolov6n", 320),
    "ultralytics/yolov8n": ultralytics("yolov8n", 320),
    "ultralytics/yolov9t": ultralytics("yolov9t", 320),
    "ultralytics/yolo11n": ultralytics("yolo11n", 320),
    "ultralytics/yolo12n": ultralytics("yolo12n", 320),
    "ultralytics/rtdetr-l": ultralytics("rtdetr-l", 320, "RTDETRDetectionModel"),
    "smp/Unet-mobileone_s0": smp("mobileone_s0", 128),
    "peft/LoRA": peft("LoraConfig", r=4, lora_dropout=0.1),
    "peft/DoRA": peft("LoraConfig", r=4, use_dora=True),
    "peft/IA3": peft("IA3Config", feedforward_modules=["down_proj"]),
    "peft/LoHa": peft("LoHaConfig", r=4),
    "peft/LoKr": peft("LoKrConfig", r=4),
    "peft/VeRA": peft("VeraConfig", r=4),
    "peft/OFT": peft("OFTConfig", oft_block_size=8),
    "peft/BOFT": peft("BOFTConfig", boft_block_size=8, boft_n_butterfly_factor=2),
    "peft/HRA": peft("HRAConfig", r=4),
    "peft/FourierFT": peft("FourierFTConfig", n_frequency=50),
    "peft/WaveFT": peft("WaveFTConfig", n_frequency=50),
    "peft/MiSS": peft("MissConfig", r=4),
    "peft/GraLoRA": peft("GraloraConfig", r=4, gralora_k=2, hybrid_r=2),
    "peft/RoAD": peft("RoadConfig", variant="road_4", group_size=8),
    "peft/PVeRA": peft("PveraConfig", r=4),
}


def build(name: str, *, seed: int = 0) -> tuple[nn.Module, nn.Module, Tensor]:
    """The original and the authors' merged model, in eval mode and single precision, and an input."""
    torch.manual_seed(seed)
    authored = AUTHORED[name]
    with contextlib.redirect_stdout(io.StringIO()):
        model, x = authored.make()
        if x.is_floating_point():
            models.calibrate(model, x, seed=seed)
        model = model.eval().requires_grad_(False)
        merged = authored.merge(copy.deepcopy(model)).eval()
    return model, merged, x


def tensors(result: Any) -> list[Tensor]:
    """All floating-point tensors of an output, in order."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    values = result.values() if isinstance(result, dict) else result
    return [x for value in values for x in tensors(value)] if isinstance(values, list | tuple) else []


@torch.no_grad()
def distance(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """The largest difference over the outputs that both have, relative to the largest value of each."""
    pairs = zip(tensors(a(x.clone())), tensors(b(x.clone())), strict=False)
    return max(float((p - q).abs().max() / p.abs().max()) for p, q in pairs)
