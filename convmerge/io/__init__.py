"""Model files: telling what they are, loading them safely, writing them whole or not at all."""

from __future__ import annotations

from convmerge.io.check import check_module
from convmerge.io.contents import Contents, TensorInfo
from convmerge.io.forms import Written
from convmerge.io.kinds import FileKind, sniff
from convmerge.io.load import load, open_model, peek
from convmerge.io.model_file import Container, ModelFile, unwrap
from convmerge.io.save import check_target, is_graph_file, save

__all__ = [
    "Container",
    "Contents",
    "FileKind",
    "ModelFile",
    "TensorInfo",
    "Written",
    "check_module",
    "check_target",
    "is_graph_file",
    "load",
    "open_model",
    "peek",
    "save",
    "sniff",
    "unwrap",
]
