"""Decisions as the report shows them: places, operators and reasons in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.fx.node import Node

from convmerge.affine import Geometry
from convmerge.cost.model import Cost
from convmerge.decide import Decider, Decisions
from convmerge.edit.lower import gap_of
from convmerge.emit import Emission
from convmerge.errors import Refusal
from convmerge.layers import Built
from convmerge.plan import Denial, Site
from convmerge.recognise import Filter, Passage, Same, Scalar
from convmerge.recognise.generated import APPLY
from convmerge.regions.elements import Block, Element, Fork, Leaf, Regions, Share, calls_of, leaves
from convmerge.regions.fold import geometry_of, place_of
from convmerge.report import SiteReport
from convmerge.structure import lone_norms, structural_denials


def describe_sites(decider: Decider, decisions: Decisions, built: Sequence[Built]) -> tuple[SiteReport, ...]:
    """Every site of the model in execution order, with what becomes of it and why."""
    outcome = {id(b.decision): b for b in built}
    rows: list[tuple[int, SiteReport]] = []
    for decision in decisions.merges:
        b = outcome.get(id(decision))
        refusal = b.refusal if b is not None else None
        static = decider.proofs.proves(decision.edits)
        for site in (decision.site, *decision.also):
            rows.append((_when(decider, site.elements), _merge_row(decider, site, b, refusal, static)))
    denials = [*decisions.denials, *structural_denials(decider.evidence, decisions.regions)]
    elements = [site.elements for d in decisions.merges for site in (d.site, *d.also)]
    told = {node for found in (*elements, *(d.elements for d in denials)) for node in _calls(found)}
    denials += lone_norms(decider.evidence, decisions.regions, told)
    for denial in denials:
        rows.append((_when(decider, denial.elements), _denial_row(decider, denial)))
    rows.extend(_refused_calls(decider, decisions.regions))
    return tuple(row for _, row in sorted(rows, key=lambda pair: pair[0]))


def describe_unknown(regions: Regions) -> dict[str, int]:
    """Operators without a rule, most frequent first."""
    return dict(Counter(call.op for call in regions.unknown).most_common())


def _when(decider: Decider, elements: Sequence[Element]) -> int:
    return min(decider.evidence.calls[node].index for node in _calls(elements))


def _calls(elements: Sequence[Element]) -> list[Node]:
    """The calls of the elements; of what is nothing but a share of an operator, that operator's."""
    return calls_of(elements) or [e.node for e in elements if isinstance(e, Share)]


def _merge_row(
    decider: Decider, site: Site, built: Built | None, refusal: str | None, static: bool
) -> SiteReport:
    found = built.probe if built is not None else None
    paths = _paths(decider, site.elements)
    return SiteReport(
        place=place_name(paths),
        operators=operator_names(site.elements),
        geometry=describe_geometry(site.geometry),
        action="merge" if refusal is None else "refuse",
        reason=_outcome(site) if refusal is None else refusal,
        evidence=("static" if static else "observed") if refusal is None else "",
        tree=_tree(site.elements),
        error=found.error if found is not None else None,
        bound=found.bound if found is not None else None,
        modules=tuple(paths),
        **figures(decider.planner.as_written(site), site.after),
    )


def _outcome(site: Site) -> str:
    emission = site.emission
    single = isinstance(emission, Emission) and len(emission.layers) == 1
    words = f"one {emission}" if single else str(emission)
    if (gap := gap_of(site.home)) is not None:
        return f"{words} {'behind' if gap.behind else 'in front of'} {gap.kind}"
    return words if site.blocks is None else f"{site.blocks.words}: {words}"


def _denial_row(decider: Decider, denial: Denial) -> SiteReport:
    keep = denial.after is not None and denial.before is not None
    reason = denial.reason
    numbers: dict[str, Any] = {}
    if denial.before is not None and denial.after is not None:
        reason = f"{reason}: {comparison(denial.before, denial.after)}"
        numbers = figures(denial.before, denial.after)
    return SiteReport(
        place=place_name(_paths(decider, denial.elements)),
        operators=operator_names(denial.elements),
        geometry=_geometry_words(decider, denial.elements),
        action="keep" if keep else "refuse",
        reason=reason,
        tree=_tree(denial.elements),
        modules=tuple(_paths(decider, denial.elements)),
        **numbers,
    )


def comparison(before: Cost, after: Cost) -> str:
    """The figure that speaks most clearly against the merge."""
    if after.macs > before.macs:
        return _times(after.macs, before.macs, "MACs")
    if after.weights > before.weights and after.latency <= before.latency:
        return _times(after.weights, before.weights, "weights")
    word = "measured" if before.measured and after.measured else "predicted"
    return _times(after.latency, before.latency, f"{word} time")


