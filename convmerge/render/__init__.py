"""Reports as documents, and documents as text, Markdown and HTML."""

from convmerge.render.document import Document
from convmerge.render.reports import (
    bench_document,
    check_document,
    contents_document,
    fuse_document,
    inspect_document,
    verify_document,
)

__all__ = [
    "Document",
    "bench_document",
    "check_document",
    "contents_document",
    "fuse_document",
    "inspect_document",
    "verify_document",
]
