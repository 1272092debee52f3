"""A model as an exported program, its sizes left open where the model allows it."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from convmerge.errors import ConvmergeError
from convmerge.evidence.capture import copy_model
from convmerge.evidence.tracing import VisibleData, collector_paused, quiet
from convmerge.export.sizes import BATCH, Dynamic, Size, Sizes, asked_for, named_sizes, others, resized
from convmerge.inputs import Inputs
from convmerge.verification.errormodel import call
from convmerge.verification.outputs import Leaves
from convmerge.verification.probes import first_line

_NO_OTHER = "the model runs on no other that was tried"
_CONSTANT = "the model's code makes it a constant"


@dataclass(frozen=True, eq=False)
class Exported:
    """A model for a file that holds a graph.

    Attributes:
        program: computes what the model does in eval mode.
        inputs: those it was exported with, in the order of forward's parameters.
        sizes: the sizes of its inputs that are open.
        others: inputs of other sizes that it takes; none where no size is open.
        conditions: what open sizes must be like, as in ``width >= 21``; the program checks them by itself.
            Lower bounds that the model has too, such as the size of a kernel, are left out.
        notes: which sizes could not stay open, and why, a sentence each.
    """

    program: ExportedProgram
    inputs: Inputs
    sizes: Sizes
    others: tuple[Inputs, ...] = ()
    conditions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def export_program(
    model: nn.Module, inputs: Inputs, dynamic: Dynamic | None = None, *, known: Sizes | None = None
) -> Exported:
    """Export a model by torch.export; neither it nor the inputs are changed.

    Sizes that are open by default are those on which the model does not depend, see :func:`named_sizes`: it
    runs with other ones too, and torch.export follows it. What cannot stay open is noted.

    Args:
        dynamic: which sizes to leave open.
        known: the sizes that are open by default, where that is settled.

    Raises:
        ConvmergeError: torch.export cannot follow the model, or a size that was asked for cannot stay open.
    """
    dynamic = dynamic or Dynamic()
    model = copy_model(model).eval()
    inputs = _in_order(model, inputs)
    notes: list[str] = []
    if not dynamic.auto:
        sizes = asked_for(dynamic, inputs)
    elif known is not None:
        sizes = known
    else:
        named = named_sizes(inputs)
        sizes = _independent(model, inputs, named)
        if closed := [size for size in named if size not in sizes]:
            notes.append(_stays(closed, inputs, _NO_OTHER))
    while True:
        try:
            return replace(_attempt(model, inputs, sizes), notes=tuple(notes))
        except _ClosedError as error:
            if not sizes:
                raise ConvmergeError(
                    f"the model cannot be exported by torch.export: {error.reason}",
                    "write a .pt file instead",
                ) from error
            if dynamic.names:
                names = ",".join(size.name for size in sizes if size not in error.sizes)
                raise ConvmergeError(
                    _stays(error.sizes, inputs, error.reason), f"try --dynamic {names or 'none'}"
                ) from error
            notes.append(_stays(error.sizes, inputs, error.reason))
            sizes = tuple(size for size in sizes if size not in error.sizes)


class _ClosedError(Exception):
    """Some sizes cannot stay open, or, where none is, the model cannot be exported."""

    def __init__(self, sizes: Sequence[Size], reason: str) -> None:
        super().__init__(reason)
        self.sizes = sizes
        self.reason = reason


def _attempt(model: nn.Module, inputs: Inputs, sizes: Sizes) -> Exported:
    # torch.export takes a size of one for a property of the model.
    given = inputs.tensors()
    example = resized(inputs, {s: 2 for s in sizes if given[s.tensor].shape[s.dim] == 1})
    first = [size for size in sizes if size.name != BATCH] or sizes
    try:
        program = _export(model, example, sizes)
    except Exception as error:  # torch.export raises many types on code it cannot follow
        raise _ClosedError(first, f"torch.export fails: {first_line(error)}") from error
    symbols = input_values(program)
    closed = [s for s in sizes if not isinstance(symbols[s.tensor].shape[s.dim], torch.SymInt)]
    if closed:
        raise _ClosedError(closed, _CONSTANT)
    module = as_module(program)
    other = _other(model, module, inputs, sizes)
    if sizes and other is None:
        groups = [tuple(s for s in sizes if s.name == name) for name in dict.fromkeys(s.name for s in sizes)]
        alone = [s for group in groups if _other(model, module, inputs, group) is None for s in group]
        raise _ClosedError(alone or first, _CONSTANT if alone else _NO_OTHER)
    conditions = _conditions(program, model, inputs, sizes)
    return Exported(program, inputs, sizes, (other,) if other else (), conditions)


def _export(model: nn.Module, inputs: Inputs, sizes: Sizes) -> ExportedProgram:
    unseen = contextlib.redirect_stderr(io.StringIO())  # where it fails, it prints the graph it has so far
    inputs = inputs.clone()
    with quiet(), unseen, collector_paused(), VisibleData(), torch.no_grad():
        return torch.export.export(
            model,
            inputs.args,
            dict(inputs.kwargs),
            dynamic_shapes=shapes_of(model, inputs, {s: Dim.AUTO for s in sizes}),
            strict=False,
        )


def shapes_of(model: nn.Module, inputs: Inputs, marks: dict[Size, Any]) -> Any:
    """``marks`` built like the arguments of forward, as torch.export and torch.onnx take them."""
    if not marks:
        return None
    by_tensor: dict[int, dict[int, Any]] = {}
    for size, mark in marks.items():
        by_tensor.setdefault(size.tensor, {})[size.dim] = mark
    collection = ShapesCollection()  # type: ignore[no-untyped-call]
    for position, dims in by_tensor.items():
        collection[inputs.tensors()[position]] = dims
    return collection.dynamic_shapes(model, inputs.args, dict(inputs.kwargs))  # type: ignore[no-untyped-call]


def as_module(program: ExportedProgram) -> GraphModule:
    """The program as a module, which is in eval mode."""
    with quiet():
        module = program.module()
    for name in ("train", "eval"):  # torch replaces them by functions that raise
        vars(module).pop(name, None)
    assert isinstance(module, GraphModule)
    return module.eval()


def input_values(program: ExportedProgram) -> list[Tensor]:
    """The fake tensors that stand for the input tensors, in order."""
    users = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.name in users]
    return [value for value in values if isinstance(value, Tensor)]


def _in_order(model: nn.Module, inputs: Inputs) -> Inputs:
    """Keyword arguments in the order of forward's parameters, as in the exported program."""
    parameters = list(inspect.signature(model.forward).parameters)
    order = {name: index for index, name in enumerate(parameters)}
    names = sorted(inputs.kwargs, key=lambda name: order.get(name, len(order)))
    return replace(inputs, kwargs={name: inputs.kwargs[name] for name in names})


