"""What a run found and did, as plain data: the command line prints it, ``--json`` is it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

SCHEMA = 1
Action = Literal["merge", "keep", "refuse"]


@dataclass(frozen=True)
class SiteReport:
    """One place where operators could merge, and what becomes of it.

    Attributes:
        place: module path of the operators, e.g. ``layer1.0.conv1 … layer1.0.bn1``; what --only/--skip match.
        operators: the operators in the order they run, e.g. ``("conv 3×3", "batch_norm")``.
        geometry: channels, kernel, stride and padding in words.
        action: merge; keep (legal, but it costs more); refuse (not exact, or not known to be).
        reason: why, in words; for a merge what it becomes.
        macs_before, macs_after: multiply-accumulates for one sample at the example inputs' size.
        weights_before, weights_after: number of weights and biases.
        latency_before, latency_after: in seconds, predicted by the cost model or measured.
        measured: whether both were measured.
        evidence: ``static`` if proved by a trace of the enclosing code, ``observed`` if seen on the example
            inputs' path only, empty where nothing is merged.
        tree: one line per branch, indented, for sums of branches; empty otherwise.
        error, bound: float64 difference of this merge from the original, and the rounding bound it must stay
            within; None where nothing was run.
        modules: paths of the modules that run the operators.
        step: which rewrite of the model it is part of; what one leaves, a later one may change again.
    """

    place: str
    operators: tuple[str, ...]
    geometry: str
    action: Action
    reason: str
    macs_before: int = 0
    macs_after: int = 0
    weights_before: int = 0
    weights_after: int = 0
    latency_before: float = 0.0
    latency_after: float = 0.0
    measured: bool = False
    evidence: Literal["static", "observed", ""] = ""
    tree: tuple[str, ...] = ()
    error: float | None = None
    bound: float | None = None
    modules: tuple[str, ...] = ()
    step: int = 0


@dataclass(frozen=True)
class Counts:
    """A model in figures: operator calls by kind in one forward pass, MACs for one pass, parameters.

    ``operators`` maps kind (``conv``, ``conv_transpose``, ``linear``, ``batch_norm``, ``add``, ...) to calls.
    """

    operators: dict[str, int]
    macs: int
    parameters: int


@dataclass(frozen=True)
class Saving:
    """Latency of the merged places before and after, in seconds, and whether all of it was measured."""

    latency_before: float
    latency_after: float
    measured: bool


def saving_of(sites: Iterable[SiteReport]) -> Saving | None:
    """The sum over the sites that merge; None where none of them has a latency.

    What an earlier step leaves of a module and a later one finds there counts once: the total is from the
    first ``latency_before`` of a module to its last ``latency_after``.
    """
    known = sorted(
        (site for site in sites if site.action == "merge" and site.latency_before), key=lambda s: s.step
    )
    if not known:
        return None
    left = [site.latency_after for site in known]
    before, after = sum(s.latency_before for s in known), sum(left)
    earlier: defaultdict[str, set[int]] = defaultdict(set)  # module → sites of the steps before
    for _, step in groupby(enumerate(known), key=lambda pair: pair[1].step):
        sites_of_step = list(step)
        for _, site in sites_of_step:
            for other in set().union(*(earlier[module] for module in site.modules)):
                within = set(known[other].modules) <= set(site.modules)
                again = left[other] if within else min(left[other], site.latency_before)
                left[other] -= again
                before, after = before - again, after - again
        for index, site in sites_of_step:
            for module in site.modules:
                earlier[module].add(index)
    return Saving(before, after, all(s.measured for s in known))


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart on one set of inputs.

    Attributes:
        inputs: the shapes compared on, e.g. ``1×3×224×224``.
        difference: max |a - b| over all outputs, in the models' own dtype.
        relative: ``difference`` over max |a|.
        difference64: max |a - b| with both models and inputs in float64; None if they do not run in it.
        relative64: ``difference64`` over max |a|.
        error_ratio: (b's error against a in float64) / (a's own rounding error against a in float64).
    """

    inputs: str
    difference: float
    relative: float
    difference64: float | None = None
    relative64: float | None = None
    error_ratio: float | None = None


@dataclass(frozen=True)
class Verification:
    """The verdict on two models, with what it rests on."""

    equal: bool
    reason: str
    comparisons: tuple[Comparison, ...] = ()


@dataclass(frozen=True)
class Speedup:
    """How two models compare in time, from forward passes in turn.

    Attributes:
        median: of the first model's time over the second's, within a pair of runs.
        middle_half: its quartiles over all pairs.
        seconds: median time of a pass of each.
        threads: that torch ran with.
    """

    median: float
    middle_half: tuple[float, float]
    seconds: tuple[float, float]
    threads: int


@dataclass(frozen=True)
class Report:
    """Everything a run has to say.

    Attributes:
        command: ``inspect``, ``fuse``, ``check``, ``verify`` or ``bench``.
        model: file name or class name.
        inputs: the example inputs used, name → ``1×3×224×224 float32``.
        inputs_inferred: whether they were guessed from the first layer.
        sites: in execution order.
        unknown: operator name → number of calls that convmerge has no rule for (nonlinear ones included).
        warnings: things the user should know, a sentence each (train mode, observed sites, dropped sites).
        saving: latency of the merged places before and after.
        before, after: figures of the model; for inspect ``after`` is predicted.
        verification: of the whole model; None if nothing was merged or nothing was run.
        speedup: of the second model over the first, for bench.
        peak_bytes: ``before`` and ``after``: the most that the tensors made in one pass take up at one time,
            for bench.
        seconds: stage → time taken.
        file_bytes: ``before`` and ``after``, where files are involved.
        output: the file that was written, or None.
        output_inputs: what each of its inputs may be, such as ``batch×3×height×width float32``, for a file
            that holds a graph (.pt2, .onnx).
    """

    command: str
    model: str
    inputs: dict[str, str] = field(default_factory=dict)
    inputs_inferred: bool = False
    sites: tuple[SiteReport, ...] = ()
    unknown: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    saving: Saving | None = None
    before: Counts | None = None
    after: Counts | None = None
    verification: Verification | None = None
    speedup: Speedup | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    output: str | None = None
    output_inputs: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def merged(self) -> tuple[SiteReport, ...]:
        """The sites that merge."""
        return tuple(site for site in self.sites if site.action == "merge")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers: what ``--json`` prints."""
        return dataclasses.asdict(self)
