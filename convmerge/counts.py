"""A model in figures, counted in one forward pass: operator calls by kind, MACs, parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convmerge.capture import copy_model
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
        kind = KINDS.get(getattr(func, "__name__", ""))
        if kind is not None and isinstance(result, Tensor):
            self.calls[kind] += 1
            if kind in ("conv", "conv_transpose", "linear"):
                source = args[0] if args else kwargs["input"]
                weight = args[1] if len(args) > 1 else kwargs["weight"]
                # A transposed convolution uses every weight once for each input, the others for each output.
                positions = source if kind == "conv_transpose" else result
                self.macs += positions.numel() * math.prod(weight.shape[1:])
        return result


def count(model: nn.Module, inputs: Inputs) -> Counts:
    """Run a copy of ``model`` once, in eval mode and without gradients, and count.

    MACs are those of convolutions and linear layers; parameters are counted once where they are shared.
    """
    inputs = inputs.clone()
    scratch = copy_model(model).eval()  # a forward may change buffers and attributes
    with torch.no_grad(), _Counter() as counter:
        scratch(*inputs.args, **inputs.kwargs)
    parameters = sum(p.numel() for p in model.parameters())
    return Counts(dict(sorted(counter.calls.items())), counter.macs, parameters)
