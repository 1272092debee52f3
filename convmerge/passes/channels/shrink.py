"""Layers without the channels that go: their weights in float64, rounded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convmerge.emit.build import round_once
from convmerge.passes.channels.alignment import Alignment, Facts, Lanes, Mix
from convmerge.passes.channels.layers import Edits, Owners, Place
from convmerge.passes.channels.liveness import Liveness, weight_of


@dataclass(frozen=True, eq=False)
class Numbers:
    """A layer's new weight and bias, rounded to the layer's dtype."""

    weight: Tensor
    bias: Tensor | None
    groups: int


def shrink(live: Liveness, owners: Owners) -> Edits:
    """The changes that take away all channels that do not stay."""
    edits, alignment = Edits(), live.alignment
    for step in alignment.steps.values():
        if isinstance(step, Lanes):
            _shrink_slots(live, owners, step, edits)
        elif isinstance(step, Mix) and not _whole(live, step):
            numbers = smaller(live, step)
            place = owners.place(step.call, step.weight)
            edits.values[place] = numbers.weight
            if numbers.bias is not None:
                named = Place(place.path, "bias")
                bias = named if step.bias is None else owners.place(step.call, step.bias)
                edits.values[bias] = numbers.bias
            inputs, outputs = (int(live.kept(c.ids).sum()) for c in (step.inputs, step.outputs))
            for kind in ("channels", "features"):
                edits.attributes[place.path, f"in_{kind}"] = inputs
                edits.attributes[place.path, f"out_{kind}"] = outputs
            edits.attributes[place.path, "groups"] = numbers.groups
        alignment.constants.release()
    return edits


def _whole(live: Liveness, mix: Mix) -> bool:
    return bool(live.kept(mix.inputs.ids).all() and live.kept(mix.outputs.ids).all())


def _shrink_slots(live: Liveness, owners: Owners, step: Lanes, edits: Edits) -> None:
    if step.call.op == "instance_norm":  # it warns of another number, even where it has no parameters
        kept = live.kept(live.alignment.channels[step.call.node].ids)
        edits.attributes[step.call.path, "num_features"] = int(kept.sum())
    for slot in step.slots:
        kept = live.kept(slot.ids)
        if kept.all():
            continue
        place = owners.place(step.call, slot.node)
        value = weight_of(live.alignment, slot.node).index_select(slot.dim, kept.nonzero().flatten())
        edits.values[place] = _rounded(live.alignment, value, slot.node)
        count = int(kept.sum())
        names = ["num_features", "num_parameters"]
        names += ["in_channels", "out_channels", "groups"] * (step.call.op.startswith("conv"))
        for name in names:
            edits.attributes[place.path, name] = count


def _rounded(alignment: Alignment, value: Tensor, node: object) -> Tensor:
    dtype: torch.dtype = node.meta["val"].dtype  # type: ignore[attr-defined]
    return value.clone() if value.dtype == dtype else round_once(value, dtype)


def smaller(live: Liveness, mix: Mix) -> Numbers:
    """A layer on the channels that stay; constants that go are added to its bias, or to their stand-in."""
    alignment = live.alignment
    weight = weight_of(alignment, mix.weight)
    blocks = mix.blocks(weight)
    groups, outputs, into, _ = blocks.shape
    facts = live.facts[mix.source]
    shape = {"out": (groups, outputs), "in": (groups, into)}
    rows = live.kept(mix.outputs.ids).reshape(shape["out"])
    columns = live.kept(mix.inputs.ids).reshape(shape["in"])
    active = live.active[mix.call.node].reshape(shape["out"])
    number = live.facts[mix.call.node].value.reshape(shape["out"])
    bias = None if mix.bias is None else weight_of(alignment, mix.bias).double().reshape(shape["out"])
    parts, shifts = [], []
    for group in rows.any(1).nonzero().flatten().tolist():
        here = slice(group * into, (group + 1) * into)
        inputs = Facts(facts.known[here], facts.value[here])
        stand_in = live.stand_ins.get(mix.call.node, {}).get(group)
        stand_in = None if stand_in is None else stand_in - group * into
        part, shift = _group(mix, blocks[group], rows[group], columns[group], active[group], inputs, stand_in)
        shift = shift if bias is None else shift + bias[group, rows[group]]
        shifts.append(shift.where(active[group, rows[group]], number[group, rows[group]]))
        parts.append(part)
    wide = any(part.dtype != weight.dtype for part in parts)
    new = torch.stack([part.double() for part in parts] if wide else parts)
    new = new.transpose(1, 2) if mix.transposed else new
    new = new.reshape(len(parts) * new.shape[1], new.shape[2], *weight.shape[2:])
    shift = torch.cat(shifts)
    rounded = _rounded(alignment, new, mix.weight)
    if mix.bias is None and not shift.any():
        return Numbers(rounded, None, len(parts))
    return Numbers(rounded, round_once(shift, rounded.dtype), len(parts))


def _group(
    mix: Mix,
    block: Tensor,
    rows: Tensor,
    columns: Tensor,
    active: Tensor,
    inputs: Facts,
    stand_in: int | None,
) -> tuple[Tensor, Tensor]:
    """One group: weight of shape (rows that stay, columns that stay, taps), and what is added to the bias."""
    kept = block[rows][:, columns] * active[rows].reshape(-1, 1, 1)
    gone = (~columns & (inputs.value != 0)).nonzero().flatten()
    if not gone.numel():
        return kept, torch.zeros(len(kept), dtype=torch.float64)
    constant = block[rows][:, gone].double() * active[rows].reshape(-1, 1, 1)
    constant = constant * inputs.value[gone].reshape(1, -1, 1)
    fragile = constant[..., ~mix.interior].ne(0).any(-1)
    shift = constant.sum(-1).where(~fragile, 0.0).sum(1)
    if fragile.any():
        assert stand_in is not None
        place = int(columns[:stand_in].sum())
        carried = (constant * fragile.unsqueeze(-1)).sum(1) / inputs.value[stand_in]
        kept = kept.double()
        kept[:, place] += carried
    return kept, shift
