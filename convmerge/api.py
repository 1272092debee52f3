"""The library: fuse, inspect, check and verify models in memory. The command line is a thin shell over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from convmerge.benchmark import Benchmark, benchmark
from convmerge.cost.model import Objective
from convmerge.counts import count
from convmerge.decide import Decider, Decisions
from convmerge.edit.rewrite import Replacement, apply
from convmerge.evidence.capture import copy_model
from convmerge.inputs import Filled, Inputs, as_inputs, bind_inputs, takes
from convmerge.layers import Built, build, together
from convmerge.pipeline import GUILTY, Options, Pipeline, Progress
from convmerge.report import Report, Verification
from convmerge.verification.compare import compare
from convmerge.verification.halves import unequal_in_single
from convmerge.verification.probes import bisect


@dataclass(frozen=True, eq=False)
class Result:
    """What :func:`fuse` returns.

    Attributes:
        model: the fused copy, in eval mode; an unchanged copy where nothing merges or verification failed.
        report: what was merged, kept and refused, and the verification figures.
        inputs: example inputs of the copy, which takes no bound ones.
    """

    model: nn.Module
    report: Report
    inputs: Inputs


def fuse(
    model: nn.Module,
    example_inputs: Any,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    objective: Objective = "latency",
    seed: int = 0,
    bind: Mapping[str, Any] | None = None,
    fully_conv: bool = False,
    average: bool = False,
    measure: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Merge what can be merged exactly and pays, and verify the result.

    Channels that masks or zero weights have silenced are removed first, and masks become part of weights.

    Args:
        model: any module; it is treated in eval mode. It is not changed.
        example_inputs: a tensor, a tuple or list of forward's arguments, a dict of keyword arguments, or
            Inputs. Not changed.
        only, skip: globs on module paths; a site is merged if one of its operators matches ``only`` and none
            matches ``skip``.
        objective: what to minimise: ``latency`` (predicted or measured), ``macs`` or ``params``; ties go to
            latency.
        seed: for the random inputs of the verification.
        bind: name of an input → the value (a tensor, number, flag or nest of them) that it has in every call.
            The copy does not take it any more; example inputs may have it or not.
        fully_conv: make convolutions of the linear layers after a map is flattened or pooled. The copy takes
            larger inputs too: its output (N, F) becomes (N, F, *positions), that of the original for every
            window of the map, one at the size of the example inputs.
        average: with ``fully_conv``, outputs stay (N, F): the mean over the windows.
        measure: time operators and the ways to merge them on this machine (in eager mode, on the CPU, with
            random numbers), and plan by that instead of by predicted latency.
        progress: called as (stage, done, total).

    Returns a copy with fresh torch.nn layers at the merged places; its dtype and device are the model's.
    Where the whole fails verification even without the sites found guilty, ``report.verification.equal`` is
    False and the model is an unchanged copy.

    Raises:
        ConvmergeError: the model does not run on the inputs, or cannot be captured, an input cannot be bound,
            or its head cannot become fully convolutional.
        ValueError: an unknown objective.
    """
    options = Options(only, skip, objective, seed, bind or {}, fully_conv, average, measure)
    run = Pipeline(model, as_inputs(example_inputs), "fuse", options, progress or _silent)
    run.prepare()
    decider, decisions = run.decide()
    with run.stage("merge"):
        decisions, built = _build(decider, decisions, seed, run.progress)
    chosen = [b for b in built if b.refusal is None]
    with run.stage("rewrite"):
        fused = _apply(run.model, decisions, chosen)
    verification = run.verification
    if chosen:
        with run.stage("verify"):
            fused, chosen, verification = _verify(run, decisions, fused, chosen)
    kept = {id(b) for b in chosen}
    built = [b if b.refusal or id(b) in kept else b.dropped(GUILTY) for b in built]
    with run.stage("count"):
        before, after = count(model, run.given), count(fused, run.inputs)
    report = run.report(decider, decisions, built, before=before, after=after, verification=verification)
    return Result(fused, report, run.inputs)


def _build(
    decider: Decider, decisions: Decisions, seed: int, progress: Progress
) -> tuple[Decisions, list[Built]]:
    """Build every merge; plan again, with smaller merges perhaps, without those that fail their own check."""
    built = build(decider, decisions, seed, progress)
    if failed := [b for b in built if b.refusal is not None]:
        for b in failed:
            decider.forbid(b.decision.site, b.refusal or "")
        decisions = decider.decide(progress)
        built = build(decider, decisions, seed, progress)
    return decisions, built


def _apply(
    model: nn.Module, decisions: Decisions, built: Sequence[Built], *, exact: bool = False
) -> nn.Module:
    """A copy of the model with the merged layers; with ``exact``, as they are before rounding."""
    replacements = [
        Replacement(edit, (b.exact if exact else b.layer) if edit is b.decision.edits[0] else None)
        for b in built
        for edit in b.decision.edits
    ]
    return apply(copy_model(model).eval(), replacements, decisions.traces)


