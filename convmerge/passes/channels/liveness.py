"""Which channels of a model have to be computed, which only have to be there, and which can go.

Forward, from the first call to the last: which channels are the same number everywhere (``facts``).
Backward: which channels somebody needs. A channel that every reader either multiplies by zero, or knows as a
number that it can take into its bias, need not be there, unless one that is tied to it must be.

Zero padding is where a constant channel is not constant for a convolution. All constants that a convolution
meets there are multiples of one of them, so that one channel stays for all.

Every call is looked at once in each direction, so this takes time linear in the number of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.passes.channels.alignment import Alignment, EqualParts, Facts, Lanes, Mix, Wall, mixes

CHUNK = 1 << 24  # weights looked at in one go
LARGE = 1 / 8  # of the largest constant
COMPUTED = "it goes together with channels that are still computed"
ONE_STAYS = "a layer keeps one channel"


def weight_of(alignment: Alignment, node: Node) -> Tensor:
    """A constant in the dtype it is stored in; in float64 where it is computed."""
    if node in alignment.evidence.tensors:
        return alignment.evidence.tensors[node][1].cpu()
    value: Tensor = alignment.constants.value(node)
    return value


@dataclass(frozen=True, eq=False)
class Edges:
    """Some rows of a layer's weight: which of its inputs they read, bool (groups, rows, in / groups).

    Attributes:
        rows: places of these rows among the outputs of every group.
        varying: weights on channels that are not known.
        fragile: weights at taps that can read padding, on channels known to be another number than zero.
    """

    rows: slice
    varying: Tensor
    fragile: Tensor


def edges(alignment: Alignment, mix: Mix, inputs: Facts) -> Iterator[Edges]:
    """The weights of a layer that are not zero, a few rows at a time."""
    blocks = mix.blocks(weight_of(alignment, mix.weight))
    groups, outputs, into, taps = blocks.shape
    known = inputs.known.reshape(groups, 1, into)
    carried = known & (inputs.value != 0).reshape(groups, 1, into)
    step = max(1, CHUNK // max(1, groups * into * taps))
    for start in range(0, outputs, step):
        used = blocks[:, start : start + step] != 0
        fragile = used[..., ~mix.interior].any(-1) & carried
        yield Edges(slice(start, start + step), used.any(-1) & ~known, fragile)


def facts(alignment: Alignment) -> dict[Node, Facts]:
    """What is known about the channels of every value."""
    found: dict[Node, Facts] = {}

    def of(node: Node) -> Facts:
        if node not in found:
            found[node] = Facts.unknown(len(alignment.channels[node].ids))
        return found[node]

    for node, step in alignment.steps.items():
        if isinstance(step, Lanes):
            found[node] = step.evaluate([of(source.node).at(source.index) for source in step.sources])
        elif isinstance(step, Mix):
            found[node] = _mixed(alignment, step, of(step.source))
        alignment.constants.release()
    for node in alignment.channels:
        of(node)
    return found


def _mixed(alignment: Alignment, mix: Mix, inputs: Facts) -> Facts:
    blocks = mix.blocks(weight_of(alignment, mix.weight))
    groups, outputs, into, _ = blocks.shape
    open_rows = torch.zeros(groups, outputs, dtype=torch.bool)
    for part in edges(alignment, mix, inputs):
        open_rows[:, part.rows] = (part.varying | part.fragile).any(-1)
    value = torch.zeros(groups, outputs, dtype=torch.float64)
    numbers = inputs.value.reshape(groups, into)
    columns = numbers.ne(0).any(0).nonzero().flatten()
    if columns.numel():
        sums = blocks[:, :, columns].double().sum(-1)
        value = torch.einsum("goi,gi->go", sums, numbers[:, columns])
    if mix.bias is not None:
        value = value + weight_of(alignment, mix.bias).double().reshape(groups, outputs)
    return Facts.of(~open_rows.flatten(), value.flatten())


@dataclass(eq=False)
class Liveness:
    """What becomes of every channel.

    Attributes:
        facts: see :class:`Facts`, by value.
        active: call → which of its channels vary and are read.
        stand_ins: layer → for each group the input channel whose constant stands for those that were removed.
    """

    alignment: Alignment
    facts: dict[Node, Facts]
    active: dict[Node, Tensor] = field(default_factory=dict)
    stand_ins: dict[Node, dict[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._groups = self.alignment.groups()
        self._kept = torch.zeros(self.alignment.count, dtype=torch.bool)
        self._why = torch.zeros(self.alignment.count, dtype=torch.int64)
        self._reasons = [COMPUTED]
        self._needs: dict[Node, Tensor] = {}
        self._fragile: dict[Mix, Tensor] = {}

    def kept(self, ids: Tensor) -> Tensor:
        """Which channels stay."""
        return self._kept[self._groups[ids]]

    def reasons(self, ids: Tensor) -> dict[str, int]:
        """Why channels stay, with how many for each reason."""
        codes, counts = self._why[self._groups[ids]].unique(return_counts=True)  # type: ignore[no-untyped-call]
        return {self._reasons[code]: int(n) for code, n in zip(codes.tolist(), counts.tolist(), strict=True)}

    def keep(self, ids: Tensor, reason: str = COMPUTED) -> None:
        """Let channels stay; a reason given is the one to be shown."""
        places = self._groups[ids]
        self._kept[places] = True
        if reason != COMPUTED:
            self._reasons.append(reason)
            self._why[places] = len(self._reasons) - 1

    def need(self, node: Node, which: Tensor) -> None:
        """Note that channels of a value are read."""
        if node in self._needs:
            self._needs[node] |= which
        else:
            self._needs[node] = which.clone()

    def run(self) -> None:
        """Decide on all channels."""
        alignment = self.alignment
        for node in alignment.evidence.outputs & alignment.channels.keys():
            ids = alignment.channels[node].ids
            self.need(node, torch.ones(len(ids), dtype=torch.bool))
            alignment.fix(ids, "the model returns it")
        for node in reversed(alignment.steps):
            self._visit(node)
        for ids, reason in alignment.fixed:
            self.keep(ids, reason)
        for mix in mixes(alignment):
            if mix in self._fragile:
                self._choose_stand_ins(mix, self._fragile[mix])
        self._settle()

    def _visit(self, node: Node) -> None:
        step, alignment = self.alignment.steps[node], self.alignment
        if isinstance(step, Wall):
            for source in alignment.data(step.call):
                if source in alignment.channels:
                    ids = alignment.channels[source].ids
                    self.need(source, torch.ones(len(ids), dtype=torch.bool))
                    alignment.fix(ids, step.reason)
            return
        ids = alignment.channels[node].ids
        needed = self._needs.pop(node, torch.zeros(len(ids), dtype=torch.bool))
        self.keep(ids[needed])
        self.active[node] = active = needed & ~self.facts[node].known
        if isinstance(step, Lanes):
            self._through(step, ids, active)
        else:
            self._into(step, active)
            alignment.constants.release()

    def _through(self, step: Lanes, ids: Tensor, active: Tensor) -> None:
        for source in step.sources:
            count = len(self.alignment.channels[source.node].ids)
            read = torch.zeros(count, dtype=torch.bool)
            index = torch.arange(count) if source.index is None else source.index
            places = index[active & (index >= 0)]
            read[places] = True
            self.need(source.node, read)
            lost = places[self.facts[source.node].known[places]]
            if step.loses and lost.numel():
                self.keep(self.alignment.channels[source.node].ids[lost], step.loses)

    def _into(self, mix: Mix, active: Tensor) -> None:
        rows = active.reshape(mix.groups, -1)
        varying = torch.zeros(mix.groups, len(mix.inputs.ids) // mix.groups, dtype=torch.bool)
        fragile = varying.clone()
        if active.any():
            for part in edges(self.alignment, mix, self.facts[mix.source]):
                read = rows[:, part.rows].unsqueeze(-1)
                varying |= (part.varying & read).any(1)
                fragile |= (part.fragile & read).any(1)
        self.need(mix.source, varying.flatten())
        if fragile.any():
            self._fragile[mix] = fragile

    def _choose_stand_ins(self, mix: Mix, fragile: Tensor) -> None:
        """In every group a large constant, of the channels that stay anyway if there is one.

        The others become multiples of it, and with it the rounding error that it has in the model's dtype.
        """
        value = self.facts[mix.source].value.reshape(fragile.shape).abs()
        kept = self.kept(mix.inputs.ids).reshape(fragile.shape)
        chosen: dict[int, int] = {}
        for group in fragile.any(1).nonzero().flatten().tolist():
            large = value[group] >= value[group][fragile[group]].max() * LARGE
            among = fragile[group] & kept[group] & large
            among = among if among.any() else fragile[group]
            place = int(value[group].where(among, -1.0).argmax())
            chosen[group] = group * fragile.shape[1] + place
            if not kept[group, place]:
                reason = f"its constant stands for all that meet the zero padding of {mix.call.leaf}"
                self.keep(mix.inputs.ids[chosen[group] : chosen[group] + 1], reason)
        self.stand_ins[mix.call.node] = chosen

    def _settle(self) -> None:
        """Keep what equal parts and layers that must not become empty need."""
        self._even_out_all()
        for channels in self.alignment.channels.values():
            if len(channels.ids) and not self.kept(channels.ids).any():
                self.keep(channels.ids[:1], ONE_STAYS)
        self._even_out_all()

    def _even_out_all(self) -> None:
        parts = self.alignment.parts
        pending = dict.fromkeys(range(len(parts)))
        while pending:
            first = next(iter(pending))
            del pending[first]
            for channel in self._even_out(parts[first]):
                pending.update(dict.fromkeys(self._touching[channel]))

    @cached_property
    def _touching(self) -> dict[int, list[int]]:
        """The equal parts that a channel is in, by the smallest id that it is tied to."""
        found: dict[int, list[int]] = {}
        for index, parts in enumerate(self.alignment.parts):
            sides = [parts.ids] if parts.beside is None else [parts.ids, parts.beside]
            for group in torch.cat([self._groups[side].flatten() for side in sides]).tolist():
                found.setdefault(group, []).append(index)
        return found

    def _even_out(self, parts: EqualParts) -> list[int]:
        """Let channels stay where others have more; returns which."""
        sides = [parts.ids] if parts.beside is None else [parts.ids, parts.beside]
        there = torch.ones(len(parts.ids), dtype=torch.bool)
        if parts.beside is not None:
            there = torch.stack([self.kept(side).any(1) for side in sides]).any(0)
        returned: list[int] = []
        for side in sides:
            kept = self.kept(side)
            least = int(kept.sum(1).max().clamp(min=1))
            missing = (least - kept.sum(1)).where(there, 0)
            order = (~kept).cumsum(1)  # the first ones that are gone come back
            back = ~kept & (order <= missing.unsqueeze(1))
            if back.any():
                self.keep(side[back], parts.reason)
                returned += self._groups[side[back]].tolist()
        return returned