def _times(after: float, before: float, what: str) -> str:
    return f"{after / before:.2f}× the {what}" if before else f"{what} where there was none"


def figures(before: Cost, after: Cost) -> dict[str, Any]:
    """What things cost as they are and merged, as fields of a report's row."""
    return {
        "macs_before": before.macs,
        "macs_after": after.macs,
        "weights_before": before.weights,
        "weights_after": after.weights,
        "latency_before": before.latency,
        "latency_after": after.latency,
        "measured": before.measured and after.measured,
    }


def _refused_calls(decider: Decider, regions: Regions) -> list[tuple[int, SiteReport]]:
    """Known operators that are no affine form here: filters, and others next to one."""
    filters = {
        leaf.node for chain in regions.chains for leaf in leaves(chain) if isinstance(leaf.step, Filter)
    }
    rows = []
    for node, reason in regions.refused.items():
        call = decider.evidence.calls[node]
        if call.op in APPLY or any(n in filters for n in (*node.all_input_nodes, *node.users)):
            site = SiteReport(call.leaf, (call.op,), "", "refuse", reason, modules=(call.place,))
            rows.append((call.index, site))
    return rows


def _paths(decider: Decider, elements: Sequence[Element]) -> list[str]:
    """The modules that run the elements."""
    return list(dict.fromkeys(decider.evidence.calls[node].place for node in _calls(elements)))


def place_name(paths: Sequence[str]) -> str:
    """The module that contains the operators where it is one of theirs, else the first and the last."""
    paths = [p for p in paths if p] or [""]
    for path in paths:
        if all(other == path or other.startswith(f"{path}.") for other in paths):
            return path
    return f"{paths[0]} … {paths[-1]}"


def operator_names(elements: Sequence[Element]) -> tuple[str, ...]:
    """The operators in words."""
    names: list[str] = []
    for element in elements:
        if isinstance(element, Block):
            branches = [_branch(branch) for branch in element.branches]
            if isinstance(element, Fork):
                names.append(" | ".join(branches))
            else:
                names.append("+".join(branches) if element.joined == "sum" else f"cat({', '.join(branches)})")
        elif not isinstance(element.step, Same):
            names.append(element.step.kind)
    return tuple(names)


def _branch(branch: Sequence[Element]) -> str:
    names = operator_names(branch)
    if not names:
        return "identity"
    return f"({' → '.join(names)})" if len(names) > 1 else names[0]


def _tree(elements: Sequence[Element], indent: str = "") -> tuple[str, ...]:
    """A line per operator and per branch, branches indented; empty where there are no branches."""
    lines: list[str] = []
    if not any(isinstance(element, Block) for element in elements):
        return ()
    for element in elements:
        if isinstance(element, Leaf):
            lines.extend(indent + name for name in operator_names([element]))
            continue
        lines.append(indent + _heading(element))
        for branch in element.branches:
            words = " → ".join(operator_names(branch)) or "identity"
            lines.extend(_tree(branch, indent + "  ") or (f"{indent}  {words}",))
    return tuple(lines)


def _heading(block: Block) -> str:
    if isinstance(block, Fork):
        return f"{len(block.branches)} layers on one value"
    return f"{'sum' if block.joined == 'sum' else 'concatenation'} of {len(block.branches)} branches"


def _geometry_words(decider: Decider, elements: Sequence[Element]) -> str:
    words = []
    for element in elements:
        place = place_of(decider.evidence, [element])
        if isinstance(element, Leaf) and isinstance(element.step, Same | Scalar | Passage):
            continue
        try:
            words.append(describe_geometry(geometry_of(element, place)) if place is not None else "")
        except Refusal:
            words.append(element.joined if isinstance(element, Block) else "")
    return ", ".join(word for word in words if word)


def describe_geometry(g: Geometry) -> str:
    """A geometry in words: channels, kernel, and whatever is not the default."""
    words = [f"{g.in_channels}→{g.out_channels}"]
    if g.spatial:
        words.append("×".join(map(str, g.kernel)))
    words += [
        f"{name} {'×'.join(map(str, dims)) if len(set(dims)) > 1 else dims[0]}"
        for name, dims, default in (
            ("up", g.up, 1),
            ("stride", g.down, 1),
            ("dilation", g.dilation, 1),
            ("padding", g.lo, 0),
        )
        if any(d != default for d in dims)
    ]
    if g.lo != g.hi:
        words[-1] += f"/{'×'.join(map(str, g.hi))}" if any(g.lo) else f", end {'×'.join(map(str, g.hi))}"
    if g.groups > 1:
        words.append(f"groups {g.groups}")
    return " ".join(words)
