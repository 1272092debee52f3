"""Example inputs: given by the caller, written on the command line, or inferred from the model."""

from __future__ import annotations

from convmerge.inputs.infer import infer_inputs
from convmerge.inputs.parse import parse_inputs
from convmerge.inputs.values import Inputs, as_inputs

__all__ = ["Inputs", "as_inputs", "infer_inputs", "parse_inputs"]
