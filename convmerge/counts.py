"""A model in figures, counted in one forward pass: operator calls by kind, MACs, parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convmerge.evidence.capture import copy_model
from convmerge.inputs import Inputs
from convmerge.report import Counts

KINDS = {
    **{f"conv{n}d": "conv" for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": "conv_transpose" for n in (1, 2, 3)},
    **{f"{mode}_pool{n}d": f"{mode}_pool" for mode in ("avg", "max", "adaptive_avg") for n in (1, 2, 3)},
    **{f"{dunder}{name}__": name for name in ("add", "sub", "mul") for dunder in ("__", "__i", "__r")},
    **{name: name.rstrip("_") for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")},
    **{
        name: name for name in ("linear", "batch_norm", "layer_norm", "group_norm", "instance_norm", "matmul")
    },
    **{name: name for name in ("interpolate", "pixel_shuffle", "pixel_unshuffle", "cat", "pad", "einsum")},
    **{name: name for name in ("bmm", "baddbmm", "index_select")},
    **{f"upsample_{mode}": "interpolate" for mode in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d")},
    "__truediv__": "div",
    "__matmul__": "matmul",
    "scaled_dot_product_attention": "attention",
}


class _Counter(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.macs = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = KINDS.get(getattr(func, "__name__", "").partition(".")[0])  # conv2d.default in programs
        if kind is not None and isinstance(result, Tensor):
            self.calls[kind] += 1
            self.macs += _macs(kind, args, kwargs, result)
        return result


def _macs(kind: str, args: tuple[Any, ...], kwargs: Any, result: Tensor) -> int:
    """MACs of a product with a weight; products of data with data do not count."""
    if kind in ("conv", "conv_transpose", "linear"):
        source = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        # A transposed convolution uses every weight once for each input, the others for each output.
        positions = source if kind == "conv_transpose" else result
        return int(positions.numel() * math.prod(weight.shape[1:]))
    if kind not in ("bmm", "baddbmm", "matmul", "einsum"):
        return 0
    tensors = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
    operands = tensors[-2:]
    if len(operands) < 2 or not any(isinstance(t, nn.Parameter) and t.dim() > 1 for t in operands):
        return 0
    if kind == "einsum" and isinstance(args[0], str):
        letters = args[0].replace(" ", "").split("->")[0].split(",")
        pairs = zip(letters, operands, strict=False)
        sizes = {a: n for text, t in pairs for a, n in zip(text, t.shape, strict=False)}
        return math.prod(sizes.values())
    return result.numel() * operands[0].shape[-1]


def count(model: nn.Module, inputs: Inputs) -> Counts:
    """Run a copy of ``model`` once, in eval mode and without gradients, and count.

    MACs are those of products with weights (convolutions, linear layers, batches of blocks); parameters are
    counted once where they are shared.
    """
    inputs = inputs.clone()
    scratch = copy_model(model).eval()  # a forward may change buffers and attributes
    with torch.no_grad(), _Counter() as counter:
        scratch(*inputs.args, **inputs.kwargs)
    parameters = sum(p.numel() for p in model.parameters())
    return Counts(dict(sorted(counter.calls.items())), counter.macs, parameters)
