"""From a captured model to decisions: what merges, how it is written back, what does not merge and why."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn
from torch.fx.node import Node

from convmerge.cost.model import CostModel, Objective, Roofline
from convmerge.edit.apart import lower_apart
from convmerge.edit.cuts import cut, home_of
from convmerge.edit.edits import Edit, Edits, GraphEdit, UnitEdit
from convmerge.edit.frames import Frames
from convmerge.edit.lower import lower
from convmerge.edit.retrace import Trace, retrace
from convmerge.edit.static import StaticProofs
from convmerge.edit.ties import Ties
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence
from convmerge.evidence.constants import Constants
from convmerge.plan import (
    ChainPlan,
    Denial,
    Junction,
    Planner,
    Siblings,
    Site,
    plan_junction,
    plan_siblings,
    units,
)
from convmerge.recognise import Context
from convmerge.regions.elements import Chain, Element, Regions, calls_of
from convmerge.regions.reduction import find_regions

# How much of a model's MACs one merge may add where it is predicted to be faster all the same.
SPARE_MACS = 0.001


@dataclass(frozen=True, eq=False)
class Decision:
    """A site that merges, with the edits that do it. ``also`` are the other calls of the same modules."""

    site: Site
    edits: Edits
    also: tuple[Site, ...] = ()


@dataclass(frozen=True, eq=False)
class Decisions:
    """Everything that was decided about a model."""

    merges: tuple[Decision, ...]
    denials: tuple[Denial, ...]
    traces: dict[str, Trace]
    regions: Regions


@dataclass(eq=False)
class Decider:
    """Plans, looks for a way to write each site back, and plans again without those that have none.

    Attributes:
        model: the model the evidence was captured from (read only).
        scratch: a copy of it for tracing, which can leave marks.
        only, skip: globs on the module paths of a site's operators.
        cost_model: what planning compares by.
    """

    model: nn.Module
    scratch: nn.Module
    evidence: Evidence
    objective: Objective = "latency"
    only: Sequence[str] = ()
    skip: Sequence[str] = ()
    cost_model: CostModel = field(default_factory=Roofline)
    _forbidden: dict[tuple[Node, Node], str] = field(default_factory=dict)
    _traces: dict[tuple[str, frozenset[str]], Trace | Refusal] = field(default_factory=dict)

    _apart: set[Site] = field(default_factory=set)

    def decide(self, progress: Callable[[str, int, int], None]) -> Decisions:
        """Decide on every chain of the model."""
        constants = Constants(self.evidence)
        self.constants = constants
        self.frames = Frames(self.evidence, constants)
        self.ties = Ties(self.model, self.evidence, constants)
        self.proofs = StaticProofs(self.scratch, self.evidence.signatures)
        regions = find_regions(Context(self.evidence, constants))
        self.planner = planner = Planner(
            self.frames, self.objective, self._forbidden, self._allowed, cost_model=self.cost_model
        )
        planner.spare_macs = SPARE_MACS * sum(planner.macs(chain) for chain in regions.chains)
        # A run without a captured graph proves single paths, not that the terms of a sum belong together.
        planned = units(regions) if not self.evidence.eager else list(regions.chains)
        plans: dict[int, ChainPlan] = {}
        edits: dict[Site, Edits] = {}
        traces: dict[str, Trace] = {}
        dirty = set(range(len(planned)))
        problems: dict[Site, str] = {}
        found = Siblings((), ())
        while dirty or problems:
            for done, index in enumerate(sorted(dirty)):
                progress("plan", done, len(dirty))
                plans[index] = _plan(planner, planned[index])
            found = plan_siblings(planner, regions.chains, [s for i in sorted(plans) for s in plans[i].sites])
            problems = self._lower([site for site in found.sites if site not in edits], edits)
            current = {site: edits[site] for site in found.sites if site not in problems}
            problems.update(self._conflicts(current))
            traces, untraceable = self._trace_owners({s: e for s, e in current.items() if s not in problems})
            problems.update(untraceable)
            final = {site: reason for site, reason in problems.items() if not self._goes_apart(site, edits)}
            self._forbidden.update({site.ends: reason for site, reason in final.items()})
            dirty = {i for i, plan in plans.items() if any(s in final for s in plan.sites)}
        denials = [denial for index in sorted(plans) for denial in plans[index].denials]
        return Decisions(_grouped(found.sites, edits), (*denials, *found.denials), traces, regions)

    def _lower(self, sites: Sequence[Site], edits: dict[Site, Edits]) -> dict[Site, str]:
        """Find the edit of every site; returns those that have none, and why."""
        problems: dict[Site, str] = {}
        for site in sites:
            try:
                edits[site] = (lower(self.frames, site.home, site.emptied, self.model, _added(site)),)
            except Refusal as refusal:
                problems[site] = refusal.reason
        return problems

    def _goes_apart(self, site: Site, edits: dict[Site, Edits]) -> bool:
        """Whether the parts of a site, which cannot be edited as one, have edits that were not tried yet."""
        if site in self._apart:
            return False
        self._apart.add(site)
        try:
            edits[site] = lower_apart(self.frames, site.home, site.emptied, self.model, _added(site))
        except Refusal:
            return False
        return True

    @cached_property
    def trainable(self) -> frozenset[str]:
        """Names of the parameters that require gradients."""
        named = self.model.named_parameters(remove_duplicate=False)
        return frozenset(name for name, parameter in named if parameter.requires_grad)

    def forbid(self, site: Site, reason: str) -> None:
        """Plan without this site from the next :meth:`decide` on."""
        self._forbidden[site.ends] = reason

    def _allowed(self, elements: Sequence[Element]) -> bool:
        paths = site_paths(self.evidence, elements)
        wanted = not self.only or any(matches(path, self.only) for path in paths)
        return wanted and not any(matches(path, self.skip) for path in paths)

    def _conflicts(self, edits: dict[Site, Edits]) -> dict[Site, str]:
        """Sites that change a module which other calls, sites or names need as it is."""
        problems: dict[Site, str] = {}
        alike: Counter[Edits] = Counter(edits.values())
        calls: dict[Edits, set[Node]] = {}
        for site, parts in edits.items():
            calls.setdefault(parts, set()).update(calls_of(site.elements))
        owners = {edit.owner for parts in edits.values() for edit in parts if isinstance(edit, GraphEdit)}
        claimed: dict[str, Edit] = {}
        for site, parts in edits.items():
            for edit in parts:
                for path in edit.modules if isinstance(edit, UnitEdit) else (edit.owner,):
                    times = len(self.frames.by_path.get(path, [1]))
                    if times != alike[parts]:
                        problems[site] = f"{path} is called {times} times with different neighbours"
                    if isinstance(edit, UnitEdit) and claimed.setdefault(path, edit) != edit:
                        problems.setdefault(site, f"{path} belongs to two sites")
                if isinstance(edit, GraphEdit) and not owners.isdisjoint(edit.opened):
                    problems[site] = "part of it stands in a module whose own code is edited"
            tied = self.ties.tied(calls_of(site.elements), parts, calls[parts])
            if site not in problems and tied is not None:
                problems[site] = tied
            if self.evidence.eager and not self.proofs.proves(parts):
                problems[site] = "torch.export cannot follow the model, and no trace proves this part of it"
        return problems

    def _trace_owners(self, edits: dict[Site, Edits]) -> tuple[dict[str, Trace], dict[Site, str]]:
        """Trace every module whose code is edited, once, opened as far as all of its sites need."""
        owners: dict[str, set[str]] = {}
        in_code = {s: [e for e in parts if isinstance(e, GraphEdit)] for s, parts in edits.items()}
        for edit in (edit for parts in in_code.values() for edit in parts):
            owners.setdefault(edit.owner, set()).update(edit.opened)
        traces: dict[str, Trace] = {}
        reasons: dict[str, str] = {}
        for owner, paths in owners.items():
            try:
                traces[owner] = self._trace(owner, paths)
            except Refusal as refusal:
                reasons[owner] = refusal.reason
        problems: dict[Site, str] = {}
        for site, parts in in_code.items():
            try:
                for edit in parts:
                    if edit.owner in reasons:
                        raise Refusal(reasons[edit.owner])
                    home_of(traces[edit.owner], edit)
                    for run in edit.emptied:
                        cut(traces[edit.owner], run)
            except Refusal as refusal:
                problems[site] = refusal.reason
        return traces, problems

    def _trace(self, owner: str, paths: set[str]) -> Trace:
        start = len(owner) + 1 if owner else 0
        opened = frozenset(path[start:] for path in paths)
        key = (owner, opened)
        if key not in self._traces:
            frame = self.frames.by_path[owner][0]
            module = self.scratch.get_submodule(owner)
            try:
                self._traces[key] = retrace(
                    module, frame, self.evidence, self.constants, self.frames.calls[frame], opened
                )
            except Refusal as refusal:
                self._traces[key] = refusal
        if isinstance(found := self._traces[key], Refusal):
            raise found
        return found


def _plan(planner: Planner, unit: Chain | Junction) -> ChainPlan:
    return plan_junction(planner, unit) if isinstance(unit, Junction) else planner.plan(unit)


def matches(path: str, globs: Sequence[str]) -> bool:
    """Whether a module path, or one that it is inside of, is meant by one of the globs."""
    return any(fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(path, f"{glob}.*") for glob in globs)


def unmatched(globs: Sequence[str], paths: Sequence[str]) -> dict[str, list[str]]:
    """Every glob that means none of the module paths, with the paths that are spelt most like it."""
    absent = [glob for glob in globs if not any(matches(path, [glob]) for path in paths)]
    return {glob: difflib.get_close_matches(glob.strip("*."), [p for p in paths if p], 2) for glob in absent}


def _added(site: Site) -> Node | None:
    """The concatenation that is to become a sum with a site."""
    return site.opens.target if site.opens is not None else None


def _grouped(sites: Sequence[Site], edits: dict[Site, Edits]) -> tuple[Decision, ...]:
    """One decision for all calls of the same modules."""
    by_edit: dict[Edits, list[Site]] = {}
    for site in sites:
        by_edit.setdefault(edits[site], []).append(site)
    return tuple(Decision(group[0], edit, tuple(group[1:])) for edit, group in by_edit.items())


def site_paths(evidence: Evidence, elements: Sequence[Element] | Chain) -> list[str]:
    """Module paths of the operators, in order, each once."""
    return list(dict.fromkeys(evidence.calls[node].place for node in calls_of(elements)))
