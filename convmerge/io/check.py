"""What a module tree must be like before convmerge works on it."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.parameter import is_lazy

from convmerge.errors import LoadError
from convmerge.io.pickles import printable

MAX_DEPTH = 200
# torch.fx writes the names of modules and parameters into the source code it generates.
_NAME = re.compile(r"[\w\-+:/ ]+")
# An instance attribute of one of these names would be called in place of the method.
_METHODS = frozenset(name for name, value in vars(nn.Module).items() if callable(value)) | {
    "_compiled_call_impl"
}
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_REGISTRIES = {"_modules": nn.Module, "_parameters": Tensor, "_buffers": Tensor}
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
_TRUST = "pass --trust if you made this file"


def check_module(model: nn.Module, *, untrusted: bool = False) -> None:
    """Refuse trees that cannot be traced safely and tensors that are no plain numbers.

    Args:
        untrusted: the module came out of a file nobody vouches for; then nothing may replace a method, or
            hook into the forward pass except torch.nn.utils.

    Raises:
        LoadError: cyclic, too deep or damaged tree, unsafe names, or meta, quantised, sparse or lazy tensors.
    """
    for path, module in _walk(model):
        if type(module).__module__.startswith(_QUANTISED):
            raise _quantised(path or "the model")
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            _check_name(name, path)
            if value is not None:
                _check_tensor(_join(path, name), value)
        if untrusted:
            _check_attributes(module, path)


def _walk(
    module: nn.Module, path: str = "", above: tuple[nn.Module, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, shared ones once, each checked before what is below it."""
    seen = set() if seen is None else seen
    if any(module is other for other in above):
        raise LoadError(f"module {path} contains itself", "a module must not be registered below itself")
    if len(above) > MAX_DEPTH:
        raise LoadError(f"modules nest more than {MAX_DEPTH} deep", "no model convmerge knows of does")
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, torch.jit.ScriptModule):
        raise LoadError(
            f"{path or 'the model'} is TorchScript, whose code cannot be followed",
            "give the model with the module that was scripted in its place",
        )
    _check_registries(module, path)
    yield path, module
    for name, child in module._modules.items():
        _check_name(name, path)
        if child is not None:
            yield from _walk(child, _join(path, name), (*above, module), seen)


def _check_registries(module: nn.Module, path: str) -> None:
    """The three registries hold what nn.Module itself would have let in."""
    for attribute, kind in _REGISTRIES.items():
        registry = vars(module).get(attribute)
        values = registry.values() if isinstance(registry, dict) else [registry]
        if registry is None or not all(value is None or isinstance(value, kind) for value in values):
            raise LoadError(
                f"module {path or 'at the root'} is damaged: its {attribute} are not all {kind.__name__}s",
                "save it again with torch.save(model, path)",
            )


def _check_name(name: object, path: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name):
        where = f" in {path}" if path else ""
        raise LoadError(
            f"the name {printable(repr(name))}{where} is not safe to trace",
            "rename it to letters, digits and _",
        )


def _check_tensor(name: str, value: Tensor) -> None:
    if is_lazy(value):
        raise LoadError(f"{name} has no shape yet (lazy module)", "run the model once before saving it")
    if value.is_meta:
        raise LoadError(
            f"{name} is on the meta device and has no numbers", "load its weights before saving it"
        )
    if value.is_quantized:
        raise _quantised(name)
    if value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise LoadError(
            f"{name} is sparse ({layout})", "make it dense with .to_dense() and save the model again"
        )


def _quantised(name: str) -> LoadError:
    return LoadError(f"{name} is quantised", "fuse the floating-point model, then quantise the result")


def _check_attributes(module: nn.Module, path: str) -> None:
    """Nothing an instance holds is called by torch.nn in place of the class's own code."""
    where = f"{type(module).__name__}{f' at {path}' if path else ''}"
    for name, value in vars(module).items():
        if name in _METHODS and callable(value):
            raise LoadError(f"the file replaces the method {name} of the {where}", _TRUST)
        if name in _HOOKS:
            for hook in value.values() if isinstance(value, dict) else [value]:
                kind = type(hook.hook if type(hook) is _WrappedHook else hook)
                if not kind.__module__.startswith("torch.nn.utils."):
                    raise LoadError(f"the file puts a hook ({kind.__name__}) on the {where}", _TRUST)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
