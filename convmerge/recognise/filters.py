"""Convolutions, linear layers, pooling, resampling and padding as affine forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.affine import Affine, Dims, Geometry
from convmerge.errors import Refusal
from convmerge.evidence.capture import Call
from convmerge.recognise.border import border_fill
from convmerge.recognise.flattened import after_flatten
from convmerge.recognise.generated import depends, refuse_generated
from convmerge.recognise.stacked import sum_of_stack
from convmerge.recognise.steps import Context, Filter, Passage, Resized, Step, recognises


def _dims(value: object, n: int) -> Dims:
    """An int or a list of ints as one int per spatial dimension."""
    values: list[Any] = list(value) if isinstance(value, Sequence) else [value]
    return tuple(int(v) for v in (values * n if len(values) == 1 else values))


def _source(context: Context, value: object) -> Node | None:
    return value if isinstance(value, Node) and not context.constant(value) else None


def _filter_constants(context: Context, call: Call) -> str | None:
    """Why the weight or the bias is not constant, or None."""
    for name, what in (("weight", "kernel"), ("bias", "bias")):
        if not context.constant(call.args[name]):
            return depends(context, what, call.args[name])
    return None


def _words(kind: str, kernel: Dims) -> str:
    return f"{kind} {'×'.join(map(str, kernel))}" if kernel else kind


@recognises("conv1d", "conv2d", "conv3d")
def conv(context: Context, call: Call) -> Step | None:
    """Cross-correlation with zero padding: up 1, down = stride."""
    source = _source(context, call.args["input"])
    if source is None:
        return None
    if (reason := _filter_constants(context, call)) is not None:
        raise Refusal(reason)
    n = int(call.op[4])
    shape = context.shape(call.args["weight"])
    groups = call.args["groups"]
    dilation, padding = _dims(call.args["dilation"], n), call.args["padding"]
    kernel = shape[2:]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        lo = tuple(t // 2 for t in total)
        hi = tuple(t - t // 2 for t in total)
    else:
        lo = hi = (0,) * n if padding == "valid" else _dims(padding, n)
    bias = call.args["bias"]
    geometry = Geometry(
        shape[1] * groups,
        shape[0],
        groups,
        kernel,
        (1,) * n,
        _dims(call.args["stride"], n),
        dilation,
        lo,
        hi,
        bias is not None,
    )

    def numbers() -> Affine:
        weight = context.tensor(call.args["weight"])
        return Affine(geometry, weight, None if bias is None else context.tensor(bias))

    return Filter(source, len(context.shape(source)) - n - 1, geometry, numbers, _words("conv", kernel))


@recognises("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(context: Context, call: Call) -> Step | None:
    """Transposed convolution: the flipped kernel on the zero-stuffed input, in and out swapped per group."""
    source = _source(context, call.args["input"])
    if source is None:
        return None
    if (reason := _filter_constants(context, call)) is not None:
        raise Refusal(reason)
    n = int(call.op[-2])
    shape = context.shape(call.args["weight"])
    groups, bias = call.args["groups"], call.args["bias"]
    kernel, dilation = shape[2:], _dims(call.args["dilation"], n)
    padding, extra = _dims(call.args["padding"], n), _dims(call.args["output_padding"], n)
    lo = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True))
    hi = tuple(at + e for at, e in zip(lo, extra, strict=True))
    geometry = Geometry(
        shape[0],
        shape[1] * groups,
        groups,
        kernel,
        _dims(call.args["stride"], n),
        (1,) * n,
        dilation,
        lo,
        hi,
        bias is not None,
    )

    def numbers() -> Affine:
        weight = context.tensor(call.args["weight"])
        weight = weight.reshape(groups, shape[0] // groups, shape[1], *kernel).transpose(1, 2)
        weight = weight.reshape(groups * shape[1], shape[0] // groups, *kernel).flip(list(range(2, 2 + n)))
        return Affine(geometry, weight, None if bias is None else context.tensor(bias))

    return Filter(
        source, len(context.shape(source)) - n - 1, geometry, numbers, _words("conv_transpose", kernel)
    )


def _linear(context: Context, source: Node, weight: Node, bias: object, *, swapped: bool) -> Filter:
    """x @ W^T + b on the last axis; ``swapped`` where the constant is W^T itself."""
    shape = context.shape(weight)
    out_channels, in_channels = (shape[1], shape[0]) if swapped else (shape[0], shape[1])
    geometry = Geometry.channelwise(in_channels, out_channels, 1, 0, bias=bias is not None)

    def numbers() -> Affine:
        matrix = context.tensor(weight)
        vector = None if bias is None else context.tensor(bias).expand(out_channels).contiguous()
        return Affine(geometry, matrix.t() if swapped else matrix, vector)

    return Filter(source, len(context.shape(source)) - 1, geometry, numbers, "linear")


@recognises("linear")
def linear(context: Context, call: Call) -> Step | None:
    """A linear layer acts on the last axis, whatever stands before it."""
    source = _source(context, call.args["input"])
    if source is None or len(context.shape(call.args["weight"])) != 2:
        return None
    if (reason := _filter_constants(context, call)) is not None:
        raise Refusal(reason)
    return after_flatten(
        context, _linear(context, source, call.args["weight"], call.args["bias"], swapped=False)
    )


@recognises("matmul", "mm")
def matmul(context: Context, call: Call) -> Step | None:
    """x @ W with a constant matrix W."""
    left, right = call.args.get("self"), call.args.get("other", call.args.get("mat2"))
    source = _source(context, left)
    if source is None or not isinstance(right, Node):
        return None
    if not context.constant(right):
        refuse_generated(context, left, right)
        return None
    if len(context.shape(right)) != 2 or len(context.shape(source)) < 2:
        raise Refusal("multiplies by a constant that is not one matrix for all positions")
    return _linear(context, source, right, None, swapped=True)


@recognises("addmm")
def addmm(context: Context, call: Call) -> Step | None:
    """bias + x @ W with constant bias and W."""
    source = _source(context, call.args["mat1"])
    weight, bias = call.args["mat2"], call.args["self"]
    refuse_generated(context, call.args["mat1"], weight)
    if source is None or not context.constant(weight) or not context.constant(bias):
        return None
    if call.args["beta"] != 1 or call.args["alpha"] != 1 or len(context.shape(bias)) > 1:
        raise Refusal("addmm with beta, alpha or a bias per row")
    return after_flatten(context, _linear(context, source, weight, bias, swapped=True))


@recognises("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(context: Context, call: Call) -> Step | None:
    """Average pooling: a depthwise filter of 1 / kernel volume where every window has as many inputs.

    A window that is cut off at the border is divided by what is left of it, with ``ceil_mode`` or
    ``count_include_pad=False``: still a mean over inputs, the same in every channel.
    """
    source = _source(context, call.args["self"] if "self" in call.args else call.args["input"])
    if source is None:
        return None
    n = int(call.op[-2])
    kernel = _dims(call.args["kernel_size"], n)
    stride = _dims(call.args["stride"] or call.args["kernel_size"], n)
    padding = _dims(call.args["padding"], n)
    axis = len(context.shape(source)) - n - 1
    ceil = call.args["ceil_mode"] and any(s > 1 for s in stride)
    inside = not any(padding) or not call.args["count_include_pad"]
    divisor = call.args.get("divisor_override")
    if inside and not divisor and (ceil or any(padding)):
        return Passage(source, {axis: axis}, "avg_pool")
    if ceil:
        raise Refusal(
            "average pooling with ceil_mode reads zeros, or divides by another count, at the border"
        )
    divisor = divisor or math.prod(kernel)
    channels, one = context.shape(source)[axis], (1,) * n
    geometry = Geometry(channels, channels, channels, kernel, one, stride, one, padding, padding)

    def numbers() -> Affine:
        return Affine(geometry, torch.full((channels, 1, *kernel), 1 / divisor, dtype=torch.float64))

    return Filter(source, axis, geometry, numbers, _words("avg_pool", kernel))


@recognises("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_avg_pool(context: Context, call: Call) -> Step | None:
    """A mean over windows whose size follows the input's: every channel alike, at every input size."""
    source = _source(context, call.args["self"])
    if source is None:
        return None
    axis = len(context.shape(source)) - int(call.op[-2]) - 1
    return Passage(source, {axis: axis}, "adaptive_avg_pool")


