"""Layers whose kernel is computed from inputs, what computes it, and the pointwise operators around them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.affine import Dims, Geometry
from convmerge.evidence.capture import Call, Evidence
from convmerge.evidence.constants import Constants, run_call
from convmerge.recognise import BorderFill, Filter, Passage, Same, Scalar
from convmerge.regions.elements import CHECKS, Chain, Element, Leaf, Regions, Share, Via, leaves
from convmerge.regions.fold import Place
from convmerge.verification.replay import RESHAPES

# Operators that hand on the numbers of their first argument, each at most once, in another layout.
LAYOUT = frozenset(
    [
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"),
        *("permute", "transpose", "t", "numpy_T", "mT", "movedim", "clone", "alias"),
        *("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "getitem"),
    ]
)


@dataclass(frozen=True, eq=False)
class Selection:
    """A value that is made of the numbers of another one.

    Attributes:
        root: the value that they come from; ``calls``: the layout operators after it, in order.
        rows: the value's shape, int64: where each number stands in the flattened root.
    """

    root: Node
    calls: tuple[Node, ...]
    rows: Tensor

    @property
    def selects(self) -> bool:
        """Whether some numbers of the root, which may be for a batch, are left out."""
        root = self.root.meta["val"]
        return root.dim() > 1 and any("slice" in node.name or "select" in node.name for node in self.calls)


@dataclass(frozen=True, eq=False)
class Computed:
    """A convolution or linear layer with a computed kernel.

    Attributes:
        node: its call; ``source``: the maps it works on; ``place``: where their channels are.
        geometry: its form.
        weight, bias: what computes them; a bias may be a constant (then a Node), or None.
        before, after: the chains of affine operators that end and begin here, read by nothing else.
    """

    node: Node
    source: Node
    place: Place
    geometry: Geometry
    weight: Selection
    bias: Selection | Node | None
    before: Chain
    after: Chain


def last_linear(layer: Computed, evidence: Evidence, regions: Regions) -> Leaf | None:
    """The linear layer that computes kernel and bias, and nothing else, for one sample; None if none."""
    root = layer.weight.root
    found = next((leaf for chain in regions.chains for leaf in leaves(chain) if leaf.node is root), None)
    if found is None or not isinstance(found.step, Filter) or found.step.kind != "linear":
        return None
    between = set(layer.weight.calls)
    if isinstance(layer.bias, Selection):
        if layer.bias.root is not root:
            return None
        between.update(layer.bias.calls)
    made = {root, *between}
    alone = {user for node in made for user in _readers(evidence, node)} <= {layer.node, *between}
    single = math.prod(evidence.size(root)[:-1]) == 1
    return found if single and alone and not made & evidence.outputs else None


def has_computed_kernel(call: Call, constants: Constants) -> bool:
    """Whether a call is a convolution or linear layer of data with a kernel that is no constant."""
    if call.op not in ("conv1d", "conv2d", "conv3d", "linear") or call.args.get("padding") == "same":
        return False
    return call.args["input"] not in constants and call.args["weight"] not in constants


def computed_layers(evidence: Evidence, constants: Constants, regions: Regions) -> Iterator[Computed]:
    """Every convolution and linear layer whose kernel depends on an input."""
    ends = {chain[-1].target: chain for chain in regions.chains}
    begins = {chain[0].source: chain for chain in regions.chains}
    for node, call in evidence.calls.items():
        if node not in regions.refused or not has_computed_kernel(call, constants):
            continue
        args = call.args
        source, weight, bias = args["input"], selection(evidence, constants, args["weight"]), args["bias"]
        if bias is not None and bias not in constants:
            bias = selection(evidence, constants, bias)
        geometry = _geometry(evidence, call)
        place = Place(len(evidence.size(source)) - geometry.spatial - 1, evidence.size(source))
        alone = node not in evidence.outputs and len(_readers(evidence, node)) == 1
        fed = source not in evidence.outputs and _readers(evidence, source) == [node]
        before, after = ends.get(source, ()) if fed else (), begins.get(node, ()) if alone else ()
        yield Computed(node, source, place, geometry, weight, bias, before, after)


def _geometry(evidence: Evidence, call: Call) -> Geometry:
    shape = evidence.size(call.args["weight"])
    bias = call.args["bias"] is not None
    if call.op == "linear":
        return Geometry.channelwise(shape[1], shape[0], 1, 0, bias=bias)
    n, groups = len(shape) - 2, call.args["groups"]
    stride, dilation = _dims(call.args["stride"], n), _dims(call.args["dilation"], n)
    padding = (0,) * n if call.args["padding"] == "valid" else _dims(call.args["padding"], n)
    one = (1,) * n
    return Geometry(
        shape[1] * groups, shape[0], groups, shape[2:], one, stride, dilation, padding, padding, bias
    )


def _dims(value: Any, n: int) -> Dims:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(int(v) for v in (values * n if len(values) == 1 else values))


def _readers(evidence: Evidence, node: Node) -> list[Node]:
    return [
        user
        for user in node.users
        if evidence.calls.get(user) is None or evidence.calls[user].op not in CHECKS
    ]


def selection(evidence: Evidence, constants: Constants, value: Node) -> Selection:
    """Where the numbers of a value come from."""
    calls: list[Node] = []
    root = value
    while (
        (call := evidence.calls.get(root)) is not None
        and call.op in LAYOUT
        and len(root.all_input_nodes) == 1
    ):
        calls.append(root)
        (root,) = root.all_input_nodes
    size = evidence.size(root)
    known: dict[Node, Any] = {root: torch.arange(math.prod(size)).reshape(size)}
    for node in reversed(calls):
        known[node] = run_call(node, known.__getitem__)
    return Selection(root, tuple(reversed(calls)), known[value])


def pointwise(layer: Computed, elements: Chain) -> Iterator[Element]:
    """The first of the elements that act on channels alone and can move into the layer."""
    for element in elements:
        if not isinstance(element, Leaf) or isinstance(element, Via | Share):
            return
        step = element.step
        if isinstance(step, Passage | BorderFill):
            return
        if isinstance(step, Filter):
            g = step.geometry
            fits = g.pointwise and not step.through and g.spatial == layer.geometry.spatial
            if (
                not fits
                or step.axis != layer.place.axis
                or not (g.diagonal or layer.geometry.groups == g.groups == 1)
            ):
                return
        yield element


def relayouts(elements: Chain) -> list[Node]:
    """Calls among the elements that lay out the maps anew, as code does for a kernel for every sample."""
    same = [e.node for e in elements if isinstance(e, Leaf) and isinstance(e.step, Same)]
    schemas = [(node, getattr(node.target, "_schema", None)) for node in same]
    return [
        node for node, schema in schemas if schema is not None and schema.name.split("::")[-1] in RESHAPES
    ]


def ends(elements: Chain) -> list[int]:
    """How many of the elements can be taken: none, or up to one that computes something."""
    return [
        0,
        *(
            n
            for n, e in enumerate(elements, 1)
            if isinstance(e, Leaf) and isinstance(e.step, Filter | Scalar)
        ),
    ]
