"""Channels that are copies or multiples of one another are computed once.

What a layer reads from a copy it can read from the original: the weights on the copy, times its factor, are
added to those on the original. Nobody reads the copy any more then, and it is removed as silenced channels
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from convmerge.cost.model import Objective
from convmerge.emit.build import round_once
from convmerge.errors import Refusal
from convmerge.evidence.capture import capture, copy_model
from convmerge.evidence.constants import Constants
from convmerge.inputs import Inputs
from convmerge.passes import Prepared
from convmerge.passes.channels.alignment import Alignment, Mix, align, mixes
from convmerge.passes.channels.copies import Copy, Rows, copies
from convmerge.passes.channels.layers import Edits, Owners, protect
from convmerge.passes.channels.liveness import COMPUTED, Liveness, facts, weight_of
from convmerge.passes.silenced import remove_silenced
from convmerge.report import SiteReport, saving_of

COPIES = "that were copies of others"
DIFFER = "what is computed from them differs"
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
# Predicted time with copies over that without, of the layers that change. What is left is rarely a multiple
# of the kernels' blocks of channels: with a tenth to an eighth of 64..128 channels gone, layers predicted to
# be 1.0 to 1.2 times as fast were measured to be 0.87 to 0.92 times as fast (tests/benchmarks/heads.py).
MARGIN = 1.25


def remove_duplicates(
    model: nn.Module,
    inputs: Inputs,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    objective: Objective = "latency",
) -> Prepared:
    """A model that computes every channel once.

    Args:
        model: in eval mode, without silenced channels; not changed.
        only, skip: globs on module paths; other layers, or these, are left as they are.
        objective: for ``latency`` copies stay where they are not predicted to cost enough.

    Raises ConvmergeError where the model cannot be captured.
    """
    sites: list[SiteReport] = []
    reduced, step = model, 0
    while may_have_copies(reduced):
        smaller, found = _once(reduced, inputs, only, skip)
        sites += [replace(s, step=step) for s in found if s.action == "merge" or smaller is None]
        if smaller is None:
            break
        reduced, step = smaller, step + 1  # layers that read fewer channels may have become alike
    saving = saving_of(sites)
    if objective == "latency" and saving and saving.latency_before < MARGIN * saving.latency_after:
        return Prepared(model, inputs, tuple(_kept(site) for site in sites))
    return Prepared(reduced, inputs, tuple(sites))


def _kept(site: SiteReport) -> SiteReport:
    if site.action != "merge":
        return site
    return replace(
        site, action="keep", reason=f"too little to gain for odd numbers of channels: {site.reason}"
    )


def may_have_copies(model: nn.Module) -> bool:
    """Whether two rows of any layer are multiples of one another: a quick look."""
    return any(_has_copies(module) for module in model.modules() if isinstance(module, LAYERS))


def _has_copies(layer: nn.Module) -> bool:
    weight, groups = getattr(layer, "weight", None), getattr(layer, "groups", 1)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or not weight.numel():
        return False
    blocks = weight.detach().cpu().reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return Rows(blocks.transpose(1, 2) if getattr(layer, "transposed", False) else blocks, None).may_repeat()


def _once(
    model: nn.Module, inputs: Inputs, only: Sequence[str], skip: Sequence[str]
) -> tuple[nn.Module | None, tuple[SiteReport, ...]]:
    """One round: a smaller model, or None where no copy can go; and the sites."""
    scene = _Scene.of(model, inputs, only, skip)
    found = copies(scene.alignment)
    if not found.computed or scene.alignment.evidence.eager:
        return None, ()
    moved = scene.moved(found.read)
    after = _Scene.of(moved, inputs, only, skip)
    live = after.liveness()
    going = {index: [c for c in read if after.goes(live, index, c)] for index, read in found.read.items()}
    if not any(going.values()):
        return None, after.stay(live, found.computed)
    if going != found.read:
        moved = scene.moved(going)
    prepared = remove_silenced(moved, inputs, only=only, skip=skip, why=COPIES)
    return None if prepared.model is moved else prepared.model, prepared.sites


@dataclass(frozen=True, eq=False)
class _Scene:
    """A model and its channels."""

    model: nn.Module
    alignment: Alignment
    owners: Owners
    layers: tuple[Mix, ...]

    @staticmethod
    def of(model: nn.Module, inputs: Inputs, only: Sequence[str], skip: Sequence[str]) -> _Scene:
        evidence = capture(model, inputs)
        constants = Constants(evidence)
        owners = Owners(model, evidence, constants, only, skip)
        alignment = align(evidence, constants, owners.watched)
        protect(alignment, owners)
        return _Scene(model, alignment, owners, tuple(mixes(alignment)))

    def moved(self, found: dict[int, list[Copy]]) -> nn.Module:
        """A copy of the model whose layers read originals in place of copies, where that can be written."""
        edits = Edits()
        for index, copied in found.items():
            mix = self.layers[index]
            try:
                edits.values[self.owners.place(mix.call, mix.weight)] = self._combined(mix, copied)
            except Refusal:  # it must not change, or overflows: then it goes on reading the copies
                continue
        changed = copy_model(self.model)
        edits.apply(changed)
        return changed

    def _combined(self, mix: Mix, copied: Sequence[Copy]) -> torch.Tensor:
        """The weight that reads no copy."""
        weight = weight_of(self.alignment, mix.weight).detach().double().clone()
        blocks = mix.blocks(weight)  # a view
        into = blocks.shape[2]
        for copy in copied:
            group, column, of = copy.place // into, copy.place % into, copy.of % into
            blocks[group, :, of] += copy.factor * blocks[group, :, column]
            blocks[group, :, column] = 0
        self.alignment.constants.release()
        return round_once(weight, self.alignment.evidence.dtype(mix.weight))

    def liveness(self) -> Liveness:
        """Which channels stay in this model."""
        live = Liveness(self.alignment, facts(self.alignment))
        live.run()
        return live

    def goes(self, live: Liveness, index: int, copy: Copy) -> bool:
        """Whether a copy that a layer no longer reads can be removed."""
        return not bool(live.kept(self.layers[index].inputs.ids[copy.place : copy.place + 1]))

    def stay(self, live: Liveness, computed: dict[int, list[int]]) -> tuple[SiteReport, ...]:
        """A row for every layer that computes copies that cannot go, with the reason."""
        rows = []
        for index, places in computed.items():
            mix = self.layers[index]
            ids = mix.outputs.ids[torch.tensor(places)]
            for reason, count in live.reasons(ids).items():
                words = f"{count} of {len(mix.outputs.ids)} output channels are multiples of others"
                why = f"copies stay: {DIFFER if reason == COMPUTED else reason}"
                rows.append(SiteReport(mix.call.leaf, (mix.call.op,), words, "refuse", why))
        return tuple(rows)
