"""Open a saved model."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from convmerge.errors import ConvmergeError, LoadError
from convmerge.io.archive import check_archive, check_storages
from convmerge.io.check import check_module
from convmerge.io.contents import MODEL_KEYS, Contents, summarise
from convmerge.io.kinds import FileKind, sniff
from convmerge.io.pickles import Pickle, printable, read_pickle
from convmerge.io.state import load_state, read_safetensors, state_dict_in
from convmerge.io.trust import import_named, importable, resolve


@dataclass(frozen=True)
class Container:
    """How the module was wrapped in the file, so that it can be written back alike.

    Attributes:
        document: the dict around the module, None where the file is the module itself.
        key: where in ``document`` the module lies.
    """

    document: dict[str, Any] | None = None
    key: str = ""

    def wrap(self, model: nn.Module) -> Any:
        """What to save: the module, or a copy of the dict with only the module replaced."""
        if self.document is None:
            return model
        document = type(self.document)(self.document)
        document[self.key] = model
        return document


@dataclass(frozen=True)
class ModelFile:
    """A model with the file it came from.

    Attributes:
        module: the model, on the CPU, in the dtype and train/eval mode it was saved in.
        container: how to write it back.
        path: the file.
        describe: what the file is, in words.
        notes: what the user should know, a sentence each: which of several modules was taken, what was unwrapped.
    """

    module: nn.Module
    container: Container
    path: Path
    describe: str
    notes: tuple[str, ...] = ()


def load(path: str | os.PathLike[str], **options: Any) -> nn.Module:
    """The module in a file; arguments and errors as in :func:`open_model`."""
    return open_model(path, **options).module


def open_model(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    allow: Sequence[str] = (),
    factory: str | None = None,
    factory_args: dict[str, Any] | str | None = None,
) -> ModelFile:
    """Open a saved model; by default without running any code of the file's.

    Args:
        trust: unpickle without limits; runs whatever the file says.
        allow: ``pkg.mod`` or ``pkg.mod.Name``: classes the file may use beside those of torch.nn.
        factory: ``pkg.mod:callable`` that builds the architecture for a file that holds only tensors.
        factory_args: keyword arguments for it, a dict or JSON.

    With any of ``trust``, ``allow`` and ``factory``, modules in the current directory and in the file's own can be
    imported; installed packages of the same name come first.

    Raises:
        LoadError: the file cannot be read as a model, or needs more trust than it was given.
    """
    path = Path(path)
    named = trust or bool(allow) or factory is not None
    with importable(*((Path.cwd(), path.resolve().parent) if named else ())):
        document, what = _read(path, trust, tuple(allow))
        if factory is not None:
            build = _factory(factory, factory_args)
            state, notes = state_dict_in(document, str(path))
            module, more = load_state(build, state, str(path))
            file = ModelFile(module, Container(), path, what, (*notes, *more))
        else:
            file = _find_module(document, path, what)
    check_module(file.module, untrusted=not trust)
    return file


def peek(path: str | os.PathLike[str]) -> Contents | None:
    """What a torch.save file says it holds, without running any of it; None for other kinds of file.

    Raises:
        LoadError: the file is damaged.
    """
    path = Path(path)
    kind = sniff(path)
    if kind.name not in ("torch_zip", "torch_legacy"):
        return None
    with path.open("rb") as file:
        return summarise(_inert(file, path, kind))


def _read(path: Path, trust: bool, allow: tuple[str, ...]) -> tuple[Any, str]:
    """The object in the file, and what the file is in words."""
    kind = sniff(path)
    if kind.name == "missing":
        raise LoadError(f"no such file: {path}", kind.hint)
    if kind.hint is not None:
        raise LoadError(f"{path} is {kind.title}", kind.hint)
    if kind.name == "safetensors":
        return read_safetensors(path), kind.title
    with path.open("rb") as file:
        pickle = _inert(file, path, kind)
        contents = summarise(pickle)
        file.seek(0)
        document = _unpickle(file, path) if trust else _unpickle_safely(file, path, kind, pickle, allow)
    return document, f"{kind.title} with {contents.title}"


def _inert(file: IO[bytes], path: Path, kind: FileKind) -> Pickle:
    """Read the file's main pickle inertly, after the container has been checked."""
    if kind.name == "torch_zip":
        data, sizes = check_archive(file, str(path))
        pickle = read_pickle(data)
        check_storages(pickle, sizes, str(path))
        return pickle
    stream = io.BytesIO(file.read())
    for _ in range(3):  # magic number, protocol, byte order and sizes of the writing machine
        read_pickle(stream)
    return read_pickle(stream)


def _unpickle_safely(
    file: IO[bytes], path: Path, kind: FileKind, pickle: Pickle, allow: tuple[str, ...]
) -> Any:
    if kind.name == "torch_legacy":
        if summarise(pickle).holds != "state_dict":
            raise LoadError(
                f"{path} is a whole model {kind.title.removeprefix('a torch.save file ')}",
                "such a file loads only by running its code: pass --trust if you made it, or save it again",
            )
        return _torch_load(file, path, weights_only=True)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    classes = resolve(pickle, unknown, allow)
    file.seek(0)
    with torch.serialization.safe_globals(classes):
        return _torch_load(file, path, weights_only=True)


