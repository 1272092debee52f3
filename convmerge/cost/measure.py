"""Costs measured on this machine: what operators take, and ways to build a form, with random numbers.

Time depends on geometry, sizes and dtype, and hardly on the numbers: a form can be timed before there are
any. What was timed once is not timed again.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from convmerge.affine import Affine, Geometry
from convmerge.borders.classes import Bordered
from convmerge.cost.model import Cost, Roofline
from convmerge.cost.timing import Run, Stopwatch, Timer
from convmerge.emit import Emission, Kind, Layer, empty_layer
from convmerge.emit.bordered import build_bordered

NEAR = 2.0  # ways predicted to take this many times as long as the best one are not timed
HOPELESS = 4.0  # nor are those with this many times the time or MACs of what they would replace
SECONDS = 120.0  # for all measurements of a model

# Operators of a model that are layers, by name; and those that go over their input once, as a scaling does.
_LAYERS: dict[str, Kind] = {
    "conv": "conv",
    "conv_transpose": "conv_transpose",
    "linear": "linear",
    "avg_pool": "avg_pool",
    "nearest": "nearest",
    "pixel_shuffle": "shuffle",
}
_ARITHMETIC = ("add", "mul", "sub", "div", "scale")


@dataclass(frozen=True)
class Operator:
    """An operator that no form is built as: ``batch_norm``, or ``scale`` for arithmetic with constants."""

    name: str
    channels: int


@dataclass(frozen=True)
class Subject:
    """What is timed, and the maps it is timed on. Layers run one after the other."""

    what: tuple[Layer, ...] | Bordered | Operator
    size: tuple[int, ...]
    batch: int
    dtype: torch.dtype


@dataclass(eq=False)
class Measured:
    """A cost model that times what could be chosen, and scales the prediction for the rest.

    Attributes:
        timer: how calls are timed.
        memory_format: of four-dimensional maps and weights.
        seconds: time for all measurements; when it has run out, the rest is predicted.
        progress: called as (stage, done, total) before each measurement; the total is not known and 0.
    """

    timer: Timer = field(default_factory=Stopwatch)
    memory_format: torch.memory_format = torch.contiguous_format
    seconds: float = SECONDS
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None

    def __post_init__(self) -> None:
        self._roofline = Roofline()
        self._known: dict[Subject, float] = {}
        self._ratios: list[float] = []  # measured over predicted
        self._spent = 0.0

    @property
    def exhausted(self) -> bool:
        """Whether the time for measurements has run out."""
        return self._spent >= self.seconds

    def operator(
        self,
        name: str,
        elements: int,
        *,
        geometry: Geometry | None = None,
        size: Sequence[int] = (),
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Cost:
        """Measured cost of an operator as a model has it; predicted for those that are not timed."""
        cost = self._roofline.operator(name, elements, geometry=geometry, size=size, batch=batch, dtype=dtype)
        subject = None
        if geometry is not None:
            subject = _as_it_is(name, geometry, tuple(size), batch, dtype)
        elif name in _ARITHMETIC:
            subject = Subject(Operator("scale", 1), (elements,), 1, dtype)
        return self._timed([(subject, cost)])[0]

    def ways(
        self, ways: Sequence[Emission], size: Sequence[int], *, batch: int, dtype: torch.dtype, before: Cost
    ) -> list[Cost]:
        """Measured cost of the ways that could be the best; predicted for the others."""
        costs = self._roofline.ways(ways, size, batch=batch, dtype=dtype, before=before)
        limit = NEAR * min(cost.latency for cost in costs)
        pairs: list[tuple[Subject | None, Cost]] = []
        for way, cost in zip(ways, costs, strict=True):
            near = cost.latency <= limit and not self._hopeless(cost, before)
            subject = Subject(_biased(way.layers), tuple(size), batch, dtype)
            pairs.append((subject if near else None, cost))
        return self._timed(pairs)

    def bordered(
        self, b: Bordered, size: Sequence[int], *, batch: int, dtype: torch.dtype, before: Cost
    ) -> Cost:
        """Measured cost of a form with border classes, unless there is no hope that it pays."""
        cost = self._roofline.bordered(b, size, batch=batch, dtype=dtype, before=before)
        subject = None if self._hopeless(cost, before) else Subject(b, tuple(size), batch, dtype)
        return self._timed([(subject, cost)])[0]

    @property
    def _scale(self) -> float:
        return statistics.median(self._ratios) if self._ratios else 1.0

    def _hopeless(self, cost: Cost, before: Cost) -> bool:
        slow = cost.latency * self._scale > HOPELESS * before.latency
        return slow or cost.macs > HOPELESS * max(before.macs, 1)

    def _timed(self, pairs: Sequence[tuple[Subject | None, Cost]]) -> list[Cost]:
        """The costs, with the latency of their subjects where there are any; new ones are timed in turn."""
        wanted = {s: cost for s, cost in pairs if s is not None and s not in self._known}
        if wanted and not self.exhausted:
            self.progress("measure", len(self._known), 0)
            start = time.perf_counter()
            seconds = self.timer([runnable(subject, self.memory_format) for subject in wanted])
            for (subject, cost), latency in zip(wanted.items(), seconds, strict=True):
                self._known[subject] = latency
                self._ratios.append(latency / cost.latency)
            self._spent += time.perf_counter() - start
        return [self._known_or_scaled(subject, cost) for subject, cost in pairs]

    def _known_or_scaled(self, subject: Subject | None, cost: Cost) -> Cost:
        if subject in self._known:
            return replace(cost, latency=self._known[subject], measured=True)
        return replace(cost, latency=cost.latency * self._scale)


def _as_it_is(
    name: str, g: Geometry, size: tuple[int, ...], batch: int, dtype: torch.dtype
) -> Subject | None:
    """An operator of a model; None for those that are not timed."""
    if name == "linear" and g.spatial:  # on a flattened map
        g, size = Geometry.channelwise(g.in_channels * math.prod(g.kernel), g.out_channels, 1, 0), ()
    if name == "batch_norm" and g.spatial:
        return Subject(Operator(name, g.in_channels), size, batch, dtype)
    if name in _LAYERS and (g.lo == g.hi or name in ("conv_transpose", "nearest", "pixel_shuffle")):
        return Subject(_biased((Layer(_LAYERS[name], g),)), size, batch, dtype)
    if g.pointwise and g.diagonal and name not in _LAYERS:
        return Subject(Operator("scale", g.in_channels), size, batch, dtype)
    return None


def _biased(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers, the convolutions and linear ones with a bias.

    Whether they have one hardly matters for the time, and what takes over a bias is not to look slower by it.
    It does matter for transposed convolutions.
    """
    usual = ("conv", "unfolded", "linear", "batched_linear")
    return tuple(
        replace(x, geometry=replace(x.geometry, bias=True)) if x.kind in usual else x for x in layers
    )


