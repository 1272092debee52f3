"""Write a model: the whole file, checked, or nothing."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from torch import nn

from convmerge.errors import ConvmergeError
from convmerge.io.forms import Form, Pickled, Written
from convmerge.io.model_file import Container, ModelFile
from convmerge.io.pickles import printable

if TYPE_CHECKING:
    from convmerge.inputs import Inputs

_PICKLED = (".pt", ".pth")
_GRAPHS = (".pt2", ".onnx")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    like: ModelFile | None = None,
    force: bool = False,
    inputs: Any = None,
    dynamic: str = "auto",
    verify: Callable[[nn.Module, tuple[Inputs, ...]], None] | None = None,
) -> Written:
    """Write ``model`` to ``path`` in one step: a reader sees the old file or the whole new one.

    What is written follows the suffix: ``.pt`` and ``.pth`` by torch.save, ``.pt2`` by torch.export,
    ``.onnx`` by torch.onnx.export. The bytes go to a temporary file in the same directory, which is synced,
    loaded again and handed to ``verify``, and only then renamed. On any error, an interrupt included, the
    temporary file goes and the target stays.

    An existing regular file is overwritten and its permissions are kept; a symbolic link stays one, and the
    file it points to is replaced.

    Args:
        like: the file the model came from; a checkpoint dict is written back with only its module replaced,
            and of a .pt2 file the same sizes stay open.
        force: allow ``path`` to be the very file the model came from.
        inputs: example inputs as for :func:`convmerge.fuse`, which .pt2 and .onnx need.
        dynamic: sizes of the inputs that stay open in .pt2 and .onnx: ``auto`` (those on which the model does
            not depend), ``none``, or names between commas, such as ``batch,height,width`` or ``tokens:1``.
        verify: called with the module as loaded from the temporary file, and with inputs of other sizes that
            it must take; what it raises is raised here. Not called where an ONNX file cannot be run.

    Raises:
        ConvmergeError: the target cannot or must not be written, or the model cannot be pickled or exported.
    """
    target = check_target(path, source=like.path if like is not None else None, force=force)
    form = _form(model, target, like, inputs, dynamic)
    with _replacing(target) as file:
        _write(form, file, target)
        file.seek(0)
        reloaded = form.reload(file)
        if verify is not None and reloaded is not None:
            verify(reloaded, form.others)
    return form.written(target)


def _form(model: nn.Module, target: Path, like: ModelFile | None, inputs: Any, dynamic: str) -> Form:
    if not is_graph_file(target):
        return Pickled(model, target, like.container if like is not None else Container())
    from convmerge.export.files import graph_form  # torch's exporters, which files of other kinds do not need

    return graph_form(model, target, inputs, dynamic, like.sizes if like is not None else None)


def is_graph_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name holds a graph and no Python code: .pt2 and .onnx."""
    return Path(path).suffix.lower() in _GRAPHS


def check_target(path: str | os.PathLike[str], *, source: Path | None = None, force: bool = False) -> Path:
    """The real path to write; call it early, so that a bad target fails before the work and not after it.

    Args:
        source: the file the model comes from.
        force: allow it to be the target.

    Raises:
        ConvmergeError: a directory, wrong suffix, in a missing or read-only directory, not a regular file, or
            the input itself; or a package to write it is missing.
    """
    path = Path(path)
    if os.path.isdir(path):
        name = f"{source.stem}-fused{source.suffix}" if source else "NAME.pt"
        raise ConvmergeError(
            f"cannot write {path}: it is a directory", f"name the file in it, as in -o {path / name}"
        )
    if path.suffix.lower() not in (*_PICKLED, *_GRAPHS):
        shown = f"'{path.suffix}'" if path.suffix else "no suffix"
        raise ConvmergeError(
            f"cannot write {path}: models are written as .pt, .pth, .pt2 or .onnx, not {shown}",
            "use -o NAME.pt",
        )
    if path.suffix.lower() == ".onnx":
        from convmerge.export.onnxfile import check_packages

        check_packages(path)
    try:
        target = path.resolve()
        if not target.parent.is_dir():
            raise ConvmergeError(
                f"cannot write {path}: there is no directory {target.parent}", f"mkdir -p {target.parent}"
            )
        if target.exists():
            _check_existing(path, target, source, force)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        raise _cannot_write(path, error) from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ConvmergeError(
            f"cannot write {path}: the directory is read-only", "choose another directory with -o"
        )
    return target


def _check_existing(path: Path, target: Path, source: Path | None, force: bool) -> None:
    if not stat.S_ISREG(target.stat().st_mode):
        raise ConvmergeError(
            f"cannot write {path}: it exists and is not a regular file", "choose another name with -o"
        )
    if not os.access(target, os.W_OK):
        raise ConvmergeError(
            f"cannot write {path}: the file is read-only", "choose another name with -o, or chmod u+w"
        )
    if source is not None and not force and source.exists() and target.samefile(source):
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


def _write(form: Form, file: IO[bytes], target: Path) -> None:
    watched = _Watched(file)
    try:
        form.write(watched)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    except ConvmergeError:
        raise
    except Exception as error:
        cause = watched.error or error
        if isinstance(cause, OSError):
            raise _cannot_write(target, cause) from error
        raise form.unwritable(error) from error


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
