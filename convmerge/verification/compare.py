"""Are two models, or an original site and its merge, the same function?

:func:`~convmerge.verification.probe` looks at one merge in float64 and is the sharp instrument;
:func:`compare` looks at whole models in their own dtype and judges them by their rounding errors (see
:mod:`convmerge.verification.errormodel`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convmerge.errors import ConvmergeError
from convmerge.inputs.random import random_state_kept
from convmerge.report import Comparison, Verification
from convmerge.verification import errormodel, variants
from convmerge.verification.errormodel import FAIL, Reading, Reference, Run, Size, call, floating, private
from convmerge.verification.outputs import Leaves, mismatch
from convmerge.verification.probes import Probe, bisect, first_line, probe, rounded_once

if TYPE_CHECKING:
    from convmerge.inputs import Inputs

__all__ = [
    "FAIL",
    "WARN",
    "Probe",
    "about_equal",
    "bisect",
    "compare",
    "probe",
    "rounded_once",
    "same_in_float64",
]

WARN = 4.0  # times the original's own error: the same function, but worth a look
CHAOTIC = 0.01  # of the output: from here on the original's own error would hide a mistake
GUARD = "Guard failed"  # how torch.export begins the message of a check of inputs
ORDER_OF_SUMS = 1e-9  # of the output, in float64: more than sums in another order can make of equal weights
MORE_SAMPLES = 3  # further inputs run in float64 where the usual two leave doubts


def compare(a: nn.Module, b: nn.Module, inputs: Inputs, *, seed: int = 0, more: bool = True) -> Verification:
    """Whether b computes what a does, up to rounding, in eval mode; neither model nor the inputs are changed.

    With ``more`` they are also run on other values, on another spatial size or length, and on batches of
    three and of one (of that size, which is smaller), each only where a runs on it; then b must run too.
    Float64 runs, which are slow, are spent on the given inputs and on the smallest; on the others a's error,
    relative to the scale of its output, is taken to be the same. Where that makes a ratio suspicious, all are
    run in float64 as well, and a few more.

    Integer and boolean outputs must be equal, except where rounding decides (an argmax, a sort) in a as well.
    NaN and infinities must be in the same places, except where a overflows and is finite in float64.

    Raises:
        ConvmergeError: no verdict: a does not run on the inputs, gives another result each time, or
            gives nothing finite to compare.
    """
    with random_state_kept():
        pair = _Pair(private(a), private(b))
        try:
            runs, refused = _run_all(pair, inputs, seed, more)
            reference, first = errormodel.reference(a, b, runs[0], seed)
            readings = _read(pair, runs, first, reference, seed)
        except _NotEqualError as error:
            return Verification(False, str(error))
    return _verdict(runs, readings, _not_accepted(refused, pair), reference.note)


def same_in_float64(a: nn.Module, b: nn.Module, inputs: Inputs, *, seed: int = 0) -> str | None:
    """Why b, which has the very weights of a, does not compute what a does, or None.

    Cheaper and sharper than :func:`compare`, on one input: in float64 only the order of sums can differ.
    Models that do not run in float64 are compared as there.

    Raises ConvmergeError as :func:`compare`.
    """
    wide = inputs.to(torch.float64)
    try:
        with random_state_kept():
            expected, found = (call(private(model, torch.float64), wide) for model in (a, b))
    except Exception:  # a dtype is fixed somewhere
        verdict = compare(a, b, inputs, seed=seed, more=False)
        return None if verdict.equal else verdict.reason
    if (reason := mismatch(expected, found)) is not None:
        return reason
    tensors = ((x, found[name]) for name, x in expected.items() if isinstance(x, Tensor))
    apart = max(_apart(x, y) for x, y in tensors if isinstance(y, Tensor))
    return f"they are {apart:.1e} of the output apart in float64" if apart > ORDER_OF_SUMS else None


def _apart(x: Tensor, y: Tensor) -> float:
    """max |x - y| over max |x|; infinite where integers or the places of NaN and infinities differ."""
    if not x.is_floating_point() or not torch.equal(x.isfinite(), y.isfinite()):
        return 0.0 if torch.equal(x, y) else math.inf
    return Size.of(errormodel.difference(x, y)).over(Size.of(errormodel.finite(x))).peak


class _NotEqualError(Exception):
    """The models differ in a way that is no matter of degree."""


class _OutsideError(Exception):
    """The other model is an exported program, and says that it is not for these inputs."""


@dataclass(frozen=True)
class _Pair:
    """Two models; ``outside`` takes in what the other one, an exported program, is not for."""

    a: nn.Module
    b: nn.Module
    outside: list[str] = field(default_factory=list)

    def run(self, inputs: Inputs) -> Run:
        """Raises whatever a raises; _NotEqualError where only b does, or its output is built differently.

        Raises _OutsideError where b is an exported program that is not for these inputs.
        """
        a = call(self.a, inputs)
        where = f"on {variants.shapes(inputs)}"
        try:
            b = call(self.b, inputs)
        except Exception as error:
            if isinstance(error, AssertionError) and str(error).startswith(GUARD):
                self.outside.append(where)
                raise _OutsideError(str(error)) from error
            raise _NotEqualError(
                f"the original runs {where}, the other fails: {first_line(error)}"
            ) from error
        reason = mismatch(a, b)
        if reason:
            raise _NotEqualError(f"{where}, {reason}")
        return Run(inputs, a, b)


def _mixes_samples(outputs: Leaves, inputs: Inputs) -> bool:
    """Whether no tensor of the output has one row for each sample.

    A model that flattens by ``view(-1, features)`` runs on other sizes too, and then cuts rows anywhere.
    """
    batch = {x.shape[0] for x in inputs.tensors()[:1] if x.dim()}
    tensors = [x for x in outputs.values() if isinstance(x, Tensor) and x.dim()]
    return bool(batch and tensors) and all(x.shape[0] not in batch for x in tensors)


def _run_all(pair: _Pair, inputs: Inputs, seed: int, more: bool) -> tuple[list[Run], list[str]]:
    """The runs, that on the given inputs first, and which variants the original did not accept."""
    try:
        first = pair.run(inputs)
        again = call(pair.a, inputs)
    except _NotEqualError:
        raise
    except _OutsideError as error:
        raise ConvmergeError(
            f"the other is an exported program that is not for {variants.shapes(inputs)}: {error}",
            hint="give inputs that both take with --input",
        ) from error
    except Exception as error:
        raise ConvmergeError(
            f"the original does not run on {variants.shapes(inputs)}: {first_line(error)}",
            hint="give inputs that it accepts",
        ) from error
    _check_repeatable(first.a, again)
    _check_informative(first.a)
    runs, refused = [first], []
    if more:
        generator = torch.Generator().manual_seed(seed)
        sized = _first_accepted(pair, variants.other_sizes(inputs, generator), like=first)
        cheap = sized.inputs if sized else inputs
        batched = _first_accepted(pair, variants.other_batches(cheap, generator))
        valued = None if batched else _first_accepted(pair, iter([variants.fresh(cheap, generator)]))
        single = _first_accepted(pair, variants.one_sample(cheap, generator))
        runs += [run for run in (sized, batched, valued, single) if run]
        accepted = {"other spatial sizes": sized, "another batch size": batched}
        refused = [name for name, run in accepted.items() if not run]
    return runs, refused


def _first_accepted(pair: _Pair, candidates: Iterator[Inputs], like: Run | None = None) -> Run | None:
    """The first run that the original accepts; with ``like``, only as it accepts that one."""
    for inputs in candidates:
        try:
            return pair.run(inputs)
        except _NotEqualError:
            if (
                like
                and not _mixes_samples(like.a, like.inputs)
                and _mixes_samples(call(pair.a, inputs), inputs)
            ):
                continue
            raise
        except Exception:  # the original may say anything to a size that it was not made for
            continue
    return None


def _check_repeatable(once: Leaves, again: Leaves) -> None:
    """Raise ConvmergeError where two runs on one input differ by more than the order of sums explains."""
    for name, x in once.items():
        y = again.get(name)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
            same = about_equal(x, y)
        else:
            same = not isinstance(x, Tensor) and x == y
        if not same:
            raise ConvmergeError(
                f"the original is not a function of its inputs: {name} differs in two runs on the same input",
                hint="take what is random, or keeps a state, out of its forward",
            )


def about_equal(x: Tensor, y: Tensor) -> bool:
    """Whether two results of the same layers on the same input differ by no more than the order of sums."""
    if not x.is_floating_point():
        return torch.equal(x, y)
    x, y = x.nan_to_num(), y.nan_to_num()
    return Size.of(x - y).over(Size.of(x)).rms <= 64 * torch.finfo(x.dtype).eps


def _check_informative(outputs: Leaves) -> None:
    tensors = [x for x in outputs.values() if isinstance(x, Tensor) and x.numel()]
    if not any(bool(x.isfinite().any()) for x in tensors):
        what = "only NaN and infinities" if tensors else "no tensor with numbers in it"
        raise ConvmergeError(
            f"the original returns {what} on these inputs", hint="give representative inputs"
        )


def _read(pair: _Pair, runs: list[Run], first: Reading, reference: Reference, seed: int) -> list[Reading]:
    """Measure the smallest run too; where that leaves doubts, all, and some more that are added to the runs.

    Raises _NotEqualError for integers that differ and for misplaced NaN and infinities.
    """
    smallest = min(runs, key=lambda run: variants.numel(run.inputs))
    readings = [first, *(reference(run) if run is smallest else Reading(run.a) for run in runs[1:])]
    if max(errormodel.ratios(runs, readings)) > WARN or any(map(errormodel.misplaced, runs, readings)):
        generator = torch.Generator().manual_seed(seed + 1)
        for _ in range(MORE_SAMPLES):
            run = _first_accepted(pair, iter([variants.fresh(smallest.inputs, generator)]))
            runs += [run] if run else []
        readings += [Reading(run.a) for run in runs[len(readings) :]]
        nudged = errormodel.nudged(pair.a, seed + 1)
        readings = [
            (reading if reading.samples else reference(run)).with_sample(call(nudged, run.inputs))
            for run, reading in zip(runs, readings, strict=True)
        ]
    for run, reading in zip(runs, readings, strict=True):
        reason = errormodel.misplaced(run, reading)
        if reason:
            raise _NotEqualError(f"on {variants.shapes(run.inputs)}, {reason}")
    return readings


def _not_accepted(refused: list[str], pair: _Pair) -> str:
    which = "one of them" if pair.outside else "the original"
    return f"{which} does not accept {' and '.join(refused)}" if refused else ""


def _verdict(runs: list[Run], readings: list[Reading], refused: str, note: str) -> Verification:
    ratios = errormodel.ratios(runs, readings)
    worst = max(ratios)
    comparisons = tuple(map(_comparison, runs, readings, ratios))
    measured = f"the error is {worst:.2g}× the original's own rounding error"
    if worst > FAIL:
        reason = f"{measured} on {comparisons[ratios.index(worst)].inputs}, more than {FAIL:g}×"
    elif worst > WARN:
        reason = f"equal, but {measured}, more than the usual {WARN:g}×"
    elif worst > 0:
        reason = f"equal up to rounding: {measured}"
    else:
        reason = "equal, without any difference on these inputs"
    notes = [text for text in (*_chaos(runs[0], readings), refused, note) if text]
    return Verification(worst <= FAIL, "; ".join([reason, *notes]), comparisons)


def _chaos(first: Run, readings: list[Reading]) -> list[str]:
    """A warning, if the original's own error is so large that comparing errors says little."""
    own = max((_distance(r.truth, sample)[1] for r in readings for sample in r.samples), default=0.0)
    if own <= max([CHAOTIC, *(64 * torch.finfo(x.dtype).eps for _, x in floating(first.a))]):
        return []
    return [f"that is {own:.0%} of the output, so only the comparison in float64 tells much"]


def _comparison(run: Run, reading: Reading, ratio: float) -> Comparison:
    difference, relative = _distance(run.a, run.b)
    difference64, relative64 = _distance(reading.truth, reading.b64) if reading.b64 else (None, None)
    return Comparison(
        inputs=variants.shapes(run.inputs),
        difference=difference,
        relative=relative,
        difference64=difference64,
        relative64=relative64,
        error_ratio=ratio if reading.samples else None,
    )


def _distance(a: Leaves, b: Leaves) -> tuple[float, float]:
    """max |a - b| over all floating-point outputs, and over max |a|."""
    apart = [Size.of(errormodel.difference(x, dict(floating(b))[name])).peak for name, x in floating(a)]
    scale = [Size.of(errormodel.finite(x)).peak for _, x in floating(a)]
    return max(apart, default=0.0), Size(0.0, max(apart, default=0.0)).over(
        Size(0.0, max(scale, default=0.0))
    ).peak
