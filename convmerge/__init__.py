"""Make a PyTorch model smaller and faster without changing the function it computes.

    import convmerge
    result = convmerge.fuse(model, example_inputs)
    result.model      # the fused copy
    result.report     # what was merged, kept and refused, and how far the two models are apart

The command line is a thin shell over these functions; see ``convmerge --help``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convmerge.api import Result, bench, check, fuse, inspect, verify
    from convmerge.errors import ConvmergeError, LoadError, Refusal
    from convmerge.io import load, save

__version__ = "0.1.0"
__all__ = [
    "ConvmergeError",
    "LoadError",
    "Refusal",
    "Result",
    "bench",
    "check",
    "fuse",
    "inspect",
    "load",
    "save",
    "verify",
]

_HOME = {
    **dict.fromkeys(("Result", "bench", "check", "fuse", "inspect", "verify"), "convmerge.api"),
    **dict.fromkeys(("ConvmergeError", "LoadError", "Refusal"), "convmerge.errors"),
    **dict.fromkeys(("load", "save"), "convmerge.io"),
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `convmerge --help` and `--version` do not import torch.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
