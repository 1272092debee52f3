"""Pruned models made really smaller: channels that masks or zero weights have silenced are removed.

A channel is silenced where its layer's weights are zero, so that it is a constant, or where no layer reads
it. Constants go through batch norm, activations, pooling and whatever else works on channels by themselves,
and are added to the bias of the layers that read them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.node import Node
from torch.nn.utils import parametrize

from convmerge.cost.model import Objective
from convmerge.emit.build import round_once
from convmerge.errors import Refusal
from convmerge.evidence.capture import capture, plain_defaults
from convmerge.evidence.constants import Constants
from convmerge.evidence.tracing import quiet
from convmerge.inputs import Inputs
from convmerge.passes import Prepared
from convmerge.passes.channels.alignment import Alignment, align, mixes
from convmerge.passes.channels.layers import Edits, Owners, Place, can_shift, protect, pruned
from convmerge.passes.channels.liveness import Liveness, facts, weight_of
from convmerge.passes.channels.rows import SILENCED, rows
from convmerge.passes.channels.shrink import shrink
from convmerge.passes.edits import shallow_copy
from convmerge.report import SiteReport, saving_of
from convmerge.verification.compare import compare


def remove_silenced(
    model: nn.Module,
    inputs: Inputs,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    why: str = SILENCED,
    objective: Objective = "macs",
) -> Prepared:
    """A model without its silenced channels, with the masks of pruning made part of the weights.

    It shares the tensors that stay as they are with the model.

    Args:
        model: in eval mode; not changed.
        only, skip: globs on module paths; other layers, or these, keep their size.
        why: what the channels that go were, for the report.
        objective: for ``latency`` all channels stay where the layers without them are predicted to be slower
            together: numbers of channels that do not fill the kernels' blocks are.

    Raises ConvmergeError where the model cannot be captured.
    """
    if not may_be_silenced(model):
        return Prepared(model, inputs)
    evidence = capture(model, inputs)
    constants = Constants(evidence)
    static = is_static(model, inputs)
    for trusting in (True, False):
        owners = Owners(model, evidence, constants, only, skip, trusting)
        alignment = align(evidence, constants, owners.watched, trusting=trusting)
        try:
            removal = _Removal.plan(alignment, owners)
        except Refusal as refusal:
            site = SiteReport(
                type(model).__name__, (), "", "refuse", f"silenced channels stay: {refusal.reason}"
            )
            return Prepared(model, inputs, (site,))
        sites = rows(removal.live, removal.folded, static=static, why=why)
        saving = saving_of(sites)
        if objective == "latency" and saving and saving.latency_before < saving.latency_after:
            removal = removal.of_masks(owners)
            sites = rows(removal.live, removal.folded, static=static, why=why, stay=True)
        if not removal.edits.values:
            return Prepared(model, inputs, sites)
        if evidence.eager:
            return Prepared(model, inputs, refused(sites))
        changed = shallow_copy(model)
        removal.edits.apply(changed)
        certain = not alignment.assumed and not owners.trusted
        if certain or compare(model, changed, inputs, more=False).equal:
            break
    return Prepared(changed, inputs, sites)


def refused(sites: Sequence[SiteReport]) -> tuple[SiteReport, ...]:
    """What would have been removed, if all readers were known."""
    return tuple(dataclasses.replace(s, action="refuse", reason=NOT_FOLLOWED, evidence="") for s in sites)


def is_static(model: nn.Module, inputs: Inputs) -> bool:
    """Whether torch.fx can trace the whole model, so that no call depends on the values of its inputs."""
    try:
        bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
        absent = {k: v for k, v in plain_defaults(model).items() if k not in bound.arguments}
        with quiet():
            fx.Tracer().trace(shallow_copy(model), concrete_args=absent or None)
    except Exception:  # torch.fx raises many types on code it cannot follow
        return False
    return True


NOT_FOLLOWED = "torch.export cannot follow the model, so other layers may read its channels"


def may_be_silenced(model: nn.Module) -> bool:
    """Whether any mask, or any weight with zeros for a whole channel, is there at all: a quick look."""
    return any(_has_silence(module) for module in model.modules())


def _has_silence(module: nn.Module) -> bool:
    if parametrize.is_parametrized(module) or any(pruned(module, name) for name in ("weight", "bias")):
        return True
    if isinstance(module, nn.Embedding):  # its rows are no channels; that of padding is zero
        return False
    for name, parameter in module._parameters.items():
        if parameter is None or not parameter.is_floating_point() or not parameter.numel():
            continue
        if parameter.dim() > 1:
            groups = getattr(module, "groups", 1)
            groups = groups if isinstance(groups, int) and len(parameter) % max(groups, 1) == 0 else 1
            used = (parameter.detach() != 0).reshape(groups, len(parameter) // groups, parameter.shape[1], -1)
            used = used.any(-1)
            if not used.any(1).all() or not used.any(2).all():
                return True
        elif name == "weight" and not (parameter.detach() != 0).all():
            return True
    return False


@dataclass(eq=False)
class _Removal:
    """What is removed from a model.

    Attributes:
        folded: layers whose masks become part of their weights.
    """

    alignment: Alignment
    live: Liveness
    edits: Edits
    folded: set[str]

    @staticmethod
    def plan(alignment: Alignment, owners: Owners) -> _Removal:
        protect(alignment, owners)
        for mix in list(mixes(alignment)):
            if not can_shift(owners, mix):  # then its constants need a stand-in wherever they are
                closed = torch.zeros_like(mix.interior)
                alignment.steps[mix.call.node] = dataclasses.replace(mix, interior=closed)
        live = Liveness(alignment, facts(alignment))
        live.run()
        edits = shrink(live, owners)
        return _Removal(alignment, live, edits, fold_masks(alignment, owners, edits))

    def of_masks(self, owners: Owners) -> _Removal:
        """Masks become part of the weights, and every channel stays."""
        edits = Edits()
        return dataclasses.replace(self, edits=edits, folded=fold_masks(self.alignment, owners, edits))


def fold_masks(alignment: Alignment, owners: Owners, edits: Edits) -> set[str]:
    """Add the masked weights that keep their size to the edits; returns the paths of all masked layers."""
    folded: set[str] = set()
    for node in alignment.steps:
        call = alignment.evidence.calls[node]
        for name in ("weight", "bias"):
            tensor = call.args.get(name)
            if not isinstance(tensor, Node) or tensor not in alignment.constants:
                continue
            if tensor in alignment.evidence.tensors:
                continue
            with contextlib.suppress(Refusal):
                place = owners.place(call, tensor)
                value = weight_of(alignment, tensor)
                if place not in edits.values and (pruned_at(owners, place) or not value.all()):
                    edits.values[place] = round_once(value, alignment.evidence.dtype(tensor))
                if place in edits.values:
                    folded.add(place.path)
        alignment.constants.release()
    return folded


def pruned_at(owners: Owners, place: Place) -> bool:
    """Whether torch.nn.utils.prune computes what lies there."""
    return pruned(owners.model.get_submodule(place.path), place.name)
