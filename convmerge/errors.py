"""The two ways in which convmerge says no."""

from __future__ import annotations


class ConvmergeError(Exception):
    """The command cannot give a verdict: bad usage, an unreadable file, a model that does not run.

    Args:
        message: one line that says what is wrong and where.
        hint: one line with the way out.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class LoadError(ConvmergeError):
    """The file is not a model that can be loaded as asked."""


class Refusal(Exception):  # noqa: N818 (a refusal is an answer, not an error)
    """This merge is not exact, or not known to be; ``reason`` is shown to the user as it is."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
