"""The forms of files that hold a graph, for :func:`convmerge.io.save`."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from convmerge.errors import ConvmergeError
from convmerge.evidence.tracing import quiet
from convmerge.export.onnxfile import read_onnx, to_onnx
from convmerge.export.program import Exported, as_module, export_program
from convmerge.export.sizes import Dynamic, Sizes, takes
from convmerge.inputs import Inputs, as_inputs
from convmerge.io.forms import Form, Written, not_again
from convmerge.io.pickles import printable

_SHOWN = 3  # conditions


def graph_form(model: nn.Module, target: Path, inputs: Any, dynamic: str, known: Sizes | None) -> Form:
    """The form a .pt2 or .onnx file takes.

    Raises ConvmergeError where the model cannot be exported, or without example inputs.
    """
    if inputs is None:
        raise ConvmergeError(f"{target.suffix} files need example inputs", "pass inputs=")
    exported = export_program(model, as_inputs(inputs), Dynamic.parse(dynamic), known=known)
    return _Onnx(exported, target) if target.suffix.lower() == ".onnx" else _Program(exported, target)


class _Program:
    """A .pt2 file."""

    def __init__(self, exported: Exported, target: Path) -> None:
        self.exported = exported
        self.target = target

    @property
    def others(self) -> tuple[Inputs, ...]:
        return self.exported.others

    def write(self, file: IO[bytes]) -> None:
        with quiet():
            torch.export.save(self.exported.program, file)

    def unwritable(self, error: Exception) -> ConvmergeError:
        reason = printable(f"{type(error).__name__}: {error}")
        return ConvmergeError(f"torch.export.save fails: {reason}", "write a .pt file instead")

    def reload(self, file: IO[bytes]) -> nn.Module:
        try:
            with quiet():
                return as_module(torch.export.load(file))
        except Exception as error:
            raise not_again(self.target, error) from error

    def written(self, path: Path) -> Written:
        return Written(
            path, takes(self.exported.inputs, self.exported.sizes), self._notes("checks it itself")
        )

    def _notes(self, checked: str) -> tuple[str, ...]:
        conditions = self.exported.conditions
        if not conditions:
            return self.exported.notes
        more = f" and {len(conditions) - _SHOWN} more such" if len(conditions) > _SHOWN else ""
        words = f"{self.target.name} is only for {', '.join(conditions[:_SHOWN])}{more}, and {checked}"
        return (*self.exported.notes, words)


class _Onnx(_Program):
    """An .onnx file, its weights inside."""

    checks: tuple[str, ...] = ()

    def write(self, file: IO[bytes]) -> None:
        file.write(to_onnx(self.exported))

    def unwritable(self, error: Exception) -> ConvmergeError:
        return not_again(self.target, error)

    def reload(self, file: IO[bytes]) -> nn.Module | None:  # type: ignore[override]
        model, self.checks = read_onnx(file.read(), self.exported)
        return model

    def written(self, path: Path) -> Written:
        notes = (*self._notes("does not check it"), *(f"{self.target.name}: {text}" for text in self.checks))
        return Written(path, takes(self.exported.inputs, self.exported.sizes), notes)
