"""How far apart two right models may be: the error model behind ``compare``.

A merge that is algebraically right still rounds differently, and by how much two right models differ depends
on the model: 1e-7 in one float32 network, 1e-2 in another. The original tells what is normal. Run in
float64 it is (nearly) exact; run in its own dtype it has some error against that. Another right model in
the same dtype has an error of the same order. So the measure is the ratio of the two errors, taken for every
tensor of the output by itself:

- of root mean squares, which see something small that is wrong everywhere, and of maxima, which see something
  local; the larger ratio counts;
- relative to the tensor's scale, and with the original's error never below one unit in the last place of it:
  where the original happens to be exact, another model that is off by a few units is none the worse;
- the original's error on this input or the median of those on several, whichever is larger, because a single
  number can be right by luck.

Where the ratio leaves doubts, the original is also run with every weight moved by one unit in its last place,
and the larger of its two errors counts: what does not depend on the input can be right by luck on all inputs,
and a deep network amplifies it. Without a float64 run (the model forces float32 somewhere, or is in float64
already) the truth is the original itself, and only the moved weights tell what error is normal.
"""

from __future__ import annotations

import contextlib
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from convmerge.evidence.copying import deep_copy
from convmerge.verification.outputs import Leaves, leaves
from convmerge.verification.probes import first_line

if TYPE_CHECKING:
    from convmerge.inputs import Inputs

FAIL = 16.0  # times the original's own error: not the same function


@dataclass(frozen=True, eq=False)
class Run:
    """Both models' outputs, in their own dtype, on one set of inputs."""

    inputs: Inputs
    a: Leaves
    b: Leaves


@dataclass(frozen=True, eq=False)
class Reading:
    """What the errors of one run are measured against.

    Attributes:
        truth: the best known result.
        samples: results that are as far from the truth as a right model may be; none where none was made.
        b64: the other model's result in float64, where it has one.
    """

    truth: Leaves
    samples: tuple[Leaves, ...] = ()
    b64: Leaves | None = None

    def with_sample(self, sample: Leaves) -> Reading:
        """With one more, if it is built like the truth."""
        more = (sample,) if same_build(sample, self.truth) else ()
        return replace(self, samples=(*self.samples, *more))


@dataclass(frozen=True)
class Size:
    """How large a tensor is: root mean square and maximum of its absolute values."""

    rms: float
    peak: float

    @staticmethod
    def of(x: Tensor) -> Size:
        if x.numel() == 0:
            return Size(0.0, 0.0)
        x = x.double().abs()
        peak = x.max().item()
        rms = peak * (x / peak).square().mean().sqrt().item() if 0 < peak < math.inf else peak
        return Size(rms, peak)

    @staticmethod
    def median(sizes: Iterable[Size]) -> Size:
        sizes = list(sizes) or [Size(0.0, 0.0)]
        return Size(statistics.median(s.rms for s in sizes), statistics.median(s.peak for s in sizes))

    def over(self, other: Size) -> Size:
        """Both relative to those of ``other``; 0 over 0 is 0."""
        return Size(_divide(self.rms, other.rms), _divide(self.peak, other.peak))

    def at_least(self, other: Size) -> Size:
        return Size(max(self.rms, other.rms), max(self.peak, other.peak))

    @property
    def larger(self) -> float:
        return max(self.rms, self.peak)


def _divide(x: float, y: float) -> float:
    return 0.0 if x == 0 else x / y if y > 0 else math.inf