def runnable(subject: Subject, memory_format: torch.memory_format = torch.contiguous_format) -> Run:
    """A call of the subject on random maps, with random weights."""
    what = subject.what
    if isinstance(what, Bordered):
        module: nn.Module = build_bordered(what, [_random(g) for g in what.stages], subject.dtype)
        channels = what.low.in_channels
    elif isinstance(what, Operator):
        module, channels = _operator(what, subject), what.channels
    else:
        modules = [_filled(layer, subject.dtype) for layer in what]
        module = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
        channels = what[0].geometry.in_channels
    x = _laid_out(torch.randn(subject.batch, channels, *subject.size).to(subject.dtype), memory_format)
    for parameter in module.parameters():
        parameter.data = _laid_out(parameter.data, memory_format)
    return lambda: module(x)


def _random(g: Geometry) -> Affine:
    weight = torch.randn(g.out_channels, g.in_channels // g.groups, *g.kernel, dtype=torch.float64)
    return Affine(replace(g, phased=False), weight, weight.flatten(1)[:, 0] if g.bias else None)


def _filled(layer: Layer, dtype: torch.dtype) -> nn.Module:
    module = empty_layer(layer, dtype).to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape).to(dtype)
    return module


class _Scale(nn.Module):
    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _operator(what: Operator, subject: Subject) -> nn.Module:
    if what.name == "batch_norm":
        kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(subject.size) - 1]
        return kind(what.channels).to(subject.dtype).eval()
    return _Scale(torch.randn(what.channels, *(1 for _ in subject.size)).to(subject.dtype))


def _laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
