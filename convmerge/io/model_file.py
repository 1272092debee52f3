"""A model together with the way it lay in its file."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from convmerge.errors import LoadError
from convmerge.io.contents import MODEL_KEYS
from convmerge.io.pickles import printable
from convmerge.io.state import state_dict_in

if TYPE_CHECKING:
    from convmerge.export.sizes import Sizes
    from convmerge.inputs import Inputs

_WRAPPED_AS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
_WRAPPER_HOMES = ("torch.nn.parallel.", "torch._dynamo.")


@dataclass(frozen=True)
class Container:
    """How the module lies in the file, so that it can be written back alike.

    Attributes:
        document: the dict around the module, None where the file is the module itself.
        key: where in ``document`` the module lies.
    """

    document: dict[str, Any] | None = None
    key: str = ""

    def wrap(self, model: nn.Module) -> Any:
        """What to save: the module, or a copy of the dict with the module replaced wherever it stands."""
        if self.document is None:
            return model
        document = copy.copy(self.document)
        original = document[self.key]
        for key, value in self.document.items():
            if value is original:
                document[key] = model
        return document


@dataclass(frozen=True)
class ModelFile:
    """A model with the file it came from.

    Attributes:
        module: the model, on the CPU, in the dtype and train/eval mode it was saved in.
        container: how to write it back.
        path: the file.
        describe: what the file is, in words.
        notes: what the user should know, a sentence each: which of several modules was taken, what was
            unwrapped, what the output will be.
        inputs: those it was exported with, where the file holds them.
        sizes: which sizes of its inputs are open, where the file says so.
    """

    module: nn.Module
    container: Container
    path: Path
    describe: str
    notes: tuple[str, ...] = ()
    inputs: Inputs | None = None
    sizes: Sizes | None = None


def find_module(document: Any, path: Path, describe: str) -> ModelFile:
    """Pick the module out of what the file holds.

    Of several modules in a dict the averaged one is taken ("ema", "model_ema"), then "model", "net",
    "network", "module", "state_dict", "generator", "netG", then the first.

    Raises:
        LoadError: there is none.
    """
    if isinstance(document, nn.Module):
        return _unwrapped(document, Container(), path, describe, ())
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise LoadError(f"{path} holds a {kind}, not a model", "save the model: torch.save(model, path)")
    keys = [key for key, value in document.items() if isinstance(value, nn.Module)]
    if not keys:
        state_dict_in(document, str(path))  # raises where there is not even that
        raise LoadError(
            f"{path} holds tensors only (a state_dict), not the model's architecture",
            "pass --model pkg.mod:callable that builds the model (arguments: --model-args '{...}')",
        )
    key = min(keys, key=lambda k: MODEL_KEYS.index(k) if k in MODEL_KEYS else len(MODEL_KEYS))
    notes: tuple[str, ...] = ()
    others = [f"'{printable(str(k))}'" for k in keys if document[k] is not document[key]]
    if others:
        left = ", ".join(others)
        notes = (f"of several modules in the file took '{printable(str(key))}' and left {left} as it is",)
    return _unwrapped(document[key], Container(document, key), path, describe, notes)


def _unwrapped(
    module: nn.Module, container: Container, path: Path, describe: str, notes: tuple[str, ...]
) -> ModelFile:
    inner, wrappers = unwrap(module)
    notes += tuple(f"took the model out of its {name} wrapper, and writes it without" for name in wrappers)
    return ModelFile(inner, container, path, describe, notes)


def unwrap(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model inside DataParallel and torch.compile wrappers, and the names of what was taken off."""
    wrappers: list[str] = []
    while True:
        kind = type(model)
        attribute = _WRAPPED_AS.get(kind.__name__)
        if attribute is None or not kind.__module__.startswith(_WRAPPER_HOMES):
            return model, tuple(wrappers)
        inner = model._modules.get(attribute)
        if not isinstance(inner, nn.Module) or len(wrappers) > 8:
            raise LoadError(f"a {kind.__name__} without a model in it", "save the model itself")
        wrappers.append("torch.compile" if attribute == "_orig_mod" else kind.__name__)
        model = inner