def private(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A deep copy in eval mode: the caller's model keeps its mode, its buffers and whatever it caches.

    With ``dtype``, the floating-point tensors among parameters, buffers and plain attributes are converted on
    the way. Tensors with a gradient history, which old-style weight_norm and pruning leave, are detached.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for x in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(x, Tensor) and (not x.is_leaf or (dtype and x.is_floating_point())):
                y = x.detach().to(dtype if x.is_floating_point() else None, copy=True)
                memo[id(x)] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
    model = deep_copy(model, memo)
    with contextlib.suppress(NotImplementedError):  # modules from torch.export are in eval already
        model.eval()
    return model


def call(model: nn.Module, inputs: Inputs) -> Leaves:
    """The outputs on a copy of the inputs (a forward may write into them)."""
    inputs = inputs.clone()
    unseen = contextlib.redirect_stderr(io.StringIO())  # where it fails, a traced module prints its code
    with torch.no_grad(), unseen:
        return leaves(model(*inputs.args, **inputs.kwargs))


class Reference(Protocol):
    """Makes the reading of a run; ``note`` says what is unusual about it, if anything."""

    note: str

    def __call__(self, run: Run) -> Reading: ...


class Float64:
    """Truth is the original in float64; in its own dtype it is the sample."""

    note = ""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        self.a, self.b = private(a, torch.float64), private(b, torch.float64)

    def __call__(self, run: Run) -> Reading:
        inputs = run.inputs.to(torch.float64)
        truth, b64 = call(self.a, inputs), None
        # That the other model fixes a dtype, as traced ones do, is nothing against it.
        with contextlib.suppress(Exception):
            b64 = call(self.b, inputs)
        if not same_build(truth, run.a):  # as many boxes as rounding leaves above a threshold, say
            return Reading(run.a)
        return Reading(truth, (run.a,), b64 if b64 is not None and same_build(b64, truth) else None)


class Itself:
    """Truth is the original; a nudged one is the sample."""

    def __init__(self, a: nn.Module, seed: int, note: str = "") -> None:
        self.note = note
        self.model = nudged(a, seed)

    def __call__(self, run: Run) -> Reading:
        in_float64 = all(x.dtype == torch.float64 for _, x in floating(run.a))
        return Reading(run.a, b64=run.b if in_float64 else None).with_sample(call(self.model, run.inputs))


def nudged(model: nn.Module, seed: int) -> nn.Module:
    """A private copy with every weight moved by one unit in its last place, at random up or down.

    As good a model as the original, if its weights are the result of rounding, as those of a right merge are.
    """
    model = private(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (*model.parameters(), *model.buffers()):
            if p.is_floating_point():
                sign = torch.randint(2, p.shape, generator=generator).to(p.device).double() * 2 - 1
                p.copy_(p.double() * (1 + sign * torch.finfo(p.dtype).eps))
    return model


def reference(a: nn.Module, b: nn.Module, first: Run, seed: int) -> tuple[Reference, Reading]:
    """What to measure against, and its first reading: float64, if that is better and the original runs so."""
    weights = (x for x in (*a.parameters(), *a.buffers()) if x.is_floating_point())
    if {x.dtype for x in (*weights, *(x for _, x in floating(first.a)))} == {torch.float64}:
        made: Reference = Itself(a, seed)
        return made, made(first)
    try:
        made = Float64(a, b)
        reading = made(first)
        if all(x.dtype == torch.float64 for _, x in floating(reading.truth)):
            return made, reading
        reason = "it does not keep float64 throughout"
    except Exception as error:
        reason = first_line(error)
    made = Itself(a, seed, f"the original cannot be run in float64: {reason}")
    return made, made(first)


def floating(outputs: Leaves) -> Iterable[tuple[str, Tensor]]:
    """The floating-point tensors of an output."""
    return [(name, x) for name, x in outputs.items() if isinstance(x, Tensor) and x.is_floating_point()]


def same_build(a: Leaves, b: Leaves) -> bool:
    """Whether the leaves have the same names and shapes, of whatever dtype."""
    return a.keys() == b.keys() and all(
        getattr(x, "shape", None) == getattr(b[name], "shape", None) for name, x in a.items()
    )


def ratios(runs: Sequence[Run], readings: Sequence[Reading]) -> list[float]:
    """Per run, the worst ratio of the other model's error to the original's own."""
    worst = [0.0] * len(runs)
    names = dict.fromkeys(name for run in runs for name, _ in floating(run.a))
    for name in names:
        for i, ratio in _leaf_ratios(name, runs, readings):
            worst[i] = max(worst[i], ratio)
    return worst


def _leaf_ratios(name: str, runs: Sequence[Run], readings: Sequence[Reading]) -> Iterable[tuple[int, float]]:
    """For every run that has this output, and where the models differ in it: its number and the ratio."""
    outputs = {i: _tensor(name, run.a) for i, run in enumerate(runs) if name in run.a}
    sizes = {i: Size.of(finite(x)) for i, x in outputs.items()}
    typical = Size.median(sizes.values())
    own: dict[int, Size] = {}
    other: dict[int, Size] = {}
    for i, size in sizes.items():
        scale, truth = size.at_least(typical), _tensor(name, readings[i].truth)
        for sample in readings[i].samples:
            error = Size.of(difference(_tensor(name, sample), truth)).over(scale)
            own[i] = error.at_least(own.get(i, error))
        if not torch.equal(outputs[i], _tensor(name, runs[i].b)):
            other[i] = Size.of(difference(_tensor(name, runs[i].b), truth)).over(scale)
    ulp = max(torch.finfo(x.dtype).eps for x in outputs.values())
    least = Size.median(own.values()).at_least(Size(ulp, ulp))
    return [(i, size.over(own.get(i, least).at_least(least)).larger) for i, size in other.items()]


def misplaced(run: Run, reading: Reading) -> str | None:
    """What differs that is no matter of degree: integers, booleans, and the places of NaN and infinities."""
    for name, a in run.a.items():
        if not isinstance(a, Tensor):
            continue
        b, truth = _tensor(name, run.b), _tensor(name, reading.truth)
        if a.is_floating_point():
            wrong = (_kind(a) != _kind(b)) & (a.isfinite() | ~truth.isfinite())
            if bool(wrong.any()):
                return f"{name} has NaN or infinities in other places, {_share(wrong)}"
        elif not torch.equal(a, b) and not _decided_by_rounding(name, b, reading):
            return f"{name} ({a.dtype}) differs, {_share(a != b)}".replace("torch.", "")
    return None


def _decided_by_rounding(name: str, b: Tensor, reading: Reading) -> bool:
    """Whether integers differ as argmax of near-ties may: not in float64, or as often in the original."""
    truth = _tensor(name, reading.truth)
    if reading.b64 is not None and torch.equal(_tensor(name, reading.b64), truth):
        return True
    own = max((int((_tensor(name, sample) != truth).sum()) for sample in reading.samples), default=0)
    return int((b != truth).sum()) <= FAIL * own


def difference(x: Tensor, y: Tensor) -> Tensor:
    """x - y in float64, 0 where either is not finite (that is for :func:`misplaced` to judge)."""
    x, y = x.double(), y.double()
    return torch.where(x.isfinite() & y.isfinite(), x - y, 0.0)


def finite(x: Tensor) -> Tensor:
    """x with 0 for NaN and infinities."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def _kind(x: Tensor) -> Tensor:
    """0 for finite numbers, 1 and -1 for infinities, 2 for NaN."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0.0).nan_to_num().to(torch.int8))


def _share(wrong: Tensor) -> str:
    return f"at {int(wrong.sum())} of {wrong.numel()} positions"


def _tensor(name: str, outputs: Leaves) -> Tensor:
    x = outputs[name]
    assert isinstance(x, Tensor)
    return x
