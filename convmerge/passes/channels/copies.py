"""Which channels of a model's values are multiples of one another, whatever the input is.

Every channel is a factor times some origin. Two rows of a layer that are exact multiples of one another, bias
included, have one origin; an operator that works on channels one by one keeps origins that are equal equal,
and factors too where it is homogeneous. Numbers are compared as they are, in float64 and without tolerance.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.passes.channels.alignment import Alignment, Lanes, Mix, Source, mixes
from convmerge.passes.channels.liveness import weight_of

# f(c x) = c f(x) for every number c, or for positive ones; sums of several values if all have one factor.
LINEAR = frozenset(
    {"add", "sub", "mean", "sum", "dropout", "contiguous", "clone", "detach", "alias", "pixel_shuffle", "cat"}
    | {
        "flatten",
        "squeeze",
        "unsqueeze",
        "unflatten",
        "view",
        "reshape",
        "_unsafe_view",
        "permute",
        "transpose",
    }
    | {"slice", "select", "getitem", "chunk", "split", "channel_shuffle", "pixel_unshuffle"}
    | {f"{kind}_pool{n}d" for kind in ("avg", "adaptive_avg") for n in (1, 2, 3)}
    | {f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d", "linear1d")}
)
POSITIVE = frozenset(
    {"relu", "leaky_relu", "prelu", "amax", "amin"}
    | {f"{kind}_pool{n}d" for kind in ("max", "adaptive_max") for n in (1, 2, 3)}
)


# Every channel becomes several, which are its positions and not copies of one another.
SPREADING = frozenset(
    {"flatten", "squeeze", "unsqueeze", "unflatten", "view", "reshape", "_unsafe_view", "view_as"}
    | {"pixel_unshuffle"}
)


@dataclass(frozen=True, eq=False)
class Origins:
    """For each channel of a value, float64 ``factor`` times the origin numbered ``number``, int64."""

    number: Tensor
    factor: Tensor

    def at(self, source: Source) -> Origins:
        """The origins of the channels that a call reads; number -1 where it reads none."""
        if source.index is None:
            return self
        there, index = source.index >= 0, source.index.clamp(min=0)
        return Origins(self.number[index].where(there, -1), self.factor[index].where(there, 0.0))


@dataclass(frozen=True)
class Copy:
    """Input channel ``place`` of a layer is ``factor`` times its input channel ``of``, in the same group."""

    place: int
    of: int
    factor: float


@dataclass(frozen=True)
class Copies:
    """Copies by place among the layers.

    Attributes:
        read: the input channels of a layer that are multiples of an earlier one of its group.
        computed: the output channels of a layer that are multiples of an earlier one.
    """

    read: dict[int, list[Copy]]
    computed: dict[int, list[int]]


def copies(alignment: Alignment) -> Copies:
    """Every copy that a layer reads or computes."""
    found = _Numbering(alignment).run()
    read: dict[int, list[Copy]] = {}
    computed: dict[int, list[int]] = {}
    for index, mix in enumerate(mixes(alignment)):
        if repeated := _repeated(found[mix.source], mix.groups):
            read[index] = repeated
        if again := _repeated(found[mix.call.node], 1):
            computed[index] = [copy.place for copy in again]
    return Copies(read, computed)


def _repeated(origins: Origins, groups: int) -> list[Copy]:
    numbers, factors = origins.number.tolist(), origins.factor.tolist()
    first: dict[tuple[int, int], int] = {}
    found = []
    for place, number in enumerate(numbers):
        of = first.setdefault((place * groups // len(numbers), number), place)
        if of != place:
            found.append(Copy(place, of, factors[place] / factors[of]))
    return found


class _Numbering:
    """Numbers origins in execution order."""

    def __init__(self, alignment: Alignment) -> None:
        self.alignment = alignment
        self.found: dict[Node, Origins] = {}
        self.count = 0

    def run(self) -> dict[Node, Origins]:
        """The origins of every value whose channels are followed."""
        for node, step in self.alignment.steps.items():
            if isinstance(step, Mix):
                self.found[node] = self._keyed(multiples(_rows(self.alignment, step)))
            elif isinstance(step, Lanes):
                self.found[node] = self._along(step)
            self.alignment.constants.release()
        for node in self.alignment.channels:
            self._of(node)
        return self.found

    def _of(self, node: Node) -> Origins:
        if node not in self.found:
            count = len(self.alignment.channels[node].ids)
            self.found[node] = self._fresh(count)
        return self.found[node]

    def _fresh(self, count: int) -> Origins:
        self.count += count
        return Origins(torch.arange(self.count - count, self.count), torch.ones(count, dtype=torch.float64))

    def _keyed(self, keys: Iterator[tuple[Hashable, float]]) -> Origins:
        numbers: dict[Hashable, int] = {}
        entries = [(numbers.setdefault(key, self.count + len(numbers)), factor) for key, factor in keys]
        self.count += len(numbers)
        number, factor = zip(*entries, strict=True)
        return Origins(torch.tensor(number), torch.tensor(factor, dtype=torch.float64))

    def _along(self, step: Lanes) -> Origins:
        sources = [self._of(source.node).at(source) for source in step.sources]
        count = len(self.alignment.channels[step.call.node].ids)
        rows = torch.stack([s.number for s in sources])
        if ((rows >= 0).sum(0) == 1).all():
            rows = rows.max(0, keepdim=True).values
        if rows.unique(dim=1).shape[1] == count:  # type: ignore[no-untyped-call]
            return self._fresh(count)  # they differ already in what they read
        slots = [self._slices(slot.node, slot.dim, count) for slot in step.slots]
        return self._keyed(self._lane_keys(step, sources, slots, count))

    def _lane_keys(
        self, step: Lanes, sources: Sequence[Origins], slots: Sequence[Sequence[bytes]], count: int
    ) -> Iterator[tuple[Hashable, float]]:
        numbers, factors = (
            np.stack([getattr(s, name).numpy() for s in sources]) for name in ("number", "factor")
        )
        spread: Counter[int] = Counter()
        for channel in range(count):
            read = numbers[:, channel] >= 0
            constants: tuple[Hashable, ...] = tuple(slot[channel] for slot in slots)
            if step.call.op in SPREADING and step.sources[0].index is not None:
                constants = (int(spread[int(step.sources[0].index[channel])]),)
                spread[int(step.sources[0].index[channel])] += 1
            origins, factor = numbers[read, channel], factors[read, channel]
            if _homogeneous(step, factor):
                yield (origins.tobytes(), constants), float(factor[0])
            else:
                yield (origins.tobytes(), factor.tobytes(), constants), 1.0

    def _slices(self, node: Node, dim: int, count: int) -> list[bytes]:
        value = weight_of(self.alignment, node).movedim(dim, 0).reshape(count, -1).double()
        return [row.tobytes() for row in value.numpy()]


def _homogeneous(step: Lanes, factors: np.ndarray[tuple[int], np.dtype[np.float64]]) -> bool:
    if not len(factors) or (factors != factors[0]).any():
        return False
    constant = any(slot.dim >= 0 for slot in step.slots) and step.call.op != "prelu"
    both = len(step.call.node.all_input_nodes) == len({source.node for source in step.sources})
    alone = not constant and (both or step.call.op == "prelu")
    if step.call.op in POSITIVE:
        return alone and bool(factors[0] > 0)
    return alone and step.call.op in LINEAR and not _shifts(step)


def _shifts(step: Lanes) -> bool:
    """Whether a number is added."""
    return step.call.op in ("add", "sub") and not isinstance(step.call.args["other"], Node)


class Rows:
    """The numbers that make each output channel of a layer: its weights, then its bias.

    Args:
        blocks: weights of shape (groups, out / groups, in / groups, taps).
        bias: shape (out,), or None.
    """

    def __init__(self, blocks: Tensor, bias: Tensor | None) -> None:
        self._blocks, self._bias = blocks, bias
        self.outputs = blocks.shape[1]

    def __len__(self) -> int:
        return len(self._blocks) * self.outputs

    def row(self, index: int) -> Tensor:
        """All numbers of one channel, in float64."""
        taps = self._blocks[index // self.outputs, index % self.outputs].reshape(-1).double()
        return taps if self._bias is None else torch.cat([taps, self._bias[index : index + 1].double()])

    def may_repeat(self) -> bool:
        """Whether the first numbers of two rows of a group are multiples: a quick look."""
        start = self._blocks.flatten(2)[:, :, :LOOK].double()
        lead = start.gather(2, (start != 0).int().argmax(2, keepdim=True))
        quotients = (start / lead).where(lead != 0, 0.0).numpy()
        return any(len({row.tobytes() for row in group}) < len(group) for group in quotients)


LOOK = 16


def _rows(alignment: Alignment, mix: Mix) -> Rows:
    bias = None if mix.bias is None else weight_of(alignment, mix.bias).detach()
    return Rows(mix.blocks(weight_of(alignment, mix.weight).detach()), bias)


def multiples(rows: Rows) -> Iterator[tuple[Hashable, float]]:
    """For every row a key that is the same for multiples of one another, and its factor.

    The quotients of a row by its first entry that is not zero are those of any exact multiple of it, since
    division rounds correctly. A row that is still no exact multiple of the first one with its key gets a key
    of its own.
    """
    first: dict[Hashable, int] = {}
    for index in range(len(rows)):
        row = rows.row(index)
        nonzero = row.nonzero()
        if not len(nonzero):
            yield index, 1.0  # silenced, which is another matter
            continue
        lead = float(row[nonzero[0, 0]])
        digest = hashlib.blake2b((row / lead).numpy().tobytes(), digest_size=16).digest()
        key = (index // rows.outputs, digest)
        known = rows.row(first.setdefault(key, index))
        ratio = lead / float(known[nonzero[0, 0]])
        exact = ratio == 1.0 if first[key] == index else torch.equal(known * ratio, row)
        yield (key, ratio) if exact else (index, 1.0)
