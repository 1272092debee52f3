"""Looking up the classes a file may use, and importing the modules the user names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from convmerge.errors import LoadError
from convmerge.io.pickles import Global, printable

# What torch.nn.utils leaves in the hooks of modules: objects that recompute a weight, without code of their
# own.
_HELPERS = {
    "torch.nn.modules.module": ("_WrappedHook",),
    "torch.nn.parallel.data_parallel": ("DataParallel",),
    "torch.nn.utils.weight_norm": ("WeightNorm",),
    "torch.nn.utils.spectral_norm": (
        *("SpectralNorm", "SpectralNormLoadStateDictPreHook", "SpectralNormStateDictHook"),
    ),
    "torch.nn.utils.prune": (
        *("CustomFromMask", "Identity", "L1Unstructured", "LnStructured", "PruningContainer"),
        *("RandomStructured", "RandomUnstructured"),
    ),
    # Pure functions of tensors that layers keep as attributes (TransformerEncoderLayer.activation).
    "torch.nn.functional": (
        *(
            "celu",
            "elu",
            "gelu",
            "hardsigmoid",
            "hardswish",
            "leaky_relu",
            "log_softmax",
            "logsigmoid",
            "mish",
        ),
        *("relu", "relu6", "selu", "sigmoid", "silu", "softmax", "softplus", "tanh"),
    ),
    "torch._C._nn": ("gelu", "log_sigmoid", "softplus"),
}


class Allowed:
    """The classes and functions a file may name, beside those ``torch.load(weights_only=True)`` knows.

    Args:
        allow: ``pkg.mod`` or ``pkg.mod.Name``; the modules are imported here.

    Raises:
        LoadError: there is no such module or class, or importing it fails.
    """

    def __init__(self, allow: Sequence[str]) -> None:
        self.modules: set[str] = set()
        self.names: set[Global] = set()
        for spec in allow:
            self._add(spec)

    def _add(self, spec: str) -> None:
        if not all(part.isidentifier() for part in spec.split(".")):
            raise LoadError(
                f"--allow {printable(spec)}: not a module or class name", "as in --allow pkg.mod.Name"
            )
        if import_named(spec) is not None:
            self.modules.add(spec)
            return
        module, _, name = spec.rpartition(".")
        if not module or import_named(module) is None:
            raise LoadError(
                f"--allow {spec}: no module of this name can be imported",
                "run where it is installed, or in the directory of its .py file",
            )
        if _defined(Global(module, name)) is None:
            raise LoadError(
                f"--allow {spec}: module {module} defines no class or function {name}",
                "name the module it is defined in, not one that imports it",
            )
        self.names.add(Global(module, name))

    def find(self, name: Global) -> Any:
        """The class or function of this name, None if it may not be used. Imports nothing but torch."""
        if name in self.names:
            return _defined(name)
        if name.name in _HELPERS.get(name.module, ()):
            return vars(importlib.import_module(name.module)).get(name.name)
        if name.module in self.modules or name.module.startswith("torch.nn.modules."):
            value = _defined(name)
            return value if isinstance(value, type) and issubclass(value, nn.Module) else None
        return None


def _defined(name: Global) -> Any:
    """The class or function *defined in* an imported module; None if there is none.

    Looked up without attribute traversal: ``torchvision.models.resnet.torch.load`` could be reached that way.
    """
    module = sys.modules.get(name.module)
    value = vars(module).get(name.name) if module is not None else None
    return value if callable(value) and getattr(value, "__module__", None) == name.module else None


def import_named(name: str) -> ModuleType | None:
    """Import a module the user named; None if there is no such module.

    Raises:
        LoadError: the module is there but fails while it is imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            return None
        raise LoadError(f"importing {name} fails: {error}", f"install {error.name}") from error
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}")
        raise LoadError(f"importing {name} fails: {reason}", f"make `import {name}` work first") from error


@contextmanager
def importable(*directories: Path) -> Iterator[None]:
    """Let modules lying in ``directories`` be imported; used only where the user trusts or names them.

    They come last, so that a file lying beside a model never takes the place of an installed package.
    """
    added = [str(directory) for directory in dict.fromkeys(directories) if str(directory) not in sys.path]
    sys.path.extend(added)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for directory in added:
            if directory in sys.path:
                sys.path.remove(directory)
