"""Exported programs, and scripts converted to such, as modules that can be merged."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from convmerge.errors import LoadError
from convmerge.evidence.tracing import quiet
from convmerge.export.program import as_module, input_values
from convmerge.export.recompose import recompose
from convmerge.export.sizes import Size, Sizes, named_sizes, resized
from convmerge.inputs import Inputs
from convmerge.verification.compare import compare
from convmerge.verification.probes import first_line


@dataclass(frozen=True, eq=False)
class Program:
    """What a .pt2 or TorchScript file holds.

    Attributes:
        module: a traced module without code of the original's, which checks the program's guards.
        inputs: those it was exported with, None where the file has none.
        sizes: which sizes of them are open; None where the file does not say.
        notes: what the user should know.
    """

    module: fx.GraphModule
    inputs: Inputs | None
    sizes: Sizes | None
    notes: tuple[str, ...] = ()


def read_program(path: Path) -> Program:
    """Load a .pt2 file, which can run any code.

    Raises LoadError where it is damaged, or of another version of torch.
    """
    try:
        with quiet():
            program = torch.export.load(path)
    except Exception as error:  # whatever the reader meets
        raise LoadError(
            f"{path} is an exported program that does not load here: {first_line(error)}",
            f"load it with the torch it was saved with, and export it again with {torch.__version__}",
        ) from error
    return from_program(program)


def read_script(path: Path, inputs: Callable[[nn.Module], Inputs]) -> Program:
    """Load a TorchScript file, which can run any code, and convert it to an exported program.

    Args:
        inputs: gives example inputs of the scripted model.

    Raises LoadError where it is damaged, or has what torch does not convert, such as control flow.
    """
    try:
        with quiet():
            script = torch.jit.load(path, map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise LoadError(
            f"{path} is a TorchScript archive that does not load here: {first_line(error)}",
            "load it with the torch it was saved with",
        ) from error
    given = inputs(script)
    try:
        module = _converted(script, given)
        verdict = compare(script, module, given, more=False)
    except Exception as error:
        raise LoadError(
            f"{path} is a TorchScript archive that torch does not convert: {first_line(error)}",
            "start from the Python model it was scripted from",
        ) from error
    if not verdict.equal:
        raise LoadError(
            f"{path} becomes another function where torch converts it: {verdict.reason}",
            "start from the Python model it was scripted from",
        )
    return Program(
        module, given, None, ("it was converted from TorchScript by torch, on the example inputs",)
    )


def _converted(script: Any, given: Inputs) -> fx.GraphModule:
    # The converter leaves all sizes open but those of one.
    ones = {s: 2 for s in named_sizes(given) if given.tensors()[s.tensor].shape[s.dim] == 1}
    try:
        program = _convert(script, resized(given, ones))
    except Exception:  # some are a property of the model
        program = _convert(script, given)
    module = plain_module(program)
    names = [argument.name for argument in script.forward.schema.arguments[1:]]
    for node, name in zip(module.graph.find_nodes(op="placeholder"), names, strict=False):
        node.target = name
    for node in module.graph.nodes:
        weights = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        if weights and node.op == "call_function":  # scripts tell by these alone where a call was
            node.meta["nn_module_stack"] = {weights[0]: (weights[0].rpartition(".")[0], "")}
    for name, old in script.named_parameters():  # the converter makes buffers of them
        path, _, leaf = name.rpartition(".")
        with contextlib.suppress(AttributeError):  # nothing uses it
            owner = module.get_submodule(path)
            if (value := owner._buffers.pop(leaf, None)) is not None:
                owner.register_parameter(leaf, nn.Parameter(value, old.requires_grad))
    module.recompile()
    return module


def _convert(script: Any, inputs: Inputs) -> ExportedProgram:
    from torch._export.converter import TS2EPConverter

    inputs = inputs.clone()
    with quiet(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        converted: ExportedProgram = TS2EPConverter(script, inputs.args, dict(inputs.kwargs)).convert()
    return converted


def from_program(program: ExportedProgram) -> Program:
    """A program as a module with plain arguments, on the CPU or where its weights are."""
    module = plain_module(program)
    if not program.example_inputs:
        return Program(module, None, None)
    args, kwargs = program.example_inputs
    names = tuple(inspect.signature(module.forward).parameters)[: len(args)]
    inputs = Inputs(tuple(args), dict(kwargs), names=names)
    return Program(module, inputs, _open_sizes(program, inputs))


def plain_module(program: ExportedProgram) -> fx.GraphModule:
    """The program as a traced module whose code takes and returns what the program does, by plain Python.

    torch's own form flattens its arguments and nests its results by tree specifications, which torch.fx does
    not trace again. It is kept where arguments are nested, or results are of classes registered with pytree.
    Its hooks go: they check what the guards check.
    """
    module = as_module(program)
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None and out_spec is not None
    flat = all(child.is_leaf() for group in in_spec.children() for child in group.children())
    if flat and _is_plain(out_spec):
        output = module.graph.output_node()
        (values,) = output.args
        output.args = (pytree.tree_unflatten(values, out_spec),)  # type: ignore[arg-type]
        names = list(inspect.signature(module.forward).parameters)
        for node, name in zip(module.graph.find_nodes(op="placeholder"), names, strict=True):
            node.target = name
        module.graph.set_codegen(CodeGen())
    for node in module.graph.find_nodes(op="call_module"):
        guards = module.get_submodule(str(node.target))
        if type(guards).__name__ == "GuardsFn":
            setattr(module, str(node.target), _plain_guards(guards, len(node.args)))
    recompose(module.graph)
    module.graph.lint()
    return fx.GraphModule(module, module.graph, class_name="ExportedProgram").eval()


def _plain_guards(guards: nn.Module, count: int) -> nn.Module:
    """A program's checks of its inputs as a traced module; torch keeps them as code made while loading."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    try:
        guards(*(fx.Proxy(graph.placeholder(f"input_{index}"), tracer) for index in range(count)))
    except Exception:  # a check that is no chain of operators: it stays as it is, and cannot be pickled
        return guards
    graph.output(None)
    module = fx.GraphModule(nn.Module(), graph, class_name="Guards")
    module._is_impure = True  # type: ignore[assignment]
    return module


def _is_plain(spec: pytree.TreeSpec) -> bool:
    return spec.is_leaf() or (spec.type in (tuple, list, dict) and all(map(_is_plain, spec.children())))


def _open_sizes(program: ExportedProgram, inputs: Inputs) -> Sizes:
    """The sizes that the program leaves open, under their usual names where they have such."""
    names = {(size.tensor, size.dim): size.name for size in named_sizes(inputs)}
    return tuple(
        Size(names.get((position, dim), f"size_{position}_{dim}"), position, dim)
        for position, value in enumerate(input_values(program))
        for dim, n in enumerate(value.shape)
        if isinstance(n, torch.SymInt)
    )
