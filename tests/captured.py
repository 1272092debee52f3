"""Small models around one function, and what is recognised in them, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convmerge.evidence.capture import Evidence, capture
from convmerge.evidence.constants import Constants
from convmerge.inputs import as_inputs
from convmerge.recognise import Context
from convmerge.regions.elements import Chain, Regions
from convmerge.regions.fold import Place, fold_geometry, fold_numbers, place_of
from convmerge.regions.reduction import find_regions
from convmerge.verification.replay import apply_at


class Function(nn.Module):
    """Modules, parameters and buffers by name, and a forward of one tensor that uses them."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Pair(Function):
    """The same with a forward of two tensors."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode with random parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    for name, b in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            b.copy_(0.5 + torch.rand(b.shape, generator=generator, dtype=b.dtype))
    return model


def evidence_of(model: nn.Module, *args: Any, **kwargs: Any) -> Evidence:
    """The evidence of a model in eval mode."""
    return capture(model, as_inputs(kwargs if kwargs else args))


def context_of(model: nn.Module, *args: Any) -> Context:
    """What recognisers see of a model."""
    evidence = evidence_of(model, *args)
    return Context(evidence, Constants(evidence))


def regions_of(model: nn.Module, *args: Any) -> tuple[Context, Regions]:
    """The affine regions of a model."""
    context = context_of(model, *args)
    return context, find_regions(context)


def whole(context: Context, regions: Regions) -> Chain:
    """The one chain that leads from the model's input to its output."""
    assert len(regions.chains) == 1, (regions.chains, regions.refused, regions.unknown)
    (chain,) = regions.chains
    assert chain[0].source in context.evidence.inputs
    assert chain[-1].target in context.evidence.outputs
    return chain


def applied(model: nn.Module, x: Tensor, *, axis: int = 1) -> Tensor:
    """What the form recognised in a whole model gives; ``axis`` of the channels where no filter says."""
    context, regions = regions_of(model, x)
    chain = whole(context, regions)
    place = place_of(context.evidence, chain) or Place(axis, tuple(x.shape))
    form = fold_numbers(chain, place)
    planned = fold_geometry(chain, place)
    assert planned.out_size(place.size) == form.geometry.out_size(place.size)
    return apply_at(form, x, place.axis)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Equal up to rounding in float64, relative to the largest value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach(), expected.detach()
    error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    assert error < tolerance, f"relative error {error:.2g}"
