"""Merged kernels in the traced code of the module that the operators have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Node

from convmerge.affine import Affine
from convmerge.edit.cuts import cut
from convmerge.edit.frames import Frames, innermost_common
from convmerge.edit.lower import check_hooks
from convmerge.edit.retrace import Trace
from convmerge.edit.rewrite import replace_part
from convmerge.emit.build import round_once
from convmerge.errors import Refusal
from convmerge.evidence.capture import Frame
from convmerge.passes.generator.choice import Fold
from convmerge.passes.generator.kernels import Selection, relayouts
from convmerge.passes.generator.numbers import Rows
from convmerge.regions.elements import Chain, calls_of

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_APPLY = (F.conv1d, F.conv2d, F.conv3d, F.linear, torch.conv1d, torch.conv2d, torch.conv3d)


@dataclass(frozen=True)
class Opening:
    """The module whose code changes, and the paths inside it whose code is traced with it."""

    owner: Frame
    opened: frozenset[str]


def opening(frames: Frames, fold: Fold, model: nn.Module) -> Opening:
    """Where a fold is written. Raises Refusal where that place has hooks or is called more than once."""
    inner = [fold.layer.node]
    taken = calls_of((*fold.before, *fold.after))
    if fold.generator is not None:
        taken.append(fold.generator.node)
        for value in (fold.layer.weight, fold.layer.bias):
            inner += value.calls if isinstance(value, Selection) else ()
    owner = innermost_common(frames, [*inner, *taken])
    if len(frames.by_path[owner.path]) > 1:
        raise Refusal(f"{owner.path} is called {len(frames.by_path[owner.path])} times")
    opened: set[str] = set()
    for node in (*inner, *taken):
        stack = frames.call(node).stack
        for frame in stack[stack.index(owner) :]:
            check_hooks(model.get_submodule(frame.path), frame.path)
            if frame != owner and (node in inner or not frames.data[frame] <= set(taken)):
                opened.add(frame.path)
    return Opening(owner, frozenset(opened))


class Writer:
    """Writes folds into a copy of a module's trace.

    Args:
        owner: the module, which gets the new layers and parameters.
        trace: of its code; ``positions``: of the calls in it.
        like: a parameter whose dtype, device and requires_grad the new ones take.
    """

    def __init__(self, owner: nn.Module, trace: Trace, positions: dict[Node, int]) -> None:
        self._owner = owner
        self._trace = trace
        self._positions = positions
        self._copies: dict[Node, Node] = {}
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(trace.graph, self._copies))

    def write(
        self, fold: Fold, rows: Rows | None, forms: tuple[Affine | None, Affine | None], like: Tensor
    ) -> None:
        """Put a merged kernel in place of the layer and of what is folded into it.

        Args:
            rows: kernel and bias for the generator's new last layer; None: they are composed in every call.
            forms: those of what is before and after the layer.
            like: gives new parameters their dtype, device and requires_grad.

        Raises Refusal where the code does not show the operators one by one.
        """
        old = self._copies[self._trace.made_by[self._positions[fold.layer.node]]]
        if old.op != "call_function" or old.target not in _APPLY:
            raise Refusal("the code applies the kernel in a way of its own")
        for elements in (fold.before, fold.after):
            self._empty(elements)
        given = dict(zip(_ARGUMENTS, old.args, strict=False)) | dict(old.kwargs)
        new = _Parameters(self._owner, self.graph, like)
        with self.graph.inserting_before(old):
            if relayouts(fold.before):  # the samples stand side by side as channels
                given["input"] = self._call("unsqueeze", self._call("flatten", given["input"], 0, 1), 0)
            if rows is not None:
                given["weight"], given["bias"] = self._generated(fold, rows, new)
            else:
                given["weight"], given["bias"] = self._composed(given, forms, new)
            result = self.graph.call_function(old.target, (given.pop("input"),), given)
            if relayouts(fold.after):
                flat = self._call("flatten", result, 0, 1)
                result = self._call("unflatten", flat, 0, (-1, fold.geometry.out_channels))
        old.replace_all_uses_with(result)
        self._erase(old)

    def module(self) -> fx.GraphModule:
        """The owner with all folds written."""
        self.graph.lint()
        made = fx.GraphModule(self._owner, self.graph, class_name=type(self._owner).__name__)
        made.graph._tracer_cls = made._tracer_cls = fx.Tracer
        return made

    def _empty(self, elements: Chain) -> None:
        """Take elements out, and the layouts of the maps between them."""
        layouts = relayouts(elements)
        stretches: list[list[int]] = [[]]
        for node in calls_of(elements):
            if node in layouts:
                stretches.append([])
            else:
                stretches[-1].append(self._positions[node])
        for positions in filter(None, stretches):
            replace_part(self.graph, cut(self._trace, sorted(positions)), self._copies, None)
        for node in layouts:
            layout = self._copies[self._trace.made_by[self._positions[node]]]
            source = layout.args[0]
            if layout.op not in ("call_method", "call_function") or not isinstance(source, Node):
                raise Refusal("the code lays out the maps in a way of its own")
            layout.replace_all_uses_with(source)
            self._erase(layout)

    def _call(self, method: str, value: Any, *args: Any) -> Node:
        return self.graph.call_method(method, (value, *args))

    def _generated(self, fold: Fold, rows: Rows, new: _Parameters) -> tuple[Node, Node | None]:
        """A linear layer that gives the kernel's numbers, then those of a computed bias.

        Code that selects numbers may select those of the first sample, whatever the batch.
        """
        assert fold.generator is not None
        per_sample = bool(relayouts((*fold.before, *fold.after)))
        apart = rows.constant_bias and not per_sample
        flat = rows.kernel.reshape(-1, rows.kernel.shape[-1])
        whole = flat if rows.bias is None or apart else torch.cat([flat, rows.bias])
        last = cut(self._trace, [self._positions[fold.generator.node]])
        made = self.graph.call_module(new.linear(whole), (self._copies[last.source],))
        first = not per_sample and fold.layer.weight.selects
        made = self._call("flatten", made) if first else made
        shape = (-1, *rows.kernel.shape[1:-1])
        kernel = (
            made if len(whole) == len(flat) and not first else self._call("narrow", made, -1, 0, len(flat))
        )
        kernel = self._call("reshape", kernel, *shape)
        if rows.bias is None or apart:
            return kernel, None if rows.bias is None else new.get(rows.bias[:, -1])
        bias = self._call("narrow", made, -1, len(flat), len(rows.bias))
        return kernel, self._call("reshape", bias, -1)

    def _composed(
        self, given: dict[str, Any], forms: tuple[Affine | None, Affine | None], new: _Parameters
    ) -> tuple[Node, Node | None]:
        """Products of the kernel with the constant matrices before and after it, in every call."""
        kernel, bias = given["weight"], given.get("bias")
        before, after = forms
        call = self.graph.call_function
        if before is not None:
            if before.bias is not None:
                taps = (
                    self._call("sum", self._call("flatten", kernel, 2), 2)
                    if before.weight.dim() > 2
                    else kernel
                )
                moved = call(torch.matmul, (taps, new.get(before.bias)))
                bias = moved if bias is None else call(torch.add, (bias, moved))
            kernel = self._times(kernel, before, 1, new)
        if after is not None:
            kernel = self._times(kernel, after, 0, new)
            shift = None if after.bias is None else new.get(after.bias)
            matrix = (
                torch.diag(after.weight.flatten()) if after.geometry.diagonal else after.weight.flatten(1)
            )
            bias = shift if bias is None else call(F.linear, (bias, new.get(matrix), shift))
        return kernel, bias

    def _times(self, kernel: Node, form: Affine, axis: int, new: _Parameters) -> Node:
        """The kernel times a form's matrix on its input axis (1) or its output axis (0)."""
        if form.geometry.diagonal:
            shape = [1] * form.weight.dim()
            shape[axis] = -1
            return self.graph.call_function(torch.mul, (kernel, new.get(form.weight.reshape(shape))))
        matrix = form.weight.flatten(1)
        last = self._call("transpose", kernel, axis, -1)
        product = self.graph.call_function(F.linear, (last, new.get(matrix if axis == 0 else matrix.t())))
        return self._call("transpose", product, axis, -1)

    def _erase(self, node: Node) -> None:
        """A node that nobody reads any more, and what it alone has read."""
        pending, erased = [node], set[Node]()
        while pending:
            current = pending.pop()
            if not current.users and current.op != "placeholder" and current not in erased:
                pending += current.all_input_nodes
                self.graph.erase_node(current)
                erased.add(current)


class _Parameters:
    """New parameters of a module, each rounded once."""

    def __init__(self, owner: nn.Module, graph: fx.Graph, like: Tensor) -> None:
        self._owner = owner
        self._graph = graph
        self._like = like

    def get(self, numbers: Tensor) -> Node:
        """A parameter with these numbers, read in the graph."""
        name = self._free()
        self._owner.register_parameter(name, self._parameter(numbers))
        return self._graph.get_attr(name)

    def linear(self, rows: Tensor) -> str:
        """The name of a linear layer of these rows, the last column being the bias."""
        layer = nn.Linear(rows.shape[1] - 1, len(rows), device="meta")
        layer.weight, layer.bias = self._parameter(rows[:, :-1]), self._parameter(rows[:, -1])
        name = self._free()
        setattr(self._owner, name, layer.eval())
        return name

    def _parameter(self, numbers: Tensor) -> nn.Parameter:
        values = round_once(numbers.contiguous(), self._like.dtype).to(self._like.device)
        return nn.Parameter(values, requires_grad=self._like.requires_grad)

    def _free(self) -> str:
        return next(name for i in range(10**6) if not hasattr(self._owner, name := f"kernel_{i}"))
