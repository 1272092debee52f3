"""Fresh torch.nn layers with the numbers of a form, rounded once from float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from convmerge.affine import Affine, Geometry
from convmerge.algebra.axis import Placement, axes
from convmerge.algebra.branches import place
from convmerge.algebra.compose import expand_groups
from convmerge.algebra.polyphase import polyphase
from convmerge.emit.batched import batched_linear, batched_rows
from convmerge.emit.interleave import interleaver
from convmerge.emit.layer import Emission, Layer, transposed_padding
from convmerge.emit.unfolded import unfolded_conv
from convmerge.emit.ways import emissions
from convmerge.errors import Refusal

WITH_WEIGHTS = ("linear", "batched_linear", "batched_rows", "conv", "conv_transpose", "unfolded")
# Which weights a memory format applies to.
_RANK = {torch.channels_last: 4, torch.channels_last_3d: 5}


def build(
    form: Affine,
    emission: Emission,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> nn.Module:
    """Fresh layers that compute ``form``, every weight rounded once from float64; one layer, or a Sequential.

    Nothing is initialised at random, so the global random state stays as it is.

    Raises:
        Refusal: a weight is too large for ``dtype``; or the bias depends on the position in a way that no
            layer has.
    """
    form, emission = _carrying_the_bias(form, emission)
    weight, bias = _numbers(form, emission)
    modules: list[nn.Module] = []
    for layer in emission.layers:
        module = empty_layer(layer, dtype)
        for name, values in (("weight", weight), ("bias", bias)):
            if getattr(module, name, None) is not None and values is not None:
                rounded = round_once(values, dtype).to(device)
                if rounded.dim() == _RANK.get(memory_format):
                    rounded = rounded.contiguous(memory_format=memory_format)
                setattr(module, name, nn.Parameter(rounded, requires_grad))
        modules.append(module)
    if len(modules) == 1:
        return modules[0]
    return nn.Sequential(*(part for module in modules for part in _flat(module)))


def _carrying_the_bias(form: Affine, emission: Emission) -> tuple[Affine, Emission]:
    """With a channel per phase where the bias depends on the position and the given way has no such bias."""
    if emission.shift is not None or form.bias is None or form.bias.dim() == 1:
        return form, emission
    return form, next(other for other in emissions(form.geometry) if other.shift is not None)


def _numbers(form: Affine, emission: Emission) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the emission's layer, as torch lays them out, in float64."""
    if emission.shift is not None:
        form = polyphase(form, emission.shift)
    layer = next(x for x in emission.layers if x.kind in WITH_WEIGHTS)
    weight, groups = form.weight, form.geometry.groups
    kinds = {x.kind for x in emission.layers}
    if kinds & {"avg_pool", "nearest"}:
        # The resampling's taps are alike: their sum is the mix under a mean, any one the mix above a copy.
        taps = weight.flatten(2)
        mix = taps.mean(2) if "nearest" in kinds else taps.sum(2)
        return mix.reshape(*mix.shape, *layer.geometry.kernel), form.bias
    if layer.kind == "linear":
        return expand_groups(weight, groups, 1).flatten(1), form.bias
    if layer.kind in ("batched_linear", "batched_rows"):
        n, rows = layer.geometry.groups, layer.kind == "batched_rows"
        blocks = expand_groups(weight, groups, n)
        blocks = blocks.reshape(n, -1, blocks.shape[1])
        bias = None if form.bias is None else form.bias.reshape((n, 1, -1) if rows else (n, -1, 1))
        return blocks.transpose(1, 2) if rows else blocks, bias
    if layer.kind == "unfolded":
        return weight.flatten(1), form.bias
    if form.ones is not None:
        weight = torch.cat([weight, form.ones.unsqueeze(1)], 1)
    dims = axes(layer.geometry)
    where = [Placement(start, 1) for start in emission.front]
    weight = place(weight, dims, where)
    return _transposed_weight(weight, groups) if layer.kind == "conv_transpose" else weight, form.bias


def _transposed_weight(weight: Tensor, groups: int) -> Tensor:
    """The correlation (out, in / groups, *k) as torch's transposed convolution (in, out / groups, *k)."""
    blocks = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return blocks.flatten(0, 1).flip(tuple(range(2, weight.dim())))