def _independent(model: nn.Module, inputs: Inputs, sizes: Sizes) -> Sizes:
    """The sizes that the model takes other values of: of the batch, of all maps together, of all tokens."""
    kinds: dict[object, list[Size]] = {}
    for size in sizes:
        is_map = inputs.tensors()[size.tensor].is_floating_point()
        kinds.setdefault(BATCH if size.name == BATCH else is_map, []).append(size)
    found: set[Size] = set()
    for group in kinds.values():
        if _other(model, None, inputs, tuple(group)) is not None:
            found.update(group)
    return tuple(size for size in sizes if size in found)


def _other(model: nn.Module, program: nn.Module | None, inputs: Inputs, sizes: Sizes) -> Inputs | None:
    """Inputs with other values of ``sizes`` that the model runs on, and the program too."""
    if not sizes:
        return None
    given = call(model, inputs)
    for changed in others(inputs, sizes):
        candidate = resized(inputs, changed)
        with contextlib.suppress(Exception), quiet():  # a model may say anything to a size it is not made for
            outputs = call(model, candidate)
            if program is not None:
                call(program, candidate)
            if _rows(inputs, given) <= _rows(candidate, outputs):
                return candidate
    return None


def _rows(inputs: Inputs, outputs: Leaves) -> set[str]:
    """The outputs that have a row for every sample of the batch.

    A model that flattens by ``view(-1, features)`` runs on other sizes too, and then cuts rows anywhere.
    """
    batch = next((x.shape[0] for x in inputs.tensors() if x.dim()), None)
    return {n for n, x in outputs.items() if isinstance(x, Tensor) and x.dim() and x.shape[0] == batch}


