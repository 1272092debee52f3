"""Reports as tables and lines, for any width and for streams without Unicode or colour."""

from convmerge.render.reports import (
    bench_parts,
    check_parts,
    contents_parts,
    fuse_parts,
    inspect_parts,
    verify_parts,
)
from convmerge.render.view import View

__all__ = [
    "View",
    "bench_parts",
    "check_parts",
    "contents_parts",
    "fuse_parts",
    "inspect_parts",
    "verify_parts",
]