def empty_layer(layer: Layer, dtype: torch.dtype) -> nn.Module:
    """The layer without storage for its weights, so that no random initialisation runs."""
    g, n = layer.geometry, layer.geometry.spatial
    new = {"dtype": dtype, "device": "meta"}
    if layer.kind == "linear":
        return nn.Linear(g.in_channels, g.out_channels, g.bias, **new)
    if layer.kind == "batched_linear":
        return batched_linear(g, dtype, "meta")
    if layer.kind == "batched_rows":
        return batched_rows(g, dtype, "meta")
    if layer.kind == "unfolded":
        return unfolded_conv(g, dtype, "meta")
    if layer.kind == "conv":
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
        sizes = (g.kernel, g.down, g.lo, g.dilation)
        return cast(nn.Module, conv(g.in_channels, g.out_channels, *sizes, g.groups, g.bias, **new))
    if layer.kind == "conv_transpose":
        conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
        sizes = (g.kernel, g.up, *transposed_padding(g))
        args = (g.in_channels, g.out_channels, *sizes, g.groups, g.bias, g.dilation)
        return cast(nn.Module, conv(*args, **new))
    if layer.kind == "avg_pool":
        pool: Any = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[n - 1]
        return cast(nn.Module, pool(g.kernel, g.down, g.lo))
    if layer.kind == "nearest":
        return nn.Upsample(scale_factor=tuple(float(u) for u in g.up))
    if layer.kind == "flatten":
        return _flatten(g)
    if layer.kind == "shuffle":
        return nn.PixelShuffle(g.up[0])
    if layer.kind == "interleave":
        return interleaver(g)
    if layer.kind == "ones":
        return _append_ones(g)
    pad: Any = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)[n - 1]
    sides = zip(reversed(g.lo), reversed(g.hi), strict=True)
    return cast(nn.Module, pad(tuple(amount for side in sides for amount in side)))


def _flatten(g: Geometry) -> nn.Module:
    """Flattens maps of the kernel's size. Fails for others, as many numbers in another shape mean others."""
    sizes = (g.in_channels, *g.kernel[:-1])  # and the last size, from the number of features
    checks = [nn.Unflatten(dim, (n, 1)) for dim, n in reversed(list(enumerate(sizes, start=1)))]
    return nn.Sequential(*checks, nn.Flatten())


def _append_ones(g: Geometry) -> nn.Module:
    """A channel of ones after the channels of every group: padding by one along the channel dimension."""
    # The class says how many dimensions it pads; four have no class of their own, and any takes their sides.
    kind: Any = (nn.ConstantPad2d, nn.ConstantPad3d, nn.ConstantPad3d)[g.spatial - 1]
    pad = kind((0, 0) * g.spatial + (0, 1), 1.0)
    if g.groups == 1:
        return cast(nn.Module, pad)
    channels = -g.spatial - 1  # counted from the end, so that inputs without a batch work as well
    by_group = nn.Unflatten(channels, (g.groups, g.in_channels // g.groups))
    return nn.Sequential(by_group, pad, nn.Flatten(channels - 1, channels))


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to the nearest value of ``dtype``.

    torch converts float64 to float16 and bfloat16 by way of float32, which rounds twice: just beside a tie
    the first rounding lands on it. The nearer of the results from both sides is the right one.

    Raises:
        Refusal: a finite value overflows.
    """
    rounded = values.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if torch.finfo(dtype).bits < 32:
        single = values.float()
        outwards = torch.where(values > single, math.inf, -math.inf).float()
        other = torch.nextafter(single, outwards).to(dtype)
        nearer = (other.double() - values).abs() < (rounded.double() - values).abs()
        rounded = torch.where(nearer, other, rounded)
    if not (rounded.isfinite() | ~values.isfinite()).all():
        raise Refusal(f"a merged weight is too large for {str(dtype).removeprefix('torch.')}")
    return rounded


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a Sequential, or the module itself."""
    yield from module if isinstance(module, nn.Sequential) else (module,)
