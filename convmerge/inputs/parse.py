"""Inputs from the command line: ``--input`` and ``--inputs``."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from convmerge.errors import ConvmergeError
from convmerge.inputs.infer import infer_inputs
from convmerge.inputs.random import integer_range, random_tensor, seeded
from convmerge.inputs.values import Inputs, as_inputs, forward_parameters, model_device, model_dtype
from convmerge.io.pickles import printable

_SYNTAX = "as in --input 1,3,224,224, --input name=1,16:int64 or --input name=@file.npy"
_SPEC = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?:@(?P<file>.+)|(?P<shape>[^:@]*)(?::(?P<dtype>\w+))?)")
_SHAPE = re.compile(r"\d{1,12}(?:[,x×]\d{1,12})*,?")
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float16", "bfloat16", "float32", "float64", "half", "float", "double", "complex64", "complex128"),
        *("bool", "uint8", "int8", "int16", "int32", "int64", "short", "int", "long"),
    )
}
_MAX_ELEMENTS = 2**33


@dataclass(frozen=True)
class Spec:
    """One ``--input``, as written: a shape to fill with random values, or a file with the values."""

    text: str
    name: str | None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    file: Path | None = None


def parse_inputs(
    specs: Sequence[str], file: Path | None, seed: int, model: nn.Module, bound: Collection[str] = ()
) -> Inputs:
    """The model's inputs from ``--input`` texts or an ``--inputs`` file; without either they are inferred.

    A spec is ``[name=]SHAPE[:dtype]`` with SHAPE as in ``1,3,224,224`` or ``1x3x224x224`` (``scalar`` for a
    tensor without dimensions), or ``[name=]@FILE[:dtype]`` with a ``.pt``, ``.npy`` or ``.npz`` file. Specs
    without a name are positional. Values are standard normal; integers lie below the size of the model's
    smallest embedding, or are 0 and 1; booleans are fair. Floating-point inputs, also from files, take the
    dtype of the model's parameters unless ``:dtype`` says otherwise. Those in ``bound`` may be left out.

    Raises:
        ConvmergeError: a spec cannot be read, or does not fit the parameters of ``forward``.
    """
    if specs and file is not None:
        raise ConvmergeError("--input and --inputs are both given", "pass one of them")
    if file is not None:
        inputs = as_inputs(_load_pt(Path(file))).to(model_dtype(model))
    elif specs:
        inputs = _from_specs([parse_spec(spec) for spec in specs], seed, model)
    else:
        return infer_inputs(model, seed)
    device = model_device(model)
    return _fit(inputs.map(lambda tensor: tensor.to(device)), model, bound)


def parse_spec(text: str) -> Spec:
    """Read one ``--input``.

    Raises:
        ConvmergeError: it is not of the form above.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise ConvmergeError(f"--input {printable(text)}: neither a shape nor a file", _SYNTAX)
    name = match["name"]
    if match["file"] is not None:
        path, dtype = split_dtype(match["file"])
        return Spec(text, name, dtype=dtype, file=Path(path).expanduser())
    shape = re.sub(r"\s*([,x×])\s*", r"\1", match["shape"].strip().strip("()[]").strip())
    if not _SHAPE.fullmatch(shape) and shape != "scalar":
        raise ConvmergeError(f"--input {printable(text)}: '{printable(shape)}' is not a shape", _SYNTAX)
    sizes = tuple(int(size) for size in re.findall(r"\d+", shape))
    if 0 in sizes or math.prod(sizes) > _MAX_ELEMENTS:
        problem = "has a size of 0" if 0 in sizes else "is too large"
        raise ConvmergeError(f"--input {printable(text)}: the shape {problem}", _SYNTAX)
    return Spec(text, name, sizes, _dtype(match["dtype"], text))


def _dtype(name: str | None, text: str) -> torch.dtype | None:
    if name is None or name in _DTYPES:
        return None if name is None else _DTYPES[name]
    close = difflib.get_close_matches(name, _DTYPES, 1)
    hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(_DTYPES)}"
    raise ConvmergeError(f"--input {printable(text)}: unknown dtype {name}", hint)


def split_dtype(file: str) -> tuple[str, torch.dtype | None]:
    """A text without the ``:dtype`` at its end, and that dtype."""
    path, colon, dtype = file.rpartition(":")
    return (path, _DTYPES[dtype]) if colon and dtype in _DTYPES else (file, None)


