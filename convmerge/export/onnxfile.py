"""ONNX files: what an exported program becomes, and a check of what was written."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

from convmerge.errors import ConvmergeError
from convmerge.evidence.tracing import quiet
from convmerge.export.program import Exported, as_module, shapes_of
from convmerge.verification.probes import first_line

_WRITING = ("onnx", "onnxscript")
_LARGEST = 2**31 - 1  # bytes of a protocol buffer
NOT_RUN = "it was checked by onnx.checker but not run, since onnxruntime is not installed"


def check_packages(path: object) -> None:
    """Raise ConvmergeError where a package that torch.onnx.export needs is not installed."""
    missing = [name for name in _WRITING if importlib.util.find_spec(name) is None]
    if missing:
        raise ConvmergeError(
            f"cannot write {path}: {' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed",
            f"pip install {' '.join(missing)}",
        )


def to_onnx(exported: Exported) -> bytes:
    """The program as an ONNX model, its open sizes named.

    Raises ConvmergeError where torch.onnx.export does not know an operator, or the model is over 2 GB.
    """
    program = exported.program
    weights = (*program.state_dict.values(), *program.constants.values())
    if sum(w.nbytes for w in weights if isinstance(w, Tensor)) > _LARGEST:
        raise ConvmergeError(
            "the model is over 2 GB, more than an ONNX file holds", "write a .pt2 file instead"
        )
    names = {size: size.name for size in exported.sizes}
    try:
        with quiet(), _unlogged():
            made = torch.onnx.export(
                program,
                exported.inputs.args,
                kwargs=dict(exported.inputs.kwargs),
                dynamic_shapes=shapes_of(as_module(program), exported.inputs, names),
                output_names=_output_names(program),
                external_data=False,
                verbose=False,
            )
            assert made is not None
            data: bytes = made.model_proto.SerializeToString()
    except Exception as error:
        raise ConvmergeError(
            f"torch.onnx.export does not convert the model: {first_line(error)}", "write a .pt2 file instead"
        ) from error
    return data


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """The exporter logs what it leaves out, such as an output that is None."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _outputs(program: torch.export.ExportedProgram) -> Any:
    """The program's outputs as the model nests them: the names of tensors, the values of all else."""
    specs = [s.arg for s in program.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"]
    leaves = [arg.value if isinstance(arg, ConstantArgument) else arg for arg in specs]
    assert program.call_spec.out_spec is not None
    return pytree.tree_unflatten(leaves, program.call_spec.out_spec)


def _is_output(value: object) -> bool:
    return hasattr(value, "name") and not isinstance(value, ConstantArgument)


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    """``output``, ``output_0``, or the key in a dict of outputs, each once."""
    names: list[str] = []
    for path, value in pytree.tree_leaves_with_path(_outputs(program)):
        if _is_output(value):
            words = re.findall(r"\w+", pytree.keystr(path))
            name = "_".join(words if words and not words[0].isdigit() else ["output", *words])
            names.append(f"{name}_{len(names)}" if name in names else name)
    return names


class OnnxModel(nn.Module):
    """An ONNX model under onnxruntime, called as the exported model is; tensors on the CPU."""

    def __init__(self, data: bytes, exported: Exported) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self._outputs = _outputs(exported.program)
        self._inputs = exported.program.graph_signature.user_inputs

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModel:
        return self  # it has no state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = dict(zip(self._inputs, pytree.tree_leaves((args, kwargs)), strict=True))
        feeds = {node.name: values[node.name].detach().numpy() for node in self._session.get_inputs()}
        results = iter(self._session.run(None, feeds))
        return pytree.tree_map(
            lambda value: torch.from_numpy(next(results)) if _is_output(value) else value, self._outputs
        )


def read_onnx(data: bytes, exported: Exported) -> tuple[nn.Module | None, tuple[str, ...]]:
    """Check an ONNX model, and load it to be run; None, with the reason, where it cannot be run here.

    Raises ConvmergeError where it is no valid model, or onnxruntime does not load it.
    """
    import onnx

    try:
        onnx.checker.check_model(data, full_check=True)
        if importlib.util.find_spec("onnxruntime") is None:
            return None, (NOT_RUN,)
        return OnnxModel(data, exported), ()
    except Exception as error:
        raise ConvmergeError(
            f"the ONNX model does not load again: {first_line(error)}", "write a .pt2 file instead"
        ) from error
