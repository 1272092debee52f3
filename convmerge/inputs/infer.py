"""Guess the input of a model from its first layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from convmerge.errors import ConvmergeError
from convmerge.evidence.copying import deep_copy
from convmerge.inputs.random import integer_range, random_tensor, seeded
from convmerge.inputs.values import Inputs, forward_parameters, model_device, model_dtype
from convmerge.io.pickles import printable

Shape = tuple[int, ...]

# Spatial sizes to try by number of dimensions, the most usual first.
_SIZES: dict[int, tuple[Shape, ...]] = {
    1: tuple((n,) for n in (256, 1024, 128, 64, 512, 100, 16000, 32, 16)),
    2: tuple((n, n) for n in (224, 256, 128, 64, 32, 28, 299, 512, 384, 96, 48, 16, 8)),
    3: ((16, 64, 64), (16, 112, 112), (32, 32, 32), (64, 64, 64), (8, 16, 16)),
}
# Models whose output is larger than their input (super-resolution) are as costly here as others at 224×224.
_ENLARGING: dict[int, Shape] = {1: (64,), 2: (64, 64), 3: (8, 16, 16)}
# Generators start from small maps and enlarge them many times.
_SMALL = (1, 4, 7, 8, 16, 32)
_LENGTHS = (16, 32, 64, 128, 8)
_MAX_LAYERS = 4


def infer_inputs(model: nn.Module, seed: int) -> Inputs:
    """Find an input the model runs on; runs a copy of it in eval mode without gradients. Batch size 1.

    Tried in turn, until one runs:

    1. the size the model states itself (``default_cfg["input_size"]`` of timm models);
    2. for the channels of the first layer in registration order: 64×64 if the model makes a larger map of it
       (super-resolution), then the common sizes 224, 256, 128, 64, 32, 28, 299, ...; 16 features or tokens
       where the layer has no spatial size;
    3. the same for the next few layers with other channels; images of 3 channels and of 1.

    Raises:
        ConvmergeError: ``forward`` takes several inputs, or nothing tried runs.
    """
    name = _only_input(model)
    trial = _copy(model)
    high, device = integer_range(model), model_device(model)
    first_failure = ""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for shape, dtype, must_enlarge in _candidates(model):
            value = random_tensor(shape, dtype, high, seeded(seed)).to(device)
            try:
                output = trial(value.clone())
            except Exception as error:  # a forward can fail in any way on a shape that does not fit
                first_failure = first_failure or f"; at {_text(shape)}: {_first_line(error)}"
                continue
            if not must_enlarge or _enlarged(value, output):
                return Inputs((value,), {}, True, (name,))
    raise ConvmergeError(
        f"the input shape cannot be inferred{first_failure}", "pass it as in --input 1,3,224,224"
    )


def _only_input(model: nn.Module) -> str:
    """Name of forward's one input."""
    parameters = forward_parameters(model)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in named if p.default is p.empty]
    if len(required) > 1:
        flags = " ".join(f"--input {name}=SHAPE" for name in required)
        raise ConvmergeError(
            f"forward needs {len(required)} inputs ({', '.join(required)}), whose shapes cannot be inferred",
            f"pass {flags}, with SHAPE as in 1,3,224,224",
        )
    first = [*required, *(p.name for p in named), *(p.name for p in parameters if p.kind is p.VAR_POSITIONAL)]
    if not first:
        raise ConvmergeError(
            "the model's forward takes no input",
            "convmerge needs a model that computes something from an input",
        )
    return first[0]


def _copy(model: nn.Module) -> nn.Module:
    try:
        return deep_copy(model, {}).eval()
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}")
        raise ConvmergeError(
            f"the model cannot be copied: {reason}", "give it plain parameters and attributes"
        ) from error


