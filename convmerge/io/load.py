"""Open a saved model."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import nn

from convmerge.errors import LoadError
from convmerge.io.allowed import importable
from convmerge.io.archive import check_storages, read_archive
from convmerge.io.check import check_module
from convmerge.io.contents import Contents, summarise
from convmerge.io.factory import Factory, make_factory
from convmerge.io.kinds import FileKind, sniff
from convmerge.io.model_file import Container, ModelFile, find_module
from convmerge.io.pickles import Pickle, printable, read_pickle
from convmerge.io.state import load_state, read_safetensors, state_dict_in
from convmerge.io.trust import resolve

if TYPE_CHECKING:
    from convmerge.inputs import Inputs


def load(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    allow: Sequence[str] = (),
    factory: str | None = None,
    factory_args: dict[str, Any] | str | None = None,
    inputs: Callable[[nn.Module], Inputs] | None = None,
) -> nn.Module:
    """The module in a file; arguments and errors as in :func:`open_model`."""
    more: dict[str, Any] = {"factory": factory, "factory_args": factory_args, "inputs": inputs}
    return open_model(path, trust=trust, allow=allow, **more).module


def open_model(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    allow: Sequence[str] = (),
    factory: str | None = None,
    factory_args: dict[str, Any] | str | None = None,
    inputs: Callable[[nn.Module], Inputs] | None = None,
) -> ModelFile:
    """Open a saved model; by default without running any code of the file's.

    Args:
        trust: unpickle without limits; runs whatever the file says.
        allow: ``pkg.mod`` or ``pkg.mod.Name``: classes the file may use beside those of torch.nn.
        factory: ``pkg.mod:callable`` that builds the architecture for a file that holds only tensors.
        factory_args: keyword arguments for it, a dict or JSON.
        inputs: gives example inputs of a scripted model, which TorchScript needs to be converted.

    With any of ``trust``, ``allow`` and ``factory``, modules in the current directory and in the file's own
    can be imported while the file is opened; installed packages of the same name come first.

    Raises:
        LoadError: the file cannot be read as a model, or needs more trust than it was given.
    """
    path = Path(path)
    named = trust or bool(allow) or factory is not None
    with _naming(path), importable(*((Path.cwd(), path.resolve().parent) if named else ())):
        kind = _readable(path)
        if kind.name in ("pt2", "torchscript"):
            file = _open_program(path, kind, trust, inputs)
        else:
            document, describe = _read(path, kind, trust, tuple(allow))
            if factory is None:
                file = find_module(document, path, describe)
            else:
                file = _build(make_factory(factory, factory_args), document, path, describe)
        check_module(file.module, untrusted=not trust)
    return file


def _open_program(
    path: Path, kind: FileKind, trust: bool, inputs: Callable[[nn.Module], Inputs] | None
) -> ModelFile:
    if not trust:
        raise LoadError(
            f"{path} is {kind.title}, which only loads unsafely", "pass --trust if you made this file"
        )
    if kind.name == "torchscript" and inputs is None:
        raise LoadError(f"{path} is {kind.title}, which is converted by example inputs", "pass inputs=")
    # torch's exporter, which files of other kinds do not need
    from convmerge.export.reading import read_program, read_script

    program = read_program(path) if inputs is None or kind.name == "pt2" else read_script(path, inputs)
    return ModelFile(
        program.module, Container(), path, kind.title, program.notes, program.inputs, program.sizes
    )


def _build(factory: Factory, document: Any, path: Path, describe: str) -> ModelFile:
    state, where = state_dict_in(document, str(path))
    module, changes = load_state(factory, state, str(path))
    whole = "writes a whole module, since a merged model no longer fits the architecture's state_dict"
    return ModelFile(module, Container(), path, describe, (*where, *changes, whole))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file it is in errors that come from where that is not known."""
    try:
        yield
    except LoadError as error:
        if str(path) in error.message or error.message.startswith("--"):
            raise
        about, message = error.message.startswith("the file "), error.message.removeprefix("the file ")
        raise LoadError(f"{path}{' ' if about else ': '}{message}", error.hint) from error.__cause__


