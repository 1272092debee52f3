"""Linear maps of the last axis, in whatever calls they are written.

Sums over groups of features, rotations of pairs, circular convolutions by FFT, products with blocks between
views: each call is linear in the data, and together they take every row (the last axis) to a row. That they
treat all rows alike, and no row with another, shows on random numbers: a linear map of all rows that commutes
with a cyclic shift of them, and gives nothing but the first row for nothing but the first row, is one matrix
for each. It would take a coincidence of probability zero to pass for another map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.affine import Affine, Geometry
from convmerge.evidence.capture import Call, Evidence, is_tensor, nodes_of
from convmerge.evidence.constants import run_call
from convmerge.recognise.channels import MOVES, drops_ones
from convmerge.recognise.steps import Context, Filter

ROWS = "rows"  # how the kind of such a step begins
# Linear in all of their data together: numbers that are moved, copied, added up or transformed.
JOINTLY = MOVES | {
    *("cat", "concat", "concatenate", "stack", "expand", "repeat", "tile", "repeat_interleave", "index"),
    *("sum", "mean", "cumsum", "add", "sub", "rsub", "neg", "diff", "tril", "triu", "diagonal", "dropout"),
    *("real", "imag", "conj", "_conj", "resolve_conj", "resolve_neg", "complex"),
    *("view_as_real", "view_as_complex", "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft"),
    *("constant_pad_nd", "pad", "lift_fresh_copy", "zeros_like", "new_zeros"),
}
CASTS = frozenset(["to", "_to_copy", "float", "double", "half"])
# Linear in one operand if all others are constant; a quotient in its numerator.
SINGLY = frozenset(
    ["mul", "div", "true_divide", "matmul", "mm", "bmm", "einsum", "linear", "addmm", "baddbmm"]
)
PRODUCTS = SINGLY - {"mul", "div", "true_divide"}
ADDING = frozenset(
    ["add", "sub", "rsub", "linear", "addmm", "baddbmm", "cat", "concat", "concatenate", "stack"]
)
LONGEST = 16  # calls
ALIKE = 1e-9  # of the largest number; a map that is nearly but not one of rows fails the probe of its site


def linear_rows(context: Context, call: Call) -> Filter | None:
    """What ends in ``call`` as one linear map of the last axis; None where it is no such thing."""
    if not _real(call.node) or call.op in PRODUCTS:
        return None
    found: _Rows | None = None
    for source, inside in _ways_back(context, call.node):
        if _fits(context, source, call.node) and (rows := _Rows(context, source, inside)).alike():
            found = rows
        if found is not None and not _padded(context, source):
            break
    return None if found is None else found.filter()


def _ways_back(context: Context, target: Node) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """Single values that calls lead from to the target, and those calls in order; more and more of them.

    Not those that only move numbers, which other rules know more of.
    """
    inside: list[Node] = []
    frontier = {target}
    while len(inside) < LONGEST:
        node = max(frontier, key=lambda n: _index(context, n))
        sources = _sources(context, node, frozenset(inside))
        if not sources:
            return
        frontier = (frontier - {node}) | sources
        inside.insert(0, node)
        if len(frontier) == 1 and any(context.evidence.calls[n].op not in MOVES for n in inside):
            yield next(iter(frontier)), tuple(inside)


def _padded(context: Context, source: Node) -> bool:
    """Whether a value is another one with zeros behind every row, or a cast: part of what reads it."""
    made = context.evidence.calls.get(source)
    return made is not None and made.op in ("pad", "constant_pad_nd", *CASTS)


def _index(context: Context, node: Node) -> int:
    call = context.evidence.calls.get(node)
    return -1 if call is None else call.index


def _real(node: Node) -> bool:
    return is_tensor(node) and bool(node.meta["val"].is_floating_point())


def _sources(context: Context, node: Node, readers: frozenset[Node]) -> set[Node]:
    """The data of a call that is linear in it and that only ``readers`` read; empty for any other."""
    call = context.evidence.calls.get(node)
    if (
        call is None
        or call.mutates
        or drops_ones(call)
        or (readers and not readers.issuperset(_readers(context, node)))
    ):
        return set()
    data = [n for n in nodes_of((node.args, node.kwargs)) if not context.constant(n)]  # x * x has x twice
    if call.op in SINGLY:
        numerator = call.op in ("mul", *PRODUCTS) or (
            call.args["self"] in data and not call.args.get("rounding_mode")
        )
        return set(data) if len(data) == 1 and numerator else set()
    kept = call.op in JOINTLY and not (call.op == "dropout" and call.args["train"])
    return set(data) if kept or (call.op in CASTS and _real(node)) else set()


def _readers(context: Context, node: Node) -> list[Node]:
    """Who reads a value; what only checks it has no result."""
    return [user for user in node.users if user.meta.get("val") is not None or user.op == "output"]


def _fits(context: Context, source: Node, target: Node) -> bool:
    """Whether two values have the same rows."""
    if not _real(source):
        return False
    before, after = context.shape(source), context.shape(target)
    return len(before) == len(after) > 1 and before[:-1] == after[:-1] and math.prod(before) > 0


@dataclass(frozen=True, eq=False)
class _Rows:
    """Calls in order from one value to another that has the same rows."""

    context: Context
    source: Node
    calls: tuple[Node, ...]

    def alike(self) -> bool:
        """Whether every row of the target is the same function of that row of the source alone.

        The constants that the calls read are replaced by random numbers: the answer does not depend on them.
        """
        generator = torch.Generator().manual_seed(0)
        stand_ins: dict[Node, Tensor] = {}
        for node in dict.fromkeys(n for c in self.calls for n in c.all_input_nodes):
            if self.context.constant(node) and is_tensor(node) and not self.context.constants.uniform(node):
                val = node.meta["val"]
                if val.is_floating_point() or val.is_complex():
                    dtype = torch.complex128 if val.is_complex() else torch.float64
                    stand_ins[node] = torch.randn(val.shape, dtype=dtype, generator=generator)
        shape = self.context.shape(self.source)
        x = torch.randn(math.prod(shape[:-1]), shape[-1], dtype=torch.float64, generator=generator)
        first = torch.zeros_like(x)
        first[0] = x[0]
        zero, y, shifted, alone = (
            self._run(given, stand_ins) for given in (torch.zeros_like(x), x, x.roll(1, 0), first)
        )
        apart = [shifted - y.roll(1, 0), (alone - zero)[1:], zero - zero[:1]]
        limit = ALIKE * float(y.abs().max())
        return all(bool((a.abs() <= limit).all()) for a in apart)

    def filter(self) -> Filter:
        """As a step; with a bias where constants are added on the way."""
        before, after = self.context.shape(self.source), self.context.shape(self.calls[-1])
        bias = any(self.context.evidence.calls[n].op in ADDING for n in self.calls)
        geometry = Geometry.channelwise(before[-1], after[-1], 1, 0, bias=bias)
        ops = [self.context.evidence.calls[n].op for n in self.calls]
        words = ", ".join(dict.fromkeys(op.removeprefix("fft_") for op in ops if op not in MOVES))
        return Filter(
            self.source,
            len(before) - 1,
            geometry,
            lambda: self._numbers(geometry),
            f"{ROWS} ({words})",
            self.calls[:-1],
        )

    def _numbers(self, geometry: Geometry) -> Affine:
        """The matrix, as many of its columns at a time as the source has rows."""
        shape = self.context.shape(self.source)
        rows, channels = math.prod(shape[:-1]), shape[-1]
        columns = []
        zero = self._run(torch.zeros(rows, channels, dtype=torch.float64), {})[0]
        for start in range(0, channels, rows):
            count = min(rows, channels - start)
            x = torch.zeros(rows, channels, dtype=torch.float64)
            x[torch.arange(count), start + torch.arange(count)] = 1
            columns.append(self._run(x, {})[:count] - zero)
        return Affine(geometry, torch.cat(columns).t().contiguous(), zero if geometry.bias else None)

    def _run(self, rows: Tensor, stand_ins: dict[Node, Tensor]) -> Tensor:
        """The calls on a matrix of rows, with other values for some constants."""
        values: dict[Node, object] = {**stand_ins, self.source: rows.reshape(self.context.shape(self.source))}
        constants = self.context.constants
        for node in self.calls:
            values[node] = run_call(
                node, lambda n: values[n] if n in values else constants.value(n), widened=constants.widened
            )
        result = values[self.calls[-1]]
        assert isinstance(result, Tensor)
        return result.reshape(len(rows), -1)


def macs_of(evidence: Evidence, node: Node) -> int:
    """Multiply-accumulates of a product with a constant; 0 for any other call."""
    call = evidence.calls[node]
    if call.op not in PRODUCTS:
        return 0
    result = math.prod(evidence.size(node))
    operands: Sequence[Node] = call.args["tensors"] if call.op == "einsum" else node.all_input_nodes
    if call.op != "einsum":
        return result * evidence.size(operands[0 if "bias" in call.args else -2])[-1]
    texts, given = str(call.args["equation"]).replace(" ", "").split("->")
    sizes: dict[str, int] = {}
    for text, operand in zip(texts.split(","), operands, strict=True):
        shape = evidence.size(operand)
        spelled = text.replace("...", "." * (len(shape) - len(text.replace("...", ""))))
        sizes |= dict(zip(spelled, shape, strict=True))
    return result * math.prod(size for letter, size in sizes.items() if letter not in f"{given}.")
