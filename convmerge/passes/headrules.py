"""What every operator of a head becomes when its values are maps: one function per kind of operator.

A rule gets the call and what the tensors it reads have become, and gives what its result becomes and the
layer that replaces it: KEPT where the call does the same to maps as it stands, None where it vanishes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import Node

from convmerge.affine import Dims
from convmerge.errors import Refusal
from convmerge.evidence.capture import Call
from convmerge.evidence.tracing import WRITTEN_AS
from convmerge.recognise import Context, Filter, recognise

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
KEPT: nn.Module = nn.Identity()  # stands for the call itself


@dataclass(frozen=True)
class Lifted:
    """What a value of the head has become: a map over the windows of a feature map.

    Attributes:
        window: spatial size of the feature map on the example inputs, which one output looks at.
        kernel: how many positions belong to one window; (1, ...) after the first linear layer.
        dilation: how far apart these are.
        axis: the channels' axis while the model's own value has spatial axes too; None once it is flat.
    """

    window: Dims
    kernel: Dims
    dilation: Dims
    axis: int | None

    @property
    def single(self) -> bool:
        """Whether a window is one position."""
        return math.prod(self.kernel) == 1

    def flattened(self) -> Lifted:
        """The same without spatial axes in the model."""
        if self.axis not in (None, 1):
            raise Refusal("it flattens a map whose channels come last")
        return replace(self, axis=None)

    def of_one_position(self) -> Lifted:
        """After a linear layer."""
        one = (1,) * len(self.window)
        return replace(self, kernel=one, dilation=one)


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters of a model, by the nodes of its evidence."""

    context: Context
    model: nn.Module

    def size(self, node: Node) -> tuple[int, ...]:
        """Shape of a value on the example inputs."""
        return self.context.evidence.size(node)

    def tensor(self, node: object) -> Tensor | None:
        """A constant argument: the model's own parameter or buffer, or the value computed from some."""
        if not isinstance(node, Node):
            return None
        evidence = self.context.evidence
        if node in evidence.tensors:
            name, tensor = evidence.tensors[node]
            try:
                return self.model.get_parameter(name)
            except AttributeError:
                return tensor
        return self.context.tensor(node).to(evidence.dtype(node))

    def channelwise(self, call: Call, spatial: int) -> nn.Module:
        """A product or a sum with one number per feature, as a convolution of every channel by itself."""
        step = recognise(self.context, call)
        if not isinstance(step, Filter) or step.axis != 1:
            raise Refusal(f"{call.op} of {call.leaf} takes a constant that is not one number per feature")
        form = step.numbers()
        channels, one = form.geometry.out_channels, (1,) * spatial
        dtype = self.context.evidence.dtype(call.node)
        weight = form.weight.reshape(channels, 1, *one).to(dtype)
        return _conv(weight, None if form.bias is None else form.bias.to(dtype), one, channels)


Outcome = tuple[Lifted, nn.Module | None]
Rule = Callable[[Weights, Call, Sequence[Lifted]], Outcome]
RULES: dict[str, Rule] = {}
# Those that torch does not tag as pointwise.
ELEMENTWISE = frozenset({"hardswish", "log_sigmoid", "prelu", "expand_as"})
COPIES = frozenset({"dropout", "to", "_to_copy", "contiguous", "detach", "alias", "lift_fresh_copy"})


def rule_for(call: Call) -> Rule | None:
    """The rule of an operator that acts on every position of a map by itself; None for any other."""
    if call.op in ("conv1d", "conv2d", "conv3d"):
        return _kept if _is_pointwise(call) else None
    if call.op in RULES:
        return RULES[call.op]
    each = call.node.meta.get(WRITTEN_AS, call.op) in ELEMENTWISE | COPIES
    each = each or torch.Tag.pointwise in getattr(call.node.target, "tags", ())
    return _elementwise if each else None


def _is_pointwise(call: Call) -> bool:
    kernel = call.args["weight"].meta["val"].shape[2:]
    padding = call.args["padding"]
    still = padding == "valid" or not any(padding) if not isinstance(padding, str) else padding == "valid"
    return math.prod(kernel) == 1 and still and all(s == 1 for s in call.args["stride"])


def _kept(weights: Weights, call: Call, values: Sequence[Lifted]) -> Outcome:
    """A 1×1 convolution between pooling and flattening."""
    if values[0].axis != 1:
        raise Refusal(f"{call.op} of {call.leaf} works on flattened values")
    return values[0], KEPT