def _verify(
    run: Pipeline, decisions: Decisions, fused: nn.Module, chosen: list[Built]
) -> tuple[nn.Module, list[Built], Verification]:
    """Compare the whole; where that fails, find and drop the guilty sites and compare again."""

    def compared(candidate: nn.Module, sites: Sequence[Built]) -> Verification:
        seed = run.options.seed
        verdict = compare(run.reference, candidate, run.inputs, seed=seed)
        if not verdict.equal or not sites or any(b.exact is None for b in sites):
            return verdict
        exact = _apply(run.model, decisions, sites, exact=True)
        return unequal_in_single(run.reference, exact, run.inputs, seed=seed) or verdict

    verification = compared(fused, chosen)
    if verification.equal:
        return fused, chosen, verification

    def ok(groups: Sequence[Sequence[Built]]) -> bool:
        sites = [b for group in groups for b in group]
        return compared(_apply(run.model, decisions, sites), sites).equal

    guilty = [b for group in bisect(together(chosen), ok) for b in group]
    run.warnings.append(f"{len(guilty)} sites were dropped: {verification.reason}")
    kept = [b for b in chosen if b not in guilty]
    fused = _apply(run.model, decisions, kept)
    final = compared(fused, kept)
    if not final.equal:
        return copy_model(run.original).eval(), [], final
    return fused, kept, final


def inspect(
    model: nn.Module,
    example_inputs: Any,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    objective: Objective = "latency",
    bind: Mapping[str, Any] | None = None,
    fully_conv: bool = False,
    average: bool = False,
    measure: bool = False,
    progress: Progress | None = None,
) -> Report:
    """What :func:`fuse` would do, decided on geometry and exact zeros; arguments and errors as there."""
    options = Options(only, skip, objective, 0, bind or {}, fully_conv, average, measure)
    return _planned("inspect", model, example_inputs, options, progress)


def check(
    model: nn.Module,
    example_inputs: Any,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    objective: Objective = "latency",
    bind: Mapping[str, Any] | None = None,
    measure: bool = False,
    progress: Progress | None = None,
) -> Report:
    """As :func:`inspect`; ``report.merged()`` is empty when no profitable merge is left."""
    options = Options(only, skip, objective, bind=bind or {}, measure=measure)
    return _planned("check", model, example_inputs, options, progress)


def _planned(
    command: str, model: nn.Module, example_inputs: Any, options: Options, progress: Progress | None
) -> Report:
    run = Pipeline(model, as_inputs(example_inputs), command, options, progress or _silent)
    run.prepare()
    decider, decisions = run.decide()
    with run.stage("count"):
        before = count(model, run.given)
    return run.report(decider, decisions, (), before=before)


def verify(
    a: nn.Module,
    b: nn.Module,
    example_inputs: Any,
    *,
    seed: int = 0,
    bind: Mapping[str, Any] | None = None,
) -> Verification:
    """Whether two models, fused or not, are the same function, with the error figures.

    With ``bind`` (see :func:`fuse`) they are compared for these values of some inputs, which ``b`` may take.

    Raises ConvmergeError where no verdict is possible: ``a`` does not run, or does not repeat its own output.
    """
    a, b, inputs = _alike(a, b, as_inputs(example_inputs), bind)
    return compare(a, b, inputs, seed=seed)


def bench(
    a: nn.Module,
    b: nn.Module,
    example_inputs: Any,
    *,
    bind: Mapping[str, Any] | None = None,
    pairs: int = 15,
    threads: int | None = None,
) -> Benchmark:
    """Time, memory, MACs and parameters of two models on the same inputs. Outputs are not compared.

    Args:
        bind: as for :func:`verify`.
        pairs: runs of each model, in turn; at least 2.
        threads: of torch while they run; None leaves the number as it is.

    Raises ConvmergeError where one of them does not run on the inputs.
    """
    a, b, inputs = _alike(a, b, as_inputs(example_inputs), bind)
    return benchmark(copy_model(a).eval(), copy_model(b).eval(), inputs, pairs=pairs, threads=threads)


def _alike(
    a: nn.Module, b: nn.Module, inputs: Inputs, bind: Mapping[str, Any] | None
) -> tuple[nn.Module, nn.Module, Inputs]:
    """Both models as functions of the inputs that are not bound; ``b`` may take the bound ones or not."""
    if not bind:
        return a, b, inputs
    bound = bind_inputs(a, inputs, bind)
    left = {name: value for name, value in bound.values.items() if takes(b, name)}
    return Filled(a, bound.values), Filled(b, left) if left else b, bound.rest


def _silent(stage: str, done: int, total: int) -> None:
    """No progress is shown."""
