"""What a module tree must be like before convmerge works on it."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convmerge.errors import LoadError
from convmerge.io.pickles import printable

MAX_DEPTH = 200
# torch.fx writes submodule names into the source code of traced modules.
_NAME = re.compile(r"[\w\-+:/ ]+")
_METHODS = frozenset(name for name, value in vars(nn.Module).items() if callable(value))


def check_module(model: nn.Module, *, untrusted: bool = False) -> None:
    """Refuse trees that cannot be traced safely and parameters that have no plain numbers.

    Args:
        untrusted: the module came out of a file nobody vouches for; then nothing may replace a method
            or hook into the forward pass except torch.nn.utils.

    Raises:
        LoadError: cyclic or too deep tree, unsafe names, or meta, quantised, sparse or uninitialised tensors.
    """
    for path, module in _walk(model):
        where = f" in {path}" if path else ""
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            _check_name(name, where)
            if value is not None:
                _check_tensor(f"{path}.{name}" if path else name, value)
        if untrusted:
            _check_attributes(module, where)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, shared ones once; raises where the tree is cyclic or badly named."""
    seen: set[nn.Module] = set()

    def visit(path: str, module: nn.Module, above: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
        if any(module is other for other in above):
            raise LoadError(f"module {path} contains itself", "a module tree must not be cyclic")
        if len(above) > MAX_DEPTH:
            raise LoadError(f"modules nest more than {MAX_DEPTH} deep", "no real model does")
        if module in seen:
            return
        seen.add(module)
        _check_dicts(path, module)
        yield path, module
        for name, child in module._modules.items():
            _check_name(name, f" in {path}" if path else "")
            if child is not None:
                yield from visit(f"{path}.{name}" if path else name, child, (*above, module))

    yield from visit("", model, ())


def _check_dicts(path: str, module: nn.Module) -> None:
    """The three registries hold what nn.Module itself would have let in."""
    kinds = {"_modules": nn.Module, "_parameters": Tensor, "_buffers": Tensor}
    for attribute, kind in kinds.items():
        registry = vars(module).get(attribute)
        if not isinstance(registry, dict) or not all(
            v is None or isinstance(v, kind) for v in registry.values()
        ):
            raise LoadError(
                f"module {path or 'at the root'} is damaged: its {attribute} are not {kind.__name__}s"
            )


def _check_name(name: object, where: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name):
        shown = printable(repr(name))
        raise LoadError(f"the name {shown}{where} is not safe to trace", "rename it to letters, digits and _")


def _check_tensor(name: str, value: Tensor) -> None:
    if is_lazy(value):
        raise LoadError(f"{name} is not initialised (lazy module)", "run the model once before saving it")
    if value.is_meta:
        raise LoadError(
            f"{name} is on the meta device and has no numbers", "save the model with its weights loaded"
        )
    if value.is_quantized:
        raise LoadError(f"{name} is quantised", "fuse the floating-point model, then quantise the result")
    if value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise LoadError(
            f"{name} is sparse ({layout})", "make it dense with .to_dense() and save the model again"
        )


def _check_attributes(module: nn.Module, where: str) -> None:
    kind = type(module).__name__
    for name in vars(module):
        if name in _METHODS:
            raise LoadError(f"the file replaces the method {name} of a {kind}{where}", _TRUST)
    for name, value in vars(module).items():
        if not name.endswith(("_hooks", "_hook")) or not isinstance(value, dict):
            continue
        for hook in value.values():
            if not type(hook).__module__.startswith("torch.nn.utils."):
                raise LoadError(f"the file puts a hook ({type(hook).__name__}) on the {kind}{where}", _TRUST)


_TRUST = "pass --trust if you made this file"
