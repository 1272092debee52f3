"""What a file is, told from its bytes: nothing is unpickled, imported or run."""

from __future__ import annotations

import os
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from convmerge.errors import LoadError

Kind = Literal[
    "torch_zip",
    "torch_legacy",
    "torchscript",
    "pt2",
    "pt2_compiled",
    "torch_package",
    "safetensors",
    "onnx",
    "numpy",
    "pickle",
    "zip",
    "damaged_zip",
    "other",
    "text",
    "html",
    "lfs_pointer",
    "empty",
    "directory",
    "special",
    "missing",
]

# torch.save before 1.6 begins with this number, pickled; the byte after 0x80 is the pickle protocol.
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
_HEAD_BYTES = 4096
_SAFETENSORS_HEADER_BYTES = 100_000_000  # the format's own limit

_SAVE_WHOLE = 'save the whole module instead: torch.save(model, "model.pt")'


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        name: the kind; ``torch_zip``, ``torch_legacy``, ``safetensors``, ``pt2`` and ``torchscript`` are the
            ones that can be opened.
        title: the kind in words, with its article.
        hint: the way out where the kind cannot be opened, else None.
    """

    name: Kind
    title: str
    hint: str | None = None


_KINDS = {
    kind.name: kind
    for kind in (
        FileKind("torch_zip", "a torch.save file"),
        FileKind("torch_legacy", "a torch.save file in the format from before torch 1.6"),
        FileKind("safetensors", "a safetensors file"),
        FileKind("torchscript", "a TorchScript archive"),
        FileKind("pt2", "an exported program (torch.export)"),
        FileKind(
            "pt2_compiled",
            "a compiled package (AOTInductor), which holds machine code and no model",
            f"start from the Python model it was compiled from and {_SAVE_WHOLE}",
        ),
        FileKind(
            "torch_package",
            "a torch.package archive, which convmerge does not read",
            f"load it with torch.package.PackageImporter, then {_SAVE_WHOLE}",
        ),
        FileKind(
            "onnx",
            "an ONNX model, which convmerge does not read",
            f"start from the PyTorch model it was exported from and {_SAVE_WHOLE}",
        ),
        FileKind("numpy", "a numpy file, which holds arrays and no model", _SAVE_WHOLE),
        FileKind(
            "pickle",
            "a plain pickle, not written by torch.save",
            f"load it where it was made, then {_SAVE_WHOLE}",
        ),
        FileKind(
            "zip", "a zip archive without a PyTorch model in it", "unpack it and pass the model file inside"
        ),
        FileKind(
            "damaged_zip",
            "a zip archive that is cut short or damaged",
            "download or copy it again, and compare the size with the source",
        ),
        FileKind("text", "a text file", "pass a model file written by torch.save(model, path)"),
        FileKind(
            "html",
            "a web page",
            "the link gave a page instead of the file: use the direct link, or log in first",
        ),
        FileKind(
            "lfs_pointer", "a git-lfs pointer, not the file itself", "fetch the content with: git lfs pull"
        ),
        FileKind("empty", "empty", "the download or the save did not finish: make the file again"),
        FileKind("special", "not a regular file", "pass the path of a model file"),
        FileKind("directory", "a directory", "pass the path of a model file inside it"),
        FileKind("missing", "not there", "check the path"),
    )
}

# (offset, signature, title) of formats people mistake for a PyTorch model.
_OTHERS = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)"),
    (0, b"GGUF", "a GGUF file (llama.cpp)"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ\x00", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstandard archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x7fELF", "a shared library or program"),
)


def sniff(path: str | os.PathLike[str]) -> FileKind:
    """Tell what the file at ``path`` is; never raises for a file that can be read.

    Raises:
        LoadError: the file cannot be opened or read (permissions, input/output error).
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _KINDS["directory"]
        if not stat.S_ISREG(mode):
            return _KINDS["special"]
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return _KINDS["missing"]
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise LoadError(
            f"cannot read {path}: {_reason(error)}", "check the path and its permissions"
        ) from None
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    return _sniff_head(head)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _sniff_head(head: bytes) -> FileKind:
    """Kind of a file that is not a zip archive, from its first bytes."""
    if not head:
        return _KINDS["empty"]
    if head[:1] == b"\x80" and _LEGACY_MAGIC in head[:32]:
        return _KINDS["torch_legacy"]
    # The length of the header, then the header; it can begin like a pickle, so safetensors is tried first.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _SAFETENSORS_HEADER_BYTES:
        return _KINDS["safetensors"]
    if head.startswith(b"\x93NUMPY"):
        return _KINDS["numpy"]
    if head[:1] == b"\x80" and head[1:2] and head[1] <= 5:
        return _KINDS["pickle"]
    for offset, magic, title in _OTHERS:
        if head[offset:].startswith(magic):
            return FileKind("other", title, _SAVE_WHOLE)
    # A ModelProto begins with ir_version, a small number, then producer_name, opset_import or the graph.
    if head[:1] == b"\x08" and head[1:2] <= b"\x20" and head[2:3] in (b"\x12", b"\x1a", b"\x3a", b"\x42"):
        return _KINDS["onnx"]
    return _sniff_text(head)


def _sniff_text(head: bytes) -> FileKind:
    if head.startswith(b"version https://git-lfs"):
        return _KINDS["lfs_pointer"]
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return _KINDS["html"]
    if not any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head):
        return _KINDS["text"]
    return FileKind(
        "other", "no file format convmerge knows", "pass a model file written by torch.save(model, path)"
    )


def _sniff_zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {_below_root(info.filename): info for info in archive.infolist()}
            if any(name.endswith(".data/extern_modules") for name in members):
                return _KINDS["torch_package"]
            if any(name.startswith("data/aotinductor/") for name in members):
                return _KINDS["pt2_compiled"]
            if "archive_format" in members or "serialized_exported_program.json" in members:
                return _KINDS["pt2"]
    except Exception:  # zipfile raises BadZipFile, OSError, EOFError, struct.error, NotImplementedError, ...
        return _KINDS["damaged_zip"]
    if "constants.pkl" in members and any(name.startswith("code/") for name in members):
        return _KINDS["torchscript"]
    if "data.pkl" in members:
        return _KINDS["torch_zip"]
    if members and all(name.endswith(".npy") for name in members):
        return _KINDS["numpy"]
    return _KINDS["zip"]


def _below_root(name: str) -> str:
    """The member name without the archive's one root folder, which may have any name."""
    root, slash, rest = name.partition("/")
    return rest if slash and root != "data" else name
