"""Which channels of a model's values belong together, for passes that change numbers of channels.

Every channel on the channel axis of a value has a number, its id. Operators that work on channels one by one
hand the ids on, convolutions and linear layers begin new ones, and operators that combine channels at equal
places (additions, depthwise convolutions, ...) tie ids together: a channel goes from all of its values, or
from none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.algebra.components import components
from convmerge.errors import Refusal
from convmerge.evidence.capture import Call, Evidence, nodes_of
from convmerge.evidence.constants import Constants, memory_root
from convmerge.regions.elements import stale_readers


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a value: ``ids``, int64, one for each entry on ``axis``.

    With ``inner`` they are those of two axes, such as groups and the channels of each: of every entry on
    ``axis`` those on ``inner``. Only relayouts follow them then.
    """

    axis: int
    ids: Tensor
    inner: int | None = None


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known about the channels of a value.

    Attributes:
        known: bool, whether a channel is the same number everywhere, whatever the model's input is.
        value: float64, that number; 0 where it is not known.
    """

    known: Tensor
    value: Tensor

    @staticmethod
    def unknown(count: int) -> Facts:
        """Nothing is known about any channel."""
        return Facts(torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.float64))

    @staticmethod
    def of(known: Tensor, value: Tensor) -> Facts:
        """Those of ``value`` that are ``known`` and finite."""
        known = known & value.isfinite()
        return Facts(known, value.where(known, 0.0))

    def at(self, index: Tensor | None) -> Facts:
        """The facts of channels ``index``; of -1 nothing is known."""
        if index is None:
            return self
        there = index >= 0
        return Facts.of(self.known[index.clamp(min=0)] & there, self.value[index.clamp(min=0)])


@dataclass(frozen=True, eq=False)
class Source:
    """A value that a call reads channel by channel.

    ``index``: int64, for each channel of the result the one that it reads, -1 for none; None: the same.
    """

    node: Node
    index: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Slot:
    """A constant with an entry for each of the channels ``ids`` along ``dim``: it shrinks with them."""

    node: Node
    dim: int
    ids: Tensor


Evaluate = Callable[[Sequence[Facts]], Facts]


@dataclass(frozen=True, eq=False)
class Lanes:
    """A call that computes every channel from single channels of its sources.

    Attributes:
        evaluate: the facts of the result from those of the sources, as far as each channel reads them.
        loses: why a channel can vary although what it is computed from does not; empty where it never does.
    """

    call: Call
    sources: tuple[Source, ...]
    evaluate: Evaluate
    slots: tuple[Slot, ...] = ()
    loses: str = ""


@dataclass(frozen=True, eq=False)
class Mix:
    """A convolution or linear layer: every output channel is computed from all input channels of its group.

    Attributes:
        source: its input, whose channels are ``inputs``; those of the result are ``outputs``.
        weight: (out, in / groups, ...), or (in, out / groups, ...) if ``transposed``.
        interior: bool, for each tap of the kernel whether it never reads padding, at any input size.
    """

    call: Call
    source: Node
    inputs: Channels
    outputs: Channels
    weight: Node
    bias: Node | None
    groups: int
    transposed: bool
    interior: Tensor

    def blocks(self, weight: Tensor) -> Tensor:
        """The weight as a view of shape (groups, out / groups, in / groups, taps)."""
        g = self.groups
        blocked = weight.reshape(g, weight.shape[0] // g, weight.shape[1], -1)
        return blocked.transpose(1, 2) if self.transposed else blocked


@dataclass(frozen=True, eq=False)
class Wall:
    """A call that needs all channels of the values it reads."""

    call: Call
    reason: str


Step = Lanes | Mix | Wall


@dataclass(frozen=True, eq=False)
class EqualParts:
    """Groups of channels that must keep equal sizes, ids of shape (groups, channels).

    ``beside``: other channels, of as many groups, that go only with the groups they belong to, and otherwise
    keep equal sizes as well. Without them every group stays.
    """

    ids: Tensor
    reason: str
    beside: Tensor | None = None


@dataclass(eq=False)
class Alignment:
    """The channels of every value of a captured model.

    Attributes:
        channels: value → its channels; for a call that returns several values, those of what it takes apart.
        steps: call → what it does along channels.
        parts: what must keep equal sizes.
        fixed: channels that must stay, and why.
        assumed: calls whose sizes are numbers in the graph, taken to be computed by the model's code.
        trusting: whether to assume that.
    """

    evidence: Evidence
    constants: Constants
    trusting: bool = True
    channels: dict[Node, Channels] = field(default_factory=dict)
    steps: dict[Node, Step] = field(default_factory=dict)
    parts: list[EqualParts] = field(default_factory=list)
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)
    assumed: set[Node] = field(default_factory=set)
    count: int = 0
    _ties: list[Tensor] = field(default_factory=list)

    def fresh(self, number: int) -> Tensor:
        """Ids of new channels."""
        self.count += number
        return torch.arange(self.count - number, self.count)

    def tie(self, some: Tensor, others: Tensor) -> None:
        """Say that channels at equal places go together."""
        if some is not others:
            self._ties.append(torch.stack([some, others]))

    def fix(self, ids: Tensor, reason: str) -> None:
        """Say that channels must stay."""
        self.fixed.append((ids, reason))

    def assume(self, call: Call, ids: Tensor, what: str) -> None:
        """Rely on the model's code to compute a size that the graph shows as a number; or keep ``ids``."""
        if self.trusting:
            self.assumed.add(call.node)
        else:
            self.fix(ids, f"{call.leaf} {what}")

    def groups(self) -> Tensor:
        """For every id the smallest one that it is tied to."""
        edges = torch.cat(self._ties, 1) if self._ties else torch.empty(2, 0, dtype=torch.int64)
        return components(self.count, edges)

    def data(self, call: Call) -> list[Node]:
        """The values that depend on the model's inputs and that a call reads."""
        return [n for n in dict.fromkeys(nodes_of((call.node.args, call.node.kwargs))) if self.is_data(n)]

    def is_data(self, value: object) -> bool:
        """Whether an argument depends on the model's inputs."""
        return isinstance(value, Node) and value not in self.constants

    def size(self, node: Node) -> tuple[int, ...]:
        """Shape of a tensor value."""
        return self.evidence.size(node)

    def on(self, node: Node, axis: int) -> Channels:
        """The channels of a value on ``axis``. Where none were followed to there, new ones that stay.

        Raises Refusal where its channels lie on another axis.
        """
        axis %= len(self.size(node))
        known = self.channels.get(node)
        if known is None:
            known = self.channels[node] = Channels(axis, self.fresh(self.size(node)[axis]))
            self.fix(known.ids, "its channels come from where they cannot be followed")
        if known.axis != axis or known.inner is not None:
            raise Refusal(f"reads axis {axis} of a value whose channels lie on axis {known.axis}")
        return known

    def lanes(
        self,
        call: Call,
        sources: Sequence[Source],
        out: Channels,
        evaluate: Evaluate | None = None,
        slots: Sequence[Slot] = (),
        loses: str = "",
    ) -> Lanes:
        """Note the channels of a call that works on them one by one."""
        self.channels[call.node] = out
        return Lanes(call, tuple(sources), evaluate or _first, tuple(slots), loses)

    def same(
        self, call: Call, node: Node, axis: int | None = None, evaluate: Evaluate | None = None
    ) -> Lanes:
        """One whose channels are those of ``node``, on ``axis`` of the result."""
        source = self.channels[node]
        out = source if axis is None else Channels(axis, source.ids)
        return self.lanes(call, [Source(node)], out, evaluate)


