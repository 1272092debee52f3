"""Inputs that are bound to a value: as written, checked against the model, and the model without them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convmerge.errors import ConvmergeError
from convmerge.inputs.infer import infer_inputs
from convmerge.inputs.parse import load_values, split_dtype, unknown_name
from convmerge.inputs.values import Inputs, describe, forward_parameters, model_device, model_dtype
from convmerge.io.pickles import printable

_SYNTAX = "as in --bind cond=cond.pt, --bind cond=0.5,-1,2 or --bind 'cond=[[0.5,-1,2]]'"
_BINDING = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.+)", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Written:
    """Numbers from the command line or a file, whose type follows from the input that they are for.

    ``value`` is a number, or tensors in any nest of tuples, lists and dicts.
    """

    value: Any
    dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class Bound:
    """A model's inputs, some of them bound.

    Attributes:
        values: name → value, in the order of forward's parameters.
        inputs: all inputs, the bound ones included; ``rest``: those that are left.
    """

    values: dict[str, Any]
    inputs: Inputs
    rest: Inputs


class Filled(nn.Module):
    """A model with some inputs filled in, which takes the others in their order. Run, but never written."""

    def __init__(self, model: nn.Module, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        leaves, self._spec = pytree.tree_flatten(dict(values))
        self._plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):  # buffers follow the model to another dtype
                self.register_buffer(f"value_{index}", leaf.detach().clone())
        self.train(model.training)

    @property
    def forward_signature(self) -> inspect.Signature:
        """What is left of the model's own signature."""
        return _without(inspect.signature(self.model.forward), self._values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self.forward_signature.bind(*args, **kwargs)
        whole = inspect.signature(self.model.forward)
        arguments = {**given.arguments, **self._values()}
        ordered = {name: arguments[name] for name in whole.parameters if name in arguments}
        call = inspect.BoundArguments(whole, ordered)
        return self.model(*call.args, **call.kwargs)

    def _values(self) -> dict[str, Any]:
        leaves = [self._buffers.get(f"value_{i}", plain) for i, plain in enumerate(self._plain)]
        values: dict[str, Any] = pytree.tree_unflatten(leaves, self._spec)
        return values


def parse_bindings(texts: Sequence[str]) -> dict[str, Any]:
    """Name → value of every ``--bind NAME=VALUE``.

    A value is numbers (``0.5,-1``), nested lists of them (``[[1,2],[3,4]]``), ``true``, ``false``, ``none``
    or a quoted string, else a ``.pt``, ``.npy`` or ``.npz`` file, with or without ``@`` before it; numbers
    and files may end in ``:dtype``.

    Raises ConvmergeError for anything else, a file that cannot be read, and a name given twice.
    """
    values: dict[str, Any] = {}
    for text in texts:
        match = _BINDING.fullmatch(text.strip())
        if match is None:
            raise ConvmergeError(f"--bind {printable(text)}: not of the form NAME=VALUE", _SYNTAX)
        name = match["name"]
        if name in values:
            raise ConvmergeError(f"--bind {name}=… is given twice", "bind every input once")
        values[name] = _parse_value(name, match["value"].strip())
    return values


def _parse_value(name: str, text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    body, dtype = split_dtype(text)
    try:
        value = ast.literal_eval(body)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        path = Path(body.removeprefix("@")).expanduser()
        return Written(load_values(path, name, f"--bind {name}={printable(text)}", _SYNTAX), dtype)
    if isinstance(value, str) or _is_number(value):
        return value if isinstance(value, str | bool) else Written(value, dtype)
    try:
        exact = torch.tensor(value, dtype=torch.float64)
        return Written(exact if _has_float(value) else torch.tensor(value), dtype)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        shown = f"--bind {name}={printable(text)}"
        raise ConvmergeError(f"{shown}: no numbers or even lists of them", _SYNTAX) from None


def takes(model: nn.Module, name: str) -> bool:
    """Whether ``forward`` has an input of that name."""
    return name in (p.name for p in forward_parameters(model))


def bind_inputs(model: nn.Module, inputs: Inputs, values: Mapping[str, Any]) -> Bound:
    """The inputs with ``values`` in the place of those of these names.

    Args:
        inputs: with or without the bound ones; arguments by position are those of ``forward``, or where these
            do not fit, those that are not bound.
        values: tensors, arrays, Python numbers, or what :func:`parse_bindings` gives.

    Raises:
        ConvmergeError: an unknown name, another shape or kind of number than the example for that input,
            nothing left that is not bound, or the model does not run on the values.
    """
    whole = inspect.signature(model.forward)
    _check_names(whole, values)
    arguments = _arguments(whole, inputs, values)
    rest = {name: value for name, value in arguments.items() if name not in values}
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(rest)):
        raise _nothing_left(whole, values)
    reduced = _without(whole, values)
    called = inspect.BoundArguments(reduced, rest)
    named = tuple(name for name in reduced.parameters if name in rest)[: len(called.args)]
    left = Inputs(called.args, called.kwargs, inputs.inferred, named)
    examples = {name: arguments.get(name) for name in whole.parameters if name in values}
    settled = _settled(model, left, values, examples)
    merged = {**arguments, **settled}
    full = {name: merged[name] for name in whole.parameters if name in merged}
    called = inspect.BoundArguments(whole, full)
    every = Inputs(called.args, called.kwargs, inputs.inferred, tuple(full)[: len(called.args)])
    return Bound(settled, every, left)


def infer_bound(model: nn.Module, values: Mapping[str, Any], seed: int) -> Inputs:
    """Find an input that the model runs on with ``values`` bound, as :func:`infer_inputs` does.

    Raises ConvmergeError as there, for an unknown name, and where nothing is left that is not bound.
    """
    whole = inspect.signature(model.forward)
    _check_names(whole, values)
    if not _without(whole, values).parameters:
        raise _nothing_left(whole, values)
    failure: ConvmergeError | None = None
    for integers in (None, model_dtype(model)):
        typed = {
            name: _fitted(name, value, None, whole.parameters[name].default, model_dtype(model), integers)
            for name, value in values.items()
        }
        try:
            return infer_inputs(Filled(model, typed), seed)
        except ConvmergeError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _check_names(whole: inspect.Signature, values: Mapping[str, Any]) -> None:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in whole.parameters.values() if p.kind not in variadic]
    for name in values:
        if name not in names:
            raise unknown_name(name, f"forward({', '.join(names)})", names)


