"""What an operator call can be to the planner, and the registry of recognisers.

A recogniser is one function per operator, registered under its ATen name. It returns a step, None (no rule
for this use of the operator), or raises Refusal with the reason why this use is not an affine form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.affine import Affine, Geometry
from convmerge.evidence.capture import Call, Evidence
from convmerge.evidence.constants import Constants


@dataclass(frozen=True, eq=False)
class Filter:
    """target = F(source), an affine form over the channels on ``axis`` and the dimensions after it.

    Attributes:
        numbers: computes the form in float64; called only when a merge was decided on.
        kind: the operator in words, for people.
        through: calls between source and target that belong to it, such as the flatten before a linear layer;
            a form with any holds at the example's input size only.
        multiple: what the input's spatial sizes are multiples of.
    """

    source: Node
    axis: int
    geometry: Geometry
    numbers: Callable[[], Affine]
    kind: str
    through: tuple[Node, ...] = ()
    multiple: int = 1


@dataclass(frozen=True, eq=False)
class BorderFill(Filter):
    """Padding with one number per channel: y = pad(x) + v (1 - pad(1)).

    Attributes:
        value: v in float64, shape (channels,).
        writes: the calls that write v into the border of a zero pad, in order, their views included.
        beginnings: values from which everything up to here turns zeros into v, so that padding there with
            zeros is the same.
        any_size: whether it pads maps of every size so, and not those of the example's alone.
    """

    value: Tensor = field(kw_only=True)
    writes: tuple[Node, ...] = ()
    any_size: bool = False
    beginnings: frozenset[Node] = frozenset()


@dataclass(frozen=True, eq=False)
class Resized(Filter):
    """Nearest upsampling to a given size, where that is ``geometry.up`` times the input's.

    Attributes:
        short: whether the size can also be one less.
    """

    short: bool = False


@dataclass(frozen=True, eq=False)
class Scalar:
    """target = factor * source + offset with plain numbers: the same on whatever axis its neighbours use."""

    source: Node
    factor: float
    offset: float
    kind: str


@dataclass(frozen=True, eq=False)
class Sum:
    """target = sum of factor_i * term_i over tensors of one shape; ``via`` are calls that collect them."""

    terms: tuple[tuple[Node, float], ...]
    via: tuple[Node, ...] = ()


@dataclass(frozen=True, eq=False)
class Concat:
    """target = the sources one after the other along ``axis``, which is not negative.

    ``via`` are calls that collect them.
    """

    sources: tuple[Node, ...]
    axis: int
    via: tuple[Node, ...] = ()


@dataclass(frozen=True, eq=False)
class Same:
    """target = source, value for value."""

    source: Node


@dataclass(frozen=True, eq=False)
class Passage:
    """An operator that every channel goes through in the same way and that keeps constants.

    Relayouts, average and adaptive pooling, mean over space, interpolation, non-zero padding modes: any
    pointwise form with the channels on ``axis`` before it equals the same form with the channels on
    ``axis_map[axis]`` after it.

    Attributes:
        filter: the same as a filter, which holds at some sizes only and has to check them.
        refusal: why it is no such filter.
    """

    source: Node
    axis_map: dict[int, int]
    kind: str
    filter: Resized | None = None
    refusal: str | None = None


Step = Filter | Scalar | Sum | Concat | Same | Passage
Recogniser = Callable[["Context", Call], Step | None]
RECOGNISERS: dict[str, Recogniser] = {}


def recognises(*ops: str) -> Callable[[Recogniser], Recogniser]:
    """Register a recogniser under the ATen names ``ops``."""

    def register(function: Recogniser) -> Recogniser:
        for op in ops:
            RECOGNISERS[op] = function
        return function

    return register


@dataclass(frozen=True, eq=False)
class Context:
    """What a recogniser may ask about the model."""

    evidence: Evidence
    constants: Constants

    def constant(self, value: object) -> bool:
        """Whether an argument is absent, a number, or a value that does not depend on the model's inputs."""
        return value is None or isinstance(value, bool | int | float) or value in self.constants

    def tensor(self, value: object) -> Tensor:
        """A constant argument as a float64 tensor."""
        tensor = self.constants.tensor(value)
        if tensor is None:
            raise KeyError(value)
        return tensor

    def origins(self, value: object) -> tuple[str, ...]:
        """Names of the model's inputs that a value depends on, in their order."""
        return tuple(n.name for n in self.evidence.inputs if n in self._origins.get(value, ()))  # type: ignore[call-overload]

    @cached_property
    def _origins(self) -> dict[Node, frozenset[Node]]:
        none: frozenset[Node] = frozenset()
        found = {node: frozenset([node]) for node in self.evidence.inputs}
        for node in self.evidence.calls:
            sources = [found.get(source, none) for source in node.all_input_nodes]
            found[node] = sources[0] if len(set(sources)) == 1 else none.union(*sources)
        return found

    def shape(self, value: object) -> tuple[int, ...]:
        """Shape of an argument on the example inputs; () for a number, also one in the shape of the data."""
        number = not isinstance(value, Node) or self.constants.uniform(value)
        return () if number else self.evidence.size(value)  # type: ignore[arg-type]


def channelwise_filter(
    source: Node,
    axis: int,
    shape: tuple[int, ...],
    scale: Callable[[], Tensor] | None,
    shift: Callable[[], Tensor] | None,
    kind: str,
) -> Filter:
    """scale[c] * x + shift[c] with one number per channel on ``axis`` of a tensor of ``shape``."""
    channels, spatial = shape[axis], len(shape) - axis - 1
    geometry = Geometry.channelwise(channels, channels, channels, spatial, bias=shift is not None)

    def numbers() -> Affine:
        weight = torch.ones(channels, dtype=torch.float64) if scale is None else scale()
        bias = None if shift is None else shift().expand(channels).contiguous()
        weight = weight.expand(channels).reshape(channels, 1, *(1 for _ in range(spatial)))
        return Affine(geometry, weight, bias)

    return Filter(source, axis, geometry, numbers, kind)
