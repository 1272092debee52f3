"""The tensors inside whatever a model returns, by name, so that two models can be compared leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Leaf = Tensor | str
Leaves = dict[str, Leaf]


def leaves(value: Any) -> Leaves:
    """Flatten nested tuples, lists, mappings, dataclasses and plain objects into name → leaf.

    Names read like the access, e.g. ``output["logits"][0]``. Tensors are detached copies, dense, complex ones
    seen as real pairs; Python numbers become tensors; all else (None, strings, opaque objects) becomes text.
    Tuples and lists are told apart by length only, mappings by keys only: an exported graph returns the one
    where the model returned the other.
    """
    return dict(_walk(value, "output", ()))


def mismatch(a: Leaves, b: Leaves) -> str | None:
    """Why a and b cannot be compared number by number, or None: names, shapes, dtypes or texts differ."""
    if a.keys() != b.keys():
        name = next(iter(a.keys() ^ b.keys()))
        first, second = ("is there", "is not") if name in a else ("is not there", "is")
        return f"the outputs are built differently: {name} {first} in the original and {second} in the other"
    for name, x in a.items():
        y = b[name]
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.shape != y.shape:
                return f"{name} is {shape_text(x)} in the original and {shape_text(y)} in the other"
            if x.dtype != y.dtype:
                return f"{name} is {dtype_text(x)} in the original and {dtype_text(y)} in the other"
        elif isinstance(x, Tensor) or isinstance(y, Tensor) or x != y:
            return f"{name} is {_brief(x)} in the original and {_brief(y)} in the other"
    return None


def shape_text(x: Tensor) -> str:
    """``1×3×224×224``; ``scalar`` for a tensor without dimensions."""
    return "×".join(map(str, x.shape)) or "scalar"


def dtype_text(x: Tensor) -> str:
    """``float32``."""
    return str(x.dtype).removeprefix("torch.")


def _walk(value: Any, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, Tensor):
        yield name, _dense(value)
    elif isinstance(value, (bool, int, float, complex, np.ndarray, np.generic)):
        yield name, _dense(torch.as_tensor(value))
    elif value is None or isinstance(value, (str, bytes)):
        yield name, repr(value)
    elif id(value) in above:
        yield name, "a reference to what contains it"
    else:
        parts = list(_parts(value))
        if not parts:
            yield name, f"{type(value).__qualname__} without tensors"
        for key, part in parts:
            yield from _walk(part, name + key, (*above, id(value)))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, with how one gets at it; nothing for an opaque object."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, Sequence):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value))
    elif not callable(value) and not isinstance(value, (nn.Module, type)):
        yield from ((f".{key}", part) for key, part in getattr(value, "__dict__", {}).items())


def _dense(x: Tensor) -> Tensor:
    x = x.detach()
    if x.is_quantized:
        x = x.dequantize()
    if x.layout != torch.strided:
        x = x.to_dense()
    return torch.view_as_real(x.resolve_conj()).clone() if x.is_complex() else x.clone()


def _brief(x: Leaf) -> str:
    return f"a {shape_text(x)} tensor" if isinstance(x, Tensor) else x[:80]