def _elementwise(weights: Weights, call: Call, values: Sequence[Lifted]) -> Outcome:
    """One number of every tensor gives one number; constants are single numbers or one per feature."""
    value = _common(call, values)
    if call.args.get("train"):
        raise Refusal(f"the dropout of {call.leaf} is active at inference too")
    rank = len(weights.size(call.node))
    constants = [n for n in call.node.all_input_nodes if n in weights.context.constants]
    sizes = [weights.size(n) for n in constants if math.prod(weights.size(n)) > 1]
    if not sizes or (call.op == "prelu" and (value.single or value.axis == 1)):
        return value, KEPT
    if value.axis == 1 and all(len(s) <= rank and math.prod(s[-(rank - 2) :]) == 1 for s in sizes):
        return value, KEPT
    if value.axis is not None or not value.single or rank != 2:
        raise Refusal(f"{call.op} of {call.leaf} takes a constant that differs between positions")
    return value, weights.channelwise(call, len(value.window))


def _common(call: Call, values: Sequence[Lifted]) -> Lifted:
    if len(set(values)) != 1:
        raise Refusal(f"{call.op} of {call.leaf} joins values that look at windows of different maps")
    return values[0]


def _rule(*ops: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


@_rule("linear", "addmm", "matmul", "mm")
def _linear(weights: Weights, call: Call, values: Sequence[Lifted]) -> Outcome:
    """A matrix (out, C · h · w) is a kernel (out, C, h, w), the same numbers in the same order."""
    value, args = values[0], call.args
    rank = len(weights.size(call.node))
    if value.axis is not None:
        if value.axis != rank - 1:
            raise Refusal(f"the linear layer {call.leaf} works on a spatial axis")
        return value, KEPT
    plain = call.op == "linear"
    names = {
        "linear": ("weight", "bias"),
        "addmm": ("mat2", "self"),
        "mm": ("mat2", ""),
        "matmul": ("other", ""),
    }
    weight, bias = (weights.tensor(args.get(name)) for name in names[call.op])
    if len(values) > 1 or weight is None or weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        raise Refusal(f"the weight of {call.leaf} is not one constant matrix")
    if call.op == "addmm" and (args["beta"] != 1 or args["alpha"] != 1):
        raise Refusal(f"{call.leaf} scales its matrix")
    kernel = (weight if plain else weight.t()).reshape(weight.shape[0 if plain else 1], -1, *value.kernel)
    return value.of_one_position(), _conv(kernel, bias, value.dilation)


def _conv(weight: Tensor, bias: Tensor | None, dilation: Dims, groups: int = 1) -> nn.Module:
    """A convolution with these very numbers: they are neither rounded nor copied."""
    out, into, *kernel = weight.shape
    size: Any = tuple(kernel)
    spread: Any = dilation if len(set(dilation)) > 1 else dilation[0]
    layer = CONV[len(kernel)](
        into * groups,
        out,
        size,
        dilation=spread,
        groups=groups,
        bias=bias is not None,
        device="meta",
        dtype=weight.dtype,
    )
    layer.weight = _parameter(weight)
    layer.bias = None if bias is None else _parameter(bias)
    return layer


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


@_rule("batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(weights: Weights, call: Call, values: Sequence[Lifted]) -> Outcome:
    """BatchNorm1d of features is the BatchNorm of a map's channels."""
    value, args = values[0], call.args
    if len(values) > 1 or args.get("training") or args["running_mean"] is None or args["running_var"] is None:
        raise Refusal(f"the batch norm {call.leaf} uses the statistics of the batch, not running ones")
    if value.axis == 1:
        return value, KEPT
    if value.axis is not None or not value.single:
        where = f"the batch norm {call.leaf} has a number for every position of the window"
        raise Refusal(f"{where}; without --fully-conv it joins the linear layer, and then this works")
    mean, var = (weights.tensor(args[name]) for name in ("running_mean", "running_var"))
    weight, bias = (weights.tensor(args[name]) for name in ("weight", "bias"))
    assert mean is not None and var is not None
    affine = weight is not None or bias is not None
    layer = NORM[len(value.window)](
        mean.numel(), eps=args["eps"], affine=affine, device=mean.device, dtype=mean.dtype
    )
    layer.running_mean, layer.running_var = mean.detach(), var.detach()
    layer.weight = layer.weight if weight is None else _parameter(weight)
    layer.bias = layer.bias if bias is None else _parameter(bias)
    return value, layer.eval()


@_rule("layer_norm", "rms_norm")
def _layer_norm(weights: Weights, call: Call, values: Sequence[Lifted]) -> Outcome:
    """Over the last axis, as long as that is the channels'."""
    value, rank = _common(call, values), len(weights.size(call.node))
    if value.axis != rank - 1 or len(call.args["normalized_shape"]) != 1:
        raise Refusal(f"{call.op} of {call.leaf} normalises the last axis, which would be a spatial one")
    return value, KEPT


@_rule("permute")
def _permute(weights: Weights, call: Call, values: Sequence[Lifted]) -> Outcome:
    """Channels to the end and back."""
    value, rank = values[0], len(weights.size(call.node))
    order = [int(d) % rank for d in call.args["dims"]]
    spatial = [axis for axis in order if axis not in (0, value.axis)]
    if value.axis is None or order[0] != 0 or spatial != sorted(spatial):
        raise Refusal(f"permute of {call.leaf} changes the order of the axes")
    return replace(value, axis=order.index(value.axis)), KEPT


@_rule("softmax", "_softmax", "log_softmax", "_log_softmax", "glu")
def _over_features(weights: Weights, call: Call, values: Sequence[Lifted]) -> Outcome:
    """Over the features, named as axis 1: the last axis would be a spatial one."""
    value, dim = _features_only(weights, call, values), int(call.args["dim"])
    if dim == 1:
        return value, KEPT
    layers = {"glu": nn.GLU, "softmax": nn.Softmax, "_softmax": nn.Softmax}
    if call.args.get("dtype") is not None:
        raise Refusal(f"{call.op} of {call.leaf} changes the dtype")
    return value, layers.get(call.op, nn.LogSoftmax)(1)


@_rule("argmax", "amax", "sum", "mean", "linalg_vector_norm", "norm", "cat", "select", "slice")
def _along_features(weights: Weights, call: Call, values: Sequence[Lifted]) -> Outcome:
    """What works along axis 1 does so on a map too."""
    dims = call.args.get("dim")
    dims = list(dims) if isinstance(dims, list | tuple) else [dims]
    if call.op == "slice" and weights.size(call.node) == weights.size(call.args["self"]):
        return values[0], KEPT
    value = _common(call, values)
    if value.axis == 1 and call.op == "select" and value.single and dims[0] >= 2:
        return _squeezed(weights, call, value)
    if value.axis == 1 and call.op == "cat" and dims == [1]:
        return value, KEPT
    value = value if call.op == "cat" else _features_only(weights, call, values)
    if value.axis is not None or dims != [1]:
        raise Refusal(f"{call.op} of {call.leaf} works on axis {dims[0]}, which is another one in maps")
    return value, KEPT


def _features_only(weights: Weights, call: Call, values: Sequence[Lifted]) -> Lifted:
    """The value of a call that works along the features of one window, which must be one position."""
    value, source = _common(call, values), weights.size(call.node.all_input_nodes[0])
    dims = call.args.get("dim")
    dims = dims if isinstance(dims, list | tuple) else [dims]
    axis = 1 if value.axis is None else value.axis
    if not value.single or any(d is None or d % len(source) != axis for d in dims):
        raise Refusal(f"{call.op} of {call.leaf} does not work along the features")
    return value


@_rule("flatten", "view", "reshape", "_unsafe_view", "squeeze")
def _reshape(weights: Weights, call: Call, values: Sequence[Lifted]) -> Outcome:
    """Nothing where the shape stays; an axis of one feature or of one position may go."""
    value, before, after = values[0], weights.size(call.args["self"]), weights.size(call.node)
    if before == after:
        return value, None
    if value.axis == 1 and value.single and before[:2] == after[:2]:
        return _squeezed(weights, call, value)
    if value.axis is None and before[1:] == (1,) and after == before[:1]:
        return value, nn.Flatten(0, 1)
    was, becomes = ("×".join(map(str, size)) for size in (before, after))
    raise Refusal(f"{call.op} of {call.leaf} from {was} to {becomes} is not known to keep windows apart")


def _squeezed(weights: Weights, call: Call, value: Lifted) -> Outcome:
    """One of the axes of the single position goes: a map keeps them."""
    flat = len(weights.size(call.node)) == 2
    return replace(value, axis=None if flat else 1), None
