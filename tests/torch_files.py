"""What the tests of files share: saving and refusing, and torch.save files made by hand."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from convmerge.errors import ConvmergeError
from convmerge.io import open_model


def saved(path: Path, obj: Any, **options: Any) -> Path:
    torch.save(obj, path, **options)
    return path


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 5, (3, 1), bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)
    )


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert [type(m).__name__ for m in a.modules()] == [type(m).__name__ for m in b.modules()]
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key


def assert_refused(path: Path, words: str, **options: Any) -> ConvmergeError:
    with pytest.raises(ConvmergeError, match=words) as caught:
        open_model(path, **options)
    error = caught.value
    assert "\n" not in error.message and len(error.message) < 400, error.message
    assert error.hint and "\n" not in error.hint, "every refusal names a way out"
    assert str(path) in error.message or error.message.startswith("--"), error.message
    return error


def archive(path: Path, pickle: bytes, storages: dict[str, bytes] | None = None, **members: bytes) -> Path:
    """Write a torch.save archive around the bytes of a pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
        for name, data in {"byteorder": b"little", "version": b"3\n", **members}.items():
            file.writestr(f"archive/{name}", data)
    return path


def members(obj: Any) -> dict[str, bytes]:
    """The members of the archive torch.save writes for an object."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    with zipfile.ZipFile(buffer) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


# A pickle by hand. Every function gives the instructions that leave one value on the stack.


def program(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def pack(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def mapping(entries: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def call(maker: bytes, *args: bytes) -> bytes:
    return maker + pack(*args) + b"R"


def module(cls: bytes, modules: dict[str, bytes] | None = None, **attributes: bytes) -> bytes:
    """An nn.Module instance, restored from a state as torch.save writes it."""
    state = {
        "training": b"\x89",
        "_parameters": b"}",
        "_buffers": b"}",
        "_modules": mapping(modules or {}),
        **attributes,
    }
    return cls + b")\x81" + mapping(state) + b"b"


RELU = name("torch.nn.modules.activation", "ReLU")
SEQUENTIAL = name("torch.nn.modules.container", "Sequential")
CONV = name("torch.nn.modules.conv", "Conv2d")
