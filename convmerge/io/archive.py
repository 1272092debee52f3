"""The zip container of torch.save, checked before torch unpickles what is in it."""

from __future__ import annotations

import sys
import zipfile
from typing import IO

import torch

from convmerge.errors import LoadError
from convmerge.io.pickles import MAX_BYTES, Global, Node, Pickle, printable

_AGAIN = "download or copy it again, or save it again"
_ITEM_BYTES = {
    **dict.fromkeys(("ComplexDouble",), 16),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
}


def read_archive(file: IO[bytes], name: str) -> tuple[bytes, dict[str, int]]:
    """Check a torch.save archive and read its pickle, without unpickling it.

    torch.load itself reads a file with a flipped weight bit without a word; here every member is compared
    with its checksum. The pickle comes from torch's own zip reader, so that it is the one torch will
    unpickle.

    Returns:
        The bytes of ``data.pkl``, and the size of every storage by its key.

    Raises:
        LoadError: a member is cut short, damaged, compressed, doubled or of another byte order.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = _check_members(archive, name)
        file.seek(0)
        reader = torch._C.PyTorchFileReader(file)
        known = "byteorder" in reader.get_all_records()
        _check_byte_order(reader.get_record("byteorder") if known else b"little", name)
        return reader.get_record("data.pkl"), sizes
    except LoadError:
        raise
    except Exception as error:  # BadZipFile, OSError, EOFError, struct.error, RuntimeError, ...
        reason = printable(str(error).partition("\n")[0] or type(error).__name__)
        raise LoadError(f"{name} is damaged: {reason}", _AGAIN) from None


def _check_members(archive: zipfile.ZipFile, name: str) -> dict[str, int]:
    """Check everything about the members but their content's meaning; size of every storage by its key."""
    infos = {info.filename: info for info in archive.infolist()}
    root = next(member.removesuffix("data.pkl") for member in infos if member.endswith("/data.pkl"))
    if len(infos) != len(archive.infolist()) or not all(member.startswith(root) for member in infos):
        raise LoadError(f"{name} is damaged: members of the archive are doubled or lie apart", _AGAIN)
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
        raise LoadError(f"{name} was packed again by a zip program", "torch.load it and torch.save it again")
    if infos[f"{root}data.pkl"].file_size > MAX_BYTES:
        raise LoadError(f"the pickle in {name} is over {MAX_BYTES >> 20} MB", "no PyTorch model needs that")
    # The directory bit of DOS: torch reads nothing then, and gives uninitialised memory as the numbers.
    if any(info.external_attr & 0x10 for info in infos.values()):
        raise LoadError(f"{name} is damaged: a member of the archive claims to be a directory", _AGAIN)
    # Under torch.serialization.set_crc32_options(False) no checksums are written: every one reads 0.
    broken = archive.testzip() if any(info.CRC for info in infos.values()) else None
    if broken is not None:
        raise LoadError(f"{name} is damaged: {printable(broken)} does not match its checksum", _AGAIN)
    prefix = f"{root}data/"
    return {key.removeprefix(prefix): info.file_size for key, info in infos.items() if key.startswith(prefix)}


def _check_byte_order(order: bytes, name: str) -> None:
    """Refuse a foreign byte order: torch swaps the bytes of most dtypes, but not of all."""
    if order != sys.byteorder.encode():
        raise LoadError(
            f"{name} was written on a machine of another byte order ({printable(repr(order))})",
            "load it and save it again with torch on this machine",
        )


def check_storages(pickle: Pickle, sizes: dict[str, int], name: str) -> None:
    """Every storage the pickle refers to is there, in the size it says.

    Raises:
        LoadError: it is not.
    """
    for storage in pickle.storages:
        key, nbytes = _storage(storage)
        if key not in sizes or nbytes > sizes[key]:
            raise LoadError(f"{name} is damaged: it lacks the numbers of storage {printable(key)}", _AGAIN)


def _storage(storage: Node) -> tuple[str, int]:
    """Key and size in bytes, from the id ('storage', class, key, location, number of elements)."""
    match storage.args:
        case ("storage", Global(name=kind), str(key), _, int(count)) if count >= 0:
            return key, count * _ITEM_BYTES.get(kind.removesuffix("Storage"), 1)
    raise LoadError("the file refers to data in a way torch.save never does", _AGAIN)