def _stays(sizes: Sequence[Size], inputs: Inputs, reason: str) -> str:
    given = {size.name: inputs.tensors()[size.tensor].shape[size.dim] for size in sizes}
    names = [f"{name} {n}" for name, n in given.items()]
    first = ", ".join(names[:-1])
    return f"{f'{first} and ' if first else ''}{names[-1]} cannot stay open: {reason}"


def _conditions(program: ExportedProgram, model: nn.Module, inputs: Inputs, sizes: Sizes) -> tuple[str, ...]:
    """What the open sizes must be like for the program but not for the model, in words of their names."""
    lower: dict[str, int] = {}
    upper: dict[str, int] = {}
    symbols = input_values(program)
    for size in sizes:
        expression = symbols[size.tensor].shape[size.dim].node.expr  # type: ignore[attr-defined]
        bounds = program.range_constraints.get(expression)
        if bounds is not None and bounds.lower > 2:  # two stands for any: see _attempt
            lower[size.name] = max(int(bounds.lower), lower.get(size.name, 0))
        if bounds is not None and str(bounds.upper).isdigit():
            upper[size.name] = min(int(bounds.upper), upper.get(size.name, int(bounds.upper)))
    guards = {frozenset(text.split(" == ")): text for text in _guards(program, model, inputs, sizes)}
    texts = sorted(guards.values(), key=lambda text: "!=" in text)
    least = [f"{name} >= {n}" for name, n in lower.items() if _runs(model, inputs, sizes, name, n - 1)]
    return (*least, *(f"{name} <= {n}" for name, n in upper.items()), *texts)


def _runs(model: nn.Module, inputs: Inputs, sizes: Sizes, name: str, n: int) -> bool:
    """Whether the model runs where the sizes of a name are ``n``."""
    try:
        with quiet():
            call(model, resized(inputs, {size: n for size in sizes if size.name == name}))
    except Exception:  # a model may say anything to a size it is not made for
        return False
    return True


_SIZE = re.compile(r"(L(?:\[[^\]]+\])+)\.size\(\)\[(\d+)\]")
_BOUND = re.compile(r"\w+ [<>]=? \d+")


def _guards(program: ExportedProgram, model: nn.Module, inputs: Inputs, sizes: Sizes) -> Iterator[str]:
    """The conditions that are no plain bounds; those that intermediate sizes are not one are left out."""
    names = {(size.tensor, size.dim): size.name for size in sizes}
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    leaves, _ = pytree.tree_flatten_with_path(dict(bound))
    sources = [f"L{pytree.keystr(path)}" for path, value in leaves if isinstance(value, Tensor)]
    positions = {source: position for position, source in enumerate(sources)}

    def named(match: re.Match[str]) -> str:
        return names.get((positions.get(match[1], -1), int(match[2])), match[0])

    for guard in getattr(program, "_guards_code", ()):
        text = _SIZE.sub(named, guard).replace("(-1) + ", "-1 + ")
        left, equals, right = text.partition(" == ")
        if not (text.endswith("!= 1") or _BOUND.fullmatch(text) or (equals and left == right)):
            yield text
