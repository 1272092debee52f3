"""Example inputs: what a model is run on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from convmerge.errors import ConvmergeError


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of one call of ``forward``.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        inferred: whether they were guessed from the model.
        names: parameter names of ``args`` where known, for :meth:`describe`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    inferred: bool = False
    names: tuple[str, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same inputs with ``function`` applied to every tensor, also inside lists, tuples and dicts."""
        kwargs = {key: _map(value, function) for key, value in self.kwargs.items()}
        return replace(self, args=tuple(_map(value, function) for value in self.args), kwargs=kwargs)

    def clone(self) -> Inputs:
        """A copy that shares no memory with this one."""
        return self.map(lambda tensor: tensor.detach().clone())

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same inputs with every floating-point tensor in ``dtype``."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor, positional ones first."""
        return tuple(value for _, value in self.leaves() if isinstance(value, Tensor))

    def describe(self) -> dict[str, str]:
        """Name → shape and dtype, as in ``{"x": "1×3×224×224 float32"}``."""
        return {name: describe(value) for name, value in self.leaves()}

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Every tensor and plain value with its name, positional ones first."""
        for index, value in enumerate(self.args):
            name = self.names[index] if index < len(self.names) else f"input{index}"
            yield from _leaves(name, value)
        for name, value in self.kwargs.items():
            yield from _leaves(name, value)


def as_inputs(example_inputs: Any) -> Inputs:
    """Inputs from a tensor, a tuple or list of forward arguments, a dict of keyword arguments, or Inputs.

    Raises:
        ConvmergeError: none of these.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,))
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return Inputs((), dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return Inputs(tuple(example_inputs))
    raise ConvmergeError(
        f"example inputs are a {type(example_inputs).__name__}",
        "pass a tensor, a tuple of forward's arguments, or a dict of its keyword arguments",
    )


def model_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of the first floating-point parameter, else buffer; float32 where there is none."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


def model_device(model: nn.Module) -> torch.device:
    """Device of the first parameter, else buffer; the CPU where there is none."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def forward_parameters(model: nn.Module) -> tuple[inspect.Parameter, ...]:
    """Parameters of ``forward``; ``*args`` alone where it has no readable signature.

    A module that hands its arguments on says what it takes as ``forward_signature``.
    """
    if isinstance(own := getattr(model, "forward_signature", None), inspect.Signature):
        return tuple(own.parameters.values())
    try:
        return tuple(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return (inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),)


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, function) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    return value


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, list)) and value:
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item)
    elif isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{name}[{key!r}]", item)
    else:
        yield name, value


def describe(value: Any) -> str:
    """``1×5 float32`` for a tensor, else the value itself."""
    if not isinstance(value, Tensor):
        return repr(value)
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{'×'.join(str(n) for n in value.shape) or 'scalar'} {dtype}"
