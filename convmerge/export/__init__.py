"""Files that hold a graph and no Python code: exported programs (.pt2) and ONNX."""

from __future__ import annotations

from convmerge.export.program import Exported, as_module, export_program
from convmerge.export.sizes import Dynamic, Size, Sizes, takes

__all__ = ["Dynamic", "Exported", "Size", "Sizes", "as_module", "export_program", "takes"]
