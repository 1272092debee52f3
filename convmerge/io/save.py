"""Write a model: the whole file, checked, or nothing."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from convmerge.errors import ConvmergeError
from convmerge.io.model_file import Container, ModelFile
from convmerge.io.pickles import printable

_SUFFIXES = (".pt", ".pth")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    like: ModelFile | None = None,
    force: bool = False,
    verify: Callable[[nn.Module], None] | None = None,
) -> None:
    """Write ``model`` to ``path`` in one step: a reader sees the old file or the whole new one.

    The bytes go to a temporary file in the same directory, which is synced, loaded again and handed to
    ``verify``, and only then renamed. On any error, an interrupt included, the temporary file goes and the
    target stays.

    An existing regular file is overwritten and its permissions are kept; a symbolic link stays one, and the
    file it points to is replaced.

    Args:
        like: the file the model came from; a checkpoint dict is written back with only its module replaced.
        force: allow ``path`` to be the very file the model came from.
        verify: called with the module as loaded from the temporary file; what it raises is raised here.

    Raises:
        ConvmergeError: the target cannot or must not be written, or the model cannot be pickled.
    """
    target = check_target(path, like=like, force=force)
    container = like.container if like is not None else Container()
    _plain_tracers(model)
    with _replacing(target) as file:
        _write(container.wrap(model), file, target)
        # These bytes were pickled by this process from objects it already runs, so loading them without
        # limits runs nothing new; the limits of open_model are for files that come from elsewhere.
        document = _reload(file, target)
        module = document if container.document is None else document[container.key]
        if verify is not None:
            verify(module)


def check_target(path: str | os.PathLike[str], *, like: ModelFile | None = None, force: bool = False) -> Path:
    """The real path to write; call it early, so that a bad target fails before the work and not after it.

    Raises:
        ConvmergeError: wrong suffix, missing or read-only directory, not a regular file, or the input itself.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        shown = f"'{path.suffix}'" if path.suffix else "no suffix"
        raise ConvmergeError(
            f"cannot write {path}: models are written as .pt or .pth, not {shown}", "use -o NAME.pt"
        )
    try:
        target = path.resolve()
        if not target.parent.is_dir():
            raise ConvmergeError(
                f"cannot write {path}: there is no directory {target.parent}", f"mkdir -p {target.parent}"
            )
        if target.exists():
            _check_existing(path, target, like, force)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        raise _cannot_write(path, error) from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ConvmergeError(
            f"cannot write {path}: the directory is read-only", "choose another directory with -o"
        )
    return target


def _check_existing(path: Path, target: Path, like: ModelFile | None, force: bool) -> None:
    if not stat.S_ISREG(target.stat().st_mode):
        raise ConvmergeError(
            f"cannot write {path}: it exists and is not a regular file", "choose another name with -o"
        )
    if not os.access(target, os.W_OK):
        raise ConvmergeError(
            f"cannot write {path}: the file is read-only", "choose another name with -o, or chmod u+w"
        )
    if like is not None and not force and like.path.exists() and target.samefile(like.path):
        raise ConvmergeError(f"{path} is the input itself", "choose another name with -o, or pass --force")


@contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside ``target`` that takes its place if the block succeeds, and vanishes if not."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise _cannot_write(target, error) from error
    file = os.fdopen(handle, "w+b")
    try:
        yield file
        try:
            file.close()
            os.chmod(name, _mode(target))
            os.replace(name, target)
        except OSError as error:
            raise _cannot_write(target, error) from error
        _sync_directory(target.parent)
    except BaseException:
        with suppress(OSError):  # closing writes what is buffered, which a full disk refuses once more
            file.close()
        Path(name).unlink(missing_ok=True)
        raise


class _Watched:
    """A file that remembers why a write failed: torch's zip writer reports a failure of its own instead."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(document: Any, file: IO[bytes], target: Path) -> None:
    watched = _Watched(file)
    try:
        torch.save(document, watched)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    except Exception as error:
        cause = watched.error or error
        if isinstance(cause, OSError):
            raise _cannot_write(target, cause) from error
        reason = printable(f"{type(error).__name__}: {error}")
        hint = "replace lambdas and local classes in it by functions and classes of a module"
        raise ConvmergeError(f"the model cannot be pickled: {reason}", hint) from error


def _reload(file: IO[bytes], target: Path) -> Any:
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}")
        raise ConvmergeError(
            f"{target} would not load again: {reason}", "nothing was written; please report this"
        ) from error


def _mode(target: Path) -> int:
    """Permissions of the file that is replaced, or those a new file gets."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable, where the system can."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: BaseException) -> ConvmergeError:
    reason = (error.strerror if isinstance(error, OSError) else None) or printable(str(error))
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = f"{'free some space, or ' if full else ''}choose another place with -o"
    return ConvmergeError(f"cannot write {path}: {reason}", hint)


def _plain_tracers(model: nn.Module) -> None:
    """Make traced modules load with torch alone: their pickle names the Tracer class they were made with."""
    for module in model.modules():
        if isinstance(module, torch.fx.GraphModule):
            module._tracer_cls = module.graph._tracer_cls = torch.fx.Tracer