def peek(path: str | os.PathLike[str]) -> Contents | None:
    """What a torch.save file says it holds, without running any of it; None for other kinds of file.

    Raises:
        LoadError: the file is damaged.
    """
    path = Path(path)
    kind = sniff(path)
    if kind.name not in ("torch_zip", "torch_legacy"):
        return None
    with _naming(path), path.open("rb") as file:
        return summarise(_inert(file, path, kind))


def _readable(path: Path) -> FileKind:
    kind = sniff(path)
    if kind.name == "missing":
        raise LoadError(f"no such file: {path}", kind.hint)
    if kind.hint is not None:
        raise LoadError(f"{path} is {kind.title}", kind.hint)
    return kind


def _read(path: Path, kind: FileKind, trust: bool, allow: tuple[str, ...]) -> tuple[Any, str]:
    """The object in the file, and what the file is in words."""
    if kind.name == "safetensors":
        return read_safetensors(path), kind.title
    with path.open("rb") as file:
        pickle = _inert(file, path, kind)
        contents = summarise(pickle)
        if trust:
            document = _unpickle(file, path, safely=False)
        elif kind.name == "torch_legacy":
            document = _unpickle_legacy(file, path, contents)
        else:
            document = _unpickle_safely(file, path, pickle, allow)
    return document, f"{kind.title} with {contents.title}"


def _inert(file: IO[bytes], path: Path, kind: FileKind) -> Pickle:
    """Read the file's main pickle inertly, after its container has been checked."""
    if kind.name == "torch_legacy":
        for _ in range(3):  # magic number, protocol version, byte order and word sizes
            read_pickle(file)
        return read_pickle(file)
    data, sizes = read_archive(file, str(path))
    pickle = read_pickle(io.BytesIO(data))
    check_storages(pickle, sizes, str(path))
    return pickle


def _unpickle_safely(file: IO[bytes], path: Path, pickle: Pickle, allow: tuple[str, ...]) -> Any:
    file.seek(0)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:
        raise LoadError(
            f"{path} is pickled in a way that cannot be loaded safely (protocol {pickle.protocol})",
            "save it again without pickle_protocol=, or pass --trust if you made this file",
        ) from None
    with torch.serialization.safe_globals(resolve(pickle, unknown, allow)):
        return _unpickle(file, path, safely=True)


def _unpickle_legacy(file: IO[bytes], path: Path, contents: Contents) -> Any:
    if contents.holds != "state_dict":
        raise LoadError(
            f"{path} holds {contents.title} in the format from before torch 1.6, which only loads unsafely",
            "pass --trust if you made this file, or load and save it again with a newer torch",
        )
    return _unpickle(file, path, safely=True)


def _unpickle(file: IO[bytes], path: Path, *, safely: bool) -> Any:
    """torch.load on the CPU, with one readable error for the dozen exceptions it can raise."""
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=safely)
    except ModuleNotFoundError as error:
        raise LoadError(
            f"{path} needs the module {error.name}, which is not installed",
            "install it, or run in the directory of its .py file",
        ) from error
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> LoadError:
    text = str(error)
    if lost := re.match(r"Can't get attribute '(.+?)' on <module '(.+?)'", text):
        name, module = printable(lost[1]), printable(lost[2])
        if module == "__main__":
            hint = "move the class into a .py file of its own, import it from there and save the model again"
            return LoadError(f"{path} needs the class {name} of the script that saved it", hint)
        hint = f"install the version of {module} the model was saved with"
        return LoadError(f"{path} needs the class {module}.{name}, which is not there", hint)
    # torch wraps the reason of a safe load in advice to load unsafely.
    reason = text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    reason = printable(reason or type(error).__name__)
    return LoadError(f"{path} cannot be unpickled: {reason}", "save it again with torch.save(model, path)")
