"""Bound inputs: everything that depends on them alone is computed once, and they leave the signature."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx.node import Node
from torch.utils import _pytree as pytree

from convmerge.edit.rewrite import stand_in
from convmerge.errors import ConvmergeError, Refusal
from convmerge.evidence.capture import Evidence, capture, copy_model, is_tensor
from convmerge.evidence.constants import Constants
from convmerge.inputs import Inputs
from convmerge.inputs.bound import Filled, bind_inputs
from convmerge.inputs.values import describe
from convmerge.passes import Pass, Prepared
from convmerge.passes.agreement import agreement, resolutions
from convmerge.passes.specialise import Specialised, specialise
from convmerge.regions.elements import CHECKS
from convmerge.report import SiteReport
from convmerge.verification.compare import compare

Check = Callable[[nn.Module, nn.Module, Inputs], bool]


def bind(values: Mapping[str, Any]) -> Pass:
    """The pass that binds inputs.

    Args:
        values: name → value, as :func:`convmerge.inputs.bound.bind_inputs` settled them.
    """

    def run(model: nn.Module, inputs: Inputs) -> Prepared:
        bound = bind_inputs(model, inputs, values)
        filled = Filled(model, bound.values)
        evidence = capture(filled, bound.rest)
        constants = Constants(evidence)
        try:
            made = _specialised(model, filled, bound.rest, bound.values, evidence, constants)
        except Refusal as refusal:
            names = ", ".join(bound.values)
            raise ConvmergeError(
                f"{names} cannot be bound: {refusal.reason}",
                "without --bind the model is merged as it is, its kernels computed in every call",
            ) from refusal
        sites = (_site(evidence, constants, bound.values, made), *_closed(made))
        return Prepared(made.module, bound.rest, sites, filled, required=True)

    return run


def _specialised(
    model: nn.Module,
    filled: Filled,
    rest: Inputs,
    values: Mapping[str, Any],
    evidence: Evidence,
    constants: Constants,
) -> Specialised:
    """The model without its bound inputs. Raises Refusal.

    A known tensor that the code repeats for every sample is first taken for one sample alone: its readers
    mostly broadcast it, and what is computed from it need not be computed again. Other batch sizes tell
    whether they all do.
    """
    for assume in (True, False):
        made = specialise(copy_model(model).eval(), rest, values, assume=assume)
        try:
            _settle(made, rest, evidence, constants)
        except (Refusal, ConvmergeError):
            if not made.assumed:
                raise
            continue
        if not made.assumed or compare(filled, made.module, rest).equal:
            break
    stand_in(made.module, model)
    return made


def _settle(made: Specialised, rest: Inputs, evidence: Evidence, constants: Constants) -> None:
    """Check the traced module against the evidence, and give its buffers their values rounded only once.

    Raises Refusal where it makes other calls on what is not known.
    """
    own = capture(made.module, rest)
    pairs = agreement(own, Constants(own), evidence, constants)
    coarsest = resolutions(evidence)
    for node, other in pairs.items():
        name = own.tensors[node][0] if node in own.tensors else ""
        if name in made.fixed:
            buffer = made.module.get_buffer(name)
            exact = constants.value(other)
            # Where the code itself computes in a coarser dtype, what it computes is the constant.
            own_unit = torch.finfo(buffer.dtype).eps if buffer.is_floating_point() else 0.0
            if exact.shape == buffer.shape and coarsest.get(other, 0.0) <= own_unit:
                buffer.copy_(exact)
    constants.release()


def _site(
    evidence: Evidence, constants: Constants, values: Mapping[str, Any], made: Specialised
) -> SiteReport:
    """One row for everything that the bound inputs alone decide."""
    computed = [n for n in _depending(evidence) if n in constants and n in evidence.calls]
    read = {n for n in evidence.tensors if n.users and all(user in set(computed) for user in n.users)}
    numbers = sum(made.module.get_buffer(name).numel() for name in made.fixed)
    kinds = Counter(
        evidence.calls[n].op for n in computed if evidence.calls[n].op not in (*CHECKS, "getitem")
    )
    plural = "s" if len(made.fixed) != 1 else ""
    return SiteReport(
        place=", ".join(values),
        operators=tuple(f"{kind} ×{n}" if n > 1 else kind for kind, n in kinds.items()),
        geometry=", ".join(_describe(value) for value in values.values()),
        action="merge",
        reason=f"bound: {len(made.fixed)} constant{plural} of {numbers} number{'s' if numbers != 1 else ''}",
        macs_before=sum(_macs(evidence, node) for node in computed),
        weights_before=sum(evidence.tensors[n][1].numel() for n in read if not _is_value(evidence, n)),
        weights_after=numbers,
        evidence="static" if not made.closed else "observed",
    )


def _describe(value: Any) -> str:
    leaves = pytree.tree_leaves(value)
    return describe(value) if len(leaves) < 2 else f"{len(leaves)} values"


def _closed(made: Specialised) -> list[SiteReport]:
    return [
        SiteReport(path, (), "", "refuse", f"what it computes from bound inputs is not fixed: {reason}")
        for path, reason in made.closed.items()
    ]


def _is_value(evidence: Evidence, node: Node) -> bool:
    return evidence.tensors[node][0].startswith("value_")


def _depending(evidence: Evidence) -> dict[Node, None]:
    """Calls that depend on bound tensors, in order."""
    found: dict[Node, None] = {n: None for n in evidence.tensors if _is_value(evidence, n)}
    for node in evidence.calls:
        if any(source in found for source in node.all_input_nodes):
            found[node] = None
    return found


def _macs(evidence: Evidence, node: Node) -> int:
    """Multiply-accumulates of a linear layer or a convolution."""
    call = evidence.calls[node]
    weight = call.args.get("weight")
    if not is_tensor(weight) or not (call.op == "linear" or call.op.startswith("conv")):
        return 0
    assert isinstance(weight, Node)
    positions = call.args["input"] if call.op.startswith("conv_transpose") else node
    return math.prod(evidence.size(positions)) * math.prod(evidence.size(weight)[1:])