def _unpickle(file: IO[bytes], path: Path) -> Any:
    return _torch_load(file, path, weights_only=False)


def _torch_load(file: IO[bytes], path: Path, *, weights_only: bool) -> Any:
    """torch.load on the CPU, with one readable error for the dozen exceptions it can raise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=weights_only)
    except ModuleNotFoundError as error:
        raise LoadError(
            f"{path} needs the module {error.name}, which is not installed",
            "install it, or run in the directory of its .py file",
        ) from error
    except (Exception, RecursionError, MemoryError) as error:
        reason = printable(str(error).partition("\n")[0] or type(error).__name__)
        raise LoadError(
            f"{path} cannot be unpickled: {reason}", "save it again with torch.save(model, path)"
        ) from error


def _find_module(document: Any, path: Path, what: str) -> ModelFile:
    """Pick the module out of what the file holds."""
    if isinstance(document, nn.Module):
        return _unwrapped(document, Container(), path, what, ())
    if not isinstance(document, dict):
        raise LoadError(
            f"{path} holds a {type(document).__name__}, not a model",
            "save the model: torch.save(model, path)",
        )
    keys = [key for key, value in document.items() if isinstance(key, str) and isinstance(value, nn.Module)]
    if not keys:
        state_dict_in(document, str(path))  # raises where there is not even that
        raise LoadError(
            f"{path} holds tensors only (a state_dict), not the model's architecture",
            "pass --model pkg.mod:factory, a callable that builds the model (arguments: --model-args '{...}')",
        )
    key = min(keys, key=lambda k: MODEL_KEYS.index(k) if k in MODEL_KEYS else len(MODEL_KEYS))
    notes: tuple[str, ...] = ()
    if len(keys) > 1:
        others = ", ".join(f"'{printable(k)}'" for k in keys if k != key)
        notes = (f"the checkpoint holds several modules: took '{printable(key)}', left {others} as it is",)
    return _unwrapped(document[key], Container(document, key), path, what, notes)


def _unwrapped(
    module: nn.Module, container: Container, path: Path, what: str, notes: tuple[str, ...]
) -> ModelFile:
    inner, wrappers = unwrap(module)
    for wrapper in wrappers:
        notes = (*notes, f"unwrapped {wrapper}: the output is the model itself")
    return ModelFile(inner, container, path, what, notes)


def unwrap(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model inside DataParallel, DistributedDataParallel and torch.compile wrappers, and what was taken off."""
    wrappers: list[str] = []
    while True:
        kind = type(model)
        if kind.__module__.startswith("torch.nn.parallel.") and isinstance(
            model._modules.get("module"), nn.Module
        ):
            inner = model._modules["module"]
        elif kind.__module__ == "torch._dynamo.eval_frame" and kind.__name__ == "OptimizedModule":
            inner = model._modules.get("_orig_mod")
        else:
            return model, tuple(wrappers)
        if inner is None or len(wrappers) > 8:
            raise LoadError(f"a {kind.__name__} without a model in it")
        wrappers.append(kind.__name__ if kind.__name__ != "OptimizedModule" else "torch.compile")
        model = inner


def _factory(spec: str, arguments: dict[str, Any] | str | None) -> Callable[[], nn.Module]:
    """The callable ``pkg.mod:name`` with its arguments bound."""
    module_name, colon, name = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise ConvmergeError(
            f"--model {printable(spec)}: not of the form pkg.mod:callable",
            "as in --model torchvision.models:resnet18",
        )
    module = import_named(module_name)
    if module is None:
        raise LoadError(
            f"--model {spec}: there is no module {module_name}",
            "run where it is installed, or in the directory of its .py file",
        )
    build: Any = module
    for part in name.split("."):
        build = getattr(build, part, None)
    if not callable(build):
        raise LoadError(f"--model {spec}: {module_name} has no callable {name}")
    kwargs = _json_arguments(arguments)

    def make() -> nn.Module:
        try:
            model = build(**kwargs)
        except Exception as error:
            reason = printable(f"{type(error).__name__}: {error}")
            raise LoadError(
                f"--model {spec} fails: {reason}", "give its arguments with --model-args '{\"name\": value}'"
            ) from error
        if not isinstance(model, nn.Module):
            raise LoadError(f"--model {spec} gave a {type(model).__name__}, not a module")
        return model

    return make


def _json_arguments(arguments: dict[str, Any] | str | None) -> dict[str, Any]:
    if not isinstance(arguments, str):
        return dict(arguments or {})
    try:
        value = json.loads(arguments)
    except ValueError as error:
        raise ConvmergeError(
            f"--model-args is no JSON: {error}", "as in --model-args '{\"num_classes\": 10}'"
        ) from None
    if not isinstance(value, dict):
        raise ConvmergeError("--model-args is no JSON object", "as in --model-args '{\"num_classes\": 10}'")
    return value
