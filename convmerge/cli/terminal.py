"""The two streams: results on stdout, everything else on stderr, whatever they are connected to."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from convmerge.render import Document

Format = Literal["table", "json", "markdown", "html"]
Progress = Callable[[str, int, int], None]  # stage, done, total

UNLIMITED = 10_000  # columns; lines of a pipe are never wrapped, so that grep finds whole ones
PROGRESS_AFTER = 1.0  # seconds

_ASCII = str.maketrans({"×": "x", "→": "->", "…": "...", "−": "-", "–": "-", "∘": "o", "≤": "<=", "≥": ">="})


def one_line(text: str, *, unicode: bool = True) -> str:
    """``text`` without line breaks, tabs and control characters, which file and module names may contain."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if unicode else text.translate(_ASCII)


def speaks_unicode(stream: TextIO | None) -> bool:
    """Whether the signs of the tables can be written to ``stream``."""
    try:
        "×→…─".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class Terminal:
    """Prints results, errors and progress.

    Args:
        quiet: errors only (a document of another format than ``table`` is printed all the same).
        verbose: tracebacks, and what the libraries warn of.
        format: of results; but for ``table`` one document on stdout, and errors are such documents too.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, format: Format = "table") -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.format = format
        self.unicode = speaks_unicode(sys.stdout)

    def results(self, data: Mapping[str, Any], document: Document) -> None:
        """Print ``data`` as JSON, or ``document``, which says the same."""
        if self.format == "json":
            text = json.dumps(_finite(data), indent=2, ensure_ascii=not self.unicode)
            _write(sys.stdout, text + "\n")
        elif self.format == "markdown":
            from convmerge.render.markdown import markdown

            _write(sys.stdout, markdown(document, unicode=self.unicode))
        elif self.format == "html":
            from convmerge.render.html import html

            _write(sys.stdout, html(document))
        else:
            self.show(document)

    def show(self, document: Document) -> None:
        """Print ``document`` as tables and lines, and nothing where results have another format."""
        if self.quiet or self.format != "table":
            return
        from convmerge.render.text import text_parts

        console = _console(sys.stdout)
        with console.capture() as capture:
            for part in text_parts(document, console.width, unicode=self.unicode):
                # An explicit soft wrap keeps commands in one piece, for copying them.
                console.print(part, soft_wrap=isinstance(part, str))
        text = capture.get()
        if not console.is_terminal:
            text = "".join(line.rstrip() + "\n" for line in text.splitlines())
        _write(sys.stdout, text)

    def warn(self, message: str) -> None:
        """Print a warning, unless quiet."""
        if not self.quiet:
            self._notice("warning", message)

    def fail(self, message: str, hint: str | None = None) -> None:
        """Print an error in one line, and the way out in another."""
        if self.format != "table":
            from convmerge.render.document import failure

            data = {"schema": 1, "error": one_line(message), "hint": hint and one_line(hint)}
            self.results(data, failure(message, hint))
        self._notice("error", message)
        if hint:
            self._notice("hint", hint)
        if self.verbose and sys.exc_info()[0] is not None:
            _write(sys.stderr, traceback.format_exc())

    def _notice(self, label: str, message: str) -> None:
        line = one_line(message, unicode=speaks_unicode(sys.stderr))
        _write(sys.stderr, f"{label}: {line}\n")

    @contextlib.contextmanager
    def working(self) -> Iterator[Progress]:
        """Keep libraries and the model's own code from printing among the results, and from reading.

        Yields what feeds a progress bar, which appears on a terminal after a second and leaves no trace.
        """
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(_progress(visible=not self.quiet))
            stack.enter_context(_apart(2 if self.verbose else None))
            if self.verbose:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            else:
                stack.enter_context(_silence())
            yield progress


@contextlib.contextmanager
def _apart(output: int | None) -> Iterator[None]:
    """Nothing to read on standard input, and ``output`` or nothing for standard output.

    This is for the descriptors: C code and other processes know nothing of sys.stdout.
    """
    with open(os.devnull, "r+b", buffering=0) as null, contextlib.ExitStack() as stack:
        for descriptor, instead in ((0, null.fileno()), (1, null.fileno() if output is None else output)):
            with contextlib.suppress(OSError):  # it was closed from the start
                kept = os.dup(descriptor)
                stack.callback(os.close, kept)
                stack.callback(os.dup2, kept, descriptor)
                os.dup2(instead, descriptor)
        yield


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No prints, warnings and log messages."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _progress(*, visible: bool) -> Iterator[Progress]:
    if not visible or sys.stderr is None or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.TimeElapsedColumn(),
        console=_console(sys.stderr),
        transient=True,
        redirect_stdout=False,  # working() has its own way
        redirect_stderr=False,
    )
    task = bar.add_task("starting", total=None)
    timer = threading.Timer(PROGRESS_AFTER, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda stage, done, total: bar.update(
            task, description=one_line(stage), completed=done, total=total or None
        )
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def _console(stream: TextIO) -> Console:
    """A console for ``stream``: COLUMNS wide if that is set, else as wide as the terminal, if it is one."""
    from rich.console import Console

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        console.width = int(columns)
    elif stream is None or not stream.isatty():
        console.width = UNLIMITED
    return console


def _write(stream: TextIO | None, text: str) -> None:
    """Write and flush; characters that the stream has no code for are escaped, a closed pipe is no error."""
    if stream is None:
        return
    encoding = stream.encoding or "ascii"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError as error:
        # Otherwise the interpreter flushes again at exit, and complains.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def _finite(value: Any) -> Any:
    """``value`` with None for numbers that JSON has no word for (inf, nan)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
