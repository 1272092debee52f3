"""From decisions to layers: the numbers of each merge, and the proof that it is exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convmerge import emit
from convmerge.borderclasses import Bordered
from convmerge.borderplan import border_numbers
from convmerge.decide import Decider, Decision, Decisions
from convmerge.emit.bordered import build_bordered
from convmerge.errors import Refusal
from convmerge.plan import Site, site_numbers
from convmerge.recognise import Filter
from convmerge.regions import leaves
from convmerge.replay import Replay
from convmerge.verification.probes import Probe, probe, rounded_once


@dataclass(frozen=True, eq=False)
class Built:
    """A decision carried out, or refused by its own check.

    Attributes:
        layer: the merged layer in the model's dtype.
        probe: the float64 check against the original calls.
        refusal: why it is not made after all.
    """

    decision: Decision
    layer: nn.Module
    probe: Probe | None = None
    refusal: str | None = None

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
    return built


def _build(decider: Decider, decision: Decision, seed: int) -> Built:
    site = decision.site
    like = _like(decider, site)
    try:
        if isinstance(site.emission, Bordered):
            exact, layer = _bordered(site, site.emission, like)
        else:
            exact, layer = _plain(decider, site, site.emission, like)
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
    return Built(decision, layer, found)


def _plain(
    decider: Decider, site: Site, emission: emit.Emission, like: Tensor
) -> tuple[nn.Module, nn.Module]:
    """One form, as layers in float64 and in the dtype of ``like``."""
    form = site_numbers(site, decider.evidence)
    resampled = any(layer.kind in ("avg_pool", "nearest") for layer in emission.layers)
    if resampled and form.bias is None and site.geometry.bias:
        form = form.with_bias(torch.zeros(form.geometry.out_channels, dtype=torch.float64))
    elif form.geometry != site.geometry:  # a bias turned out to be zero
        emission, _ = decider.planner.cheapest(form.geometry, site.home_place)
    exact = emit.build(form, emission, torch.float64)
    layer = emit.build(form, emission, like.dtype, device=like.device, requires_grad=like.requires_grad)
    if len(site.home_place.shape) != len(decider.evidence.size(site.home.target)):
        layer, exact = _flattened(layer), _flattened(exact)
    return exact, layer


def _bordered(site: Site, b: Bordered, like: Tensor) -> tuple[nn.Module, nn.Module]:
    """An interior kernel and border kernels, in float64 and in the dtype of ``like``."""
    forms = border_numbers(site.elements, site.place)
    exact = build_bordered(b, forms, torch.float64)
    layer = build_bordered(b, forms, like.dtype, device=like.device, requires_grad=like.requires_grad)
    return exact, layer


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


def _like(decider: Decider, site: Site) -> Tensor:
    """A parameter of the site that says dtype, device and requires_grad of the new layer."""
    dtype = decider.evidence.dtype(site.home.source)
    for leaf in leaves(site.elements):
        if isinstance(leaf.step, Filter):
            for node in leaf.node.all_input_nodes:
                if node in decider.evidence.tensors:
                    tensor = decider.evidence.tensors[node][1]
                    if tensor.dtype == dtype:
                        return tensor
    return torch.empty(0, dtype=dtype)
