"""The library: fuse, inspect, check and verify models in memory. The command line is a thin shell over it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from convmerge.benchmark import Benchmark, benchmark
from convmerge.capture import Evidence, capture, copy_model
from convmerge.cost import CostModel, Objective, Roofline
from convmerge.counts import count
from convmerge.decide import Decider, Decisions
from convmerge.errors import ConvmergeError
from convmerge.inputs import Filled, Inputs, as_inputs, bind_inputs, takes
from convmerge.io.check import check_module
from convmerge.layers import Built, build, together
from convmerge.measure import Measured
from convmerge.passes import Pass, Prepared
from convmerge.passes.bind import bind as bind_pass
from convmerge.passes.duplicates import remove_duplicates
from convmerge.passes.fully_conv import fully_convolutional
from convmerge.passes.generator import fold_into_generators
from convmerge.passes.silenced import remove_silenced
from convmerge.report import Report, SiteReport, Verification, saving_of
from convmerge.rewrite import Replacement, apply
from convmerge.sites import describe_sites, describe_unknown
from convmerge.verification.compare import compare
from convmerge.verification.probes import bisect

Progress = Callable[[str, int, int], None]
GUILTY = "with it, the whole model does not pass its check"
OBJECTIVES = ("latency", "macs", "params")


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


@dataclass(frozen=True)
class _Options:
    """What the caller asked for; see :func:`fuse`."""

    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    objective: Objective = "latency"
    seed: int = 0
    bind: Mapping[str, Any] = field(default_factory=dict)
    fully_conv: bool = False
    average: bool = False
    measure: bool = False

    def __post_init__(self) -> None:
        if self.average and not self.fully_conv:
            raise ConvmergeError("average is for the windows of --fully-conv", "ask for both")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")

    def passes(self) -> list[tuple[str, Pass]]:
        """The passes that come before merging, in order, by the name of their stage."""
        found: list[tuple[str, Pass]] = [("bind", bind_pass(self.bind))] if self.bind else []
        if self.fully_conv:
            found.append(("fully-conv", partial(fully_convolutional, average=self.average)))
        found.append(("prune", partial(remove_silenced, only=self.only, skip=self.skip)))
        copies = partial(remove_duplicates, only=self.only, skip=self.skip, objective=self.objective)
        found.append(("duplicates", copies))
        kernels = partial(
            fold_into_generators, only=self.only, skip=self.skip, objective=self.objective, seed=self.seed
        )
        return [*found, ("kernels", kernels)]


@dataclass(eq=False)
class _Run:
    """The stages that fuse, inspect and check share, with their timings.

    Attributes:
        model, inputs: what is to be merged: the caller's model, after :meth:`prepare` as the passes left it.
        original, given: the caller's model and its inputs, bound ones included.
        reference: computes on ``inputs`` what the result must.
        sites: what the passes found; ``verification``: the last comparison of one that changed the model.
    """

    model: nn.Module
    inputs: Inputs
    command: str
    options: _Options
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sites: list[SiteReport] = field(default_factory=list)
    verification: Verification | None = None
    evidence: Evidence | None = None

    def __post_init__(self) -> None:
        check_module(self.model)
        if self.options.bind:
            bound = bind_inputs(self.model, self.inputs, self.options.bind)
            self.inputs, self.options = bound.inputs, replace(self.options, bind=bound.values)
        self.original = self.reference = self.model
        self.given = self.inputs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress(name, 0, 0)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def prepare(self) -> None:
        """Run the passes; each must leave the whole function as it was."""
        if any(module.training for module in self.model.modules()):
            self.warnings.append("the model is in train mode; it was treated, and is written, in eval mode")
        for name, run in self.options.passes():
            with self.stage(name):
                prepared = run(self._in_eval_mode(), self.inputs)
                self._adopt(name, prepared)

    def _in_eval_mode(self) -> nn.Module:
        if any(module.training for module in self.model.modules()):
            return copy_model(self.model).eval()
        return self.model

    def _adopt(self, name: str, prepared: Prepared) -> None:
        changed = any(site.action == "merge" for site in prepared.sites)
        reference = prepared.reference or self.reference
        verdict = (
            compare(reference, prepared.model, prepared.inputs, seed=self.options.seed) if changed else None
        )
        if verdict is not None and not verdict.equal:
            if prepared.required:
                raise ConvmergeError(f"{name} failed its check: {verdict.reason}", "nothing was changed")
            self.warnings.append(f"{name} was left out: {verdict.reason}")
            self.sites += [replace(s, action="refuse", reason=GUILTY) for s in prepared.sites]
            return
        self.sites += prepared.sites
        self.evidence = prepared.evidence if verdict is not None else prepared.evidence or self.evidence
        if verdict is not None:
            self.model, self.inputs, self.reference = prepared.model, prepared.inputs, reference
            self.verification = verdict

    def decide(self) -> tuple[Decider, Decisions]:
        """Capture what the passes left, and plan."""
        with self.stage("capture"):
            evidence = self.evidence or capture(self.model, self.inputs)
        if evidence.eager:
            self.warnings.append(
                "torch.export cannot follow this model; the calls of one real run were used instead"
            )
        with self.stage("plan"):
            scratch = copy_model(self.model).eval()
            o = self.options
            chosen = (o.objective, tuple(o.only), tuple(o.skip))
            decider = Decider(self.model, scratch, evidence, *chosen, self._cost_model())
            decisions = decider.decide(self.progress)
        if isinstance(decider.cost_model, Measured) and decider.cost_model.exhausted:
            self.warnings.append("the time for measuring ran out; the latency of other places is predicted")
        return decider, decisions

    def _cost_model(self) -> CostModel:
        if not self.options.measure:
            return Roofline()
        devices = {tensor.device.type for tensor in self.model.parameters()}
        if devices - {"cpu"}:
            raise ConvmergeError("only models on the CPU can be measured", "leave --measure out")
        weights = [p for p in self.model.parameters() if p.dim() == 4 and not p.is_contiguous()]
        last = any(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
        memory_format = torch.channels_last if last else torch.contiguous_format
        return Measured(memory_format=memory_format, progress=self.progress)

    def report(self, decider: Decider, decisions: Decisions, built: Sequence[Built], **more: Any) -> Report:
        sites = (*self.sites, *describe_sites(decider, decisions, built))
        return Report(
            command=self.command,
            model=type(self.model).__name__,
            inputs=self.inputs.describe(),
            inputs_inferred=self.inputs.inferred,
            sites=sites,
            saving=saving_of(sites),
            unknown=describe_unknown(decisions.regions),
            warnings=tuple(self.warnings),
            seconds=self.seconds,
            **more,
        )


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
    options = _Options(only, skip, objective, seed, bind or {}, fully_conv, average, measure)
    run = _Run(model, as_inputs(example_inputs), "fuse", options, progress or _silent)
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


def _apply(model: nn.Module, decisions: Decisions, built: Sequence[Built]) -> nn.Module:
    replacements = [Replacement(b.decision.edit, b.layer) for b in built]
    return apply(copy_model(model).eval(), replacements, decisions.traces)


def _verify(
    run: _Run, decisions: Decisions, fused: nn.Module, chosen: list[Built]
) -> tuple[nn.Module, list[Built], Verification]:
    """Compare the whole; where that fails, find and drop the guilty sites and compare again."""

    def compared(candidate: nn.Module) -> Verification:
        return compare(run.reference, candidate, run.inputs, seed=run.options.seed)

    verification = compared(fused)
    if verification.equal:
        return fused, chosen, verification

    def ok(groups: Sequence[Sequence[Built]]) -> bool:
        sites = [b for group in groups for b in group]
        return compared(_apply(run.model, decisions, sites)).equal

    guilty = [b for group in bisect(together(chosen), ok) for b in group]
    run.warnings.append(f"{len(guilty)} sites were dropped: {verification.reason}")
    kept = [b for b in chosen if b not in guilty]
    fused = _apply(run.model, decisions, kept)
    final = compared(fused)
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
    options = _Options(only, skip, objective, 0, bind or {}, fully_conv, average, measure)
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
    options = _Options(only, skip, objective, bind=bind or {}, measure=measure)
    return _planned("check", model, example_inputs, options, progress)


def _planned(
    command: str, model: nn.Module, example_inputs: Any, options: _Options, progress: Progress | None
) -> Report:
    run = _Run(model, as_inputs(example_inputs), command, options, progress or _silent)
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