def _first(found: Sequence[Facts]) -> Facts:
    return found[0]


def followed(alignment: Alignment, value: object) -> tuple[Node, Channels]:
    """A data argument and its channels. Raises Refusal where they are not followed."""
    if isinstance(value, Node) and value in alignment.channels:
        return value, alignment.channels[value]
    raise Refusal("its input's channels are not followed")


def on_one_axis(alignment: Alignment, call: Call) -> bool:
    """Whether the channels of all that a call reads are on one axis."""
    found = (alignment.channels.get(node) for node in alignment.data(call))
    return all(channels is None or channels.inner is None for channels in found)


def unknown(found: Sequence[Facts]) -> Facts:
    """Nothing is told about a call's result."""
    return Facts.unknown(len(found[0].known))


Rule = Callable[[Alignment, Call], Step | None]
RULES: dict[str, Rule] = {}


def follows(*ops: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen names: it gives a step, or None or a Refusal where all channels must stay."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def align(
    evidence: Evidence, constants: Constants, watched: Callable[[Call], str | None], *, trusting: bool = True
) -> Alignment:
    """Follow the channels through a model.

    Args:
        watched: why a call must go on reading and computing all channels, or None.
        trusting: see :class:`Alignment`.
    """
    from convmerge.passes.channels.operators import along  # every rule is registered with it

    alignment = Alignment(evidence, constants, trusting)
    rewritten = _rewritten(evidence, constants)
    for node, call in evidence.calls.items():
        if node in constants or call.op.startswith("_assert"):
            continue
        reason = rewritten.get(node) or watched(call)
        step: Step | None = None
        if reason is None:
            try:
                step, reason = along(alignment, call), f"no rule for the channels of {call.op}"
            except Refusal as refusal:
                reason = refusal.reason
        if step is None:
            alignment.channels.pop(node, None)
            step = Wall(call, f"{call.leaf}: {reason}" if call.path else str(reason))
        alignment.steps[node] = step
    return alignment


def _rewritten(evidence: Evidence, constants: Constants) -> dict[Node, str]:
    """Calls that read memory changed under another name since, and the calls that change it."""
    stale = stale_readers(evidence, constants)
    reason = "reads memory that is written to under another name"
    found = dict.fromkeys(stale, reason)
    roots = {memory_root(source) for node in stale for source in nodes_of((node.args, node.kwargs))}
    for node, call in evidence.calls.items():
        sources = nodes_of(node.args[:1]) if call.mutates else []
        if not sources:
            continue
        root = memory_root(sources[0])
        if root in roots:
            found[node] = "writes to memory that is read under another name"
        elif root not in evidence.calls:
            found[node] = "writes to an input or a buffer"
    return found


def mixes(alignment: Alignment) -> Iterator[Mix]:
    """The convolutions and linear layers in execution order."""
    return (step for step in alignment.steps.values() if isinstance(step, Mix))