@recognises("mean")
def mean(context: Context, call: Call) -> Step | None:
    """A mean over axes other than the channels' keeps every pointwise form; over a stack's it is a sum."""
    if (summed := sum_of_stack(context, call)) is not None:
        return summed
    source = _source(context, call.args["self"])
    dims = call.args.get("dim")
    if source is None or not dims or call.args.get("dtype") not in (None, context.evidence.dtype(source)):
        return None
    rank = len(context.shape(source))
    reduced = {d % rank for d in dims}
    kept = [axis for axis in range(rank) if axis not in reduced]
    if call.args["keepdim"]:
        return Passage(source, {axis: axis for axis in kept}, "mean")
    return Passage(source, {axis: at for at, axis in enumerate(kept)}, "mean")


@recognises("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
@recognises("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
def upsample_nearest(context: Context, call: Call) -> Step | None:
    """Nearest upsampling by integer factors: ones on the zero-stuffed input; by a given size: a passage."""
    source = _source(context, call.args["input"] if "input" in call.args else call.args["self"])
    if source is None:
        return None
    n = int(call.op[-2])
    axis = len(context.shape(source)) - n - 1
    scales = call.args.get("scale_factors")
    copies = _copies_exactly if "exact" not in call.op else float.is_integer
    passage = Passage(source, {axis: axis}, "interpolate")
    if scales:
        whole = all(s >= 1 and copies(float(s)) for s in scales)
        return Filter(**_nearest(context, source, axis, [int(s) for s in scales])) if whole else passage
    if math.prod(context.shape(call.node)) <= math.prod(context.shape(source)):
        return passage
    ratio = context.evidence.ratios.get(call.node)
    if ratio is None or (ratio.refusal is None and not all(copies(float(u)) for u in ratio.up)):
        return passage
    if ratio.refusal is not None:
        return replace(passage, refusal=ratio.refusal)
    return replace(passage, filter=Resized(**_nearest(context, source, axis, ratio.up), short=ratio.short))


def _nearest(context: Context, source: Node, axis: int, up: Sequence[int]) -> dict[str, Any]:
    """What a filter is that repeats every input ``up`` times."""
    up = tuple(up)
    channels, one = context.shape(source)[axis], (1,) * len(up)
    pad = tuple(u - 1 for u in up)
    geometry = Geometry(channels, channels, channels, up, up, one, one, pad, pad)

    def numbers() -> Affine:
        return Affine(geometry, torch.ones(channels, 1, *up, dtype=torch.float64))

    kind = f"nearest ×{'×'.join(map(str, up))}"
    return {"source": source, "axis": axis, "geometry": geometry, "numbers": numbers, "kind": kind}


def _copies_exactly(factor: float) -> bool:
    """Whether torch repeats every input ``factor`` times, at every size, as it computes in single precision.

    It reads input floor(n * s) for output n, with s = 1 / factor rounded to single precision. With
    s = (1 - e) / factor, n * s is rounded up to the next whole number where it has to be if e <= 2**-25.
    """
    if not factor.is_integer():
        return False
    rounded = Fraction(float(torch.tensor(1 / factor, dtype=torch.float32)))
    return 1 - rounded * int(factor) <= Fraction(1, 2**25)


@recognises("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
@recognises("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
def interpolate(context: Context, call: Call) -> Step | None:
    """Interpolation weights sum to one at every position, and are the same in every channel."""
    source = _source(context, call.args["input"] if "input" in call.args else call.args["self"])
    if source is None:
        return None
    axis = len(context.shape(source)) - int(call.op.removesuffix("_aa")[-2]) - 1
    return Passage(source, {axis: axis}, "interpolate")


@recognises("pixel_shuffle")
def pixel_shuffle(context: Context, call: Call) -> Step | None:
    """y[c, r*h+i, r*w+j] = x[c*r*r + i*r + j, h, w] as a one-hot filter at rate r."""
    source = _source(context, call.args["self"])
    if source is None:
        return None
    r = int(call.args["upscale_factor"])
    axis = len(context.shape(source)) - 3
    channels = context.shape(source)[axis] // (r * r)
    pad = (r - 1, r - 1)
    geometry = Geometry(channels * r * r, channels, channels, (r, r), (r, r), (1, 1), (1, 1), pad, pad)

    def numbers() -> Affine:
        hot = _one_hot(r).flip(1, 2)
        return Affine(geometry, hot.expand(channels, r * r, r, r).contiguous())

    return Filter(source, axis, geometry, numbers, f"pixel_shuffle {r}")


@recognises("pixel_unshuffle")
def pixel_unshuffle(context: Context, call: Call) -> Step | None:
    """y[c*r*r + i*r + j, h, w] = x[c, r*h+i, r*w+j]: r*r one-hot filters per channel, stride r."""
    source = _source(context, call.args["self"])
    if source is None:
        return None
    r = int(call.args["downscale_factor"])
    axis = len(context.shape(source)) - 3
    channels = context.shape(source)[axis]
    zero, one = (0, 0), (1, 1)
    geometry = Geometry(channels, channels * r * r, channels, (r, r), one, (r, r), one, zero, zero)

    def numbers() -> Affine:
        return Affine(geometry, _one_hot(r).repeat(channels, 1, 1).unsqueeze(1))

    return Filter(source, axis, geometry, numbers, f"pixel_unshuffle {r}", multiple=r)


def _one_hot(r: int) -> Tensor:
    """Shape (r*r, r, r): entry i*r+j is one at (i, j)."""
    return torch.eye(r * r, dtype=torch.float64).reshape(r * r, r, r)


@recognises("channel_shuffle")
def channel_shuffle(context: Context, call: Call) -> Step | None:
    """A permutation of channels: y[i*groups + g] = x[g*(C/groups) + i]."""
    source = _source(context, call.args["self"])
    if source is None:
        return None
    groups, shape = int(call.args["groups"]), context.shape(source)
    channels, spatial = shape[1], len(shape) - 2
    geometry = Geometry.channelwise(channels, channels, 1, spatial)

    def numbers() -> Affine:
        order = torch.arange(channels).reshape(groups, -1).t().reshape(-1)
        weight = torch.eye(channels, dtype=torch.float64)[order]
        return Affine(geometry, weight.reshape(channels, channels, *(1,) * spatial))

    return Filter(source, 1, geometry, numbers, "channel_shuffle")


@recognises("constant_pad_nd", "pad")
def pad(context: Context, call: Call) -> Step | None:
    """Padding with a constant, or cropping, of the last dimensions; other modes are passages that repeat
    border values.
    """
    source = _source(context, call.args["self"])
    if source is None:
        return None
    pads = [int(p) for p in call.args["pad"]]
    shape = context.shape(source)
    n = len(pads) // 2
    spatial = len(shape) - 2
    if call.op == "pad" and call.args["mode"] != "constant":
        return Passage(source, {axis: axis for axis in range(len(shape) - n)}, f"{call.args['mode']} pad")
    if n > spatial or spatial < 1 or spatial > 3:
        raise Refusal("pads more than the spatial dimensions")
    lo = (0,) * (spatial - n) + tuple(pads[2 * i] for i in reversed(range(n)))
    hi = (0,) * (spatial - n) + tuple(pads[2 * i + 1] for i in reversed(range(n)))
    value = float(call.args.get("value") or 0)
    if value == 0 or max(pads) <= 0:
        return _padding(source, shape, lo, hi, "pad")
    if not math.isfinite(value):
        raise Refusal(f"pads with {value}, which is no number")
    return border_fill(source, lo, hi, torch.full((shape[1],), value, dtype=torch.float64), any_size=True)


def _padding(source: Node, shape: tuple[int, ...], lo: Dims, hi: Dims, kind: str) -> Filter:
    """Zero padding (negative: cropping) of every dimension after axis 1."""
    channels, one = shape[1], (1,) * len(lo)
    geometry = Geometry(channels, channels, channels, one, one, one, one, lo, hi)

    def numbers() -> Affine:
        return Affine(geometry, torch.ones(channels, 1, *one, dtype=torch.float64))

    return Filter(source, 1, geometry, numbers, kind)
