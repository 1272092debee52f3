"""The forms in which a model goes to a file; those that hold a graph are in :mod:`convmerge.export.files`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import torch
from torch import nn

from convmerge.errors import ConvmergeError
from convmerge.io.model_file import Container
from convmerge.io.pickles import printable

if TYPE_CHECKING:
    from convmerge.inputs import Inputs


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        path: the file.
        inputs: what each input may be, as in ``batch×3×height×width float32``, for files that hold a graph.
        notes: what the user should know, a sentence each: sizes that are fixed, checks that were not made.
    """

    path: Path
    inputs: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Form(Protocol):
    """A model in the form a file takes."""

    @property
    def others(self) -> tuple[Inputs, ...]:
        """Inputs of other sizes than the example's that what is read back must take."""

    def write(self, file: IO[bytes]) -> None:
        """Write it; OSError and ConvmergeError pass through :func:`save`."""

    def unwritable(self, error: Exception) -> ConvmergeError:
        """What to say of any other error."""

    def reload(self, file: IO[bytes]) -> nn.Module | None:
        """What the file gives, from its beginning; None where it cannot be run here."""

    def written(self, path: Path) -> Written:
        """What to say of the file."""


class Pickled:
    """A module, or the dict it lay in, by torch.save."""

    others: tuple[Inputs, ...] = ()

    def __init__(self, model: nn.Module, target: Path, container: Container) -> None:
        _plain_tracers(model)
        self.target = target
        self.container = container
        self.document = container.wrap(model)

    def write(self, file: IO[bytes]) -> None:
        torch.save(self.document, file)

    def unwritable(self, error: Exception) -> ConvmergeError:
        reason = printable(f"{type(error).__name__}: {error}")
        hint = "replace lambdas and local classes in it by functions and classes of a module"
        return ConvmergeError(f"the model cannot be pickled: {reason}", hint)

    def reload(self, file: IO[bytes]) -> nn.Module:
        # These bytes were pickled by this process from objects it already runs, so loading them without
        # limits runs nothing new; the limits of open_model are for files that come from elsewhere.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                document = torch.load(file, map_location="cpu", weights_only=False)
        except Exception as error:
            raise not_again(self.target, error) from error
        module: nn.Module = document if self.container.document is None else document[self.container.key]
        return module

    def written(self, path: Path) -> Written:
        return Written(path)


def not_again(target: Path, error: Exception) -> ConvmergeError:
    """What was written cannot be read."""
    reason = printable(f"{type(error).__name__}: {error}")
    return ConvmergeError(
        f"{target} would not load again: {reason}", "nothing was written; please report this"
    )


def _plain_tracers(model: nn.Module) -> None:
    """Make traced modules load with torch alone: their pickle names the Tracer class they were made with."""
    for module in model.modules():
        if isinstance(module, torch.fx.GraphModule):
            module._tracer_cls = module.graph._tracer_cls = torch.fx.Tracer