def _from_specs(specs: Sequence[Spec], seed: int, model: nn.Module) -> Inputs:
    generator = seeded(seed)
    default, high = model_dtype(model), integer_range(model)
    args: list[Tensor] = []
    kwargs: dict[str, Any] = {}
    for spec in specs:
        if spec.file is not None:
            value = _load_tensor(spec)
            dtype = spec.dtype or (default if value.is_floating_point() else value.dtype)
            value = value.to(dtype)
        else:
            value = random_tensor(spec.shape, spec.dtype or default, high, generator)
        if spec.name is None:
            args.append(value)
        elif spec.name in kwargs:
            raise ConvmergeError(f"--input {spec.name}=… is given twice", "give every input once")
        else:
            kwargs[spec.name] = value
    return Inputs(tuple(args), kwargs)


def _load_tensor(spec: Spec) -> Tensor:
    path = spec.file
    assert path is not None
    value = load_values(path, spec.name, f"--input {printable(spec.text)}", _SYNTAX)
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise ConvmergeError(f"{path} holds a {kind}, not a tensor", f"--inputs {path} for several inputs")
    return value


def load_values(path: Path, name: str | None, option: str, syntax: str) -> Any:
    """What a .pt, .npy or .npz file holds for the input called ``name``; ``option`` is what asked for it.

    Raises ConvmergeError.
    """
    if path.suffix in (".npy", ".npz"):
        return _load_numpy(path, name)
    if path.suffix not in (".pt", ".pth") and not path.is_dir():
        raise ConvmergeError(f"{option}: the file is no .pt, .npy or .npz", syntax)
    return _load_pt(path)


def _load_pt(path: Path) -> Any:
    """A torch-saved tensor, tuple, list or dict; never runs code from the file."""
    _check_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise ConvmergeError(
            f"{path} is no torch-saved tensor, tuple, list or dict of tensors",
            'make it with torch.save((x, y), "inputs.pt")',
        ) from None


def _load_numpy(path: Path, name: str | None) -> Tensor:
    """The array in a .npy file; of an .npz the one called as the input, or the only one."""
    _check_file(path)
    try:
        data = numpy.load(path, allow_pickle=False)
        arrays = {"": data} if isinstance(data, numpy.ndarray) else data
        if name not in arrays and len(arrays) != 1:
            hint = f"name one of them, as in --input {next(iter(arrays), 'NAME')}=@{path}"
            raise ConvmergeError(f"{path} holds {len(arrays)} arrays", hint)
        key = name if name in arrays else next(iter(arrays))
        return torch.from_numpy(numpy.array(arrays[key], order="C"))
    except ConvmergeError:
        raise
    except Exception as error:
        reason = printable(str(error) or type(error).__name__)
        raise ConvmergeError(
            f"{path} is no readable numpy file: {reason}", "make it with numpy.save"
        ) from None


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ConvmergeError(
            f"{path} is a directory, not a file", f"name the file in it, as in {path}/FILE.pt"
        )
    if not path.is_file():
        raise ConvmergeError(f"no such file: {path}", "check the path after @ or --inputs")


def _fit(inputs: Inputs, model: nn.Module, bound: Collection[str]) -> Inputs:
    """Check the inputs against forward's signature, and name the positional ones.

    Raises:
        ConvmergeError: too many inputs, an unknown name, an input given twice, or one that is missing.
    """
    parameters = forward_parameters(model)
    first = [p.name for p in parameters][: len(inputs.args)]
    if any(p.default is p.empty and p.name not in (*bound, *first, *inputs.kwargs) for p in parameters):
        parameters = tuple(p for p in parameters if p.name not in bound or p.name in inputs.kwargs)
    kinds = {p.kind for p in parameters}
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    positional = by_position[: len(inputs.args)]
    signature = f"forward({', '.join(dict.fromkeys([*by_position, *by_name]))})"
    for name in inputs.kwargs:
        if name in positional:
            raise ConvmergeError(f"input {name} is given by position and by name", "give every input once")
        if name not in by_name and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise unknown_name(name, signature, by_name)
    if len(inputs.args) > len(by_position) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise ConvmergeError(f"{len(inputs.args)} inputs for {signature}", "leave some --input out")
    given = {*positional, *inputs.kwargs}
    needed = [p.name for p in parameters if p.default is p.empty and p.name in (*by_position, *by_name)]
    missing = [name for name in needed if name not in given and name not in bound]
    if missing:
        flags = " ".join(f"--input {name}=SHAPE" for name in missing)
        raise ConvmergeError(f"{signature} also needs {', '.join(missing)}", f"add {flags}")
    return replace(inputs, names=tuple(positional))


def unknown_name(name: str, signature: str, names: Sequence[str]) -> ConvmergeError:
    """The error for a name that none of forward's parameters has."""
    close = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}?" if close else f"the model has {signature}"
    return ConvmergeError(f"forward has no input named {printable(name)}", hint)
