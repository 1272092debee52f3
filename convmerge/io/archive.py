"""The zip container of torch.save, checked before torch reads it."""

from __future__ import annotations

import sys
import zipfile
from typing import IO

from convmerge.errors import LoadError
from convmerge.io.pickles import MAX_BYTES, Global, Node, Pickle

_AGAIN = "download or copy it again, or save it again"
_ITEM_BYTES = {
    **dict.fromkeys(("ComplexDouble",), 16),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
}


def check_archive(file: IO[bytes], name: str) -> tuple[bytes, dict[str, int]]:
    """Check the members of a torch.save archive against their checksums.

    torch.load itself reads a file with a flipped weight bit without a word.

    Returns:
        The bytes of ``data.pkl``, and the size of every storage by its key.

    Raises:
        LoadError: a member is cut short, damaged, compressed, doubled or of another byte order.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _check_members(archive, name)
    except LoadError:
        raise
    except (
        Exception
    ) as error:  # zipfile raises BadZipFile, OSError, EOFError, struct.error, NotImplementedError, ...
        raise LoadError(f"{name} is damaged: {error or type(error).__name__}", _AGAIN) from None


def _check_members(archive: zipfile.ZipFile, name: str) -> tuple[bytes, dict[str, int]]:
    infos = {info.filename: info for info in archive.infolist()}
    roots = {member.partition("/")[0] for member in infos}
    if len(infos) != len(archive.infolist()) or len(roots) != 1:
        raise LoadError(f"{name} is damaged: members of the archive are doubled or lie apart", _AGAIN)
    root = roots.pop()
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
        raise LoadError(
            f"{name} was packed again by a zip program", "unpack with torch.load, and torch.save it again"
        )
    if infos[f"{root}/data.pkl"].file_size > MAX_BYTES:
        raise LoadError(
            f"the pickle in {name} is larger than {MAX_BYTES >> 20} MB", "no PyTorch model needs that"
        )
    broken = archive.testzip()
    if broken is not None:
        raise LoadError(f"{name} is damaged: {broken} does not match its checksum", _AGAIN)
    order = archive.read(f"{root}/byteorder") if f"{root}/byteorder" in infos else b"little"
    if order.decode("ascii", "replace") != sys.byteorder:
        raise LoadError(
            f"{name} was written on a machine of the other byte order",
            "load and save it on this machine first",
        )
    prefix = f"{root}/data/"
    sizes = {
        key.removeprefix(prefix): info.file_size for key, info in infos.items() if key.startswith(prefix)
    }
    return archive.read(f"{root}/data.pkl"), sizes


def check_storages(pickle: Pickle, sizes: dict[str, int], name: str) -> None:
    """Every storage the pickle refers to is there, in the size it says.

    Raises:
        LoadError: it is not.
    """
    for storage in pickle.storages:
        key, nbytes = _storage(storage)
        if key not in sizes or nbytes > sizes[key]:
            raise LoadError(f"{name} is damaged: the numbers of tensor storage {key!r} are missing", _AGAIN)


def _storage(storage: Node) -> tuple[str, int]:
    """Key and size in bytes, from the id ('storage', class, key, location, number of elements)."""
    match storage.args:
        case ("storage", Global(name=kind), str(key), _, int(count)) if count >= 0:
            return key, count * _ITEM_BYTES.get(kind.removesuffix("Storage"), 1)
    raise LoadError("the file refers to data in a way torch.save never does", _AGAIN)
