"""The stages that fuse, inspect and check share: passes over the whole model, capture, plan, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from convmerge.cost.measure import Measured
from convmerge.cost.model import CostModel, Objective, Roofline
from convmerge.decide import Decider, Decisions, unmatched
from convmerge.errors import ConvmergeError
from convmerge.evidence.capture import Evidence, capture, copy_model
from convmerge.inputs import Inputs, bind_inputs
from convmerge.inputs.random import random_state_kept
from convmerge.io.check import check_module
from convmerge.layers import Built
from convmerge.passes import Pass, Prepared
from convmerge.passes.bind import bind as bind_pass
from convmerge.passes.duplicates import remove_duplicates
from convmerge.passes.fully_conv import fully_convolutional
from convmerge.passes.generator import fold_into_generators
from convmerge.passes.silenced import remove_silenced
from convmerge.report import Report, SiteReport, Verification, saving_of
from convmerge.sites import describe_sites, describe_unknown
from convmerge.verification.compare import compare

Progress = Callable[[str, int, int], None]
GUILTY = "with it, the whole model does not pass its check"
OBJECTIVES = ("latency", "macs", "params")


@dataclass(frozen=True)
class Options:
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
        found.append(
            ("prune", partial(remove_silenced, only=self.only, skip=self.skip, objective=self.objective))
        )
        copies = partial(remove_duplicates, only=self.only, skip=self.skip, objective=self.objective)
        found.append(("duplicates", copies))
        kernels = partial(
            fold_into_generators, only=self.only, skip=self.skip, objective=self.objective, seed=self.seed
        )
        return [*found, ("kernels", kernels)]


@dataclass(eq=False)
class Pipeline:
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
    options: Options
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
        with random_state_kept():
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
        first = self._next_step()
        sites = [replace(site, step=first + site.step) for site in prepared.sites]
        verdict = (
            compare(reference, prepared.model, prepared.inputs, seed=self.options.seed) if changed else None
        )
        if verdict is not None and not verdict.equal:
            if prepared.required:
                raise ConvmergeError(f"{name} failed its check: {verdict.reason}", "nothing was changed")
            self.warnings.append(f"{name} was left out: {verdict.reason}")
            self.sites += [replace(site, action="refuse", reason=GUILTY) for site in sites]
            return
        self.sites += sites
        self.evidence = prepared.evidence if verdict is not None else prepared.evidence or self.evidence
        if verdict is not None:
            self.model, self.inputs, self.reference = prepared.model, prepared.inputs, reference
            self.verification = verdict

    def _next_step(self) -> int:
        return max((site.step + 1 for site in self.sites), default=0)

    def decide(self) -> tuple[Decider, Decisions]:
        """Capture what the passes left, and plan."""
        with self.stage("capture"):
            evidence = self.evidence or capture(self.model, self.inputs)
        if evidence.eager:
            self.warnings.append(
                "torch.export cannot follow this model; the calls of one real run were used instead"
            )
        self._check_globs(evidence)
        with self.stage("plan"):
            scratch = copy_model(self.model).eval()
            o = self.options
            chosen = (o.objective, tuple(o.only), tuple(o.skip))
            decider = Decider(self.model, scratch, evidence, *chosen, self._cost_model())
            decisions = decider.decide(self.progress)
        if isinstance(decider.cost_model, Measured) and decider.cost_model.exhausted:
            self.warnings.append("the time for measuring ran out; the latency of other places is predicted")
        return decider, decisions

    def _check_globs(self, evidence: Evidence) -> None:
        """Warn of globs that choose nothing, which are mistyped more often than not."""
        if not self.options.only and not self.options.skip:
            return
        places = dict.fromkeys(path for m in (self.original, self.model) for path, _ in m.named_modules())
        places |= dict.fromkeys(call.place for call in evidence.calls.values())
        for option, globs in (("--only", self.options.only), ("--skip", self.options.skip)):
            for glob, near in unmatched(globs, list(places)).items():
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                self.warnings.append(f"{option} {glob!r} matches no module{hint}")

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
        last = (replace(s, step=self._next_step()) for s in describe_sites(decider, decisions, built))
        sites = (*self.sites, *last)
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
