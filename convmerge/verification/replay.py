"""Running one site in float64: as the evidence has it, as merged, and on absolute values."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.node import Node

from convmerge.affine import Affine
from convmerge.borders.classes import Bordered
from convmerge.emit.sized import Sized
from convmerge.evidence.capture import Evidence
from convmerge.evidence.constants import Constants, run_call
from convmerge.plan import Site
from convmerge.plan.bordered import border_canvases
from convmerge.recognise import BorderFill, Filter, Passage, Resized, Same, Scalar
from convmerge.regions.elements import Block, Element, Leaf, Share, Via, calls_of, leaves
from convmerge.regions.fold import Place, geometry_of, numbers_of, place_of, size_multiple

# Operators that export writes the example's sizes into.
RESHAPES = frozenset(
    ["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"]
)


class Replay:
    """The two sides of one site, as functions of a float64 tensor of the site's source.

    ``original`` runs the calls of the evidence graph themselves, not the forms recognised in them, so that a
    wrong recogniser shows. Calls with sizes written into them run at the example's shape only.
    """

    def __init__(self, site: Site, evidence: Evidence, constants: Constants) -> None:
        self._site = site
        self._evidence = evidence
        self._constants = constants
        self._calls = sorted(calls_of(site.elements), key=lambda node: evidence.calls[node].index)
        self._absolute: dict[int, tuple[Affine, int]] = {}  # by leaf: its form on absolute values, its axis

    def original(self, x: Tensor) -> Tensor:
        """The calls as they were captured."""
        return self._walk(self._site.elements, x.clone())

    def merged(self, layer: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        """The site with ``layer`` at home and nothing in place of the other merged parts."""
        gone = {id(e) for run in self._site.emptied for e in run.elements}
        home = {id(e) for e in self._site.home.elements}

        def run(x: Tensor) -> Tensor:
            value, done = x, False
            for element in self._site.elements:
                if id(element) in home:
                    given = self._given(value) if isinstance(self._site.emission, Sized) else ()
                    value, done = (value if done else layer(value, *given)), True
                elif id(element) not in gone and not isinstance(element, Via | Share):
                    value = self._walk([element], value)
            return value

        return run

    def magnitude(self, x: Tensor) -> Tensor:
        """The sum of the absolute values of everything that is added up, for rounding bounds."""
        return self._magnitudes(self._site.elements, x)

    def terms(self) -> int:
        """How many products one output element accumulates, summed over the stages."""
        total = 0
        for element in self._site.elements:
            for leaf in leaves([element]):
                if isinstance(leaf.step, Passage | Same):
                    continue
                place = place_of(self._evidence, [leaf])
                g = geometry_of(leaf, place) if place is not None else None
                total += 1 if g is None else g.in_channels // g.groups * math.prod(g.kernel) + 1
        return total

    def shapes(self) -> list[tuple[int, ...]]:
        """Small canvases where every tap meets input, odd, even and multiples of the stride; the example's if
        sizes are fixed.
        """
        g, place = self._site.geometry, self._site.place
        steps = [leaf.step for leaf in leaves(self._site.elements)]
        fixed = any(isinstance(step, BorderFill) and not step.any_size for step in steps)
        if fixed or any(self._evidence.calls[node].op in RESHAPES for node in self._calls):
            return [place.shape]
        lead = tuple(min(n, 1 if place.size else 2) for n in place.shape[: place.axis])
        if isinstance(self._site.emission, Bordered):
            canvases = border_canvases(self._site.emission, size_multiple(self._site.elements))
            return [(*lead, place.channels, *size) for size in canvases]
        if isinstance(self._site.emission, Sized):
            sizes = itertools.product((1, 2, 4, 7), repeat=g.spatial)
            return [(*lead, place.channels, *size) for size in sizes]
        if len(place.size) != g.spatial:
            return [(*lead, *place.shape[place.axis :])]
        least = self._reflected() + 1
        dims = zip(g.kernel, g.dilation, g.lo, g.hi, g.up, strict=True)
        need = [max(_canvas(*dim), least) for dim in dims]
        small = [
            tuple(n + i % 2 for i, n in enumerate(need)),
            tuple(n + 2 - i % 2 for i, n in enumerate(need)),
            tuple(n + -n % d for n, d in zip(need, g.down, strict=True)),
        ]
        return [(*lead, place.channels, *size) for size in dict.fromkeys(small)]

    def _reflected(self) -> int:
        """How far padding other than by zeros reaches into the map."""
        pads = [self._evidence.calls[node] for node in self._calls if self._evidence.calls[node].op == "pad"]
        return max((abs(int(n)) for call in pads for n in call.args["pad"]), default=0)

    def _walk(self, elements: Sequence[Element], x: Tensor) -> Tensor:
        """Elements in a row, by the calls that they stand for."""
        for element in elements:
            x = self._response(element, x)
        return x

    def _response(self, element: Element, x: Tensor) -> Tensor:
        if isinstance(element, Block) and element.partial:
            branches = [self._walk(branch, x) for branch in element.branches]
            return torch.stack(branches).sum(0) if element.axis is None else torch.cat(branches, element.axis)
        if isinstance(element, Share):
            return self._share(element, x)
        if isinstance(element, Leaf) and element.implied:
            return x * element.step.factor if isinstance(element.step, Scalar) else x
        if isinstance(element, Leaf) and isinstance(element.step, Resized):
            return self._resized(element, x)
        calls = sorted(calls_of([element]), key=lambda node: self._evidence.calls[node].index)
        return self._run(calls, {element.source: x})[element.target]

    def _resized(self, leaf: Leaf, x: Tensor) -> Tensor:
        """Upsampling to a given size with another size than the example's."""
        y: Tensor = leaf.node.target(x, self._given(x), None)  # type: ignore[operator]
        return y

    def _given(self, x: Tensor) -> list[int]:
        """A size to upsample x to: with odd ones, where these are possible, for some sizes of x."""
        first = self._site.elements[0]
        assert isinstance(first, Leaf) and isinstance(first.step, Resized)
        up = first.step.geometry.up
        sizes = enumerate(zip(x.shape[-len(up) :], up, strict=True))
        return [n * u - (first.step.short and (n // 2 + dim) % 2) for dim, (n, u) in sizes]

    def _share(self, share: Share, x: Tensor) -> Tensor:
        """What the operator makes of this term where the others are zero."""
        x = self._among_zeros(share, x)
        y = self._walk([share.of], x)
        return y if share.constant == 1 else y + (share.constant - 1) * self._at_zero(share, x)

    def _at_zero(self, share: Share, x: Tensor) -> Tensor:
        return self._walk([share.of], torch.zeros_like(x))

    def _among_zeros(self, share: Share, x: Tensor) -> Tensor:
        """The term's channels where they are in the operator's input."""
        if share.start is None:
            return x
        assert isinstance(share.step, Filter)
        axis = share.step.axis
        after = self._evidence.size(share.source)[axis] - share.start - x.shape[axis]
        return F.pad(x, [0, 0] * (x.dim() - axis - 1) + [share.start, after])

    def _run(self, calls: Sequence[Node], values: dict[Node, Tensor]) -> dict[Node, Tensor]:
        constants = self._constants

        def look_up(node: Node) -> Any:
            return values[node] if node in values else constants.value(node)

        def in_shape(node: Node, reader: Node) -> Any:
            if not constants.uniform(node):
                return look_up(node)
            other = next(look_up(n) for n in reader.all_input_nodes if n is not node)
            return torch.ones_like(other) * constants.value(node)

        for node in calls:
            values[node] = run_call(node, lambda n: in_shape(n, node), widened=constants.widened)  # noqa: B023
        return values

    def _magnitudes(self, elements: Sequence[Element], x: Tensor) -> Tensor:
        for element in elements:
            x = self._magnitude_of(element, x)
        return x

    def _magnitude_of(self, element: Element, x: Tensor) -> Tensor:
        if isinstance(element, Block):
            branches = [self._magnitudes(branch, x) for branch in element.branches]
            if element.axis is not None:
                return torch.cat(branches, element.axis)
            return functools.reduce(torch.add, branches)  # on small maps some may broadcast
        if isinstance(element.step, Same):
            return x
        if isinstance(element.step, Resized):
            return self._resized(element, x)
        if isinstance(element.step, Passage):
            y = self._run([element.node], {element.source: x})[element.node].abs()
            if "bicubic" not in self._evidence.calls[element.node].op:
                return y
            # Some weights are negative; with those of a point, the sum of the absolute ones is below two.
            return torch.full_like(y, 2 * float(x.max()))
        if id(element) not in self._absolute:
            place = place_of(self._evidence, [element]) or Place(self._site.place.axis, tuple(x.shape))
            self._absolute[id(element)] = absolute(numbers_of(element, place)), place.axis
        form, axis = self._absolute[id(element)]
        y = apply_at(form, x, axis)
        if isinstance(element, Share):  # its response to zeros is added and subtracted again
            y = y + self._at_zero(element, self._among_zeros(element, x)).abs()
        # A linear layer on a flattened map leaves the axes of the one position that the form has.
        return y.flatten(1) if y.dim() > len(self._evidence.size(element.target)) else y


def _canvas(kernel: int, dilation: int, lo: int, hi: int, up: int) -> int:
    """The smallest size, from 2 on, at which the first and the last tap meet input, padding considered."""
    reach = dilation * (kernel - 1)
    return max(2, -(-(reach - max(0, min(lo, hi))) // up) + 1)


def absolute(form: Affine) -> Affine:
    """The form with absolute weights and biases."""
    bias = None if form.bias is None else form.bias.abs()
    return Affine(form.geometry, form.weight.abs(), bias, None if form.ones is None else form.ones.abs())


def apply_at(form: Affine, x: Tensor, axis: int) -> Tensor:
    """A form on a tensor with its channels on ``axis``, whatever stands before it."""
    lead, rest = x.shape[:axis], x.shape[axis:]
    y = form(x.reshape(-1, *rest))
    return y.reshape(*lead, *y.shape[1:])
