"""From decisions to layers: the numbers of each merge, and the proof that it is exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx.node import Node

from convmerge import emit
from convmerge.borders.classes import Bordered
from convmerge.decide import Decider, Decision, Decisions
from convmerge.emit.bordered import build_bordered
from convmerge.emit.parallel import Parallel, build_parallel
from convmerge.emit.sized import Sized, build_sized
from convmerge.errors import Refusal
from convmerge.plan import Site, site_numbers
from convmerge.plan.bordered import border_numbers
from convmerge.recognise import Filter
from convmerge.regions.elements import leaves
from convmerge.regions.fold import after, fold_numbers, geometry_of
from convmerge.verification.probes import Probe, probe, rounded_once
from convmerge.verification.replay import Replay

PARTNER = "another term of the same sum cannot be merged"


@dataclass(frozen=True, eq=False)
class Built:
    """A decision carried out, or refused by its own check.

    Attributes:
        layer: the merged layer in the model's dtype.
        probe: the float64 check against the original calls.
        refusal: why it is not made after all.
        exact: the merged layer in float64, kept where half precision leaves much unseen.
    """

    decision: Decision
    layer: nn.Module
    probe: Probe | None = None
    refusal: str | None = None
    exact: nn.Module | None = None

    def dropped(self, reason: str) -> Built:
        """The same, not made."""
        return dataclasses.replace(self, refusal=reason)


def build(
    decider: Decider, decisions: Decisions, seed: int, progress: Callable[[str, int, int], None]
) -> list[Built]:
    """Compute every merged layer in float64, check it against the calls it replaces, and round it once."""
    built: list[Built] = []
    for done, decision in enumerate(decisions.merges):
        progress("merge", done, len(decisions.merges))
        built.append(_build(decider, decision, seed))
        decider.constants.release()
    failed = {b.decision.site.joint for b in built if b.refusal is not None} - {None}
    return [b.dropped(PARTNER) if b.decision.site.joint in failed and b.refusal is None else b for b in built]


def together(built: Sequence[Built]) -> list[list[Built]]:
    """Groups of merges that are right only with one another: those of the terms of one sum."""
    groups: dict[object, list[Built]] = {}
    for b in built:
        groups.setdefault(b.decision.site.joint or b, []).append(b)
    return list(groups.values())


def _build(decider: Decider, decision: Decision, seed: int) -> Built:
    site = decision.site
    style = _style(decider, site)
    try:
        if isinstance(site.emission, Bordered):
            exact, layer = _bordered(site, site.emission, style)
        elif isinstance(site.emission, Sized):
            exact, layer = _sized(decider, site, site.emission, style)
        elif isinstance(site.emission, Parallel):
            exact, layer = _parallel(site, site.emission, style)
        else:
            exact, layer = _plain(decider, site, site.emission, style)
        rounded_once(layer, exact)
        found = _probe(decider, site, exact, seed)
        for other in decision.also:
            if found.exact:
                found = _probe(decider, other, exact, seed)
    except Refusal as refusal:
        return Built(decision, nn.Identity(), refusal=refusal.reason)
    if not found.exact:
        reason = f"differs from the original by {found.error:.1e} in float64, more than rounding explains"
        return Built(decision, layer, found, reason)
    return Built(decision, layer, found, exact=exact if style.dtype.itemsize < 4 else None)


def _plain(
    decider: Decider, site: Site, emission: emit.Emission, style: _Style
) -> tuple[nn.Module, nn.Module]:
    """One form, as layers in float64 and in the dtype of ``style``."""
    form = site_numbers(site, decider.evidence)
    resampled = any(layer.kind in ("avg_pool", "nearest") for layer in emission.layers)
    if resampled and form.bias is None and site.geometry.bias:
        form = form.with_bias(torch.zeros(form.geometry.out_channels, dtype=torch.float64))
    elif form.geometry != site.geometry:  # a bias turned out to be zero
        emission = decider.planner.way_to_build(form.geometry, site)
    exact, layer = style.both(partial(emit.build, form, emission))
    ends_flat = emission.layers[0].kind == "flatten"
    if not ends_flat and len(site.home_place.shape) != len(decider.evidence.size(site.home.target)):
        layer, exact = _flattened(layer), _flattened(exact)
    return exact, layer


def _bordered(site: Site, b: Bordered, style: _Style) -> tuple[nn.Module, nn.Module]:
    """An interior kernel and border kernels, in float64 and in the dtype of ``style``."""
    forms = border_numbers(site.elements, site.place)
    return style.both(partial(build_bordered, b, forms))


def _sized(decider: Decider, site: Site, s: Sized, style: _Style) -> tuple[nn.Module, nn.Module]:
    """A filter behind upsampling to a given size, in float64 and in the dtype of ``style``."""
    form = site_numbers(site, decider.evidence)
    if form.geometry != site.geometry:
        s = dataclasses.replace(s, main=decider.planner.way_to_build(form.geometry, site))
    edge = None
    if s.edge is not None:
        first, *rest = site.elements
        edge = fold_numbers(rest, after(site.place, geometry_of(first, site.place)))
    return style.both(partial(build_sized, s, form, edge))


def _parallel(site: Site, p: Parallel, style: _Style) -> tuple[nn.Module, nn.Module]:
    """Layers side by side, in float64 and in the dtype of ``style``."""
    assert site.blocks is not None
    return style.both(partial(build_parallel, p, site.blocks.forms()))


def _flattened(layer: nn.Module) -> nn.Module:
    """The layer on a map it covers, without the axes of the one position that is left."""
    return nn.Sequential(layer, nn.Flatten(1))


def _probe(decider: Decider, site: Site, exact: nn.Module, seed: int) -> Probe:
    replay = Replay(site, decider.evidence, decider.constants)
    return probe(
        replay.original,
        replay.merged(exact),
        replay.magnitude,
        replay.shapes(),
        terms=replay.terms(),
        seed=seed,
    )


@dataclass(frozen=True)
class _Style:
    """What a new layer takes over from the parameters it replaces."""

    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    memory_format: torch.memory_format

    def both(self, build: Callable[..., nn.Module]) -> tuple[nn.Module, nn.Module]:
        """What ``build`` makes, in float64 and in this style."""
        layer = build(
            self.dtype,
            device=self.device,
            requires_grad=self.requires_grad,
            memory_format=self.memory_format,
        )
        return build(torch.float64), layer


def _style(decider: Decider, site: Site) -> _Style:
    """The data's dtype and device; gradients and channels-last layout if any of the parameters has them."""
    data = site.home.source.meta["val"]
    filters = [(leaf.node, leaf.step) for leaf in leaves(site.elements) if isinstance(leaf.step, Filter)]
    pending = [node for last, step in filters for node in (last, *step.through)]
    weights: dict[Node, tuple[str, Tensor]] = {}
    seen: set[Node] = set()
    while pending:
        for node in pending.pop().all_input_nodes:
            if node in decider.evidence.tensors:
                weights[node] = decider.evidence.tensors[node]
            elif node in decider.constants and node not in seen:
                seen.add(node)
                pending.append(node)
    trainable = any(name in decider.trainable for name, _ in weights.values())
    formats = [_memory_format(tensor) for _, tensor in weights.values()]
    memory_format = next((f for f in formats if f != torch.contiguous_format), torch.contiguous_format)
    device = next((tensor.device for _, tensor in weights.values()), data.device)
    return _Style(data.dtype, device, trainable, memory_format)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    found = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    plain = found is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=found)
    return torch.contiguous_format if plain or found is None else found