def _nothing_left(whole: inspect.Signature, values: Mapping[str, Any]) -> ConvmergeError:
    only = next(iter(values)) if len(values) == 1 else "one of them"
    return ConvmergeError(
        f"with {', '.join(values)} bound, forward{_shown(whole)} has no input left: it is one constant",
        f"bind only what stays the same in every call; give {only} as an example, by --input, instead",
    )


def _arguments(whole: inspect.Signature, inputs: Inputs, values: Mapping[str, Any]) -> dict[str, Any]:
    """Name → example, by the whole signature, or where that does not fit by what is left of it."""
    for signature in (whole, _without(whole, values)):
        try:
            arguments = signature.bind_partial(*inputs.args, **inputs.kwargs).arguments
            absent = [n for n in values if n in signature.parameters and n not in arguments]
            signature.bind(*inputs.args, **inputs.kwargs, **dict.fromkeys(absent))
        except TypeError:
            continue
        return dict(arguments)
    raise ConvmergeError(
        f"the inputs do not fit forward{_shown(whole)} with {', '.join(values)} bound",
        "give every other input once; by name where in doubt",
    )


def _settled(
    model: nn.Module, rest: Inputs, values: Mapping[str, Any], examples: Mapping[str, Any]
) -> dict[str, Any]:
    """The values as the model takes them; integers may stand for numbers of the model's own dtype."""
    from convmerge.evidence.capture import run_copy  # which itself knows inputs

    whole = inspect.signature(model.forward)
    device, dtype = model_device(model), model_dtype(model)
    failure: Exception | None = None
    for integers in (None, dtype):
        settled = {
            name: _fitted(name, values[name], example, whole.parameters[name].default, dtype, integers)
            for name, example in examples.items()
        }
        settled = dict(pytree.tree_map_only(Tensor, lambda t: t.to(device), settled))
        try:
            run_copy(Filled(model, settled), rest)
        except Exception as error:  # a forward can fail in any way on values that do not fit
            failure = error
            continue
        return settled
    shown = ", ".join(f"{name} = {describe(value)}" for name, value in settled.items())
    raise ConvmergeError(
        f"the model does not run with {shown}: {_first_line(failure)}",
        "give the value the shape of the model's own input, as in --bind 'cond=[[1,2,3]]' for 1×3",
    )


def _fitted(
    name: str, value: Any, example: Any, default: Any, dtype: torch.dtype, integers: torch.dtype | None
) -> Any:
    """One value in the type of its example, where there is one, or of its default."""
    if isinstance(value, numpy.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Written):
        value = _typed(value, example, default, dtype, integers)
    if isinstance(value, Tensor) and isinstance(example, Tensor):
        _check_like(name, value, example)
    return value


def _typed(
    written: Written, example: Any, default: Any, dtype: torch.dtype, integers: torch.dtype | None
) -> Any:
    """A written value as a tensor, or as the plain number that the default of its input is one of."""
    value, wanted = written.value, written.dtype
    if wanted is None and not isinstance(example, Tensor) and _is_number(value) and _is_number(default):
        return value
    if _is_number(value):
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)

    def typed(tensor: Tensor) -> Tensor:
        if isinstance(example, Tensor) and wanted is None and example.is_floating_point():
            return tensor.to(example.dtype)
        if tensor.is_floating_point():
            return tensor.to(wanted or dtype)
        return tensor.to(wanted or (integers if tensor.dtype == torch.int64 else None) or tensor.dtype)

    return pytree.tree_map_only(Tensor, typed, value)


def _check_like(name: str, value: Tensor, example: Tensor) -> None:
    floating = value.is_floating_point() == example.is_floating_point()
    if value.shape != example.shape or not floating:
        raise ConvmergeError(
            f"{name} is bound to {describe(value)}, but the model's input {name} is {describe(example)}",
            f"give a value of shape {'×'.join(map(str, example.shape)) or 'scalar'}"
            + ("" if floating else f" and dtype {str(example.dtype).removeprefix('torch.')}"),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _has_float(value: Any) -> bool:
    return any(isinstance(leaf, float) for leaf in pytree.tree_leaves(value))


def _without(signature: inspect.Signature, names: Mapping[str, Any]) -> inspect.Signature:
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name not in names])


def _shown(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})"


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0])}" if lines else type(error).__name__
