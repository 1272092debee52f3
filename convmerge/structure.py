"""Why affine operators that stand next to each other do not meet: what the model's structure says."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from torch.fx.node import Node

from convmerge.evidence.capture import Evidence
from convmerge.plan import Denial
from convmerge.recognise import Filter
from convmerge.regions.elements import CHECKS, Block, Chain, Element, Join, Leaf, Regions, Term, calls_of
from convmerge.regions.fold import place_of


def structural_denials(evidence: Evidence, regions: Regions) -> Iterator[Denial]:
    """Filters whose result is read elsewhere too, and sums of filters of different inputs."""
    ends = {chain[-1].target: chain for chain in regions.chains}
    seen: set[Node] = set()
    for chain in regions.chains:
        value = chain[0].source
        last, first = _last_affine(ends.get(value, ())), _last_affine(chain[:1])
        if last is None or first is None or value in seen or place_of(evidence, (last,)) is None:
            continue
        if (reason := _other_readers(evidence, value, first)) is not None:
            seen.add(value)
            yield _denial(evidence, (last, first), f"the result of {_kind(last)} {reason}")
    for join in regions.joins:
        yield from _different_inputs(evidence, join)


def lone_norms(evidence: Evidence, regions: Regions, told: AbstractSet[Node]) -> Iterator[Denial]:
    """Batch norms that no merge and no other denial is about: no layer to merge with is next to them.

    Args:
        evidence, regions: of one model.
        told: the calls that something is said about already.
    """
    for element in (element for chain in regions.chains for element in chain):
        if not isinstance(element, Leaf) or element.node in told or _kind(element) != "batch_norm":
            continue
        before = evidence.calls.get(element.source)
        after = [evidence.calls[user].op for user in element.node.users if user in evidence.calls]
        names = ", ".join(dict.fromkeys(after)) or "the model's output"
        reason = f"no layer next to it: it follows {before.op if before else 'an input'} and goes to {names}"
        if (place := place_of(evidence, (element,))) is not None:
            yield Denial((element,), place, reason)


def _different_inputs(evidence: Evidence, join: Join) -> Iterator[Denial]:
    """The first term of a sum that ends in a filter, as another one does, of another value."""
    if join.joined != "sum":
        return
    first: Term | None = None
    for number, term in enumerate(join.terms, start=1):
        if (last := _last_affine(term.elements)) is None:
            continue
        if first is None:
            first, start = term, last
        elif term.origin is not first.origin:
            yield _denial(evidence, (start, last), f"branch {number} reads a different input")
            return


def _other_readers(evidence: Evidence, value: Node, reader: Element) -> str | None:
    calls = [evidence.calls[user] for user in value.users if user in evidence.calls]
    own = set(calls_of([reader]))
    others = [call for call in calls if call.op not in CHECKS and call.node not in own]
    if value in evidence.outputs:
        return "is an output of the model too"
    names = list(dict.fromkeys(call.op for call in others))
    return f"is also read by {', '.join(names[:3])}{' …' if names[3:] else ''}" if names else None


def _last_affine(elements: Chain) -> Element | None:
    """The last element, if it is a filter or a sum of branches."""
    last = elements[-1] if elements else None
    return last if isinstance(last, Block) or (last and isinstance(last.step, Filter)) else None


def _kind(element: Element) -> str:
    return element.step.kind if isinstance(element, Leaf) and isinstance(element.step, Filter) else "the sum"


def _denial(evidence: Evidence, elements: tuple[Element, Element], reason: str) -> Denial:
    place = place_of(evidence, elements)
    assert place is not None
    return Denial(elements, place, reason)
