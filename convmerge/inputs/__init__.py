"""Example inputs: given, written on the command line, or inferred from the model; bound inputs."""

from __future__ import annotations

from convmerge.inputs.bound import Filled, bind_inputs, infer_bound, parse_bindings, takes
from convmerge.inputs.infer import infer_inputs
from convmerge.inputs.parse import parse_inputs
from convmerge.inputs.values import Inputs, as_inputs

__all__ = [
    "Filled",
    "Inputs",
    "as_inputs",
    "bind_inputs",
    "infer_bound",
    "infer_inputs",
    "parse_bindings",
    "parse_inputs",
    "takes",
]
