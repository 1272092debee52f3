"""From a captured model to decisions: what merges, how it is written back, what does not merge and why."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn
from torch.fx.node import Node

from convmerge.cost.model import CostModel, Objective, Roofline
from convmerge.edit.cuts import cut, home_of
from convmerge.edit.edits import Edit, GraphEdit, UnitEdit
from convmerge.edit.frames import Frames
from convmerge.edit.lower import lower
from convmerge.edit.retrace import Trace, retrace
from convmerge.edit.static import StaticProofs
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
    """A site that merges, with the edit that does it. ``also`` are the other calls of the same modules."""

    site: Site
    edit: Edit
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
    _traces: dict[tuple[str, frozenset[str]], Trace] = field(default_factory=dict)

    def decide(self, progress: Callable[[str, int, int], None]) -> Decisions:
        """Decide on every chain of the model."""
        constants = Constants(self.evidence)
        self.constants = constants
        self.frames = Frames(self.evidence, constants)
        self.proofs = StaticProofs(self.scratch, self.evidence.signatures)
        regions = find_regions(Context(self.evidence, constants))
        self.planner = planner = Planner(
            self.frames, self.objective, self._forbidden, self._allowed, cost_model=self.cost_model
        )
        planner.spare_macs = SPARE_MACS * sum(planner.macs(chain) for chain in regions.chains)
        # A run without a captured graph proves single paths, not that the terms of a sum belong together.
        planned = units(regions) if not self.evidence.eager else list(regions.chains)
        plans: dict[int, ChainPlan] = {}
        edits: dict[Site, Edit] = {}
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
            self._forbidden.update({site.ends: reason for site, reason in problems.items()})
            dirty = {i for i, plan in plans.items() if any(s in problems for s in plan.sites)}
        denials = [denial for index in sorted(plans) for denial in plans[index].denials]
        return Decisions(_grouped(found.sites, edits), (*denials, *found.denials), traces, regions)

    def _lower(self, sites: Sequence[Site], edits: dict[Site, Edit]) -> dict[Site, str]:
        """Find the edit of every site; returns those that have none, and why."""
        problems: dict[Site, str] = {}
        for site in sites:
            try:
                added = site.opens.target if site.opens is not None else None
                edits[site] = lower(self.frames, site.home, site.emptied, self.model, added)
            except Refusal as refusal:
                problems[site] = refusal.reason
        return problems

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

    def _conflicts(self, edits: dict[Site, Edit]) -> dict[Site, str]:
        """Sites that change a module which other calls, sites or names need as it is."""
        problems: dict[Site, str] = {}
        alike: Counter[Edit] = Counter(edits.values())
        calls: dict[Edit, set[Node]] = {}
        for site, edit in edits.items():
            calls.setdefault(edit, set()).update(calls_of(site.elements))
        owners = {edit.owner for edit in edits.values() if isinstance(edit, GraphEdit)}
        claimed: dict[str, Edit] = {}
        for site, edit in edits.items():
            modules = edit.modules if isinstance(edit, UnitEdit) else (edit.owner,)
            for path in modules:
                times = len(self.frames.by_path.get(path, [1]))
                if times != alike[edit]:
                    problems[site] = f"{path} is called {times} times with different neighbours"
                if isinstance(edit, UnitEdit) and claimed.setdefault(path, edit) != edit:
                    problems.setdefault(site, f"{path} belongs to two sites")
            if isinstance(edit, GraphEdit) and not owners.isdisjoint(edit.opened):
                problems[site] = "part of it stands in a module whose own code is edited"
            if site not in problems and (reason := self._tied(site, edit, calls[edit])) is not None:
                problems[site] = reason
            if self.evidence.eager and not self.proofs.proves(edit):
                problems[site] = "torch.export cannot follow the model, and no trace proves this part of it"
        return problems

    def _tied(self, site: Site, edit: Edit, calls: set[Node]) -> str | None:
        """Why a weight that is read outside the site's ``calls`` too must keep existing there, or None."""
        direct, computed = self._weights(calls_of(site.elements))
        readers = {weight: set(weight.users) | self._twins(weight) for weight in direct}
        readers |= {w: set(w.users) for w in computed if w not in direct and self._goes(w, edit)}
        for weight, users in readers.items():
            if self._needed(users, calls, edit):
                return f"{self.evidence.tensors[weight][0]} is used elsewhere too"
        return None

    def _weights(self, calls: Sequence[Node]) -> tuple[set[Node], set[Node]]:
        """Parameters and buffers that calls read, and those that what they read is computed from."""
        read = {n for call in calls for n in call.all_input_nodes if n in self.constants}
        seen, pending = set(read), list(read)
        while pending:
            sources = [n for n in pending.pop().all_input_nodes if n not in seen]
            seen.update(sources)
            pending.extend(sources)
        tensors = self.evidence.tensors
        return {n for n in read if n in tensors}, {n for n in seen if n in tensors}

    def _goes(self, weight: Node, edit: Edit) -> bool:
        """Whether a weight is registered nowhere but in modules that an edit replaces."""
        if not hasattr(self, "_names"):
            self._tensors: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
            self._tensors.update(self.model.named_buffers(remove_duplicate=False))
            self._names: dict[int, list[str]] = {}
            for name, tensor in self._tensors.items():
                self._names.setdefault(id(tensor), []).append(name)
        replaced = edit.modules if isinstance(edit, UnitEdit) else (edit.owner,)
        names = self._names.get(id(self._tensors.get(self.evidence.tensors[weight][0])), [])
        inside = [
            any(f"{name}.".startswith(f"{path}." if path else "") for path in replaced) for name in names
        ]
        return bool(inside) and all(inside)

    def _needed(self, readers: set[Node], calls: set[Node], edit: Edit) -> bool:
        """Whether what a weight's readers compute is read by anything but ``calls``.

        What nobody reads, or is written into another constant, goes with a module that is replaced whole.
        """
        replaced = edit.modules if isinstance(edit, UnitEdit) else ()
        seen, pending = set(calls), list(readers)
        while pending:
            reader = pending.pop()
            call = self.evidence.calls.get(reader)
            if call is None or reader in seen:
                continue
            seen.add(reader)
            if reader not in self.constants or reader in self.evidence.outputs:
                return True
            if not reader.users and not any(frame.path in replaced for frame in call.stack):
                return True
            pending.extend(reader.users)
        return False

    def _twins(self, weight: Node) -> set[Node]:
        """Calls that read the same storage under another name."""
        if not hasattr(self, "_by_storage"):
            self._by_storage: dict[int, list[Node]] = {}
            for node, (_, tensor) in self.evidence.tensors.items():
                if tensor.numel():
                    self._by_storage.setdefault(tensor.data_ptr(), []).append(node)
        tensor = self.evidence.tensors[weight][1]
        return {u for twin in self._by_storage.get(tensor.data_ptr(), []) for u in twin.users}

    def _trace_owners(self, edits: dict[Site, Edit]) -> tuple[dict[str, Trace], dict[Site, str]]:
        """Trace every module whose code is edited, once, opened as far as all of its sites need."""
        owners: dict[str, set[str]] = {}
        for edit in edits.values():
            if isinstance(edit, GraphEdit):
                owners.setdefault(edit.owner, set()).update(edit.opened)
        traces: dict[str, Trace] = {}
        problems: dict[Site, str] = {}
        for owner, paths in owners.items():
            try:
                traces[owner] = self._trace(owner, paths)
                reason = None
            except Refusal as refusal:
                reason = refusal.reason
            for site, edit in edits.items():
                if not isinstance(edit, GraphEdit) or edit.owner != owner:
                    continue
                try:
                    if reason is not None:
                        raise Refusal(reason)
                    home_of(traces[owner], edit)
                    for run in edit.emptied:
                        cut(traces[owner], run)
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
            self._traces[key] = retrace(
                module, frame, self.evidence, self.constants, self.frames.calls[frame], opened
            )
        return self._traces[key]


def _plan(planner: Planner, unit: Chain | Junction) -> ChainPlan:
    return plan_junction(planner, unit) if isinstance(unit, Junction) else planner.plan(unit)


def matches(path: str, globs: Sequence[str]) -> bool:
    """Whether a module path, or one that it is inside of, is meant by one of the globs."""
    return any(fnmatch.fnmatchcase(path, glob) or fnmatch.fnmatchcase(path, f"{glob}.*") for glob in globs)


def _grouped(sites: Sequence[Site], edits: dict[Site, Edit]) -> tuple[Decision, ...]:
    """One decision for all calls of the same modules."""
    by_edit: dict[Edit, list[Site]] = {}
    for site in sites:
        by_edit.setdefault(edits[site], []).append(site)
    return tuple(Decision(group[0], edit, tuple(group[1:])) for edit, group in by_edit.items())


def site_paths(evidence: Evidence, elements: Sequence[Element] | Chain) -> list[str]:
    """Module paths of the operators, in order, each once."""
    return list(dict.fromkeys(evidence.calls[node].path for node in calls_of(elements)))