def _candidates(model: nn.Module) -> Iterator[tuple[Shape, torch.dtype, bool]]:
    """Shapes to try, with the dtype and whether to take the shape only if the model enlarges it."""
    dtype = model_dtype(model)
    stated = _stated_size(model)
    if stated is not None:
        yield (1, *stated), dtype, False
    seen: set[tuple[str, int]] = set()
    for module in model.modules():
        key = _key(module)
        if key is None or key in seen:
            continue
        seen.add(key)
        yield from _shapes(module, key[1], dtype)
        if len(seen) == _MAX_LAYERS:
            break
    for channels in (3, 1):
        if ("conv2", channels) not in seen:
            yield from (((1, channels, *size), dtype, False) for size in _SIZES[2])


def _stated_size(model: nn.Module) -> Shape | None:
    """Channels and size a timm model carries in its configuration."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
        if isinstance(size, (tuple, list)) and all(isinstance(n, int) and n > 0 for n in size):
            return tuple(size)
    return None


def _key(module: nn.Module) -> tuple[str, int] | None:
    """Kind and channels of a layer that tells something about the input."""
    if isinstance(module, nn.modules.conv._ConvNd):
        up = "up" if isinstance(module, nn.modules.conv._ConvTransposeNd) else "conv"
        return f"{up}{len(module.kernel_size)}", module.in_channels
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return f"norm{_norm_dims(module)}", module.num_features
    if isinstance(module, nn.Linear):
        return "linear", module.in_features
    if isinstance(module, nn.Unflatten) and module.dim == 1:
        sizes = [n for n in module.unflattened_size if isinstance(n, int)]
        return ("linear", math.prod(sizes)) if min(sizes, default=0) > 0 else None
    if isinstance(module, nn.ModuleList) and len(module) > 1:
        # Side by side, each on features of its own: a block-diagonal layer.
        sizes = [part.in_features for part in module if isinstance(part, nn.Linear)]
        return ("linear", sum(sizes)) if len(sizes) == len(module) else None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding", module.num_embeddings
    if isinstance(module, nn.RNNBase):
        return "sequence", module.input_size
    if isinstance(module, nn.LayerNorm):
        return "sequence", module.normalized_shape[-1]
    if isinstance(module, nn.GroupNorm):
        return "norm2", module.num_channels
    return None


def _norm_dims(module: nn.Module) -> int:
    """Spatial dimensions of BatchNorm1d and the like, 2 where the class does not say."""
    digits = [int(char) for char in type(module).__name__ if char in "123"]
    return digits[0] if digits else 2


def _shapes(module: nn.Module, n: int, dtype: torch.dtype) -> Iterator[tuple[Shape, torch.dtype, bool]]:
    key = _key(module)
    kind = key[0] if key else ""
    if kind == "embedding":
        yield from (((1, length), torch.int64, False) for length in _LENGTHS)
    elif kind == "sequence":
        yield from (((1, length, n), dtype, False) for length in _LENGTHS)
    elif kind == "linear":
        yield (1, n), dtype, False
        yield from (((1, length, n), dtype, False) for length in _LENGTHS)
    elif kind.startswith("up"):
        dims = int(kind[-1])
        yield from (((1, n, *(size,) * dims), dtype, False) for size in _SMALL)
    else:
        dims = int(kind[-1])
        if kind == "norm1":
            yield (1, n), dtype, False
        yield (1, n, *_ENLARGING[dims]), dtype, True
        yield from (((1, n, *size), dtype, False) for size in _SIZES[dims])


def _enlarged(value: Tensor, output: Any) -> bool:
    """Whether an output is a map of more positions than the input."""
    outputs = (
        output.values()
        if isinstance(output, dict)
        else output
        if isinstance(output, (tuple, list))
        else [output]
    )
    return any(
        isinstance(out, Tensor)
        and out.dim() == value.dim()
        and math.prod(out.shape[2:]) > math.prod(value.shape[2:])
        for out in outputs
    )


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0] or type(error).__name__)


def _text(shape: Shape) -> str:
    return "×".join(str(n) for n in shape)
