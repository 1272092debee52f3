"""Reports as tables and lines, for any width and for streams without Unicode or colour."""

from convmerge.render.reports import check_parts, contents_parts, fuse_parts, inspect_parts, verify_parts
from convmerge.render.view import View

__all__ = ["View", "check_parts", "contents_parts", "fuse_parts", "inspect_parts", "verify_parts"]
