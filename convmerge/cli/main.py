"""The entry point: run a command, turn every error into a line on stderr and an exit code.

Exit codes: 0 clean, 1 a negative finding, 2 no verdict, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Sequence

import typer

from convmerge.cli.commands import CLEAN, FINDING, REPORT_IT, NotSameError, app
from convmerge.cli.options import Printing
from convmerge.errors import ConvmergeError

NO_VERDICT, INTERRUPTED, TERMINATED = 2, 130, 143
COMMANDS = ("inspect", "fuse", "check", "verify", "bench")
_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)

# Typer carries its own copy of click in some versions; this is ClickException in all of them.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; every error becomes a line on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        signal.signal(signal.SIGTERM, _end)
    terminal = Printing.before_parsing(words)
    command = typer.main.get_command(app)
    try:
        if not words:
            with contextlib.redirect_stdout(sys.stderr):
                command.main(["--help"], prog_name="convmerge", standalone_mode=False)
            return NO_VERDICT
        code = command.main(words, prog_name="convmerge", standalone_mode=False)
        return code if isinstance(code, int) else CLEAN
    except ConvmergeError as error:
        terminal.fail(error.message, error.hint)
        return FINDING if isinstance(error, NotSameError) else NO_VERDICT
    except _UsageError as error:
        terminal.fail(*_usage(error, [word for word in words if word in COMMANDS]))
    except typer.Abort as abort:
        if not isinstance(abort.__cause__, EOFError):  # what Typer takes for the end of a prompt
            return INTERRUPTED
        terminal.fail("internal error: unexpected end of file", REPORT_IT)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        terminal.fail(f"{error.strerror or error}{place}", "check the path, permissions and free space")
    except _Terminated:
        return TERMINATED
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # whoever read --help has left
            return CLEAN
        terminal.fail(
            "the model's own code ended the program", "take sys.exit() out of its modules and of forward"
        )
    except Exception as error:
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            terminal.fail("out of memory", "give a smaller --input")
        else:
            terminal.fail(f"internal error: {type(error).__name__}: {error}", REPORT_IT)
    except BaseException as error:
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        terminal.fail(f"the model's own code raised {what}", "-v shows where")
    return NO_VERDICT


class _Terminated(BaseException):
    """SIGTERM, as an exception: temporary files go."""


def _end(*_: object) -> None:
    raise _Terminated


def _usage(error: Exception, words: Sequence[str]) -> tuple[str, str]:
    message: str = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    message = message.replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else " ".join(["convmerge", *words[:1]])
    return message[:1].lower() + message[1:], f"see {command} --help"
