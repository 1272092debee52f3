"""Batched products with constant blocks, between a view of the channels as blocks and one back.

``einsum``, ``bmm``, ``baddbmm`` and ``matmul`` with a weight of (blocks, in, out), and constants added on the
way, are one linear form on the channels: block-diagonal, the channels in whatever order the views give them.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.affine import Affine, Geometry
from convmerge.evidence.capture import Call
from convmerge.recognise.channels import LONGEST, VIEWS, data_of, fits, move, positions, rows_of
from convmerge.recognise.steps import Context, Filter


@dataclass(frozen=True)
class Notation:
    """A product in the letters of einsum, one for each axis of the data, the weight and the result."""

    data: str
    weight: str
    result: str

    @property
    def parts(self) -> tuple[str, str, str, str] | None:
        """Letters of rows, blocks, inputs (summed over) and outputs; None where there are others."""
        rows = "".join(a for a in self.data if a not in self.weight)
        outputs = "".join(a for a in self.weight if a not in self.data)
        shared = [a for a in self.weight if a in self.data]
        blocks = "".join(a for a in shared if a in self.result)
        inputs = "".join(a for a in shared if a not in self.result)
        once = all(len(set(text)) == len(text) for text in (self.data, self.weight, self.result))
        complete = set(rows + blocks + outputs) == set(self.result)
        return (rows, blocks, inputs, outputs) if once and complete and inputs else None


@dataclass(frozen=True, eq=False)
class Product:
    """A call that multiplies data by a constant, and a constant that it adds, or None."""

    node: Node
    data: Node
    weight: Node
    notation: Notation
    bias: Node | None = None


def product_of(context: Context, call: Call) -> Product | None:
    """The call as a product with a constant."""
    args = call.args
    if call.op == "einsum":
        equation = str(args["equation"]).replace(" ", "")
        if len(args["tensors"]) != 2 or "->" not in equation:
            return None
        operands, result = equation.split("->")
        texts = _spelled_out(context, args["tensors"], [*operands.split(","), result])
        if texts is None:
            return None
        return _with_data_first(context, call.node, args["tensors"], texts[:2], texts[2])
    if call.op in ("bmm", "matmul"):
        return _matmul(context, call.node, (args["self"], args[next(reversed(args))]))
    if call.op == "baddbmm" and args["beta"] == args["alpha"] == 1 and context.constant(args["self"]):
        return _matmul(context, call.node, (args["batch1"], args["batch2"]), args["self"])
    return None


def _spelled_out(context: Context, tensors: Sequence[Node], texts: list[str]) -> list[str] | None:
    """The letters of an einsum, those included that ``...`` stands for; None where both tensors have it."""
    with_dots = [index for index, text in enumerate(texts) if "..." in text]
    if not with_dots:
        return texts
    if len(with_dots) != 2 or with_dots[1] != 2:
        return None
    unused = (letter for letter in string.ascii_letters if letter not in "".join(texts))
    count = len(context.shape(tensors[with_dots[0]])) - len(texts[with_dots[0]].replace("...", ""))
    letters = "".join(itertools.islice(unused, count))
    return [text.replace("...", letters) for text in texts]


def _matmul(
    context: Context, node: Node, operands: tuple[Node, Node], bias: Node | None = None
) -> Product | None:
    """Stacks of matrices; of the shorter one the last axes of the stack count."""
    shapes = [context.shape(operand) for operand in operands]
    shortest, longest = sorted(map(len, shapes))
    if shortest < 3 or longest > 12 or shapes[0][-shortest:-2] != shapes[1][-shortest:-2]:
        return None
    stack = string.ascii_lowercase[: longest - 2]
    letters = [stack[longest - len(shape) :] + ends for shape, ends in zip(shapes, ("xy", "yz"), strict=True)]
    return _with_data_first(context, node, operands, letters, stack + "xz", bias)


def _with_data_first(
    context: Context,
    node: Node,
    operands: Sequence[Node],
    letters: Sequence[str],
    result: str,
    bias: Node | None = None,
) -> Product | None:
    constant = [context.constant(operand) for operand in operands]
    if sum(constant) != 1:
        return None
    data, weight = (1, 0) if constant[0] else (0, 1)
    notation = Notation(letters[data], letters[weight], result)
    return Product(node, operands[data], operands[weight], notation, bias)


def blockwise(context: Context, call: Call) -> Filter | None:
    """What ends in the view ``call`` as a linear form on the channels; None where it is no such product."""
    after = [call.node]
    while (product := _product_before(context, after)) is None:
        source = data_of(context, after[0])
        made = context.evidence.calls.get(source) if source is not None else None
        if (
            made is None
            or len(made.node.users) != 1
            or made.op not in VIEWS | {"add"}
            or len(after) > LONGEST
        ):
            return None
        after.insert(0, made.node)
    before: list[Node] = []
    source = product.data
    while len(before) <= LONGEST:
        for axis in dict.fromkeys((len(context.shape(source)) - 1, 1)):
            if fits(context, call.node, source, axis):
                form = _Form.found(context, product, source, axis, before, after)
                if form is not None:
                    return form.filter()
        made = context.evidence.calls.get(source)
        if made is None or made.op not in VIEWS or len(source.users) != 1:
            return None
        before.insert(0, source)
        source = made.node.all_input_nodes[0]
    return None


def _product_before(context: Context, after: Sequence[Node]) -> Product | None:
    source = data_of(context, after[0])
    made = context.evidence.calls.get(source) if source is not None else None
    if made is None or len(made.node.users) != 1:
        return None
    return product_of(context, made)


@dataclass(frozen=True, eq=False)
class _Form:
    """A product with everything around it, on the channels on ``axis`` of ``source``.

    Attributes:
        calls: all of them, the last one being the target.
        reads: (blocks, inputs), the channels that each block reads.
        gives: for each channel of the target block * outputs + output.
        added: constants with the factor and the position in each that every entry of a block's outputs gets.
    """

    context: Context
    product: Product
    source: Node
    axis: int
    calls: tuple[Node, ...]
    reads: Tensor
    gives: Tensor
    added: tuple[tuple[Node, float, Tensor], ...]

    @staticmethod
    def found(
        context: Context,
        product: Product,
        source: Node,
        axis: int,
        before: Sequence[Node],
        after: Sequence[Node],
    ) -> _Form | None:
        """The form; None where the views mix rows, or leave channels out."""
        if product.notation.parts is None:
            return None
        rows, blocks, inputs, outputs = product.notation.parts
        sizes = dict(zip(product.notation.weight, context.shape(product.weight), strict=True))
        sizes |= dict(zip(product.notation.data, context.shape(product.data), strict=True))
        channels, count = context.shape(source)[axis], math.prod(sizes[a] for a in blocks + outputs)
        at = move(context, before, source, positions(context, source, axis))
        order = [product.notation.data.index(a) for a in rows + blocks + inputs]
        found = rows_of(at.permute(order).reshape(math.prod(sizes[a] for a in rows), -1), channels)
        if found is None or sorted(found[1].tolist()) != list(range(channels)):
            return None
        letters = rows + blocks + outputs
        given = (found[0].unsqueeze(1) * count + torch.arange(count)).reshape([sizes[a] for a in letters])
        given = given.permute([letters.index(a) for a in product.notation.result])
        followed = _followed(context, product, after, given, count)
        if followed is None:
            return None
        table = followed[0].movedim(axis, -1).reshape(-1, count)
        gives = rows_of(table, count)
        if gives is None or not torch.equal(gives[0], torch.arange(len(table))):
            return None
        reads = found[1].reshape(-1, math.prod(sizes[a] for a in inputs))
        calls = (*before, product.node, *after)
        return _Form(context, product, source, axis, calls, reads, gives[1], followed[1])

    def filter(self) -> Filter:
        """As a step: grouped where the blocks lie one after the other, dense where they do not."""
        shape = self.context.shape(self.source)
        (blocks, into), channels = self.reads.shape, shape[self.axis]
        out = len(self.gives) // blocks
        of = self.gives.reshape(blocks, out) // out  # for each run of outputs the block they are of
        lows = self.reads[of[:, 0]].min(1).values
        in_row = bool((of == of[:, :1]).all()) and torch.equal(lows, torch.arange(blocks) * into)
        in_row = in_row and int(self.reads.max(1).values.sub(self.reads.min(1).values).max()) == into - 1
        spatial = len(shape) - self.axis - 1
        geometry = Geometry.channelwise(
            channels, len(self.gives), blocks if in_row else 1, spatial, bias=bool(self.added)
        )
        return Filter(
            self.source, self.axis, geometry, lambda: self._numbers(geometry), self._words(), self.calls[:-1]
        )

    def _words(self) -> str:
        op = self.context.evidence.calls[self.product.node].op
        return f"{op} of {len(self.reads)} blocks" if len(self.reads) > 1 else op

    def _numbers(self, geometry: Geometry) -> Affine:
        parts = self.product.notation.parts
        assert parts is not None
        _, blocks, inputs, outputs = parts
        letters = self.product.notation.weight
        weight = self.context.tensor(self.product.weight)
        weight = weight.permute([letters.index(a) for a in blocks + outputs + inputs])
        weight = weight.reshape(-1, self.reads.shape[1])[self.gives]
        out = len(self.gives) // len(self.reads)
        columns = self.reads[self.gives // out]
        if geometry.groups > 1:
            columns = columns % self.reads.shape[1]
        into = geometry.in_channels // geometry.groups
        placed = weight.new_zeros(len(self.gives), into).scatter(1, columns, weight)
        bias = None
        if self.added:
            terms = [self.context.tensor(n).flatten()[where] * alpha for n, alpha, where in self.added]
            bias = torch.stack(terms).sum(0)[self.gives]
        return Affine(geometry, placed.reshape(*placed.shape, *(1,) * geometry.spatial), bias)


def _followed(
    context: Context, product: Product, after: Sequence[Node], given: Tensor, count: int
) -> tuple[Tensor, tuple[tuple[Node, float, Tensor], ...]] | None:
    """Where the views after a product put its ``count`` outputs, and the constants added on the way."""
    added = []
    for node in (product.node, *after):
        call = context.evidence.calls[node]
        term, factor = (product.bias, 1.0) if node is product.node else (None, 1.0)
        if call.op == "add":
            # A constant on the left would have alpha on the data.
            if not isinstance(call.args["other"], Node) or not context.constant(call.args["other"]):
                return None
            term, factor = call.args["other"], float(call.args["alpha"])
        elif node is not product.node:
            given = move(context, [node], node.all_input_nodes[0], given)
        if term is not None:
            if (where := _same_in_all_rows(context, term, given, count)) is None:
                return None
            added.append((term, factor, where))
    return given, tuple(added)


def _same_in_all_rows(context: Context, term: Node, given: Tensor, count: int) -> Tensor | None:
    """Which entry of a constant each of ``count`` outputs gets; None where that differs between rows."""
    shape = context.shape(term)
    if len(shape) > given.dim() or any(
        n not in (1, m) for n, m in zip(reversed(shape), reversed(given.shape), strict=False)
    ):
        return None
    entry = torch.arange(math.prod(shape)).reshape(shape).expand(given.shape)
    where = torch.zeros(count, dtype=torch.int64)
    where[(given % count).flatten()] = entry.flatten()
    return where if torch.equal(where[given % count], entry) else None
